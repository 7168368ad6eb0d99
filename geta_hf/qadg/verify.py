"""Run gates 2 and 3, which a pruning space has to pass: completeness and alignment of its slices.

Neither is enough alone. Gate 3 compares sliced with zeroed outputs: of a group that lacks a member, the missing slice
is often multiplied by zeros, so that nothing shows. Gate 2 compares shapes, which cannot see that the wrong rows were
taken. Both run on replays of a recording (`replay.py`), with random weights: a fresh model has biases of zero and norm
weights of one, which would hide a slice that is forgotten.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from geta_hf.errors import GETAError
from geta_hf.qadg.families.find import find_families
from geta_hf.qadg.group_types import Family
from geta_hf.qadg.propagation.element_ids import PINNED
from geta_hf.qadg.propagation.flow import Flow
from geta_hf.qadg.propagation.propagate import record_and_propagate
from geta_hf.qadg.replay import Replay, ReplayError, Weights, double
from geta_hf.qadg.space import PruningSpace, kept_indices
from geta_hf.qadg.variants import variants

TOLERANCE = 1e-9
"""Largest difference of outputs in double precision, relative to the largest output."""

_ROUNDS = 4  # removals for the first batch, and bits of the codes in `_RecordingTrial.removals`
_NOISE = 4_194_301  # a prime, so that the rows of a longer weight do not repeat
_HUGE = 1e30  # masked scores hold the lowest float, which must not set the scale of a comparison

Removal = dict[str, torch.Tensor]


class _GateError(Exception):
    """A gate failed; the message says which and how."""


class _RecordingTrial:
    """A recorded model with random weights, on which removals are tried.

    Args:
        flow: the propagated recording.
        model: the model that was recorded; read, not changed.
        space: whose prunable families are tried.
        seed: for weights and removals.
    """

    def __init__(self, flow: Flow, model: nn.Module, space: PruningSpace, seed: int) -> None:
        self.flow = flow
        self.space = space
        self.generator = torch.Generator().manual_seed(seed)
        self.positions = {v.names[0]: p for p, v in enumerate(flow.graph.values) if v.role in ("parameter", "buffer")}
        self._check_names()
        # One stretch serves all weights, since they are made again in every replay and drawing them would be slow.
        self.noise = torch.rand(_NOISE, generator=self.generator, dtype=torch.float64) - 0.5
        self.scales: dict[str, float] = {}
        self.cut = {member.tensor for family in space.families for member in family.members}
        self.tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        # What this recording did not touch, such as an expert that no token went to, cannot be tried on it.
        self.families = [f for f in space.prunable if any(self._touched(member.tensor) for member in f.members)]
        self.atoms = {family.name: self._atoms(family) for family in self.families}

    def _touched(self, name: str) -> bool:
        return self.flow.known(self.positions[name])

    def _check_names(self) -> None:
        for family in self.space.families:
            for member in family.members:
                shape = self.space.shapes.get(member.tensor)
                position = self.positions.get(member.tensor)
                if position is None or self.flow.graph.values[position].shape != shape:
                    found = "none" if position is None else str(self.flow.graph.values[position].shape)
                    raise GETAError(
                        f"{family.name} cuts {member.tensor} of shape {shape}, but the model's has shape {found}; "
                        "build the space for this very model"
                    )
                low, high = int(member.index.min()), int(member.index.max())
                if low < 0 or high >= shape[member.dim] or member.index.shape[0] != family.size:
                    raise GETAError(
                        f"{family.name} has indices {low}..{high} of {member.tensor} dim {member.dim} in "
                        f"{member.index.shape[0]} groups of {family.size}, but the dim has {shape[member.dim]}"
                    )

    def _random(self, name: str) -> torch.Tensor:
        """Return noise of the tensor's own scale; biases and norm weights away from 0 and 1; quantizers as they are.

        The same at every call, so that a weight need not be kept.
        """
        tensor = self.tensors[name]
        buffer = self.flow.graph.values[self.positions[name]].role == "buffer"
        # Numbers such as a step size, counters, and buffers such as a table of frequencies mean something.
        if tensor.numel() == 1 or not tensor.is_floating_point() or (buffer and name not in self.cut):
            return torch.ones(tensor.shape).double() if tensor.is_meta else double(tensor.detach().cpu())
        if name not in self.scales:
            scale = 0.0 if tensor.is_meta else float(tensor.detach().float().std())
            self.scales[name] = scale if 0 < scale < float("inf") else tensor.shape[-1] ** -0.5
        noise = self._noise(tensor.numel(), self.positions[name]).view(tensor.shape)
        if tensor.dim() == 1:
            # 0.5 to 1.5: a bias that is never 0, and a norm weight or a running variance that is never negative.
            return noise.add_(1.0)
        # Uniform noise from -0.5 to 0.5 has standard deviation 1 / sqrt(12).
        return noise.mul_(self.scales[name] * 12**0.5)

    def _noise(self, count: int, start: int) -> torch.Tensor:
        """Return a copy of a stretch of the noise, from -0.5 to 0.5, over and over; another one for every start."""
        start = start * 7919 % len(self.noise)
        parts = [self.noise[start : start + count]]
        count -= len(parts[0])
        parts += [self.noise] * (count // len(self.noise)) + [self.noise[: count % len(self.noise)]]
        return torch.cat(parts)

    def _atoms(self, family: Family) -> NDArray[np.int64]:
        """Return for every group the atom that most of its elements carry, shape (groups,).

        A group's own atom is in all of its elements. Others are in some: a head's rows also carry the head dims.
        """
        cells = []
        for member in family.members:
            if not self._touched(member.tensor):
                continue
            ids = self.flow.dims(self.positions[member.tensor])[member.dim]
            if ids is not None:
                cells.append(self.flow.ids.atoms(ids)[member.index.numpy()].reshape(family.size, -1))
        if not cells:
            return np.zeros(family.size, np.int64)
        table = np.concatenate(cells, axis=1)
        rows = np.repeat(np.arange(family.size), table.shape[1])
        (group, atom), count = np.unique(np.stack([rows, table.ravel()]), axis=1, return_counts=True)
        count[atom == PINNED] = 0
        # By group and then by count, so that the most frequent atom of each group comes last.
        order = np.lexsort((count, group))
        last = np.flatnonzero(np.diff(group[order], append=family.size))
        return atom[order][last]

    def check(self, removal: Removal) -> None:
        """Run both gates for one removal.

        Args:
            removal: family name to bool, shape (groups,): True for the groups that are removed.

        Raises:
            _GateError: a gate failed.
        """
        removed = self._removed(removal)
        kept = kept_indices(self.space, removal)
        try:
            # Shapes are asserted on the way; reaching the end is gate 2.
            sliced = Replay(self.flow, removed).run(self._cut(kept, zero=False))
        except ReplayError as error:
            raise _GateError(
                f"gate 2 (completeness: the slices of a group must be all that is removed): {error}"
            ) from error
        # Divisors are corrected for these families alone: any other family must not depend on one.
        coupled = {family.name for family in self.space.prunable if "norm" in family.couplings}
        divisors = self._removed({name: mask for name, mask in removal.items() if name in coupled})
        zeroed = Replay(self.flow, divisors, zeroed=True).run(self._cut(kept, zero=True))
        for position, (left, right) in enumerate(zip(sliced, zeroed, strict=True)):
            difference = _difference(left, right)
            # Not `difference > TOLERANCE`, which NaN would pass.
            if not difference <= TOLERANCE:
                raise _GateError(
                    "gate 3 (alignment: sliced groups must act like zero groups): "
                    f"output {position} differs by {difference:.1e} of its scale"
                )

    def trouble(self) -> str:
        """Return why the recorded forward does not even run with nothing removed; empty when it does."""
        try:
            outputs = Replay(self.flow).run(self._cut({}, zero=False))
        except ReplayError as error:
            return f"cannot run the batch: {error}"
        if any(bool(output.isnan().any()) for output in outputs):
            return "gives NaN on random weights, on which gates 2 and 3 run, so they can prove nothing of it"
        return ""

    def _removed(self, removal: Removal) -> NDArray[np.bool_]:
        """Return for every id whether it is an atom that is removed; bool, shape (ids,)."""
        removed = np.zeros(self.flow.ids.count, np.bool_)
        for name, mask in removal.items():
            removed[self.atoms[name][mask.numpy()]] = True
        removed[PINNED] = False
        return removed

    def _cut(self, kept: dict[str, dict[int, torch.Tensor]], zero: bool) -> Weights:
        """Return what makes the weights without the removed slices, or with zeros there."""

        def make(name: str) -> torch.Tensor:
            tensor = self._random(name)
            for dim, indices in kept.get(name, {}).items():
                if zero:
                    removed = torch.ones(tensor.shape[dim], dtype=torch.bool).index_fill(0, indices, False)
                    tensor.index_fill_(dim, torch.nonzero(removed).flatten(), 0.0)
                else:
                    tensor = tensor.index_select(dim, indices)
            return tensor

        return {position: partial(make, name) for name, position in self.positions.items()}

    def possible(self, removal: Removal) -> Removal:
        """Return the part of a removal that this recording touches."""
        return {name: mask for name, mask in removal.items() if name in self.atoms and mask.any()}

    def removals(self, rounds: int) -> Iterator[Removal]:
        """Yield removals of parts of every prunable family at once: in round r the groups whose code has bit r set.

        Codes are dealt out at random from 1 to 2^rounds - 2, so none has all bits or no bit set. So every group is
        removed at least once and kept at least once, no family loses its last group, and up to 14 groups are all told
        apart (larger families statistically).
        """
        codes = {}
        for family in self._compatible():
            # 4 bits: codes 1 to 14. Group 5 with code 0b0101 is removed in rounds 0 and 2, and kept in 1 and 3.
            codes[family.name] = 1 + torch.randperm(family.size, generator=self.generator) % (2**_ROUNDS - 2)
        for bit in range(rounds):
            masks = {name: (code >> bit) % 2 == 1 for name, code in codes.items()}
            yield {name: mask for name, mask in masks.items() if mask.any()}

    def _compatible(self) -> list[Family]:
        """Return prunable families in random order, without those that exclude an earlier one."""
        chosen: dict[str, Family] = {}
        families = self.families
        for position in torch.randperm(len(families), generator=self.generator).tolist():
            family = families[position]
            # Of two families that cut the same indices only one can lose groups at a time; over seeds either is tried.
            if family.size > 1 and not chosen.keys() & set(family.excludes):
                chosen[family.name] = family
        return list(chosen.values())


def _difference(left: torch.Tensor, right: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest ordinary entry."""
    left = left.double()
    right = right.double()
    if not (left.numel() and right.numel()):
        return 0.0
    ordinary = right.abs()[right.abs() < _HUGE]
    scale = float(ordinary.max()) if ordinary.numel() else 1.0
    # Equal infinities, as in masked scores, differ by NaN.
    error = torch.where(left == right, torch.zeros_like(left), (left - right).abs())
    error = torch.where(right.abs() < _HUGE, error / (scale or 1.0), error / right.abs())
    return float(error.max())


def verify_space(
    model: nn.Module,
    batch: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    space: PruningSpace,
    seed: int = 0,
    removal: Removal | None = None,
    flow: Flow | None = None,
) -> None:
    """Check a space by gates 2 and 3: its groups are complete, and removing them is the same as zeroing them.

    The recorded forward runs on random weights, in double precision on CPU, and holds one weight at a time. Parts of
    all prunable families are removed together, in four combinations for the first batch and one for every other; every
    group is removed at least once and kept at least once.
    Gate 2: every operator accepts the sliced tensors and gives the shape that the dependency graph says. Gate 3: the
    outputs equal those of the full model with the slices zeroed, to 1e-9 of their scale; where a family is coupled to
    a norm, its means then run over what remains. The model itself is not changed, and no family loses its last group.

    Args:
        model: the model that the space was built for.
        batch: a batch of real inputs, or several of different shapes. To a single one, others are added which the model
            runs as well: with other rows, and shorter text with padding. Each is recorded, and must give the same
            prunable families.
        space: what to check; only its prunable families are.
        seed: for the random weights and removals.
        removal: the only one to try instead: family name to bool, shape (groups,), True for the groups to remove.
        flow: a propagated recording of this model on the (first) batch; recorded here when None.

    Raises:
        GETAError: a gate failed (names the family and the gate), the families differ from batch to batch, or the space
            belongs to another model.

    Example:
        >>> import torch
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> sizes = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 32, "num_hidden_layers": 1}
        >>> model = BertForSequenceClassification(BertConfig(vocab_size=30, **sizes))
        >>> batch = {"input_ids": torch.arange(1, 9)[None]}
        >>> from geta_hf import build_space, verify_space
        >>> space = build_space(model, batch)
        >>> verify_space(model, batch, space)  # silent where the space is sound
    """
    expected: list[Family] | None = None
    for recorded in _flows(model, batch, flow):
        found = find_families(recorded)
        first = expected is None
        if expected is None:
            names = {family.name for family in space.prunable}
            expected = [family for family in found if family.name in names]
        _check_same_families(expected, found, recorded)
        trial = _RecordingTrial(recorded, model, space, seed)
        if removal is not None:
            rounds: Iterable[Removal] = [trial.possible(removal)]
        else:
            rounds = trial.removals(_ROUNDS if first else 1)
        for removals in rounds:
            try:
                trial.check(removals)
            except _GateError as failure:
                # A gate that fails with nothing removed says nothing about the groups.
                trouble = trial.trouble()
                if trouble:
                    if first or not isinstance(batch, Mapping):
                        raise GETAError(f"{type(model).__name__} {trouble}") from None
                    # A made-up batch, which the model turns out not to run.
                    break
                name, reason = _blame(trial, removals) or (" with ".join(removals), failure)
                remedy = "mark it unprunable, or correct the rule of that operator"
                raise GETAError(f"{name} fails {reason}; {remedy}") from None


def _flows(
    model: nn.Module, batch: Mapping[str, Any] | Sequence[Mapping[str, Any]], first: Flow | None
) -> Iterator[Flow]:
    """Yield a propagated recording of every batch, and of other shapes of a single one."""
    batches = [batch] if isinstance(batch, Mapping) else batch
    yield record_and_propagate(model, batches[0]) if first is None else first
    if not isinstance(batch, Mapping):
        yield from (record_and_propagate(model, item) for item in batches[1:])
        return
    for other in variants(model, batch):
        try:
            flow = record_and_propagate(model, other)
        except GETAError:
            # Not every model runs every shape.
            continue
        yield flow


def _check_same_families(expected: Iterable[Family], found: Iterable[Family], flow: Flow) -> None:
    """Raise an error unless every family is found again in a recording whose operators touch its tensors.

    It may have another name there: names are numbered where several families would have the same.
    """
    by_tensor_dims: dict[frozenset[tuple[str, int]], list[Family]] = {}
    for family in found:
        by_tensor_dims.setdefault(_tensor_dims_of(family), []).append(family)
    read = {name for position, v in enumerate(flow.graph.values) if flow.known(position) for name in v.names}
    for family in expected:
        if any(_same_members(family, other) for other in by_tensor_dims.get(_tensor_dims_of(family), ())):
            continue
        if any(member.tensor in read for member in family.members):
            raise GETAError(
                f"{family.name} is not found again, or with other members, when the forward is recorded again: its "
                "control flow changes from call to call, or with the content or shape of the batch. Make the forward "
                "take one path"
            )


def _tensor_dims_of(family: Family) -> frozenset[tuple[str, int]]:
    return frozenset((member.tensor, member.dim) for member in family.members)


def _same_members(left: Family, right: Family) -> bool:
    theirs = {(m.tensor, m.dim): m.index for m in right.members}
    return all(torch.equal(m.index, theirs[m.tensor, m.dim]) for m in left.members)


def _blame(trial: _RecordingTrial, removal: Removal) -> tuple[str, _GateError] | None:
    """Return the first family whose removal alone fails, with the failure; None if only the combination does."""
    for name, mask in removal.items():
        try:
            trial.check({name: mask})
        except _GateError as failure:
            return name, failure
    return None
