"""The four stages of QASSO and their periods, as plain integers: which step belongs to which."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

from geta_hf.config import Duration, GETAConfig, parse_duration
from geta_hf.errors import GETAError

logger = logging.getLogger(__name__)

WARMUP, PROJECTION, JOINT, COOLDOWN = "warm-up", "projection", "joint", "cool-down"
STAGES = (WARMUP, PROJECTION, JOINT, COOLDOWN)


def resolve_duration(duration: Duration, total_steps: int, steps_per_epoch: float, name: str = "duration") -> int:
    """Return a stage's length in optimizer steps.

    Args:
        duration: int steps, float share of training in [0, 1), or text: "200 steps", "1.5 epochs".
        total_steps: optimizer steps of the entire training.
        steps_per_epoch: optimizer steps of one epoch.
        name: what to call it in an error.
    """
    # True is an int in Python, and would pass for one step.
    if isinstance(duration, bool) or not isinstance(duration, (int, float, str)):
        raise GETAError(f"{name} = {duration!r} must be steps, a share of training, or text such as '1.5 epochs'")
    # An int is steps and a float a share, so 1 and 1.0 are far apart: the latter, all of training, is refused.
    if isinstance(duration, str):
        steps = _parse(duration, steps_per_epoch, name)
    elif isinstance(duration, int):
        steps = duration
    elif duration < 1:
        steps = math.floor(duration * total_steps + 1e-6)  # down, so that shares of 1 in all fit into training
    else:
        raise GETAError(f"{name} = {duration} is a share of training and must be below 1; steps are integers")
    if steps < 0:
        raise GETAError(f"{name} = {duration!r} must not be negative")
    return steps


def _parse(duration: str, steps_per_epoch: float, name: str) -> int:
    parsed = parse_duration(duration)
    if parsed is None:
        raise GETAError(f"{name} = {duration!r} is not like '200 steps' or '1.5 epochs'")
    count, kind = parsed
    if kind == "epoch" and not math.isfinite(steps_per_epoch):
        raise GETAError(
            f"{name} = {duration!r}, but the training data has no length; give steps or a share of training"
        )
    return math.floor(count * (steps_per_epoch if kind == "epoch" else 1) + 0.5)


@dataclass(frozen=True)
class Phase:
    """The position of one step in the schedule.

    Attributes:
        stage: one of STAGES.
        period: 0-based period of the projection or joint stage, else 0.
        step: 0-based step inside the period or stage.
        length: steps of that period or stage.
    """

    stage: str
    period: int
    step: int
    length: int

    @property
    def starts(self) -> bool:
        """True at the first step of a period."""
        return self.step == 0

    @property
    def ends(self) -> bool:
        """True at the last step of a period."""
        return self.step == self.length - 1


@dataclass(frozen=True)
class Schedule:
    """Steps of each stage; cool-down takes the rest of `total`. Any stage may have none.

    >>> from geta_hf import GETAConfig, Schedule
    >>> schedule = Schedule.from_config(GETAConfig(warmup=10, projection=0.2), total_steps=100, steps_per_epoch=50)
    >>> schedule.warmup, schedule.projection, schedule.joint
    (10, 20, 40)
    >>> schedule.at(10).stage, schedule.at(99).stage
    ('projection', 'cool-down')
    """

    warmup: int
    projection: int
    joint: int
    total: int
    projection_periods: int
    pruning_periods: int

    @classmethod
    def from_config(cls, config: GETAConfig, total_steps: int, steps_per_epoch: float) -> Schedule:
        """Resolve the stages of a config. A stage of length 0, or of no period, has no steps.

        In a short run every other stage has at least one step, and no more periods than steps.

        Raises:
            GETAError: the stages do not fit into training.
        """
        periods = {"warmup": 1, "projection": config.projection_periods, "joint": config.pruning_periods}
        resolved = {}
        lengths = {}
        for name, count in periods.items():
            duration = getattr(config, name)
            resolved[name] = resolve_duration(duration, total_steps, steps_per_epoch, f"GETAConfig.{name}")
            if not count or _is_zero(duration):
                resolved[name] = lengths[name] = 0
            else:
                lengths[name] = max(resolved[name], 1)
        if sum(resolved.values()) > total_steps:
            used = sum(resolved.values())
            raise GETAError(f"stages take {resolved}, {used} steps, but training has {total_steps}; shorten them")
        lengths = _fit(lengths, total_steps)
        return cls(
            **lengths,
            total=total_steps,
            projection_periods=min(periods["projection"], lengths["projection"]),
            pruning_periods=min(periods["joint"], lengths["joint"]),
        )

    @property
    def cool_down_start(self) -> int:
        """The number of steps before cool-down."""
        return self.warmup + self.projection + self.joint

    @property
    def decided_after(self) -> int:
        """The number of steps after which groups are removed and widths are final; at least one, for its gradients."""
        return max(self.cool_down_start, 1)

    def averages(self, phase: Phase) -> bool:
        """Return whether gradients are averaged in a step, for the scores and widths that are decided later.

        From the projection stage on, so that the first partition has an average to read; without that stage in warm-up,
        and where there is no stage but cool-down, in its first step.
        """
        if phase.stage == WARMUP:
            return self.projection == 0
        if phase.stage == COOLDOWN:
            return self.cool_down_start == 0 and phase.starts
        return True

    def in_last_period(self, phase: Phase) -> bool:
        """Return whether a step belongs to the last period before widths are decided."""
        if phase.stage == JOINT:
            return phase.period == self.pruning_periods - 1
        if self.joint:
            return False
        if phase.stage == PROJECTION:
            return phase.period == self.projection_periods - 1
        return self.projection == 0 and self.averages(phase)

    def first_start_after(self, steps: int) -> int:
        """Return the first step at which a stage or period starts, with `steps` or more before it; -1 if none does."""
        return next((step for step in range(steps, self.total) if self.at(step).starts), -1)

    def at(self, step: int) -> Phase:
        """Return the phase of 0-based optimizer step `step`; steps beyond `total` are cool-down."""
        joint_start = self.warmup + self.projection
        if step < self.warmup:
            return Phase(WARMUP, 0, step, self.warmup)
        if step < joint_start:
            return _in_period(PROJECTION, step - self.warmup, self.projection, self.projection_periods)
        if step < joint_start + self.joint:
            return _in_period(JOINT, step - joint_start, self.joint, self.pruning_periods)
        # Everything after it, however long training goes on: a longer run than planned only trains more.
        start = joint_start + self.joint
        return Phase(COOLDOWN, 0, step - start, max(self.total - start, 1))


def _is_zero(duration: Duration) -> bool:
    """Return whether a length is 0 as it was given; a small share that rounds to no step is not."""
    if not isinstance(duration, str):
        return duration == 0
    parsed = parse_duration(duration)
    return parsed is not None and parsed[0] == 0


def _fit(lengths: dict[str, int], total_steps: int) -> dict[str, int]:
    """Return lengths of stages that fit into training, shortened from the longest where they do not."""
    wanted = [name for name, length in lengths.items() if length]
    if len(wanted) > total_steps:
        raise GETAError(
            f"training has {_count(total_steps, 'step')}, but {', '.join(wanted)} take at least one each: train for "
            f"{_count(len(wanted), 'step')} or more, or leave a stage out with GETAConfig.{wanted[0]} = 0"
        )
    lengths = dict(lengths)
    # Stages that would have rounded to no step take it from the others, one at a time.
    while sum(lengths.values()) > total_steps:
        longest = max(lengths, key=lambda name: lengths[name])
        lengths[longest] -= 1
    return lengths


def note_short_run(schedule: Schedule, config: GETAConfig) -> None:
    """Say in one line of the log where a run is too short for the periods that its config asks for."""
    fewer = []
    for stage, steps, periods, wanted in (
        ("projection", schedule.projection, schedule.projection_periods, config.projection_periods),
        ("joint", schedule.joint, schedule.pruning_periods, config.pruning_periods),
    ):
        if steps and periods < wanted:
            fewer.append(f"{stage} has {_count(periods, 'period')} instead of {wanted} in {_count(steps, 'step')}")
    if fewer:
        logger.warning("training has only %s: %s", _count(schedule.total, "step"), ", ".join(fewer))


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _in_period(stage: str, step: int, length: int, periods: int) -> Phase:
    # Periods differ by at most one step where the stage does not divide evenly.
    # 5 steps in 2 periods: step 2 gives ((2 + 1) * 2 - 1) // 5 = 1, so the periods are steps 0-1 and 2-4.
    period = ((step + 1) * periods - 1) // length
    start, end = (period * length) // periods, ((period + 1) * length) // periods
    return Phase(stage, period, step - start, end - start)
