"""Find before training how many groups every layer may keep so that an ordinary config.json can say it."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from geta_hf.config import CompressionConfig
from geta_hf.errors import GETAError
from geta_hf.export.formats.plain import Changes, ConfigSearch
from geta_hf.qadg.group_types import Family
from geta_hf.qadg.space import PruningSpace, kept_indices
from geta_hf.serialization.hf_quantizer import attach_quantizer
from geta_hf.surgery.record import Recordings
from geta_hf.surgery.slice import slice_model
from geta_hf.surgery.solve_attributes import solve
from geta_hf.utils.copies import copy_module

_ALL = 256
"""Families of up to so many groups have each of their counts tried; of larger ones, a few decide about the others."""

_BUILT = 64
"""Up to so many counts, the model is built as well, since some classes check sizes there."""


def choose_counts(
    config: CompressionConfig, space: PruningSpace, model: Any, recordings: Recordings | None
) -> tuple[PruningSpace, str | None]:
    """Return the space of a run, and why its result cannot be written in the format `vanilla`.

    Args:
        config: of the run; under `uniform` the space gets the counts that the model's configuration accepts.
        space, model, recordings: as in `with_accepted_counts`; without recordings nothing is known.

    Returns:
        The space and the reason: empty if the format takes the result, None if that is not known.
    """
    if recordings is None:
        return space, None
    problem: str | None = None
    if config.uniform:
        space, problem = with_accepted_counts(space, model, recordings)
    else:
        problem = "layers may keep different numbers of groups, and config.json has one for all; set uniform=True"
    if getattr(config, "activation_bits", None) is not None:
        problem = problem or "it has no place for rounded activations"
    return space, problem or ""


def with_accepted_counts(
    space: PruningSpace, model: PreTrainedModel, recordings: Recordings
) -> tuple[PruningSpace, str | None]:
    """Return the space with the counts that families may keep under `uniform`, and why config.json cannot say them.

    Families of like kind and size are cut alike in trial, on the model's class without weights: that shows which
    numbers of the configuration stand for them. The configuration class, with its own checks, then tells which values
    of these numbers it accepts.

    Args:
        space: the pruning space of the model.
        model: dense, with its weights; unchanged afterwards.
        recordings: of this model, as `prepare_space` returns them.

    Returns:
        The space, whose families have `counts` where not every count will do, and a reason why the result has no
        ordinary configuration; None if it has one.
    """
    alike: dict[object, list[Family]] = defaultdict(list)
    for family in space.trainable:
        if family.size > 1:
            alike[family.kind, family.size, family.parameters].append(family)
    counts: dict[str, tuple[int, ...]] = {}
    problem: str | None = None
    for families in alike.values():
        try:
            accepted = _accepted(space, model, recordings, families)
        except GETAError as error:
            problem = problem or f"{families[0].kind}: {error}"
            continue
        if len(accepted) < families[0].size:
            counts.update({family.name: accepted for family in families})
    found = (dataclasses.replace(f, counts=counts[f.name]) if f.name in counts else f for f in space.families)
    return dataclasses.replace(space, families=tuple(found)), problem


def _accepted(
    space: PruningSpace, model: PreTrainedModel, recordings: Recordings, families: Sequence[Family]
) -> tuple[int, ...]:
    """Return the counts that a configuration accepts for families that all keep equally many, ascending.

    Raises:
        GETAError: no number of the configuration stands for them.
    """
    size = families[0].size
    reason: GETAError | None = None
    for kept in _probes(size):
        try:
            search = ConfigSearch(_cut(space, model, recordings, families, kept))
            changes = next(search.solutions())
        except GETAError as error:  # perhaps this count alone is refused
            reason = reason or error
            continue
        tried = [count for count in _tried(size) if _accepts(search, changes, kept, count, size)]
        if size > _ALL and len(tried) == len(_tried(size)):
            return tuple(range(1, size + 1))
        every = tried if size <= _ALL else [n for n in range(1, size) if _accepts(search, changes, kept, n, size)]
        return (*every, size)
    assert reason is not None
    raise reason


def _probes(size: int) -> Iterator[int]:
    """Yield counts to find the numbers with, the likeliest to be accepted first."""
    seen = set()
    for count in (size // 2, size // 4, size - 1, size // 3, 1):
        if 0 < count < size and count not in seen:
            seen.add(count)
            yield count


def _tried(size: int) -> list[int]:
    return list(range(1, size)) if size <= _ALL else [size - 1, size - 2, size - 3, size // 2 + 1, size // 3]


def _cut(
    space: PruningSpace, model: PreTrainedModel, recordings: Recordings, families: Sequence[Family], count: int
) -> PreTrainedModel:
    """Return a copy that shares what is not cut, in which these families keep their first groups."""
    removed: dict[str, Tensor] = {family.name: torch.arange(family.size) >= count for family in families}
    kept = kept_indices(space, removed)
    small = copy_module(model, {id(parameter): parameter for parameter in model.parameters()})
    attach_quantizer(small, slice_model(small, kept, solve(recordings.traces, kept)))
    return small


def _accepts(search: ConfigSearch, changes: Changes, kept: int, count: int, size: int) -> bool:
    """Return whether the configuration accepts the numbers of `changes`, found for `kept` groups, for `count`."""
    scaled: Changes = {}
    for place, value in changes.items():
        before = search.value(place)
        if before == value:
            scaled[place] = value  # a number that is stated, so that it stays as it is
            continue
        # A number that was open, None, becomes the size itself.
        whole = value * size if before is None else before * kept
        if (before is not None and before * kept != value * size) or whole * count % (kept * size):
            return False
        scaled[place] = whole * count // (kept * size)
    return search.accepts(scaled, build=size <= _BUILT)
