"""Steps 2 to 5 of an export: cut, fill, prove, publish. Each takes what the one before returned.

`geta_hf.export.plan` is step 1. One recording of the trained model serves all: the plan verifies the groups and solves
for the attributes with it, and the proof replays it where a norm runs over what was removed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from geta_hf.errors import GETAError
from geta_hf.export.formats import Writer
from geta_hf.export.plan import ExportPlan, channel_bits
from geta_hf.export.sorted_groups import sort_channels
from geta_hf.methods.base import CompressionResult
from geta_hf.qadg.tracing.raw_reads import find_raw_reads
from geta_hf.quantization import (
    FixedQuantizer,
    Quantizer,
    cut_quantizers,
    detach_quantizers,
    fixed_quantizer,
    float_inputs,
    quantized_layers,
    without_quantizers,
)
from geta_hf.quantization.fixed import output_dim
from geta_hf.quantization.maths import FOUR_LEVEL_BITS
from geta_hf.serialization.atomic_folder import write_folder
from geta_hf.serialization.embeddings import RoundedEmbedding
from geta_hf.serialization.encode import activation_bits, dense_weight, pack_layer, weight_holders
from geta_hf.serialization.hf_quantizer import attach_quantizer
from geta_hf.serialization.packed_layers import ChannelWidths, PackedRows, packed_layers
from geta_hf.surgery.compare_outputs import Outputs, attention_outputs, prove_alike
from geta_hf.surgery.fixes import Fixes
from geta_hf.surgery.other_paths import compare_path, other_paths
from geta_hf.surgery.slice import slice_model
from geta_hf.surgery.verify import prove_replay
from geta_hf.utils.copies import copy_module
from geta_hf.utils.model_io import to_device

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CutModel:
    """A model without its removed groups.

    Attributes:
        model: shares the tensors that nothing cut with the trained model; its quantizers are still attached.
        fixes: what makes a freshly built model of this class as small.
    """

    model: PreTrainedModel
    fixes: Fixes


@dataclass(frozen=True)
class Proof:
    """Hold what a comparison of the compressed model with the trained one found.

    Attributes:
        difference: largest absolute difference of any output.
        outputs: of the compressed model on the batch, as a reference for the folder.
    """

    difference: float
    outputs: Outputs


def cut(model: PreTrainedModel, plan: ExportPlan) -> CutModel:
    """Slice the removed groups away in a copy of the model.

    Args:
        model: trained; unchanged afterwards.
        plan: what to cut.

    Raises:
        GETAError: a module whose attributes cannot follow its tensors.
    """
    # Parameters are shared: those that are cut or packed are replaced in the copy, and nothing writes to the others.
    shared = {id(parameter): parameter for parameter in model.parameters()}
    compressed = copy_module(model, shared)
    fixes = slice_model(compressed, plan.kept, plan.attributes)
    # A quantizer with a step size for each channel loses those of the removed channels, as the weight loses its rows.
    cut_quantizers(compressed, plan.kept)
    sort_channels(compressed, plan.families, plan.result.removed, plan.kept, plan.batch, plan.device)
    return CutModel(compressed, fixes)


def prove_paths(model: PreTrainedModel, cut_model: CutModel, plan: ExportPlan) -> None:
    """Compare the cut model with the trained one on paths that the batch does not take.

    Both run without quantizers: which code runs, and on which sizes, does not depend on them, and to round every weight
    for each of the paths would take longer than all the rest.

    Args:
        model: trained; unchanged afterwards.
        cut_model: not filled yet.
        plan: by which it was cut.

    Raises:
        PathError: the cut model fails, or computes something else.
    """
    # Without a cut the code and its sizes are those of the trained model on every path.
    if not plan.kept:
        return
    with without_quantizers(model), without_quantizers(cut_model.model):
        for path in other_paths(model, plan.batch):
            compare_path(model, cut_model.model, path, plan.paths, equal=not plan.norms, device=plan.device)


@torch.no_grad()
def fill(cut_model: CutModel, plan: ExportPlan, embedding: RoundedEmbedding | None = None) -> PreTrainedModel:
    """Replace quantized weights by packed codes at their own widths; the model then loads and saves as an export does.

    Args:
        cut_model: changed in place.
        plan: the widths.
        embedding: how the model's embedding was rounded; None where it was not.

    Raises:
        GETAError: codes beyond their bit width.
    """
    model = cut_model.model
    quantized = {
        name: (layer.weight_quantizer, layer.input_quantizer) for name, layer in quantized_layers(model).items()
    }
    # Detaching takes the quantizers off the layers; they are kept here, with their step sizes.
    detach_quantizers(model)
    names = dict.fromkeys((*quantized, *([] if embedding is None else [embedding.name])))
    holders = weight_holders(model, names)
    # One weight at a time, since codes take four bytes each. One that is tied is read for all its layers first.
    for shared in _by_weight(model, names):
        parts: dict[str, _Part] = {}
        for name in shared:
            layer = model.get_submodule(name)
            if embedding is not None and name == embedding.name:
                # The cut has only taken columns of the embedding: its step sizes are those of the rows, which remain.
                parts[name] = _Part(embedding.codes(layer), embedding.bits, embedding.step_size)
            else:
                parts[name] = _packed(name, layer, *quantized[name], plan.result)
        for name, part in parts.items():
            layer = model.get_submodule(name)
            tied = len(holders[name]) > 1
            pack_layer(
                name,
                layer,
                part.codes,
                part.bits,
                part.step_size,
                part.input_quantizer,
                tied,
                part.widths,
                part.four_levels,
            )
            # Other modules that share the weight would otherwise keep the dense tensor, and the file would hold both.
            for holder, leaf in holders[name]:
                setattr(holder, leaf, layer.weight)
    # Last, since the config that it writes lists the layers that are packed by now.
    attach_quantizer(model, cut_model.fixes)
    return model


def _by_weight(model: nn.Module, names: Iterable[str]) -> list[list[str]]:
    """Return the layers in lists, of which each has one weight."""
    lists: dict[int, list[str]] = {}
    for name in names:
        lists.setdefault(id(model.get_submodule(name).weight), []).append(name)
    return list(lists.values())


@dataclass(frozen=True)
class _Part:
    """What a layer is packed from; see `pack_layer`."""

    codes: Tensor
    bits: int
    step_size: Tensor
    input_quantizer: FixedQuantizer | None = None
    widths: ChannelWidths | None = None
    four_levels: bool = False


def _packed(
    name: str, layer: nn.Module, weight: Quantizer, inputs: Quantizer | None, result: CompressionResult
) -> _Part:
    """Return codes, bits and step size of a layer's weight, and what rounds its input."""
    fixed = None if inputs is None else fixed_quantizer(inputs, result.input_bits[name])
    codes = weight.codes(layer.get_parameter("weight"))
    widths = _channel_widths(name, layer, weight)
    bits = result.weight_bits[name] if widths is None else int(widths.bits.max())
    four_levels = weight.four_levels or weight.some_four_levels
    if not four_levels:
        return _Part(codes, bits, weight.step, fixed, widths)
    zeros = codes == 0
    if weight.some_four_levels:
        zeros &= weight.over(codes, weight.levels.bool())
    if bool(zeros.any()):
        # Three bits hold 0 as well as -3, -1, 1 and 3, so that the folder computes what was trained.
        logger.warning(
            "%s has %d weights of exactly 0, which is none of its four levels; it is stored at 3 bits in place of 2",
            name,
            int(zeros.sum()),
        )
        four_levels = False
        if widths is None:
            bits += 1
        else:
            wider = widths.bits.masked_fill(widths.bits == FOUR_LEVEL_BITS, FOUR_LEVEL_BITS + 1)
            widths, bits = ChannelWidths(widths.dim, wider), int(wider.max())
    return _Part(codes, bits, weight.step, fixed, widths, four_levels)


def _channel_widths(name: str, layer: nn.Module, quantizer: Quantizer) -> ChannelWidths | None:
    """Return the widths of a layer's rows or columns after the cut; None for one width and step sizes of outputs."""
    dim = quantizer.channel_dim
    if dim is None or quantizer.order is not None:
        return None
    bits = channel_bits(name, quantizer.bits())
    if dim == output_dim(layer) and len(set(bits.tolist())) == 1:
        return None
    return ChannelWidths(dim, bits.to(torch.int8))


def prove(model: PreTrainedModel, compressed: PreTrainedModel, plan: ExportPlan) -> Proof:
    """Compare the compressed model with the trained one, whose removed groups are zero (gate 4).

    Layers that round their inputs are compared without, since the last bit of a sum may decide which way an activation
    is rounded. Where a norm runs over what was removed, zeros still count in its mean: the recorded graph, on the
    compressed model's own weights, takes the place of the trained model.

    Raises:
        GETAError: an output differs by more than the tolerance; names a layer whose quantizer had no effect, if any.
    """
    try:
        return _compare(model, compressed, plan)
    except GETAError as error:
        raw = find_raw_reads(model, quantized_layers(model), to_device(plan.batch, model.device))
        if not raw:
            raise
        raise GETAError(
            f"{error}. The model reads the weight of {raw[0]} itself, past its quantizer ({len(raw)} such layers): "
            f"leave them out by `exclude` when quantizers are attached, and train again"
        ) from error


def _compare(model: PreTrainedModel, compressed: PreTrainedModel, plan: ExportPlan) -> Proof:
    with float_inputs(compressed):
        outputs = attention_outputs(compressed, plan.batch, device=plan.device)
        if plan.norms:
            # Norms are marked only where something is removed, and then the plan has recordings.
            assert plan.recordings is not None
            # The embedding that is looked up row by row holds its codes.
            layers = packed_layers(compressed).items()
            decoded = {f"{name}.weight": dense_weight(layer) for name, layer in layers if isinstance(layer, PackedRows)}
            difference = prove_replay(plan.recordings.traces[0], plan.kept, compressed, plan.batch, outputs, decoded)
        else:
            with float_inputs(model):
                trained = attention_outputs(model, plan.batch, device=plan.device)
                difference = prove_alike(model, trained, compressed, plan.batch, "cut", outputs)
    if activation_bits(compressed):  # the folder rounds inputs again, as this model does
        outputs = attention_outputs(compressed, plan.batch, device=plan.device)
    return Proof(difference, outputs)


def publish(
    target: Path,
    model: PreTrainedModel,
    plan: ExportPlan,
    proof: Proof,
    write: Writer,
    finish: Callable[[Path], None],
    overwrite: bool,
) -> float:
    """Write a folder and let it appear under its name once it is proved; a failure leaves the target as it was.

    Args:
        target: absolute path.
        model: compressed.
        plan: with the batch of the proof.
        proof: of the compressed model.
        write: writes and proves the format.
        finish: adds what lies next to the model.
        overwrite: replace an existing model folder.

    Returns:
        The largest absolute difference of any output, of the compressed model or of the reloaded one.

    Raises:
        GETAError: the format cannot hold the model, the folder computes something else, or the target may not be
            replaced.
    """
    difference = proof.difference

    def write_all(folder: Path) -> None:
        nonlocal difference
        # A format with inexact kernels returns None; it notes its relative differences in its own config.json.
        found = write(model, folder, plan.batch)
        if found is not None:
            difference = max(difference, found)
        finish(folder)

    write_folder(target, write_all, overwrite=overwrite)
    return difference
