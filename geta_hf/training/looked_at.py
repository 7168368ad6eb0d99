"""Give training again what was looked at before it: the samples of a stream that can be read only once."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from torch.utils.data import IterableDataset


@dataclass
class _Looked:
    """Hold what was read of a stream so far.

    Attributes:
        samples: what was read, in order.
        rest: where reading goes on; None where nothing was read.
        looking: whether what is read now will be wanted again.
    """

    samples: list[Any] = field(default_factory=list)
    rest: Iterator[Any] | None = None
    looking: bool = False


class _LookedAt:
    """A mix-in for an iterable data set: its first pass in training begins with the samples that were looked at."""

    _looked: _Looked

    def __iter__(self) -> Iterator[Any]:
        looked = self._looked
        if looked.looking:
            return self._look()
        if looked.rest is None:
            return super().__iter__()  # type: ignore[misc]
        samples, rest = looked.samples, looked.rest
        self._looked = _Looked()
        return chain(samples, rest)

    def _look(self) -> Iterator[Any]:
        looked = self._looked
        if looked.rest is None:
            looked.rest = super().__iter__()  # type: ignore[misc]
        place = 0
        while True:
            if place == len(looked.samples):
                try:
                    looked.samples.append(next(looked.rest))
                except StopIteration:
                    return
            # A copy, as some collators write to the samples that they are given.
            yield copy.deepcopy(looked.samples[place])
            place += 1


def keep_looked_at(dataset: Any) -> Any:
    """Return a data set like this one that loses nothing of what is read within `looking_at`.

    Anything but an iterable data set is returned as it is: it can be read again.
    """
    if not isinstance(dataset, IterableDataset) or isinstance(dataset, _LookedAt):
        return dataset
    kind = type(dataset)
    # A subclass of the data set's own class, as Trainer, Accelerate and datasets ask for types and methods.
    kept: Any = object.__new__(type(kind.__name__, (_LookedAt, kind), {"__module__": kind.__module__}))
    kept.__dict__.update(dataset.__dict__)
    kept._looked = _Looked()
    return kept


@contextmanager
def looking_at(dataset: Any) -> Iterator[None]:
    """Let what is read of a data set of `keep_looked_at` come again, here and in training."""
    if not isinstance(dataset, _LookedAt):
        yield
        return
    dataset._looked.looking = True
    try:
        yield
    finally:
        dataset._looked.looking = False
