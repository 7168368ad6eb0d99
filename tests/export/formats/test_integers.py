from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, ViTConfig, ViTForImageClassification

from geta_hf.export.export import compress
from geta_hf.export.formats.integers import Style, plain_copy, store_integers
from geta_hf.qadg import zero_groups
from geta_hf.quantization import attach_input_quantizers, step_size
from geta_hf.quantization.blocks import split_blocks
from geta_hf.serialization.embeddings import rounded_embedding
from geta_hf.serialization.encode import layer_codes
from geta_hf.serialization.packed_layers import packed_layers
from tests.export.tiny_encoders import some_batch, tiny_model, train_by_hand
from tests.spaces import build_space


@torch.no_grad()
def compressed(
    model: PreTrainedModel, batch: dict[str, Tensor], learn_t: bool | None = None, **kwargs: Any
) -> PreTrainedModel:
    """A model as `export` makes it; with `learn_t` given, its layers round their inputs."""
    space = build_space(model, batch)
    train_by_hand(model, space, **kwargs)
    if learn_t is not None:
        for place, layer in enumerate(attach_input_quantizers(model, [batch], learn_t=learn_t).values()):
            quantizer = layer.input_quantizer
            quantizer.t.fill_(1.2 if learn_t else 1.0)
            quantizer.d.copy_(step_size(4 + place % 8, quantizer.q_m, quantizer.t))
    return compress(model, space, zero_groups(model, space), batch).eval()


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=60, n_positions=40, n_embd=32, n_layer=2, n_head=4))


def vit() -> tuple[PreTrainedModel, dict[str, Tensor]]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    pictures = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, **sizes)), {"pixel_values": pictures}


def run(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        outputs = model(**batch)
    return torch.cat([outputs[name].flatten() for name in ("logits", "start_logits", "end_logits") if name in outputs])


@pytest.mark.parametrize("style", ["operators", "arithmetic", "float"])
@pytest.mark.parametrize(
    "case", ["bert", "channels", "rounded", "exponents", "conv1d", "conv2d", "blocks", "conv1d blocks"]
)
def test_integers_give_what_the_decoded_weights_give(case: str, style: Style) -> None:
    model, batch = tiny_model(), some_batch()
    if case.startswith("conv1d"):
        model = gpt2()
    elif case == "conv2d":
        model, batch = vit()
    learn_t = {"rounded": False, "exponents": True}.get(case)
    blocks = "blocks" in case
    per_channel = case in ("channels", "conv1d", "conv2d")
    small = compressed(model, batch, learn_t, per_channel=per_channel, grid="block32" if blocks else None)
    copied = plain_copy(small)
    store_integers(copied, style)
    assert (run(copied, batch) - run(small, batch)).abs().max() <= 1e-5
    stored = {name: layer.integers for name, layer in packed_layers(copied).items() if hasattr(layer, "integers")}
    narrow = {name: layer for name, layer in packed_layers(small).items() if layer.bits <= 8}
    assert stored.keys() == (set() if style == "float" else narrow.keys())
    for name, codes in stored.items():
        expected = layer_codes(name, narrow[name])
        if blocks:
            rows = expected.t() if case == "conv1d blocks" else expected
            assert torch.equal(codes.int(), split_blocks(rows))
            continue
        expected = expected.t() if isinstance(narrow[name], torch.nn.Linear) else expected
        assert codes.dtype == torch.int8 and torch.equal(codes.int(), expected)


def test_the_model_is_left_as_it_was() -> None:
    small = compressed(tiny_model(), some_batch())
    before, config = copy.deepcopy(small.state_dict()), small.config.to_dict()
    copied = plain_copy(small)
    store_integers(copied, "operators")
    assert all(torch.equal(tensor, before[name]) for name, tensor in small.state_dict().items())
    assert small.config.to_dict() == config and "quantization_config" in config
    assert "quantization_config" not in copied.config.to_dict()


def test_half_precision_becomes_the_exact_weights() -> None:
    small = compressed(tiny_model().to(torch.bfloat16), some_batch())
    copied = plain_copy(small)
    assert {tensor.dtype for tensor in copied.parameters()} == {torch.float32}
    for name, layer in packed_layers(small).items():
        weight = copied.get_parameter(f"{name}.weight")
        assert torch.equal(weight, layer_codes("layer", layer).float() * layer.step_size)


def test_ties_hold_and_tied_codes_stay_float() -> None:
    model, batch = gpt2().to(torch.bfloat16), some_batch()
    space = build_space(model, batch)
    train_by_hand(model, space)
    with rounded_embedding(model, 8) as embedding:
        small = compress(model, space, zero_groups(model, space), batch, embedding)
    copied = plain_copy(small)
    store_integers(copied, "operators")
    assert copied.lm_head.weight is copied.transformer.wte.weight
    assert copied.lm_head.weight.dtype == torch.float32
