"""Tiny causal language models with a tokenizer, compressed so that their layers differ or are alike."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.export.formats.uniform import compressed
from tests.spaces import build_space

VOCABULARY = 288
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": None,
}
ROPE = {"rope_theta": 10000.0, "rope_type": "default"}


def model(kind: str, **changes: Any) -> PreTrainedModel:
    """A model of a class such as `Llama`, with biases and norms that are not trivial."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind.removesuffix('ForCausalLM')}Config", None)
    if kind == "Gemma3":
        config = transformers.Gemma3TextConfig
    made = getattr(transformers, f"{kind}ForCausalLM")(config(**{**SIZES, **changes}))
    with torch.no_grad():
        for parameter in made.parameters():
            # Large enough for probabilities that differ, or any file would pass.
            scale = 0.1 if parameter.dim() == 1 else 0.15
            parameter.add_(scale * torch.randn_like(parameter))
    return made.eval()


def batch() -> dict[str, Tensor]:
    return {"input_ids": torch.arange(40, 56)[None] * 5 % 256}


def cut(dense: PreTrainedModel, alike: bool, bits: tuple[int, ...] = (4, 3, 8, 2, 6, 5, 7)) -> PreTrainedModel:
    """The compressed model: half of all heads and channels removed, or another number in every layer."""
    space = build_space(dense, batch())
    removal = {}
    for kind in ("heads", "channels"):
        for place, family in enumerate(family for family in space.prunable if family.kind == kind):
            # Other layers keep all heads, and two thirds of all channels.
            kept = family.size // 2 if alike or place % 2 else max(family.size * 2 // 3, 2)
            removal[family.name] = torch.arange(family.size) >= kept
    return compressed(dense, batch(), space, removal, bits)


def byte_level(**options: Any) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the kind of GPT-2, with two merges and two special tokens."""
    words = {letter: place for place, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    words |= {"<s>": 256, "</s>": 257, "th": 258, "the": 259}
    made = Tokenizer(models.BPE(vocab=words, merges=[("t", "h"), ("th", "e")], **options))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def characters() -> PreTrainedTokenizerFast:
    """BPE on characters with bytes as a fallback, of the kind of Llama, which starts every text with `<s>`."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    words |= {letter: 259 + place for place, letter in enumerate("▁etahonis")} | {"he": 268, "▁t": 269, "▁the": 270}
    made = Tokenizer(
        models.BPE(
            vocab=words,
            merges=[("▁", "t"), ("h", "e"), ("▁t", "he")],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@torch.no_grad()
def sliced(dense: PreTrainedModel, layers: tuple[int, ...] = (0, 1)) -> PreTrainedModel:
    """The model with half of the heads and of the channels of some layers, in place, and without a proof of it."""

    def slice_weight(layer: torch.nn.Linear, dim: int) -> None:
        half = layer.weight.shape[dim] // 2
        layer.weight = torch.nn.Parameter(layer.weight.narrow(dim, 0, half).contiguous())
        if dim == 0 and layer.bias is not None:
            layer.bias = torch.nn.Parameter(layer.bias[:half].contiguous())

    for number in layers:
        layer = dense.model.layers[number]
        for name, module in layer.named_modules():
            leaf = name.split(".")[-1]
            if leaf in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "fc1"):
                slice_weight(module, 0)
            if leaf in ("o_proj", "dense", "down_proj", "fc2"):
                slice_weight(module, 1)
    return dense
