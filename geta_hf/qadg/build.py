"""From a model and one batch to its pruning space."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from geta_hf.errors import GETAError
from geta_hf.qadg.families.find import find_families
from geta_hf.qadg.policy import apply_policy
from geta_hf.qadg.propagation.flow import Flow
from geta_hf.qadg.propagation.propagate import analyse
from geta_hf.qadg.space import PruningSpace
from geta_hf.qadg.tracing.graph import Node
from geta_hf.qadg.verify import verify_space


def build_space(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    prune: Sequence[str] = (),
    keep: Sequence[str] = (),
    verify: bool = False,
) -> PruningSpace:
    """Find what may be removed from `model`: the quantization-aware dependency graph (paper Sec. 4, Alg. 1).

    The forward runs twice, to see whether it takes the same path, without computing with the parameters, which may lie
    on any device or on meta; the model is as before afterwards. Quantizers, own or foreign, change nothing about the
    groups. Caches are switched off.

    Args:
        model: a Hugging Face model, or any module that `model(**batch)` runs.
        batch: one batch of real inputs; one or two rows will do, with padding if training has it.
        prune: kinds, couplings or name patterns to make prunable beside heads and channels; see `apply_policy`.
        keep: kinds, couplings or name patterns to keep whole.
        verify: whether to let the space pass all gates: `verify_space`, then, for a Hugging Face model with weights,
            `geta_hf.export.verify_surgery`; families that the model's own code can't follow become unprunable.

    Returns:
        Every family found, those that the policy lets QASSO prune with `prunable` set and the others with the reason
        why not, the operators that no rule covers, and the parameters that nothing read.

    Raises:
        GETAError: the model cannot run the batch, returns no tensor, nothing in it may be pruned, an entry of `prune`
            or `keep` matches nothing, or a gate failed.
    """
    flow = analyse(model, batch, times=2)
    space = space_of(flow, prune, keep)
    if not space.prunable:
        raise GETAError(_nothing_prunable(type(model).__name__, space))
    if not verify:
        return space
    verify_space(model, batch, space)
    return _verify_surgery(model, batch, space)


def _verify_surgery(model: nn.Module, batch: Mapping[str, Any], space: PruningSpace) -> PruningSpace:
    """Gate 4, where there is a Hugging Face model with weights to cut; without what its own code can't follow."""
    from geta_hf.surgery.dry_run import rehearse
    from geta_hf.surgery.verify import verify_surgery  # the one step against the way of the data, on demand alone

    if not isinstance(model, PreTrainedModel) or any(parameter.is_meta for parameter in model.parameters()):
        return space
    space = rehearse(model, space, batch)
    verify_surgery(model, batch, space)
    return space


def space_of(flow: Flow, prune: Sequence[str] = (), keep: Sequence[str] = ()) -> PruningSpace:
    """The pruning space of a propagated graph; it may hold nothing prunable.

    Raises:
        GETAError: an entry of `prune` or `keep` matches nothing.
    """
    families = find_families(flow)
    parameters = {p: value for p, value in enumerate(flow.graph.values) if value.kind == "parameter"}
    named = {member.tensor for family in families for member in family.members}
    shapes = {value.names[0]: value.shape for value in flow.graph.values if value.names and value.names[0] in named}
    read = {ref for node in flow.graph.nodes for ref in _reads(node)}
    space = PruningSpace(
        families,
        shapes,
        flow.frozen,
        untouched=tuple(value.names[0] for position, value in parameters.items() if position not in read),
        buffers=tuple(v.names[0] for v in flow.graph.values if v.kind == "buffer" and v.names[0] in shapes),
        matrix_parameters=sum(value.elements for value in parameters.values() if len(value.shape) > 1),
    )
    return apply_policy(space, prune, keep)


def _reads(node: Node) -> Iterator[int]:
    for inner in (node, *node.body):
        yield from inner.refs()


def _nothing_prunable(model: str, space: PruningSpace) -> str:
    frozen = "; ".join(f"{f.operator} in {f.module or model} ({f.reason}, {f.count}x)" for f in space.frozen)
    refused = "; ".join(f"{family.name}: {family.reason}" for family in space.families[:8])
    return (
        f"nothing in {model} may be pruned. Operators without a rule: {frozen or 'none'}. "
        f"Families found but not prunable: {refused or 'none'}. Name kinds, couplings or families in `prune` to switch "
        "them on. Whatever the model returns keeps its shape, so ask it for no attentions or hidden states"
    )
