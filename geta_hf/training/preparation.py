"""What is done to a model, its families and its optimizer before the first step."""

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

from geta_hf.config import GETAConfig
from geta_hf.errors import GETAError
from geta_hf.qadg import Family, PruningSpace
from geta_hf.quantization import attach_quantizers
from geta_hf.quantization.quantizer import Quantizer

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
    """The first batches of a data loader; all random states are then as they were.

    Args:
        loader: makes it.
        count: how many batches, fewer where there are no more.

    Raises:
        GETAError: there is none.
    """
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            batches = list(itertools.islice(loader(), count))
        except (StopIteration, ValueError) as error:
            raise GETAError(f"no batch can be made of train_dataset ({error or 'it is empty'})") from error
    random.setstate(states[0])
    np.random.set_state(states[1])
    if not batches:
        raise GETAError("no batch can be made of train_dataset (it is empty)")
    return batches


def attach(model: nn.Module, config: GETAConfig) -> None:
    """Put weight quantizers on a model as its config asks."""
    attach_quantizers(
        model,
        include=config.include,
        exclude=config.exclude,
        initial_bits=config.initial_bits,
        target_bits=config.bits[1],
        clipping=config.clipping,
        learn_t=config.learn_exponent,
        per_channel=config.per_channel,
    )


def empty_copy(model: nn.Module) -> Any:
    """A copy of a model without the data of its parameters, to be filled later."""
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, empty)


def without_untrained(space: PruningSpace, model: nn.Module) -> PruningSpace:
    """The space with families that cut a frozen parameter no longer prunable."""
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


def quantizer_parameters(model: nn.Module, trained: bool = True) -> dict[str, nn.Parameter]:
    """Quantizer parameters by name: those that are trained, or all."""
    return {
        f"{name}.{leaf}": parameter
        for name, module in model.named_modules()
        if isinstance(module, Quantizer)
        for leaf, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad or not trained
    }


def own_group(base: torch.optim.Optimizer, quantizers: dict[str, nn.Parameter], learning_rate: float) -> None:
    """Move the quantizers into a parameter group of their own: their learning rate, no weight decay."""
    own = {id(parameter) for parameter in quantizers.values()}
    for group in base.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
        group.pop("param_names", None)  # QASSO names all groups itself
    group = {"params": list(quantizers.values()), "lr": learning_rate, "weight_decay": 0.0}
    base.add_param_group(group)


def hold_frozen(base: torch.optim.Optimizer, frozen: list[nn.Parameter]) -> None:
    """Show a base optimizer parameters that never have a gradient when it steps, so that it leaves them alone."""
    if frozen:
        base.add_param_group({"params": frozen, "lr": 0.0, "weight_decay": 0.0})
