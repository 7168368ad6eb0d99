"""What the tiny configurations share: sizes by kind of model, and the form of an entry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

VOCABULARY, WIDTH, LAYERS, HEADS, KV_HEADS, CHANNELS = 99, 32, 2, 4, 2, 48

Settings = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """One tiny model.

    Attributes:
        model: class name in transformers.
        settings: keyword arguments of its configuration class.
        inputs: makes the batch where `example_batch` cannot.
        length: tokens per row, where an architecture needs more than 8.
        labels: makes what training passes in addition, where the forward asks for it.
    """

    model: str
    settings: Settings
    inputs: Callable[[], dict[str, Tensor]] | None = None
    length: int = 8
    labels: Callable[[], dict[str, Tensor]] | None = None


SIZES: Settings = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": CHANNELS,
}
ENCODER: Settings = SIZES | {"vocab_size": VOCABULARY, "max_position_embeddings": 64}
DECODER: Settings = ENCODER | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GQA: Settings = DECODER | {"num_key_value_heads": KV_HEADS}
HEAD_DIM: Settings = GQA | {"head_dim": 8}
EXPERTS: Settings = GQA | {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
GPT: Settings = {
    "vocab_size": VOCABULARY,
    "n_embd": WIDTH,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOWERS: Settings = {
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": CHANNELS,
    "decoder_ffn_dim": CHANNELS,
}
BART: Settings = TOWERS | {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
T5: Settings = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "d_kv": 8,
    "d_ff": CHANNELS,
    "num_layers": LAYERS,
    "num_heads": HEADS,
    "decoder_start_token_id": 0,
}
VIT: Settings = SIZES | {"image_size": 32, "patch_size": 8}
CLIP_VISION: Settings = VIT | {"model_type": "clip_vision_model", "projection_dim": 16}
SWIN: Settings = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}
STAGES: Settings = {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]}
ATTENDING_STAGES: Settings = STAGES | {"num_attention_heads": [1, 2, 2, 4]}
SPEECH: Settings = SIZES | {
    "vocab_size": VOCABULARY,
    "conv_dim": [16, 16],
    "conv_stride": [5, 4],
    "conv_kernel": [10, 3],
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "apply_spec_augment": False,
}


def noise(*shape: int) -> Tensor:
    """The same normal noise at every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def tokens(*shape: int, start: int = 3, end: int = 90) -> Tensor:
    """The same ordinary token ids at every call."""
    return torch.randint(start, end, shape, generator=torch.Generator().manual_seed(0))
