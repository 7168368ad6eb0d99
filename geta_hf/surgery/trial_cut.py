"""Trial cuts before training: what a model's code cannot follow must be known before hours are spent on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from geta_hf.errors import GETAError
from geta_hf.qadg.group_types import Family
from geta_hf.qadg.space import PruningSpace
from geta_hf.surgery.record import Recordings
from geta_hf.surgery.verify import Removal, SurgeryTrial

logger = logging.get_logger(__name__)


def try_cuts(
    model: PreTrainedModel,
    space: PruningSpace,
    batch: Mapping[str, Tensor],
    recordings: Recordings | None = None,
    labels: Mapping[str, Tensor] | None = None,
) -> PruningSpace:
    """Cut a few groups of every prunable family away on a copy and compare with the same groups zeroed.

    Args:
        model: with or without quantizers; unchanged afterwards.
        space: its pruning space.
        batch: inputs to compare on.
        recordings: of this very model on this batch, as `record_sizes` makes them; made here when None.
        labels: entries that only training passes, to compare in training mode as well.

    Returns:
        The space; families that the model cannot follow are no longer prunable, with the reason.

    Raises:
        GETAError: no prunable family remains.
    """
    # Every trial costs a cut copy and several forwards. Most models pass the first one, with all families at once; only
    # a refusal is worth the search for the families that cause it.
    trial = SurgeryTrial(model, batch, space, recordings, labels)
    reason = trial.refusal(_some_of_each(space.prunable))
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
        reason = trial.refusal(_some_of_each(narrowed.prunable))
    if reason is not None:
        raise GETAError(f"nothing in {type(model).__name__} can be cut away: {reason}")
    for text in dict.fromkeys(refused.values()):
        logger.warning("%d families are not pruned: %s", list(refused.values()).count(text), text)
    return narrowed


def _refused(trial: SurgeryTrial, families: Iterable[Family]) -> dict[str, str]:
    """Return the families that cannot be cut away, with the reason.

    All families of a kind are tried together first; only where that fails is each of its families tried alone.
    """
    refused = {}
    for kind in dict.fromkeys(family.kind for family in families):
        alike = [family for family in families if family.kind == kind]
        reason = trial.refusal(_some_of_each(alike))
        if reason is None:
            continue
        for family in alike:
            own = trial.refusal(_some_of_each([family]))
            if own is not None:
                refused[family.name] = f"the model does not follow when {kind} are cut away: {own}"
    return refused


def _some_of_each(families: Iterable[Family]) -> Removal:
    """Return a removal of one to three groups of each family, by turns.

    The counts differ, since what holds for equal counts alone does not hold in training. The groups come from the
    middle: removing the last one would hide shifted indices. A family never loses its last group: attention without a
    single KV head, for one, leaves a layer's cache without a length.
    """
    removal = {}
    for position, family in enumerate(family for family in families if family.size > 1):
        # Group `middle` and up to two before it: for 5 groups {2}, {1, 2} or {0, 1, 2}. As middle < size - 1, the last
        # group always remains.
        middle = (family.size - 1) // 2
        places = torch.arange(family.size)
        removal[family.name] = (places <= middle) & (places > middle - 1 - position % 3)
    return removal
