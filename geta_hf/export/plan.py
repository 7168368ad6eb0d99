"""Step 1 of an export: decide what is removed and at how many bits the rest is stored, and refuse what cannot be.

Nothing is copied or written here. Whatever prevents an export is found on the trained model itself, before a
second one takes memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from geta_hf.errors import GETAError
from geta_hf.export.untouched import Untouched, untouched_of
from geta_hf.methods.base import CompressionResult
from geta_hf.qadg import PruningSpace, build_space, kept_indices, verify_space, zero_groups
from geta_hf.qadg.group_types import Family
from geta_hf.qadg.tracing.record_forward import check_same_path
from geta_hf.quantization import quantized_layers, without_quantizers
from geta_hf.serialization.bitpack import MAX_BITS, MIN_BITS
from geta_hf.serialization.embeddings import input_embedding
from geta_hf.serialization.hf_quantizer import GETAQuantizationConfig, has_quantizer
from geta_hf.serialization.packed_layers import packed_layers
from geta_hf.serialization.tied_weights import check_ties
from geta_hf.surgery.other_paths import PathError
from geta_hf.surgery.rebuild import check_rebuilds
from geta_hf.surgery.record import Recordings, record_batch, record_path, record_sizes
from geta_hf.surgery.size_trace import SizeTrace
from geta_hf.surgery.solve_attributes import solve
from geta_hf.surgery.symbolic_int import Attribute
from geta_hf.surgery.verify import norm_coupled, solve_with_paths
from geta_hf.utils.residence import visiting

_CHANGED = (
    "Where something changed the model after its last step (an average of weights such as EMA, noise, an earlier "
    "state), trainer.restore_compression() sets removed groups to zero and widths to their final values again"
)


@dataclass(frozen=True)
class ExportPlan:
    """Hold what an export does to a trained model, as plain data.

    Attributes:
        batch: what the proofs run on.
        result: removed groups of every prunable family, bit widths of every quantized layer.
        kept: tensor name -> dim -> int64 indices that remain.
        attributes: what the modules' attributes become, so that the model's own code follows.
        kept_counts: family -> (groups kept, groups before).
        norms: whether a norm runs over something that is removed, so that zeros do not do what a cut does.
        recordings: of the trained model without its quantizers; None where nothing is removed.
        untouched: what compression leaves as it is, and why.
        device: where the proofs run, the trained model's own.
        paths: name of a path on which a first cut failed -> what was recorded on it.
        families: the prunable ones.
    """

    batch: Mapping[str, Tensor]
    result: CompressionResult
    kept: Mapping[str, Mapping[int, Tensor]]
    attributes: Mapping[Attribute, int]
    kept_counts: dict[str, tuple[int, int]]
    norms: bool
    recordings: Recordings | None
    untouched: Untouched
    device: torch.device
    paths: Mapping[str, tuple[SizeTrace, ...]] = field(default_factory=dict)
    families: tuple[Family, ...] = ()


def plan_export(
    model: PreTrainedModel,
    space: PruningSpace | None = None,
    batch: Mapping[str, Tensor] | None = None,
    result: CompressionResult | None = None,
    expected_zero_groups: int | None = None,
    embedding_bits: int | None = None,
) -> ExportPlan:
    """Decide what is cut and how it is stored; pass gates 2 and 3 for it, and solve for the attributes.

    The forward is recorded twice at most, where groups are removed; a space to be built takes another recording.

    Args:
        model: trained, with its quantizers; unchanged afterwards.
        space: the pruning space used in training; built from the batch when None.
        batch: what the proofs run on; the model's `dummy_inputs` when None.
        result: what the method decided; read from the model when None.
        expected_zero_groups: how many groups training was to remove.
        embedding_bits: to which the input embedding is to be rounded; only checked here.

    Raises:
        GETAError: whatever keeps the model from being exported; see `geta_hf.export.export`.
    """
    if not isinstance(model, PreTrainedModel):
        raise GETAError(f"export takes a transformers model, not a {type(model).__name__}")
    check_never_exported(model)
    # Only for its errors; `rounded_embedding` does the work, when nothing else can be refused any more.
    if embedding_bits is not None:
        input_embedding(model, embedding_bits)
    batch = dict(model.dummy_inputs if batch is None else batch)
    with without_quantizers(model):
        check_rebuilds(model, batch, quantized_layers(model))
    first: SizeTrace | None = None
    if space is None:
        # Quantizers change nothing about the groups, and without them the graph serves the proof on packed weights too.
        with without_quantizers(model):
            first = record_batch(model, batch)
            check_same_path(model, batch, first.graph)
        space = build_space(model, batch, flow=first.flow)
    _check_zero_groups(model, space, expected_zero_groups)
    if result is None:
        result = read_result(model, space)
    else:
        check_result(result, model, space)
        if expected_zero_groups is not None and result.removed_groups < expected_zero_groups:
            raise GETAError(
                f"the result removes {result.removed_groups} groups, {expected_zero_groups} were to be removed; take "
                f"it once the method has finished"
            )
    return plan_cut(model, space, batch, result, first)


def plan_cut(
    model: PreTrainedModel,
    space: PruningSpace,
    batch: Mapping[str, Tensor],
    result: CompressionResult,
    first: SizeTrace | None = None,
    verify: bool = True,
) -> ExportPlan:
    """Record a model and solve for the attributes that a result changes.

    Args:
        model, space, batch: as in `plan_export`.
        result: what is removed; it is taken as it is.
        first: a recording of the batch that is at hand, of the model without its quantizers.
        verify: let the removal pass gates 2 and 3 first.

    Raises:
        GETAError: weights that are tied so that they cannot be packed, a gate that failed, or a cut that the model's
            code cannot follow.
    """
    # Ties are checked before the recording, which takes far longer.
    check_ties(model)
    removed = _all_families(result.removed, space)
    kept = kept_indices(space, removed)
    # Without a cut every shape and attribute remains, so quantization alone needs no recording.
    recordings = _record(model, batch, first) if kept else None
    if recordings is not None and verify:
        verify_space(model, [batch], space, removal=removed, flow=recordings.flow)
    return ExportPlan(
        batch=batch,
        result=result,
        kept=kept,
        attributes={} if recordings is None else solve(recordings.traces, kept),
        kept_counts={name: (int((~mask).sum()), mask.numel()) for name, mask in removed.items()},
        norms=norm_coupled(space, removed),
        recordings=recordings,
        untouched=untouched_of(space),
        device=model.device,
        families=space.prunable,
    )


def with_path(model: PreTrainedModel, plan: ExportPlan, error: PathError) -> ExportPlan:
    """Return a plan whose attributes also suit a path on which the cut model failed.

    Args:
        model: trained; unchanged afterwards.
        plan: by which it was cut.
        error: what the proof found on the path.

    Raises:
        PathError: the path was recorded before.
        RefusalError: no attributes suit it.
    """
    name = error.path.name
    if plan.recordings is None or name in plan.paths:
        raise error
    with without_quantizers(model), visiting(model, plan.device):
        recorded = record_path(model, error.path)
    paths = {**plan.paths, name: recorded}
    return replace(plan, paths=paths, attributes=solve_with_paths(plan.recordings.traces, paths, plan.kept))


def _record(model: PreTrainedModel, batch: Mapping[str, Tensor], first: SizeTrace | None) -> Recordings:
    with without_quantizers(model):
        return record_sizes(model, batch, first)


def check_never_exported(model: nn.Module) -> None:
    """Raise GETAError for a model that was packed, cut or quantized before: there is no second time."""
    kind = type(model).__name__
    if packed_layers(model):
        raise GETAError(f"this {kind} is an export already; save it with save_pretrained, or train the dense model")
    if not has_quantizer(model):
        return
    # A model that was cut but not quantized has no packed layer; its config still says that it was compressed.
    if isinstance(getattr(model.config, "quantization_config", None), GETAQuantizationConfig):
        raise GETAError(f"this {kind} was pruned before by geta_hf; start from the dense model")
    raise GETAError(f"this {kind} was loaded in quantized form; train from full precision")


def _check_zero_groups(model: PreTrainedModel, space: PruningSpace, expected: int | None) -> None:
    found = sum(int(zero.sum()) for zero in zero_groups(model, space).values())
    # More than expected is no fault: slices may have been zero before training, or become zero without a method.
    if expected is not None and found < expected:
        raise GETAError(
            f"export before the groups are zero: {found} of {space.num_groups} groups are zero, {expected} were to be "
            f"removed; train to the end first"
        )
    if not found and not quantized_layers(model):
        raise GETAError(
            f"nothing to export: {type(model).__name__} has no quantized layer and none of its {space.num_groups} "
            f"groups is zero; save it with save_pretrained"
        )


def _all_families(removed: Mapping[str, Tensor], space: PruningSpace) -> dict[str, Tensor]:
    """Return the masks of all prunable families, those that lose nothing included."""
    nothing = {family.name: torch.zeros(family.size, dtype=torch.bool) for family in space.prunable}
    return nothing | dict(removed)


# --- what the method decided --------------------------------------------------------------------------------------


def read_result(model: nn.Module, space: PruningSpace) -> CompressionResult:
    """Read off a trained model what its method decided: groups that are zero, integer widths of the quantizers.

    Args:
        model: trained, at full shapes.
        space: its pruning space.

    Raises:
        GETAError: a bit width that is no integer of 2 to 16.
    """
    removed = {}
    for name, zero in zero_groups(model, space).items():
        mask = zero.clone()
        if mask.all():
            mask[0] = False  # no layer can lose its last group
        removed[name] = mask
    return CompressionResult(removed, *read_widths(model), channel_bits=read_channel_bits(model))


def check_result(result: CompressionResult, model: nn.Module, space: PruningSpace) -> None:
    """Check that a model is what its method says: removed groups are zero, quantizers have their widths.

    Raises:
        GETAError: a family or layer that there is not, a removed group that is not zero, or a width that the quantizer
            does not have. The message names it with its value and the remedy.
    """
    zero = zero_groups(model, space)
    for name, mask in result.removed.items():
        if name not in zero:
            raise GETAError(
                f"the result removes groups of {name}, which is no prunable family of the space; pass the space that "
                f"the model was trained with"
            )
        if not isinstance(mask, Tensor):
            raise GETAError(f"the result's mask of {name} is a {type(mask).__name__}; pass a tensor of torch.bool")
        # Integers would pass as a mask, but ~ on them is -n - 1, so nearly all groups would count as kept.
        if mask.dtype != torch.bool or mask.shape != zero[name].shape:
            raise GETAError(
                f"the result's mask of {name} is {mask.dtype} of shape {tuple(mask.shape)}; pass torch.bool of shape "
                f"({zero[name].numel()},)"
            )
        wrong = torch.nonzero(mask.cpu() & ~zero[name]).flatten().tolist()
        if wrong:
            raise GETAError(
                f"the result removes group {wrong[0]} of {name}, whose weights are not zero ({len(wrong)} such "
                f"groups); set them to zero first, as a method does before it has finished. {_CHANGED}"
            )
    found = read_widths(model)
    for what, theirs, ours in zip(("weight", "input"), (result.weight_bits, result.input_bits), found, strict=True):
        for name in dict.fromkeys((*theirs, *ours)):
            # Types as well: 8.0 == 8 and True == 1 in Python, and the folder's JSON would hold such a width.
            if type(theirs.get(name)) is not type(ours.get(name)) or theirs.get(name) != ours.get(name):
                raise GETAError(
                    f"the result stores the {what} of {name} at {theirs.get(name, 'no')} bits, but its quantizer has "
                    f"{ours.get(name, 'none')}; take the result after the widths were rounded, and attach no other "
                    f"quantizers"
                )
    _check_channel_bits(result, model)


def _check_channel_bits(result: CompressionResult, model: nn.Module) -> None:
    """Check that channels have the widths that a result gives them, and one width where it gives them none."""
    for name, layer in quantized_layers(model).items():
        ours = channel_bits(name, layer.weight_quantizer.bits()).flatten()
        theirs = result.channel_bits.get(name, torch.full_like(ours, result.weight_bits[name]))
        if theirs.shape != ours.shape or not torch.equal(theirs.cpu().long(), ours):
            raise GETAError(
                f"the result stores channels of {name} at {sorted(set(theirs.tolist()))} bits, but its quantizer has "
                f"{sorted(set(ours.tolist()))}, or has them elsewhere; take the result after the widths were rounded"
            )


def read_widths(model: nn.Module) -> tuple[dict[str, int], dict[str, int]]:
    """Return the integer widths of the weights, of several channels the widest, and of the rounded inputs, by path.

    Raises:
        GETAError: as `integer_bits`, or blocks of inputs of several widths.
    """
    weights, inputs = {}, {}
    for name, layer in quantized_layers(model).items():
        quantizer = layer.weight_quantizer
        weights[name] = integer_bits(name, quantizer.bits())
        if quantizer.order is not None and len(channel_bits(name, quantizer.bits()).unique()) > 1:
            raise GETAError(
                f"{name} has blocks of 32 inputs of several widths, but is stored at one; give all the same"
            )
        if layer.input_quantizer is not None:
            inputs[name] = integer_bits(f"the input of {name}", layer.input_quantizer.bits())
    return weights, inputs


def read_channel_bits(model: nn.Module) -> dict[str, Tensor]:
    """Return the integer widths of each quantizer's entries, int64, by module path, where they differ."""
    found = {}
    for name, layer in quantized_layers(model).items():
        bits = channel_bits(name, layer.weight_quantizer.bits()).flatten()
        if len(bits.unique()) > 1:
            found[name] = bits
    return found


def integer_bits(name: str, bits: Tensor) -> int:
    """Return a learned bit width as the integer that it was rounded to; the widest of several channels.

    Args:
        name: path of the layer, for the error.
        bits: shape (1,) or (channels,).

    Raises:
        GETAError: as `channel_bits`.
    """
    return int(channel_bits(name, bits).max())


def channel_bits(name: str, bits: Tensor) -> Tensor:
    """Return learned bit widths as the integers that they were rounded to, int64, on CPU.

    Args:
        name: path of the layer, for the error.
        bits: of any shape.

    Raises:
        GETAError: not within 1e-3 of an integer, or not of 2 to 16.
    """
    # b = log2(q_m^t / d + 1) + 1 is computed from fp32 values, so a rounded width is an integer up to their precision
    # only.
    for value in bits.unique().tolist():
        if not MIN_BITS - 1e-3 <= value <= MAX_BITS + 1e-3:
            raise GETAError(f"{name} has {value:.4g} bits; what is exported has {MIN_BITS} to {MAX_BITS}")
        if abs(value - round(value)) > 1e-3:
            raise GETAError(
                f"{name} has {value:.4f} bits, which is not an integer; the cool-down must round bits before an "
                f"export. {_CHANGED}"
            )
    return bits.detach().cpu().round().long()
