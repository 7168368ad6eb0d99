"""Trial cuts before training: what a model's code cannot follow must be known before hours are spent on it.

Of a model on meta, which has no weights to cut, only the sizes are solved for. That finds code that fixes a size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from geta_hf.errors import GETAError
from geta_hf.qadg.group_types import Family
from geta_hf.qadg.space import PruningSpace
from geta_hf.surgery.record import Recordings, record_sizes
from geta_hf.surgery.verify import Removal, SurgeryTrial, unsolvable

logger = logging.get_logger(__name__)


class _Trial(Protocol):
    """Says why groups cannot be cut away, or None where they can: by a cut, or by the sizes alone."""

    def refusal(self, removal: Removal) -> str | None: ...

    def unsolvable(self, removal: Removal) -> str | None: ...


class _SizeTrial:
    """A trial of a model without weights: sizes are solved for, and nothing is cut."""

    def __init__(self, space: PruningSpace, recordings: Recordings) -> None:
        self.space = space
        self.recordings = recordings

    def unsolvable(self, removal: Removal) -> str | None:
        return unsolvable(self.space, self.recordings, removal)

    refusal = unsolvable


def try_cuts(
    model: PreTrainedModel,
    space: PruningSpace,
    batch: Mapping[str, Tensor],
    recordings: Recordings | None = None,
    labels: Mapping[str, Tensor] | None = None,
    required: bool = True,
    warn: bool = True,
) -> PruningSpace:
    """Cut a few groups of every prunable family away on a copy, both ends included, and compare with them zeroed.

    Of a model on meta nothing is cut and compared; families are refused that need a size which the code fixes.

    Args:
        model: with or without quantizers; unchanged afterwards.
        space: its pruning space.
        batch: inputs to compare on.
        recordings: of this very model on this batch, as `record_sizes` makes them; made here when None.
        labels: entries that only training passes, to compare in training mode as well.
        required: whether it is an error if no prunable family remains. Default True.
        warn: log what is refused; False for a caller that lists the families with their reasons. Default True.

    Returns:
        The space; families that the model cannot follow are no longer prunable, with the reason.

    Raises:
        GETAError: no prunable family remains.
    """
    # Every trial costs a cut copy and several forwards. Most models pass the first one, with all families at once; only
    # a refusal is worth the search for the families that cause it.
    if not space.prunable:
        return space
    trial = _trial(model, space, batch, recordings, labels)
    reason = _refusal(trial, space.prunable)
    if reason is None:
        return space
    refused = _refused(trial, space.prunable)
    families = tuple(
        dataclasses.replace(family, prunable=False, reason=refused[family.name]) if family.name in refused else family
        for family in space.families
    )
    narrowed = dataclasses.replace(space, families=families)
    if narrowed.prunable:
        # Together again: families that can each be cut alone may not be cut with one another.
        reason = _refusal(trial, narrowed.prunable)
    if reason is not None and (required or narrowed.prunable):
        raise GETAError(f"nothing in {type(model).__name__} can be cut away: {reason}")
    for text in dict.fromkeys(refused.values()) if warn else ():
        logger.warning("number of families that are not pruned: %d; %s", list(refused.values()).count(text), text)
    return narrowed


def _trial(
    model: PreTrainedModel,
    space: PruningSpace,
    batch: Mapping[str, Tensor],
    recordings: Recordings | None,
    labels: Mapping[str, Tensor] | None,
) -> _Trial:
    if any(parameter.is_meta for parameter in model.parameters()):
        return _SizeTrial(space, record_sizes(model, batch) if recordings is None else recordings)
    return SurgeryTrial(model, batch, space, recordings, labels)


def _refusal(trial: _Trial, families: Iterable[Family]) -> str | None:
    """Return why these families cannot be cut away together, at either end or in the middle; None where they can."""
    families = [family for family in families if family.size > 1]
    reason = trial.refusal({family.name: _ends_and_middle(family, place) for place, family in enumerate(families)})
    if reason is not None:
        return reason
    # One end alone, which the other might make up for where sizes of two halves are compared. Only the equations are
    # solved for this one, a small part of what a cut costs.
    return trial.unsolvable({family.name: _one_end(family, place) for place, family in enumerate(families)})


def _refused(trial: _Trial, families: Iterable[Family]) -> dict[str, str]:
    """Return the families that cannot be cut away, with the reason.

    All families of a kind are tried together first; only where that fails is each of its families tried alone.
    """
    refused = {}
    for kind in dict.fromkeys(family.kind for family in families):
        alike = [family for family in families if family.kind == kind]
        reason = _refusal(trial, alike)
        if reason is None:
            continue
        for family in alike:
            own = _refusal(trial, [family])
            if own is not None:
                refused[family.name] = f"the model does not follow when {kind} are cut away: {own}"
    return refused


def _ends_and_middle(family: Family, place: int) -> Tensor:
    """Return a removal of the first group, the last one, and one to three between them, as far as one remains.

    The counts differ from family to family, since what holds for equal counts alone does not hold in training. A family
    never loses its last group: attention without a single KV head, for one, leaves a layer's cache without a length.

    Args:
        family: of at least two groups.
        place: of the family among those that are tried together.
    """
    # For 9 groups {0, 4, 8}, {0, 3, 4, 8} or {0, 2, 3, 4, 8}: more in one half than in the other. Of two groups one or
    # the other, and of three both ends.
    groups = torch.arange(family.size)
    if family.size == 2:
        return groups == place % 2
    middle = (family.size - 1) // 2
    between = (groups <= middle) & (groups > middle - 1 - place % 3)
    ends = (groups == 0) | (groups == family.size - 1)
    return ends if bool((between | ends).all()) else between | ends


def _one_end(family: Family, place: int) -> Tensor:
    """Return a removal of the first or the last group alone: the one that `_ends_and_middle` keeps, of two."""
    end = 0 if place % 2 else family.size - 1
    return torch.arange(family.size) == end
