"""Prepare data, models and families before the first step."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.utils import logging

from geta_hf.errors import GETAError
from geta_hf.qadg import Family, PruningSpace

logger = logging.get_logger(__name__)


class SeededByEpoch(Sampler[int]):
    """A sampler whose order depends on seed and epoch alone."""

    def __init__(self, inner: LengthGroupedSampler, seed: int) -> None:
        self.inner, self.seed, self.epoch = inner, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.inner)

    def __iter__(self) -> Iterator[int]:
        self.inner.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(self.inner)


def first_batches(loader: Callable[[], Iterable[Any]], count: int) -> list[Any]:
    """Return the first batches of a data loader, and leave all random states as they were.

    Args:
        loader: makes it.
        count: how many batches, fewer where there are no more.

    Raises:
        GETAError: there is none.
    """
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            batches = list(itertools.islice(loader(), count))
    except (StopIteration, ValueError) as error:
        raise GETAError(f"no batch can be made of train_dataset ({error or 'it is empty'})") from error
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
    if not batches:
        raise GETAError("no batch can be made of train_dataset (it is empty)")
    return batches


def empty_copy(model: nn.Module) -> Any:
    """Copy a model without the data of its parameters, to be filled later."""
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, empty)


def without_untrained(space: PruningSpace, model: nn.Module) -> PruningSpace:
    """Return the space with families that cut a frozen parameter marked as not prunable."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}

    def follow(family: Family) -> Family:
        held = [member.tensor for member in family.members if member.tensor in frozen]
        if not family.prunable or not held:
            return family
        logger.warning("not pruned: %s, since %s is not trained", family.name, held[0])
        return dataclasses.replace(family, prunable=False, reason=f"{held[0]} is not trained")

    left = dataclasses.replace(space, families=tuple(follow(family) for family in space.families))
    if not left.prunable:
        raise GETAError("every prunable group has a parameter that is not trained; set requires_grad of some")
    return left
