"""Time models against each other on this machine."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from transformers import PreTrainedModel

from geta_hf.costs.model_costs import Image, one_sample

_WARM_UP = 3
_ALIKE = 1.05
"""The ratio of two times up to which noise may have made the difference."""


def time_in_turns(
    calls: Mapping[str, Callable[[], object]],
    repeats: int = 30,
    seconds: float = math.inf,
    clock: Callable[[], float] | None = None,
) -> dict[str, float]:
    """Time calls that take turns, so that a change of the machine's load affects all alike.

    Args:
        calls: name -> what to time, which may run on an accelerator.
        repeats: turns that are timed, after three more to warm up. Default 30.
        seconds: after which no turn begins, once there were two; of few turns, half are to warm up. Default: no limit.
        clock: returns seconds; `time.process_time` counts the processor's alone, on a CPU that others use too. Default:
            `time.perf_counter`.

    Returns:
        Name -> median in milliseconds.

    >>> times = time_in_turns({"one": lambda: sum(range(10)), "other": lambda: sum(range(100))}, repeats=3)
    >>> list(times)
    ['one', 'other']
    """
    clock = time.perf_counter if clock is None else clock
    taken: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    for turn in range(_WARM_UP + repeats):
        if turn >= 2 and time.perf_counter() - begin > seconds:
            break
        for name, call in calls.items():
            start = clock()
            call()
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            taken[name].append(clock() - start)
    # The first turns allocate memory and choose kernels.
    return {name: 1000 * statistics.median(times[min(_WARM_UP, len(times) // 2) :]) for name, times in taken.items()}


@torch.no_grad()
def measure_latency(
    models: Mapping[str, PreTrainedModel],
    tokens: int,
    repeats: int = 30,
    *,
    image: Image | None = None,
    clock: Callable[[], float] | None = None,
) -> dict[str, float]:
    """Measure a forward pass on one sequence, or on one image; see `time_in_turns`.

    Args:
        models: name -> model.
        tokens: length of the sequence.
        repeats: passes that are timed.
        image: channels, height and width of one image, which is run instead. Default None.
        clock: as in `time_in_turns`.

    Returns:
        Name -> median in milliseconds.
    """

    def one_pass(model: PreTrainedModel) -> Callable[[], object]:
        sample = one_sample(model, tokens, image)
        return lambda: model(**sample)

    return time_in_turns({name: one_pass(model) for name, model in models.items()}, repeats, clock=clock)


def faster(dense: float, compressed: float) -> str:
    """Say how two durations compare, such as "1.9x faster"; differences of 5 % and less may be noise.

    >>> faster(152, 79), faster(100, 102), faster(10, 15)
    ('1.9x faster', 'about as fast', '1.5x slower')
    """
    ratio = dense / compressed
    if 1 / _ALIKE <= ratio <= _ALIKE:
        return "about as fast"
    return f"{ratio:.1f}x faster" if ratio > 1 else f"{1 / ratio:.1f}x slower"
