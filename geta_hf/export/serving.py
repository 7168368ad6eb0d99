"""What the program that `serve` names can hold of a model: limits of a run, settled before it starts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel

from geta_hf.config import CompressionConfig
from geta_hf.errors import GETAError
from geta_hf.export.formats.exported import require
from geta_hf.export.formats.gguf.architectures import architecture_of, layout_of
from geta_hf.export.formats.gguf.vocabulary import read_vocabulary
from geta_hf.export.formats.vllm.architectures import PER_LAYER, per_layer_problem, served_class
from geta_hf.qadg.group_types import Family
from geta_hf.qadg.space import PruningSpace
from geta_hf.quantization import select_layers

LLAMA_CPP, VLLM = "llama.cpp", "vllm"

_BLOCK = 32
"""llama.cpp's blocks of weights have 32 neighboring inputs."""

_SUPER_BLOCK = 256
"""The length of blocks with further widths, which no grid of 32 inputs fits."""

_WIDTHS, _WIDTHS_OF_SUPER_BLOCKS = (4, 5, 8), (2, 3, 4, 5, 6, 8)
"""The widths for which llama.cpp has blocks of 32, and of 256 as well."""

_TILES = (128, 64, 32, 16, 8)
"""Multiples that suit GPU kernels, the best first."""

_KINDS = ("heads", "query_heads", "channels")
"""The kinds of families whose sizes the programs read; all others are kept."""

_NAMED = 3
"""Number of layers that a note lists."""


@dataclass(frozen=True)
class ServingLimits:
    """What a program asks of the result.

    Attributes:
        uniform: all layers must keep equally many groups.
        heads: why no heads may be removed; empty if they may be.
        multiple: channels are kept in multiples of this.
        columns: heads are kept so that their joint width is a multiple of this.
        notes: what this means for the run, in sentences.
    """

    uniform: bool
    heads: str
    multiple: int
    columns: int
    notes: tuple[str, ...]


_Config = TypeVar("_Config", bound=CompressionConfig)


def limit_config(config: _Config, model: nn.Module, processing_class: Any = None) -> _Config:
    """Return the config with the limits that the program of `serve` sets; the config itself without one.

    Args:
        config: of a run.
        model: dense.
        processing_class: the tokenizer or processor, which a GGUF file holds; None where it is not known yet.

    Raises:
        GETAError: a model or tokenizer that the program can't run, or a package that is needed to know.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from geta_hf import GETAConfig
        >>> sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
        >>> limited = limit_config(GETAConfig(serve="llama.cpp"), model)
        >>> limited.multiple_of, limited.uniform
        (32, False)
    """
    if config.serve is None:
        return config
    limits = find_limits(config.serve, model, processing_class)
    multiple = math.lcm(config.multiple_of, limits.multiple)
    changes: dict[str, Any] = {"uniform": config.uniform or limits.uniform, "multiple_of": multiple}
    widths = _useful_widths(config, model)
    if widths is not None:
        _check_mean(config, widths)
        changes["bit_choices"] = widths
    return dataclasses.replace(config, **changes)


def _useful_widths(config: CompressionConfig, model: nn.Module) -> list[int] | None:
    """Return the widths that make a GGUF file smaller than the next larger one does; None where the user chose some.

    Blocks of a narrower width do not exist for all rows: 2 and 3 bits are then stored as 4, and 6 and 7 as 8.
    """
    if config.serve != LLAMA_CPP or config.bit_choices is not None:
        return None
    assert isinstance(model, PreTrainedModel)  # find_limits has refused all others
    hidden: int = getattr(model.config.get_text_config(), "hidden_size", 0)
    coarse = config.grid == "block32" or hidden % _SUPER_BLOCK != 0
    widths = [width for width in config.widths if width in (_WIDTHS if coarse else _WIDTHS_OF_SUPER_BLOCKS)]
    return widths if widths and len(widths) < len(config.widths) else None


def _check_mean(config: CompressionConfig, widths: Sequence[int]) -> None:
    """Raise GETAError for a mean width that these widths can't have."""
    if config.mean_bits is not None and not widths[0] <= config.mean_bits <= widths[-1]:
        raise GETAError(
            f"serve = {config.serve!r} and mean_bits = {config.mean_bits}: a GGUF file of this model has places for "
            f"{', '.join(map(str, widths))} bits; choose a mean between them, or set bit_choices"
        )


def find_limits(serve: str, model: nn.Module, processing_class: Any = None) -> ServingLimits:
    """Return what a program asks of a model's result; arguments and errors as in `limit_config`."""
    if not isinstance(model, PreTrainedModel):
        raise GETAError(f"serve = {serve!r} is for transformers models, not a {type(model).__name__}; leave it out")
    return _of_llama_cpp(model, processing_class) if serve == LLAMA_CPP else _of_vllm(model)


def _of_llama_cpp(model: PreTrainedModel, processing_class: Any) -> ServingLimits:
    found = architecture_of(model)
    require("gguf", "gguf")  # which has the names of tensors
    layout = layout_of(model)
    if processing_class is not None:
        read_vocabulary(getattr(processing_class, "tokenizer", processing_class), layout.vocabulary, model.config)
    uniform = found.per_layer is None
    heads = ""
    if uniform and found.full_heads:
        heads = f"llama.cpp's {found.name} has no place for removed heads"
    notes = [
        f"to be served by llama.cpp as {found.name if uniform else found.per_layer}: channels in multiples of {_BLOCK}",
        "all layers keep equally many groups" if uniform else "layers may differ",
    ]
    return ServingLimits(uniform, heads, _BLOCK, _BLOCK, ("; ".join(notes), *layout.notes))


def _of_vllm(model: PreTrainedModel) -> ServingLimits:
    found = served_class(model)
    problem = per_layer_problem(model)
    hidden = model.config.hidden_size
    multiple = next((tile for tile in _TILES if hidden % tile == 0), 1)
    heads = ""
    if problem and not found.head_dim:
        heads = f"vLLM's {type(model).__name__} has no place for removed heads, and {problem}"
    name = type(model).__name__ if problem else PER_LAYER
    rest = f"all layers keep equally many groups, since {problem}" if problem else "all layers keep equally many heads"
    note = f"to be served by vLLM as {name}: channels in multiples of {multiple}; {rest}"
    return ServingLimits(problem is not None, heads, multiple, 1, (note,))


def limit_families(config: CompressionConfig, space: PruningSpace, model: nn.Module) -> PruningSpace:
    """Return the space with only the families and counts that the program of `serve` can hold.

    Args:
        config: of the run.
        space: of the model.
        model: dense.

    Raises:
        GETAError: no prunable family is left.
    """
    if config.serve is None:
        return space
    limits = find_limits(config.serve, model)
    narrowed = dataclasses.replace(space, families=tuple(_limited(f, limits, config.serve) for f in space.families))
    if space.prunable and not narrowed.prunable:
        pairs = zip(space.families, narrowed.families, strict=True)
        reason = next(after.reason for before, after in pairs if before.prunable and not after.prunable)
        raise GETAError(f"{config.serve} can hold no family that may be pruned: {reason}; choose other families")
    return narrowed


def _limited(family: Family, limits: ServingLimits, serve: str) -> Family:
    if not family.prunable:
        return family
    if family.kind not in _KINDS:
        return dataclasses.replace(
            family, prunable=False, reason=f"{serve} reads no number of {family.kind} that remain"
        )
    if family.kind == "channels":
        return family
    if limits.heads:
        return dataclasses.replace(family, prunable=False, reason=limits.heads)
    width = max((member.index.shape[1] for member in family.members if member.consumer), default=0)
    counts = [count for count in range(1, family.size) if count * width % limits.columns == 0]
    if family.counts:
        counts = [count for count in counts if count in family.counts]
    # All of them is always one of the counts: what is not removed is as it was.
    return dataclasses.replace(family, counts=(*counts, family.size)) if len(counts) < family.size - 1 else family


def serving_notes(config: CompressionConfig, model: nn.Module, space: PruningSpace) -> tuple[str, ...]:
    """Return what `serve` means for a run, in sentences for its plan; nothing without it.

    Args:
        config: with the limits, as `limit_config` returns it.
        model: with its quantizers or without.
        space: as `limit_families` returns it.
    """
    if config.serve is None:
        return ()
    limits = find_limits(config.serve, model)
    kept = sorted({family.reason for family in space.families if family.reason and _is_ours(family, limits, config)})
    notes = [*limits.notes, *(f"not pruned: {reason}" for reason in kept)]
    if config.serve == LLAMA_CPP:
        notes.append(f"widths: {', '.join(map(str, config.widths))} bits")
        notes += _float_rows(config, model)
    return tuple(notes)


def _is_ours(family: Family, limits: ServingLimits, config: CompressionConfig) -> bool:
    return family.reason == limits.heads or family.reason.startswith(f"{config.serve} reads no number")


def _float_rows(config: CompressionConfig, model: nn.Module) -> Iterator[str]:
    """Say which weights have rows without blocks, whatever is removed."""
    layers = select_layers(model, config.include, config.exclude)
    shapes = {name: tuple(layer.get_parameter("weight").shape) for name, layer in layers.items()}
    found = [(name, shape[1]) for name, shape in shapes.items() if len(shape) == 2 and shape[1] % _BLOCK]
    if found:
        named = ", ".join(f"{name} ({rows} long)" for name, rows in found[:_NAMED])
        more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        yield (
            f"rows that are no multiple of {_BLOCK} long are stored as F16, and save nothing by their widths: "
            f"{named}{more}"
        )
