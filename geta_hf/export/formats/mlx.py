"""The MLX format: weights packed as mlx-lm reads them on Apple's chips, each module at its own bits and group size."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from geta_hf.errors import GETAError
from geta_hf.export.formats.layer_sizes import LayerSizes, sizes_of_llama
from geta_hf.export.formats.plain import LEFT_OUT
from geta_hf.serialization.encode import activation_bits, dense_weight, layer_codes
from geta_hf.serialization.packed_layers import PackedLayer, packed_layers

WIDTHS = (2, 3, 4, 5, 6, 8)
"""The bit widths that MLX has kernels for."""

_GROUPS = (128, 64, 32)
"""The group sizes that it has kernels for, the largest first."""

_CHANNELS = 256
"""Of this mlx-lm's model with layers that differ has a multiple of channels in each."""

_ROPE = ("default", "linear", "llama3", "dynamic")


@dataclass(frozen=True)
class _Class:
    """What mlx-lm does with a `model_type`.

    Attributes:
        head_dim: whether it reads `head_dim`, so that heads may be fewer.
    """

    head_dim: bool


_CLASSES = {
    "llama": _Class(head_dim=True),
    "mistral": _Class(head_dim=True),
    "qwen2": _Class(head_dim=False),
    "qwen3": _Class(head_dim=True),
}
_PER_LAYER = "nemotron-nas"


@dataclass(frozen=True)
class Packed:
    """A weight as MLX has it: scale * code + offset, for codes without a sign, in groups of inputs.

    Attributes:
        words: uint32, shape (rows, columns * bits / 32): codes as one stream of bits, the lowest first.
        scales, offsets: shape (rows, columns / group_size).
        bits: of each code.
        group_size: inputs that share a scale.
    """

    words: Tensor
    scales: Tensor
    offsets: Tensor
    bits: int
    group_size: int


def check_mlx(model: PreTrainedModel) -> None:
    """Raise GETAError for a model that mlx-lm would compute in another way; known before it is cut."""
    kind, config = type(model).__name__, model.config
    found = _CLASSES.get(config.model_type)
    if found is None or not kind.endswith("ForCausalLM"):
        raise GETAError(
            f"the mlx format has no name for a {kind}; known are causal language models of type "
            f"{', '.join(_CLASSES)}. Export in another format"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    share = rope.get("partial_rotary_factor") or 1.0
    if rope.get("rope_type", "default") not in _ROPE or share != 1.0:
        raise GETAError(
            f"{kind} has rotary positions of type {rope.get('rope_type')} over {share:g} of each head, and mlx-lm of "
            f"the types {', '.join(_ROPE)} over all of it; export in another format"
        )
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True) and window < config.max_position_embeddings:
        raise GETAError(
            f"mlx-lm attends to all earlier tokens, {kind} to the last {window}; set sliding_window to None if texts "
            f"are shorter, or export in another format"
        )
    if config.hidden_act not in ("silu", "swish"):
        raise GETAError(f"{kind} computes {config.hidden_act}, mlx-lm silu; export in another format")


def write_mlx(model: PreTrainedModel, folder: Path, batch: Mapping[str, Tensor]) -> None:
    """Write a compressed model for mlx-lm, which reads it without code of ours.

    Weights of at most 8 bits are packed at their own width (7 at 8), in groups of 128, 64 or 32 inputs, or of the 32
    that have a step size of their own. Rows that are no multiple of 32 long, and wider weights, are dense. Where layers
    have different numbers of channels, zeros fill them up: to a multiple of 256, in mlx-lm's class for such layers, as
    long as all heads remain; otherwise to the widest layer. Channels that are no multiple of 32 are filled up to one.
    Outputs are the same.

    Every tensor is decoded again and compared. Codes are exact; MLX computes scale * code + offset in the dtype of the
    model. mlx-lm itself is not run by this function.

    Args:
        model: compressed, or plain; left unchanged.
        folder: an existing empty folder.
        batch: not used, since nothing is run here.

    Raises:
        GETAError: an architecture that mlx-lm computes in another way, other heads in every layer, removed heads where
            it derives their width, rounded activations, or a file that holds something else.
    """
    check_mlx(model)
    if rounded := activation_bits(model):
        raise GETAError(
            f"the mlx format has no place for rounded activations, which {len(rounded)} layers have (the first is "
            f"{next(iter(rounded))}); export in the geta format, or train on float activations"
        )
    sizes = sizes_of_llama(model)
    config, channels = _config(model, sizes)
    packed: dict[str, dict[str, int]] = {}
    tensors: dict[str, Tensor] = {}
    for name, tensor, layer in _weights(model):
        shape = _padded(name, tuple(tensor.shape), channels)
        own = None if layer is None else _pack(*layer, shape, model.dtype)
        if own is None:
            tensors[name] = _fill(tensor, shape)
            continue
        path = name.removesuffix(".weight")
        packed[path] = {"group_size": own.group_size, "bits": own.bits}
        tensors |= {name: own.words, f"{path}.scales": own.scales, f"{path}.biases": own.offsets}
    if packed:
        # The first two are defaults, for modules that are not named.
        config["quantization"] = {"group_size": 64, "bits": 4, **packed}
        config["quantization_config"] = config["quantization"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "mlx"})
    errors = _prove(model, folder, packed, channels)
    notes = _notes(model, sizes, channels, packed)
    config["exported_as"] = {
        "format": "mlx",
        "load": "mlx_lm.load(folder)",
        "not_exact": {name: error for name, error in errors.items() if error},
        "ran": False,
        "notes": notes,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    model.generation_config.save_pretrained(folder)
    (folder / "README.md").write_text(_card(config, errors), encoding="utf-8")


# --- sizes --------------------------------------------------------------------------------------------------------


def _config(model: PreTrainedModel, sizes: LayerSizes) -> tuple[dict[str, Any], list[int]]:
    """Return config.json, and the channels of every layer once they are filled up.

    Raises:
        GETAError: heads that mlx-lm has no place for.
    """
    config = {key: value for key, value in model.config.to_dict().items() if key not in LEFT_OUT}
    kind, hidden = type(model).__name__, model.config.hidden_size
    if len(set(sizes.heads)) > 1 or len(set(sizes.kv_heads)) > 1:
        raise GETAError(
            f"layers kept {', '.join(map(str, sizes.heads[:6]))} heads, and mlx-lm has one number for all; train with "
            f"uniform=True in GETAConfig, or export in another format"
        )
    full = sizes.heads[0] * sizes.head_dim == hidden
    if not full and not _CLASSES[model.config.model_type].head_dim:
        raise GETAError(
            f"mlx-lm's {model.config.model_type} has no place for removed heads of {kind}; keep all heads "
            f"(keep=['heads'] in GETAConfig), or export in another format"
        )
    rope = dict(config.get("rope_parameters") or {})
    config |= {
        "dtype": str(model.dtype).removeprefix("torch."),
        "num_attention_heads": sizes.heads[0],
        "num_key_value_heads": sizes.kv_heads[0],
        "head_dim": sizes.head_dim,
        "rope_theta": rope.pop("rope_theta", 10000.0),  # which mlx-lm reads in this place
        "rope_scaling": rope if rope.get("rope_type", "default") != "default" else None,
    }
    if config.get("sliding_window"):
        config["sliding_window"] = None  # as wide as any text, as `check_mlx` has seen
    config.pop("layer_types", None)
    channels = list(sizes.channels)
    # Filled up to groups in any case, or the weights that read them could not be packed.
    widest = -(-max(channels) // _GROUPS[-1]) * _GROUPS[-1]
    if len(set(channels)) == 1:
        return config | {"intermediate_size": widest}, [widest] * len(channels)
    biased = any(name.endswith(".bias") for name, _ in model.named_parameters())
    if full and not biased and model.config.model_type in ("llama", "mistral"):
        channels = [-(-count // _CHANNELS) * _CHANNELS for count in channels]
        blocks = [_block(sizes, count, hidden) for count in channels]
        return config | {
            "model_type": _PER_LAYER,
            "intermediate_size": max(channels),
            "block_configs": blocks,
        }, channels
    return config | {"intermediate_size": widest}, [widest] * len(channels)


def _block(sizes: LayerSizes, channels: int, hidden: int) -> dict[str, Any]:
    # mlx-lm takes 2/3 of the multiple of the residual stream and rounds up to 256, so one half of these is below it.
    share = round(1.5 * (channels - _CHANNELS // 2) / hidden, 6)
    return {"attention": {"n_heads_in_group": sizes.heads[0] // sizes.kv_heads[0]}, "ffn": {"ffn_mult": share}}


_LAYER = re.compile(r"\.layers\.(\d+)\.mlp\.(gate_proj|up_proj|down_proj)\.")


def _padded(name: str, shape: tuple[int, ...], channels: list[int]) -> tuple[int, ...]:
    """Return the shape of a tensor once channels are filled up."""
    found = _LAYER.search(name)
    if found is None:
        return shape
    count = channels[int(found[1])]
    if found[2] == "down_proj":
        return (shape[0], count) if len(shape) == 2 else shape
    return (count, *shape[1:])


def _fill(tensor: Tensor, shape: tuple[int, ...], value: float = 0.0) -> Tensor:
    if tuple(tensor.shape) == shape:
        return tensor.contiguous()
    filled = torch.full(shape, value, dtype=tensor.dtype)
    filled[tuple(slice(size) for size in tensor.shape)] = tensor
    return filled


# --- tensors ------------------------------------------------------------------------------------------------------


def _weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor, tuple[str, PackedLayer] | None]]:
    """Yield every tensor that mlx-lm reads, decoded, with the layer whose codes it has."""
    layers = packed_layers(model)
    paths = {id(layer.weight): (name, layer) for name, layer in layers.items()}
    seen: set[int] = set()
    for name, parameter in model.state_dict(keep_vars=True).items():
        path, _, leaf = name.rpartition(".")
        holder = model.get_submodule(path) if path else model
        # What a packed layer has besides its weight are scales; a tied head is the embedding.
        if leaf not in ("weight", "bias") or id(parameter) in seen or isinstance(holder, nn.ModuleList):
            continue
        seen.add(id(parameter))
        packed = paths.get(id(parameter))
        value = parameter if packed is None else dense_weight(packed[1])
        yield name, value.detach().cpu(), packed


def _pack(name: str, layer: PackedLayer, shape: tuple[int, ...], dtype: torch.dtype) -> Packed | None:
    """Return a weight packed; None where MLX has no place for its codes."""
    rows, columns = shape
    group_size = 32 if layer.in_blocks else next((size for size in _GROUPS if columns % size == 0), 0)
    bits = next((width for width in WIDTHS if width >= layer.integer_bits), 0)
    steps = layer.step_size.detach().float().cpu()
    if not bits or not group_size or columns % group_size or not isinstance(layer, nn.Linear | nn.Embedding):
        return None
    codes = _fill(layer_codes(name, layer).cpu().to(torch.int64), shape)
    scales = steps if steps.dim() == 2 else steps.view(-1, 1).expand(layer.dense_shape[0], columns // group_size)
    # Of zeros that fill up, any scale is right.
    scales = _fill(scales.contiguous(), (rows, columns // group_size), 1.0).to(dtype)
    # A power of two times a scale has no rounding error. That of four levels would be 3, so their codes take 3 bits.
    return Packed(_words(codes + 2 ** (bits - 1), bits), scales, -(2 ** (bits - 1)) * scales, bits, group_size)


def _words(codes: Tensor, bits: int) -> Tensor:
    """Return unsigned codes as one stream of bits for each row, the lowest first, in words of 32."""
    stream = (codes.numpy()[:, :, None] >> np.arange(bits)) & 1
    packed = np.packbits(stream.astype(np.uint8).reshape(len(codes), -1), axis=1, bitorder="little")
    return torch.from_numpy(packed).view(torch.uint32)


def unpack(words: Tensor, scales: Tensor, offsets: Tensor, bits: int, group_size: int) -> Tensor:
    """Return the fp32 values of a packed weight; arguments as in `Packed`."""
    stream = np.unpackbits(words.view(torch.uint8).numpy(), axis=1, bitorder="little")
    codes = (stream.reshape(len(stream), -1, bits).astype(np.int64) << np.arange(bits)).sum(-1)
    wide = [part.float().repeat_interleave(group_size, 1) for part in (scales, offsets)]
    return torch.from_numpy(codes).float() * wide[0] + wide[1]


def _prove(
    model: PreTrainedModel, folder: Path, packed: Mapping[str, Mapping[str, int]], channels: list[int]
) -> dict[str, float]:
    """Decode the file; return by how much each tensor differs, as a share of its largest value.

    Raises:
        GETAError: a tensor is missing, or differs by more than its dtype explains.
    """
    errors = {}
    with safe_open(folder / "model.safetensors", framework="pt") as stored:
        for name, tensor, _ in _weights(model):
            path = name.removesuffix(".weight")
            expected = _fill(tensor, _padded(name, tuple(tensor.shape), channels)).float()
            found = stored.get_tensor(name)
            if path in packed:
                scales, offsets = (stored.get_tensor(f"{path}.{leaf}") for leaf in ("scales", "biases"))
                found = unpack(found, scales, offsets, packed[path]["bits"], packed[path]["group_size"])
            gap = float((found.float() - expected).abs().max())
            errors[name] = gap / float(expected.abs().max()) if gap else 0.0
            # A product of a code and a scale has the error of the scale; offset and product cancel in fp32.
            if not errors[name] <= 2 * torch.finfo(model.dtype).eps:
                raise GETAError(f"{name} in the mlx folder is not the model's; export in the geta format")
    return errors


def _notes(
    model: PreTrainedModel, sizes: LayerSizes, channels: list[int], packed: Mapping[str, Mapping[str, int]]
) -> list[str]:
    notes = []
    if channels != sizes.channels:
        more = sum(channels) / sum(sizes.channels) - 1
        multiple = _CHANNELS if len(set(sizes.channels)) > 1 else _GROUPS[-1]
        notes.append(f"zeros fill up channels, {more:.1%} of them more: train with multiple_of={multiple}")
    dense = [name for name in packed_layers(model) if name not in packed]
    if dense:
        names = ", ".join(dense[:4]) + (", ..." if len(dense) > 4 else "")
        notes.append(f"dense, since rows are no multiple of 32 or weights wider than 8 bits: {names}")
    return notes


def _card(config: Mapping[str, Any], errors: Mapping[str, float]) -> str:
    found = config["exported_as"]
    lines = [
        "# A model for MLX",
        "",
        f"A compressed model for mlx-lm's own `{config['model_type']}`.",
        "",
        "```bash",
        'mlx_lm.generate --model . --prompt "Once upon a time"',
        "```",
        "",
        f"{len(errors) - len(found['not_exact'])} of {len(errors)} tensors are exactly the trained ones; the largest "
        f"difference is {max(errors.values()):.2g} of the largest value of its tensor. Not run: mlx-lm.",
        "",
        *(f"- {note}" for note in found["notes"]),
    ]
    return "\n".join(lines).rstrip() + "\n"
