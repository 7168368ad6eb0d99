"""Build and use the pruning space: every family of a model, from the model and one batch.

The way is that of paper Alg. 1: record the forward pass (`tracing.record_forward`), merge quantizer branches
(`tracing.merge`, lines 3-14), propagate element ids (`propagation.propagate`, line 15), and read the families from them
(`families.find`). A policy then says which of them may be pruned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from geta_hf.errors import GETAError
from geta_hf.qadg.families.find import find_families
from geta_hf.qadg.group_types import Family, UnsupportedOperator
from geta_hf.qadg.policy import choose_prunable
from geta_hf.qadg.propagation.flow import Flow
from geta_hf.qadg.propagation.propagate import record_and_propagate
from geta_hf.qadg.storage import read_space, write_space
from geta_hf.qadg.tracing.dummy_inputs import empty_model, make_dummy_inputs
from geta_hf.utils.former_modules import former_names

# Pickled spaces name these under this module's former path.
__getattr__ = former_names(
    __name__,
    {
        "Frozen": "geta_hf.qadg.group_types.UnsupportedOperator",
        "Member": "geta_hf.qadg.group_types.Member",
    },
)


@dataclass(frozen=True)
class PruningSpace:
    """All families of one model, and what could not be followed.

    Attributes:
        families: every family found, prunable or not.
        shapes: the full shape of every tensor that a member names, to check a model against.
        unsupported: operators without a rule, which pin all that they read.
        untouched: parameters that no operator read; they can't be pruned.
        buffers: those of the tensors in `shapes` that are buffers.
        matrix_parameters: elements of all parameters of two or more dims.

    Example:
        >>> from transformers import BertConfig
        >>> from geta_hf import PruningSpace
        >>> sizes = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 32, "num_hidden_layers": 1}
        >>> space = PruningSpace.from_config(BertConfig(vocab_size=30, **sizes))
        >>> space.num_groups
        36
        >>> [(family.kind, family.size, family.parameters) for family in space.prunable]
        [('heads', 4, 268), ('channels', 32, 33)]
    """

    families: tuple[Family, ...]
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    unsupported: tuple[UnsupportedOperator, ...] = ()
    untouched: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()
    matrix_parameters: int = 0

    @property
    def frozen(self) -> tuple[UnsupportedOperator, ...]:
        """Return `unsupported`; the former name, kept for this version."""
        return self.unsupported

    @property
    def prunable(self) -> tuple[Family, ...]:
        """Return the families whose groups may be removed."""
        return tuple(family for family in self.families if family.prunable)

    @property
    def trainable(self) -> tuple[Family, ...]:
        """Return the prunable families with their parameters alone: no optimizer touches a buffer."""
        return tuple(
            replace(family, members=tuple(member for member in family.members if member.tensor not in self.buffers))
            for family in self.prunable
        )

    @property
    def num_groups(self) -> int:
        """Return the number of prunable groups, |G| in the paper."""
        return sum(family.size for family in self.prunable)

    @classmethod
    def from_config(
        cls,
        source: str | PreTrainedConfig,
        batch: Mapping[str, Any] | None = None,
        *,
        prune: Sequence[str] = (),
        keep: Sequence[str] = (),
    ) -> PruningSpace:
        """Build the space of a model of which only the configuration is at hand: no weights are read or stored.

        As `build_space` without `verify`, so families count as prunable whose sizes the model's own code fixes, such as
        the heads of PVTv2. `geta-hf inspect` leaves them out, as the trainer does.

        Args:
            source: a Hub name, a local folder, a `config.json`, or a configuration.
            batch: what the model runs; made from the configuration when None.
            prune: see `build_space`.
            keep: see `build_space`.

        Raises:
            GETAError: there is no such configuration, no batch can be made from it, or as `build_space`.
        """
        model = empty_model(source)
        return build_space(model, make_dummy_inputs(model) if batch is None else batch, prune=prune, keep=keep)

    def save(self, folder: str | Path) -> None:
        """Write the space into a folder, as `pruning_space.json` and `pruning_space.safetensors`.

        Args:
            folder: made if need be; a space that it holds is replaced.
        """
        write_space(folder, **{field.name: getattr(self, field.name) for field in fields(self)})

    @classmethod
    def load(cls, folder: str | Path, model: nn.Module | None = None) -> PruningSpace:
        """Read what `save` wrote.

        Args:
            folder: where it is.
            model: what it is to fit; checked by names and shapes.

        Returns:
            The space, equal to the one that was saved.

        Raises:
            GETAError: no space, a damaged one, or one of another model.
        """
        space = cls(**read_space(folder))
        if model is not None:
            space.check(model)
        return space

    def check(self, model: nn.Module) -> None:
        """Check that a model has all tensors that the families cut, in their full shapes.

        Args:
            model: on any device.

        Raises:
            GETAError: naming the first tensor that is missing or has another shape.
        """
        # With duplicates, as the space may name a tied tensor by either of its names.
        tensors: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
        tensors |= dict(model.named_buffers(remove_duplicate=False))
        for name in self.shapes:
            _check_shape(name, tensors.get(name), self)

    def coverage(self, prunable_only: bool = False) -> float:
        """Return the share of the matrix parameters' elements that some family cuts, 0 to 1.

        Args:
            prunable_only: count prunable families alone.
        """
        # By (tensor, dim), since rows and columns of one weight mostly belong to different families.
        cut: dict[tuple[str, int], torch.Tensor] = {}
        for family in self.prunable if prunable_only else self.families:
            for member in family.members:
                size = self.shapes[member.tensor][member.dim]
                hit = cut.setdefault((member.tensor, member.dim), torch.zeros(size, dtype=torch.bool))
                # Several families may cut one dim, and an index that two of them cut counts once.
                hit[member.index.flatten()] = True
        # An element is untouched if none of its dims is cut there, and dims are cut independently of each other.
        untouched: dict[str, float] = {}
        for (tensor, _), hit in cut.items():
            untouched[tensor] = untouched.get(tensor, 1.0) * (1.0 - float(hit.float().mean()))
        parameters = self.shapes.keys() - set(self.buffers)
        matrices = {name: math.prod(self.shapes[name]) for name in parameters if len(self.shapes[name]) > 1}
        covered = sum(matrices[name] * (1.0 - rest) for name, rest in untouched.items() if name in matrices)
        return covered / self.matrix_parameters if self.matrix_parameters else 0.0


def build_space(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    prune: Sequence[str] = (),
    keep: Sequence[str] = (),
    flow: Flow | None = None,
    required: bool = True,
) -> PruningSpace:
    """Find what may be removed from `model`: the quantization-aware dependency graph (paper Sec. 4, Alg. 1).

    The forward runs twice, to see whether it takes the same path, without computing with the parameters, which may lie
    on any device or on meta; the model is as before afterwards. Quantizers, own or foreign, change nothing about the
    groups. Caches are switched off.

    Args:
        model: a Hugging Face model, or any module that `model(**batch)` runs.
        batch: one batch of real inputs; one or two rows will do, with padding if training has it.
        prune: kinds, couplings or name patterns to make prunable in addition to heads and channels; see
            `apply_policy`.
        keep: kinds, couplings or name patterns that are not pruned.
        flow: a propagated recording of this model on this batch that took the same path twice; recorded here when None.
        required: whether it is an error if nothing may be pruned. Default True.

    Returns:
        Every family found, `prunable` set where the policy allows it and otherwise with the reason why not, the
        operators without a rule, and the parameters that nothing read.

    Raises:
        GETAError: the model cannot run the batch, returns no tensor, nothing in it may be pruned, or an entry of
            `prune` or `keep` matches nothing.
    """
    if flow is None:
        # Twice, since a graph of one path says nothing of a model that chooses its path by chance or by a counter.
        flow = record_and_propagate(model, batch, times=2)
    space = space_of(flow, prune, keep)
    # Here and not at the end of training, where a run that removed nothing would come as a surprise.
    if required and not space.prunable:
        raise GETAError(_nothing_prunable(type(model).__name__, space))
    return space


def space_of(flow: Flow, prune: Sequence[str] = (), keep: Sequence[str] = ()) -> PruningSpace:
    """Return the pruning space of a propagated graph; it may hold nothing prunable.

    Args:
        flow: of `record_and_propagate`.
        prune: see `apply_policy`.
        keep: see `apply_policy`.

    Raises:
        GETAError: an entry of `prune` or `keep` matches nothing.
    """
    families = find_families(flow)
    parameters = {p: value for p, value in enumerate(flow.graph.values) if value.role == "parameter"}
    named = {member.tensor for family in families for member in family.members}
    # Full shapes, so that a space can be checked against a model, and costs counted, without the model it came from.
    shapes = {value.names[0]: value.shape for value in flow.graph.values if value.names and value.names[0] in named}
    # With the bodies, or a quantizer's own parameters, which no rule reads, would be reported as unused.
    read = {ref for node in flow.graph.nodes for ref in node.refs_with_body()}
    space = PruningSpace(
        families,
        shapes,
        flow.unsupported,
        untouched=tuple(value.names[0] for position, value in parameters.items() if position not in read),
        buffers=tuple(v.names[0] for v in flow.graph.values if v.role == "buffer" and v.names[0] in shapes),
        matrix_parameters=sum(value.elements for value in parameters.values() if len(value.shape) > 1),
    )
    return apply_policy(space, prune, keep)


def _nothing_prunable(model: str, space: PruningSpace) -> str:
    unsupported = "; ".join(
        f"{one.operator} in {one.module or model} ({one.reason}, {one.count}x)" for one in space.unsupported
    )
    refused = "; ".join(f"{family.name}: {family.reason}" for family in space.families[:8])
    return (
        f"nothing in {model} may be pruned. Operators without a rule: {unsupported or 'none'}. "
        f"Families found but not prunable: {refused or 'none'}. Name kinds, couplings or families in `prune` to switch "
        "them on. Whatever the model returns keeps its shape, so ask it for no attentions or hidden states"
    )


def apply_policy(space: PruningSpace, prune: Sequence[str] = (), keep: Sequence[str] = ()) -> PruningSpace:
    """Decide which families are prunable, whatever was decided before.

    By default heads and channels are, except where they are coupled to a norm, to a tied tensor or to an output.
    Of prunable families that cut the same indices only one remains so: one named in `prune` before the others, then
    the one that cuts most. A family of one group is never prunable.

    Args:
        space: the families.
        prune: switches on. A kind (`head_dim`) or a pattern of names (`model.layers.*.mlp:*`) makes families prunable
            whatever their couplings; a coupling (`norm`) is no obstacle any more.
        keep: switches off, stronger than `prune`: kinds, couplings, or patterns of names.

    Returns:
        The space with `prunable` and `reason` of every family set.

    Raises:
        GETAError: an entry that is no kind, no coupling, and matches no family.

    Example:
        >>> from transformers import BertConfig
        >>> from geta_hf import PruningSpace, apply_policy
        >>> sizes = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 32, "num_hidden_layers": 1}
        >>> space = PruningSpace.from_config(BertConfig(vocab_size=30, **sizes))
        >>> [family.kind for family in apply_policy(space, keep=["heads"]).prunable]
        ['channels']
    """
    return replace(space, families=choose_prunable(space.families, prune, keep))


def zero_groups(model: nn.Module, space: PruningSpace) -> dict[str, torch.Tensor]:
    """Find the groups of the prunable families that are exactly zero in `model`, as QASSO makes them (paper Sec. 5).

    Args:
        model: holds the tensors that the space names, at their full shapes, on any device.
        space: what `build_space` gave for it.

    Returns:
        For every prunable family, by name: bool, shape (groups,), on CPU; True where every parameter slice of the
        group is exactly zero. Buffers have no say: no optimizer touches them.

    Raises:
        GETAError: the model lacks a parameter of the space, or has it in another shape.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    used: dict[tuple[str, int], torch.Tensor] = {}
    result: dict[str, torch.Tensor] = {}
    for family in space.prunable:
        zero = torch.ones(family.size, dtype=torch.bool)
        for member in family.members:
            key = (member.tensor, member.dim)
            if key not in used:
                tensor = parameters.get(member.tensor, buffers.get(member.tensor))
                _check_shape(member.tensor, tensor, space)
                # Once for each (tensor, dim): families of a fused weight share the pass over it.
                used[key] = _nonzero(tensor, member.dim) if member.tensor in parameters else torch.empty(0)
            if member.tensor in parameters:
                # All slices have to be zero: a bias that is not would still act on what follows.
                zero &= ~used[key][member.index].any(dim=1)
        result[family.name] = zero
    return result


def _check_shape(name: str, tensor: torch.Tensor | None, space: PruningSpace) -> None:
    if tensor is None:
        raise GETAError(f"the pruning space names {name}, which the model lacks; build the space for this very model")
    if tuple(tensor.shape) != space.shapes[name]:
        raise GETAError(
            f"{name} has shape {tuple(tensor.shape)}, but {space.shapes[name]} in the pruning space; "
            "build the space for this very model"
        )


def _nonzero(tensor: torch.Tensor | None, dim: int) -> torch.Tensor:
    """Return for every index along `dim` whether anything there is not zero; bool, shape (size,), on CPU."""
    assert tensor is not None
    others = [position for position in range(tensor.dim()) if position != dim]
    nonzero = tensor.detach() != 0
    return (nonzero.any(dim=others) if others else nonzero).cpu()


def kept_indices(space: PruningSpace, removed: Mapping[str, torch.Tensor]) -> dict[str, dict[int, torch.Tensor]]:
    """Return what remains of every tensor when groups are removed.

    Args:
        space: all families.
        removed: family name to bool, shape (groups,): True for the groups to remove. Families that are not named lose
            nothing.

    Returns:
        Tensor name to dim to the kept indices: int64, ascending, on CPU. Only dims that lose something are listed.

    Raises:
        GETAError: an unknown family, a mask of another shape or dtype, a family that would lose its last group, or
            two families that cut the same indices.
    """
    families = {family.name: family for family in space.families}
    cut: dict[tuple[str, int], torch.Tensor] = {}
    losing = {name for name, mask in removed.items() if bool(mask.any())}
    for name, mask in removed.items():
        if name not in families:
            raise GETAError(f"no family {name} in the pruning space; it has {', '.join(families) or 'none'}")
        family = families[name]
        mask = mask.cpu()
        _check_removal(family, mask, losing)
        if name not in losing:
            continue
        for member in family.members:
            # Several families may cut one dim, such as those of a fused projection, so their indices add up.
            size = space.shapes[member.tensor][member.dim]
            along = cut.setdefault((member.tensor, member.dim), torch.zeros(size, dtype=torch.bool))
            along[member.index[mask].flatten()] = True
    kept: dict[str, dict[int, torch.Tensor]] = {}
    for (tensor, dim), along in cut.items():
        kept.setdefault(tensor, {})[dim] = torch.nonzero(~along).flatten()
    return kept


def _check_removal(family: Family, mask: torch.Tensor, losing: set[str]) -> None:
    if mask.dtype != torch.bool or tuple(mask.shape) != (family.size,):
        raise GETAError(
            f"the mask of {family.name} is {mask.dtype} of shape {tuple(mask.shape)}; "
            f"pass torch.bool of shape ({family.size},)"
        )
    if bool(mask.all()):
        raise GETAError(f"{family.name} would lose all of its {family.size} groups; keep at least one")
    clash = losing.intersection(family.excludes)
    if family.name in losing and clash:
        raise GETAError(f"{family.name} and {', '.join(sorted(clash))} cut the same indices; remove from one only")
