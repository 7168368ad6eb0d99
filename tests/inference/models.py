"""Small compressed models, and how their outputs are compared."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, T5Config
from transformers import T5ForConditionalGeneration as T5

from geta_hf.export.export import compress
from geta_hf.qadg import zero_groups
from geta_hf.quantization import attach_input_quantizers, step_size
from tests.export.tiny_encoders import some_batch, tiny_model, train_by_hand
from tests.spaces import build_space

Batch = Mapping[str, Tensor]


@torch.no_grad()
def compressed(model: PreTrainedModel, batch: Batch, inputs: int = 0, per_channel: bool = False) -> PreTrainedModel:
    """A cut and packed copy, weights of 2 to 16 bits; where `inputs` is given all inputs are rounded to that width."""
    space = build_space(model, batch)
    train_by_hand(model, space, per_channel=per_channel)
    if inputs:
        for layer in attach_input_quantizers(model, [dict(batch)], learn_t=True).values():
            layer.input_quantizer.t.fill_(1.2)
            layer.input_quantizer.d.copy_(step_size(inputs, layer.input_quantizer.q_m, layer.input_quantizer.t))
    removed = {family.name: zero_groups(model, space)[family.name] for family in space.prunable}
    return compress(model, space, removed, batch).eval()


@cache
def _bert(inputs: int, per_channel: bool) -> PreTrainedModel:
    return compressed(tiny_model(hidden=64), some_batch(), inputs, per_channel)


def bert(inputs: int = 0, per_channel: bool = False) -> PreTrainedModel:
    return copy.deepcopy(_bert(inputs, per_channel))


@torch.no_grad()
def outputs(model: PreTrainedModel, batch: Batch | None = None) -> Tensor:
    found = model(**(some_batch() if batch is None else batch))
    return torch.cat([found[name].flatten() for name in ("logits", "start_logits", "end_logits") if name in found])


@torch.no_grad()
def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def gpt2() -> tuple[PreTrainedModel, Batch]:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=60, n_embd=64, n_layer=2, n_head=4, n_positions=40, bos_token_id=1, eos_token_id=2)
    model, batch = GPT2LMHeadModel(config).eval(), some_batch()
    return compressed(model, batch), batch


def t5() -> tuple[PreTrainedModel, Batch]:
    torch.manual_seed(0)
    config = T5Config(vocab_size=60, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, decoder_start_token_id=0)
    batch = {**some_batch(), "decoder_input_ids": some_batch()["input_ids"][:, :5]}
    return compressed(T5(config).eval(), batch), batch
