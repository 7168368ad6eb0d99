"""Prepare data, models and families before the first step."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase, ProcessorMixin, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import align_special_tokens
from transformers.utils import logging

from geta_hf.errors import GETAError
from geta_hf.qadg import Family, PruningSpace
from geta_hf.utils.copies import copy_module
from geta_hf.utils.process_state import random_state_kept

logger = logging.get_logger(__name__)


def align_tokens(model: nn.Module, processing_class: Any) -> None:
    """Give the config the tokenizer's special tokens, as Trainer does when training starts.

    Recordings and checks come before that, and both depend on the padding token.

    Args:
        model: with a config, which is changed in place.
        processing_class: the tokenizer or processor of the trainer; others are left out, as Trainer does.
    """
    if isinstance(processing_class, PreTrainedTokenizerBase | ProcessorMixin):
        align_special_tokens(model, processing_class)


class SeededByEpoch(Sampler[int]):
    """A sampler whose order depends on seed and epoch alone."""

    def __init__(self, inner: LengthGroupedSampler, seed: int) -> None:
        self.inner, self.seed, self.epoch = inner, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.inner)

    def __iter__(self) -> Iterator[int]:
        # Trainer leaves it None: the order then comes from torch's global generator, whose state a resumed run does
        # not share at this point. Accelerate calls `set_epoch` on any sampler that has one.
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
    # Shuffling and augmentation may draw from all three generators; the run has to see the data that its seed stands
    # for.
    states = random.getstate(), np.random.get_state()
    try:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        with random_state_kept(() if accelerator is None else (accelerator,)):
            batches = list(itertools.islice(loader(), count))
    except (StopIteration, ValueError) as error:
        raise GETAError(f"no batch can be made of train_dataset ({error or 'it is empty'})") from error
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
    if not batches:
        raise GETAError("no batch can be made of train_dataset (it is empty)")
    return batches


def planned_steps(args: TrainingArguments, loader: Callable[[], Sized]) -> tuple[int, float]:
    """Return the optimizer steps of a run and of one epoch, before training; NaN for an epoch of unknown length.

    Args:
        args: of the run.
        loader: makes the data loader of training.
    """
    try:
        batches = len(loader())
    except TypeError:  # an iterable data set has no length; Trainer then asks for `max_steps`
        return args.max_steps, math.nan
    per_epoch = max(math.ceil(batches / args.gradient_accumulation_steps), 1)
    if args.max_steps > 0:
        return args.max_steps, per_epoch
    return math.ceil(args.num_train_epochs * per_epoch), per_epoch


def empty_copy(model: nn.Module) -> Any:
    """Copy a model without the data of its parameters, to be filled later."""
    # deepcopy takes what its memo holds instead of copying it. Tied parameters have one id, so they stay tied.
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
    return copy_module(model, empty)


def without_untrained(space: PruningSpace, model: nn.Module) -> PruningSpace:
    """Return the space with families that cut a frozen parameter marked as not prunable."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}

    def follow(family: Family) -> Family:
        # A slice that no step changes would still have its old values when its group has to be zero.
        held = [member.tensor for member in family.members if member.tensor in frozen]
        if not family.prunable or not held:
            return family
        logger.warning("not pruned: %s, since %s is not trained", family.name, held[0])
        return dataclasses.replace(family, prunable=False, reason=f"{held[0]} is not trained")

    narrowed = dataclasses.replace(space, families=tuple(follow(family) for family in space.families))
    if not narrowed.prunable:
        raise GETAError("every prunable group has a parameter that is not trained; set requires_grad of some")
    return narrowed
