"""What tests of the operator rules share: tiny modules around an operator, and the groups found there, proven."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from geta_hf.qadg import Family, PruningSpace, kept_indices, verify_space
from geta_hf.qadg.propagation.flow import Flow
from geta_hf.qadg.propagation.propagate import record_and_propagate
from geta_hf.qadg.replay import Replay, double
from geta_hf.qadg.space import space_of

Batch = dict[str, Tensor]
Cut = dict[str, list[list[int]]]
"""A family as data: `tensor:dim` to the rows of indices."""


class Between(nn.Module):
    """`down(operator(up(x)))`."""

    def __init__(self, operator: Callable[[Tensor], Tensor], up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.up, self.down, self.operator = up, down, operator

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.operator(self.up(x)))


def linears(operator: Callable[[Tensor], Tensor], made: int = 8, read: int = 8) -> tuple[nn.Module, Batch]:
    """The operator between two linear layers, on tokens of shape (2, 4, 6)."""
    torch.manual_seed(0)
    return Between(operator, nn.Linear(6, made), nn.Linear(read, 3)), {"x": torch.randn(2, 4, 6)}


def convs(operator: Callable[[Tensor], Tensor], made: int = 8, read: int = 8) -> tuple[nn.Module, Batch]:
    """The operator between two convolutions, on pictures of shape (2, 3, 8, 8)."""
    torch.manual_seed(0)
    return Between(operator, nn.Conv2d(3, made, 1), nn.Conv2d(read, 2, 1)), {"x": torch.randn(2, 3, 8, 8)}


def singles(count: int, start: int = 0) -> list[list[int]]:
    """Every index from `start` on in a group of its own."""
    return [[start + index] for index in range(count)]


def channels(count: int = 8) -> Cut:
    """What `linears` and `convs` cut where the operator lets every channel pass by itself."""
    return {"up.weight:0": singles(count), "up.bias:0": singles(count), "down.weight:1": singles(count)}


def cuts(model: nn.Module, batch: Batch) -> list[Cut]:
    """All families of a model, after proof that each of them may be removed whatever the policy says."""
    space = proven(model, batch)
    return [as_cut(family) for family in space.families]


def as_cut(family: Family) -> Cut:
    return {f"{member.tensor}:{member.dim}": member.index.tolist() for member in family.members}


def all_prunable(space: PruningSpace) -> PruningSpace:
    """Whatever the policy says; a family of one group stays."""
    families = (replace(family, prunable=family.size > 1, reason="") for family in space.families)
    return replace(space, families=tuple(families))


def proven(model: nn.Module, batch: Batch) -> PruningSpace:
    """The space after all gates, with slices compared to zeros in the model itself where no norm is involved."""
    model = model.eval()
    flow = record_and_propagate(model, batch, times=2)
    space = all_prunable(space_of(flow))
    verify_space(model, batch, space)
    for family in space.prunable:
        if "norm" not in family.couplings:
            for parity in (0, 1):
                mask = torch.arange(family.size) % 2 == parity
                _check_against_model(model, batch, flow, space, {family.name: mask})
    return space


def _check_against_model(model: nn.Module, batch: Batch, flow: Flow, space: PruningSpace, removal: Batch) -> None:
    """What is left when groups leave a replay is what the model itself gives with zeros there."""
    kept = kept_indices(space, removal)
    full, cut = _random_state(model), {}
    for name, tensor in full.items():
        for dim, indices in kept.get(name, {}).items():
            gone = torch.ones(tensor.shape[dim], dtype=torch.bool).index_fill(0, indices, False)
            tensor.index_fill_(dim, torch.nonzero(gone).flatten(), 0.0)
        cut[name] = tensor
        for dim, indices in kept.get(name, {}).items():
            cut[name] = cut[name].index_select(dim, indices)
    values = {value.names[0]: position for position, value in enumerate(flow.graph.values) if value.names}
    weights = {values[name]: tensor.clone for name, tensor in cut.items() if flow.known(values[name])}
    sliced = Replay(flow, _leaving(flow, space, removal, values)).run(weights)
    for left, right in zip(sliced, _outputs(model, batch, full), strict=True):
        assert torch.allclose(left.double(), right.double(), rtol=1e-9, atol=1e-9), removal


def _random_state(model: nn.Module) -> Batch:
    """Parameters away from 0, where gates stand open and norms are no identity; buffers as they are."""
    generator = torch.Generator().manual_seed(3)
    state = {name: tensor.detach().clone().double() for name, tensor in model.named_parameters()}
    for tensor in state.values():
        if tensor.numel() > 1:
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
    return state | {name: double(tensor.clone()) for name, tensor in model.named_buffers()}


def _leaving(flow: Flow, space: PruningSpace, removal: Batch, values: dict[str, int]) -> NDArray[np.bool_]:
    """The atoms that all elements of a removed group share."""
    leaving = np.zeros(flow.ids.count, np.bool_)
    for family in space.families:
        for group in torch.nonzero(removal.get(family.name, torch.empty(0))).flatten().tolist():
            member = family.members[0]
            ids = flow.dims(values[member.tensor])[member.dim]
            assert ids is not None
            terms = flow.ids.atoms(ids[member.index[group].numpy()])
            common = set(terms[0].tolist()).intersection(*map(set, terms.tolist())) - {0}
            leaving[_own(flow, family, group, values, common)] = True
    return leaving


def _own(flow: Flow, family: Family, group: int, values: dict[str, int], common: set[int]) -> list[int]:
    """Of the atoms that a group's elements share, those that no other element of the tensor has."""
    member = family.members[0]
    ids = flow.dims(values[member.tensor])[member.dim]
    assert ids is not None
    others = np.delete(np.arange(len(ids)), member.index[group].numpy())
    return sorted(common - set(flow.ids.atoms(ids[others]).ravel().tolist()))


def _outputs(model: nn.Module, batch: Batch, tensors: Batch) -> list[Tensor]:
    """What the model itself returns, in double precision."""
    model = copy.deepcopy(model).double()
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name, tensor in tensors.items():
            state[name].copy_(tensor)
        output = model(**{name: double(tensor.clone()) for name, tensor in batch.items()})
    return list(output) if isinstance(output, tuple | list) else [output]
