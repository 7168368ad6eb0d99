"""From the trained model to a small folder: cut the zero groups away, pack every weight, prove, then appear whole."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from geta_hf.config import CONFIG_NAME
from geta_hf.errors import GETAError
from geta_hf.export.formats import writer
from geta_hf.qadg import build_space, verify_space
from geta_hf.qadg.space import PruningSpace, kept_indices, zero_groups
from geta_hf.quantization import (
    FixedQuantizer,
    QuantizedLayer,
    cut_quantizers,
    detach_quantizers,
    fixed_quantizer,
    float_inputs,
    quantized_layers,
)
from geta_hf.serialization.atomic_folder import check_target, write_folder
from geta_hf.serialization.bitpack import MAX_BITS, MIN_BITS
from geta_hf.serialization.embeddings import RoundedEmbedding, rounded_embedding
from geta_hf.serialization.encode import activation_bits, pack_layer, weight_bits, weight_holders
from geta_hf.serialization.hf_quantizer import GETAQuantizationConfig, attach_quantizer, has_quantizer
from geta_hf.serialization.packed_layers import packed_layers
from geta_hf.serialization.remote_code import save_compressed
from geta_hf.serialization.sizes import check_shards, shard_options, tensor_bytes
from geta_hf.serialization.tied_weights import check_ties
from geta_hf.surgery.compare_outputs import Outputs, attention_outputs, prove_alike
from geta_hf.surgery.record import record_sizes
from geta_hf.surgery.size_equations import WANTED
from geta_hf.surgery.size_trace import trace_sizes
from geta_hf.surgery.slice import slice_model
from geta_hf.surgery.solve_attributes import solve
from geta_hf.surgery.verify import norm_coupled, prove_replay

STRUCTURE_NAME = "geta_structure.json"
PICTURE_NAME = "geta_structure.svg"
STRUCTURE_VERSION = 1

_ORIGIN = ("is_local", "local_files_only")


class SupportsToDict(Protocol):
    """What is asked of `config`: a dataclass that gives itself as JSON-ready data."""

    def to_dict(self) -> dict[str, Any]: ...


class SupportsSave(Protocol):
    """What is asked of `processing_class`: a tokenizer or processor."""

    def save_pretrained(self, save_directory: str, /) -> Any: ...


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    Attributes:
        path: the folder.
        tensor_bytes: bytes of all tensors in model.safetensors, or in its shards.
        file_bytes: bytes of model.safetensors or its shards, headers included.
        packed_bits: bits of all codes, Σ numel · b over the packed weights.
        bits: module path -> bits of its packed weight.
        activation_bits: module path -> bits of its input, for the layers that round it.
        kept: family -> (groups kept, groups before).
        difference: largest absolute difference of any output, trained against cut and against reloaded.
    """

    path: Path
    tensor_bytes: int
    file_bytes: int
    packed_bits: int
    bits: dict[str, int]
    activation_bits: dict[str, int]
    kept: dict[str, tuple[int, int]]
    difference: float


def export(
    model: PreTrainedModel,
    directory: str | os.PathLike[str],
    *,
    space: PruningSpace | None = None,
    batch: Mapping[str, Tensor] | None = None,
    config: SupportsToDict | None = None,
    processing_class: SupportsSave | None = None,
    expected_zero_groups: int | None = None,
    embedding_bits: int | None = None,
    format: str = "geta",
    max_shard_size: int | str | None = None,
    finish: Callable[[Path], object] | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write a trained model as a small folder.

    In its own format, `AutoModelForX.from_pretrained` reads it once geta_hf is imported, or with
    `trust_remote_code=True`. The others are ways out to other programs: see `geta_hf.export.formats`.

    Groups whose trained slices are all exactly zero are cut away (a family keeps at least one group), every quantized
    weight is stored at its own bit width, everything else in its own dtype. What is cut passes gates 2 and 3 first
    (`verify_space`). Before the folder appears it is reloaded, and the trained, the cut and the reloaded model must
    give the same outputs, with eager and with sdpa attention (gate 4).
    Where a norm runs over what was cut, the trained model's recorded graph on what is left takes its place. Layers that
    round their inputs do so in the folder with the same values; what was trained and what was cut are compared without,
    since the last bit of a sum may decide which way an activation is rounded.

    Args:
        model: trained, with its quantizers attached and their bits snapped to integers; left unchanged.
        directory: where the folder is to appear.
        space: the pruning space used in training; by default built from the batch.
        batch: what the proof runs on; by default the model's `dummy_inputs`.
        config: saved beside the model as geta_config.json; what was kept is saved as geta_structure.json.
        processing_class: tokenizer or processor to save with the model.
        expected_zero_groups: how many groups training was to remove; fewer are an error.
        embedding_bits: 2 to 8: the input embedding is rounded to it, with a step size for every row; the rounded model
            is then the one that the proof starts from. By default it stays as it is.
        format: `geta`, or one of `FORMATS`.
        max_shard_size: bytes, or a size such as `2GB`: weights beyond it are written in several files. For the format
            `geta` alone. By default that of `save_pretrained`, 50 GB.
        finish: called with the folder when it is proven, before it appears, to write more beside, such as a card.
        overwrite: replace an existing model folder, but for one from which a training can go on.

    Raises:
        GETAError: groups that are not zero yet, bits that are not whole, nothing to compress, a target that exists,
            a batch the model cannot run, or outputs that differ. The target is then as it was before.
    """
    target = Path(directory).resolve()
    check_target(target, overwrite)
    check_shards(max_shard_size, format)
    write = None if format == "geta" else writer(format)
    if not isinstance(model, PreTrainedModel):
        raise GETAError(f"export takes a transformers model, not a {type(model).__name__}")
    check_never_exported(model)
    batch = dict(model.dummy_inputs if batch is None else batch)
    if space is None:
        space = build_space(model, batch)
    removed = _removed_groups(model, space, expected_zero_groups)
    kept = {name: (int((~gone).sum()), gone.numel()) for name, gone in removed.items()}
    with rounded_embedding(model, embedding_bits) as embedding:
        small, difference = _prove_cut(model, space, removed, batch, embedding)
    reference = attention_outputs(small, batch)

    def fill(folder: Path) -> None:
        nonlocal difference
        if write is not None:
            write(small, folder, batch)
        else:
            save_compressed(small, folder, **shard_options(max_shard_size))
            write_structure(folder, small, kept)
        _save_beside(folder, config, processing_class)
        if write is None:
            difference = max(difference, _prove_reloaded(small, folder, batch, reference))
        if finish is not None:
            finish(folder)

    write_folder(target, fill)
    return _report(target, small, kept, difference)


def _prove_cut(
    model: PreTrainedModel,
    space: PruningSpace,
    removed: dict[str, Tensor],
    batch: Mapping[str, Tensor],
    embedding: RoundedEmbedding | None,
) -> tuple[PreTrainedModel, float]:
    """The cut and packed copy, and by how much its outputs differ from the trained model's."""
    with float_inputs(model):
        trained = attention_outputs(model, batch)
        if any(bool(gone.any()) for gone in removed.values()):
            verify_space(model, [batch], space, removal=removed)
    small = compress(model, space, removed, batch, embedding)
    with float_inputs(small):
        if norm_coupled(space, removed):
            return small, _prove_norms(model, small, kept_indices(space, removed), batch)
        return small, prove_alike(model, trained, small, batch, "cut")


def _prove_reloaded(small: PreTrainedModel, folder: Path, batch: Mapping[str, Tensor], reference: Outputs) -> float:
    """By how much the outputs of the folder differ from the reference, those of the cut model."""
    reloaded = type(small).from_pretrained(folder, dtype=small.dtype)
    reloaded.to(small.device)  # type: ignore[arg-type]
    return prove_alike(small, reference, reloaded, batch, "reloaded")


def _prove_norms(
    model: PreTrainedModel,
    small: PreTrainedModel,
    kept: Mapping[str, Mapping[int, Tensor]],
    batch: Mapping[str, Tensor],
) -> float:
    """The proof where a norm runs over what was cut: the recorded graph without quantizers, on the packed weights."""
    plain = copy.deepcopy(model)
    detach_quantizers(plain)
    return prove_replay(trace_sizes(plain, batch, WANTED), kept, small, batch)


def check_never_exported(model: nn.Module) -> None:
    """Raises GETAError for a model that was packed, cut or quantized before: there is no second time."""
    kind = type(model).__name__
    if packed_layers(model):
        raise GETAError(f"this {kind} is an export already; save it with save_pretrained, or train the dense model")
    if not has_quantizer(model):
        return
    if isinstance(getattr(model.config, "quantization_config", None), GETAQuantizationConfig):
        raise GETAError(f"this {kind} was pruned before by geta_hf; start from the dense model")
    raise GETAError(f"this {kind} was loaded in quantized form; train from full precision")


def _removed_groups(model: PreTrainedModel, space: PruningSpace, expected: int | None) -> dict[str, Tensor]:
    """Per prunable family which groups are zero in the trained weights, bool of shape (groups,)."""
    zero = zero_groups(model, space)
    found = sum(int(zero[family.name].sum()) for family in space.prunable)
    if expected is not None and found < expected:
        raise GETAError(
            f"export before the groups are zero: {found} of {space.num_groups} groups are zero, {expected} were to be "
            f"removed; train to the end of the joint stage first"
        )
    if not found and not quantized_layers(model):
        raise GETAError(
            f"nothing to export: {type(model).__name__} has no quantized layer and none of its {space.num_groups} "
            f"groups is zero; save it with save_pretrained"
        )
    removed = {}
    for family in space.prunable:
        gone = zero[family.name].clone()
        if gone.all():
            gone[0] = False  # no layer can lose its last group
        removed[family.name] = gone
    return removed


def compress(
    model: PreTrainedModel,
    space: PruningSpace,
    removed: dict[str, Tensor],
    batch: Mapping[str, Tensor],
    embedding: RoundedEmbedding | None = None,
) -> PreTrainedModel:
    """A cut and packed copy of a trained model, which `save_pretrained` writes in the format of an export.

    Args:
        model: as in `export`.
        space: as in `export`.
        removed: family name -> bool (groups,), the groups to cut away.
        batch: what the forward is recorded on, to find the attributes that a cut changes.
        embedding: how the model's embedding was rounded; None where it was not.

    Raises:
        GETAError: bits that are not whole, codes beyond their bit width, a cut that cannot be.
    """
    kept = kept_indices(space, removed)
    values = solve(record_sizes(model, batch).traces, kept) if kept else {}
    small = copy.deepcopy(model)
    fixes = slice_model(small, kept, values)
    cut_quantizers(small, kept)
    _pack_weights(small, embedding)
    attach_quantizer(small, fixes)
    return small


@torch.no_grad()
def _pack_weights(model: PreTrainedModel, embedding: RoundedEmbedding | None) -> None:
    check_ties(model)
    packed = {name: _packed(name, layer) for name, layer in quantized_layers(model).items()}
    detach_quantizers(model)
    if embedding is not None:
        codes = embedding.codes(model.get_submodule(embedding.name))
        packed[embedding.name] = (codes, embedding.bits, embedding.step_size, None)
    holders = weight_holders(model, packed)
    for name, parts in packed.items():
        layer = model.get_submodule(name)
        pack_layer(name, layer, *parts, tied=len(holders[name]) > 1)
        for holder, leaf in holders[name]:
            setattr(holder, leaf, layer.weight)


def _packed(name: str, layer: QuantizedLayer) -> tuple[Tensor, int, Tensor, FixedQuantizer | None]:
    """Codes, bits and step size of a layer's weight, and what rounds its input."""
    weight, inputs = layer.weight_quantizer, layer.input_quantizer
    fixed = None if inputs is None else fixed_quantizer(inputs, integer_bits(f"the input of {name}", inputs.bits()))
    return weight.codes(layer.weight), integer_bits(name, weight.bits()), weight.d, fixed


def integer_bits(name: str, bits: Tensor) -> int:
    """A learned bit width as the integer it was snapped to.

    Args:
        name: path of the layer, for the error.
        bits: shape (1,), or (channels,), which must agree: a layer is stored at one width.

    Raises:
        GETAError: not within 1e-3 of an integer, not of 2 to 16, or another one for another channel.
    """
    values = bits.unique().tolist()
    for value in values:
        if not MIN_BITS - 1e-3 <= value <= MAX_BITS + 1e-3:
            raise GETAError(f"{name} has {value:.4g} bits; what is exported has {MIN_BITS} to {MAX_BITS}")
        if abs(value - round(value)) > 1e-3:
            raise GETAError(
                f"{name} has {value:.4f} bits, which is not whole; the cool-down must snap bits before an export"
            )
    if len(widths := sorted(set(map(round, values)))) > 1:
        raise GETAError(f"{name} has channels of {widths} bits, but a layer is stored at one width; give all the same")
    return widths[0]


def write_structure(folder: Path, model: PreTrainedModel, kept: Mapping[str, tuple[int, int]]) -> None:
    """Write `STRUCTURE_NAME` of a compressed model: family -> (groups kept, groups before), and the bits of layers."""
    structure = {"version": STRUCTURE_VERSION, "kept": kept, "bits": weight_bits(model)}
    _write_json(folder / STRUCTURE_NAME, structure | {"activation_bits": activation_bits(model)})


def copy_beside(source: Path, target: Path, structure: bool) -> None:
    """Copy what stands beside the weights of an export, such as its tokenizer, where the target lacks it.

    Args:
        source: an exported folder.
        target: the new folder, with its model.
        structure: whether what was kept is copied too, and what describes the folder in geta_hf's own format.
    """
    own = {STRUCTURE_NAME, PICTURE_NAME, "README.md", "config.json"}
    for path in sorted(source.iterdir()):
        weights = path.suffix in (".safetensors", ".py") or path.name.endswith(".index.json")
        if path.is_file() and not weights and (structure or path.name not in own) and not (target / path.name).exists():
            (target / path.name).write_bytes(path.read_bytes())


def _save_beside(folder: Path, config: SupportsToDict | None, processing_class: SupportsSave | None) -> None:
    if processing_class is not None:
        processing_class.save_pretrained(str(folder))
        _forget_origin(folder / "tokenizer_config.json")
    if config is not None:
        _write_json(folder / CONFIG_NAME, config.to_dict())


def _forget_origin(path: Path) -> None:
    """Drop what transformers notes in a tokenizer's file of where that was read from, which is of no use elsewhere."""
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if any([stored.pop(name, None) is not None for name in _ORIGIN]):  # noqa: C419  every one is dropped
        path.write_text(json.dumps(stored, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _report(target: Path, model: PreTrainedModel, kept: dict[str, tuple[int, int]], difference: float) -> ExportReport:
    files = sorted(target.glob("*.safetensors"))
    layers = packed_layers(model)
    return ExportReport(
        path=target,
        tensor_bytes=tensor_bytes(target),
        file_bytes=sum(file.stat().st_size for file in files),
        packed_bits=sum(layer.weight.numel() * layer.bits for layer in layers.values()),
        bits=weight_bits(model),
        activation_bits=activation_bits(model),
        kept=kept,
        difference=difference,
    )
