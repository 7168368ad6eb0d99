"""The four stages of QASSO and their periods, as plain integers: which step belongs to which."""

from __future__ import annotations

import math
from dataclasses import dataclass

from geta_hf.config import Duration, GETAConfig
from geta_hf.errors import GETAError

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
        raise GETAError(f"{name} = {duration} is a share of training and must be below 1; steps are whole numbers")
    if steps < 0:
        raise GETAError(f"{name} = {duration!r} must not be negative")
    return steps


def _parse(duration: str, steps_per_epoch: float, name: str) -> int:
    number, _, unit = duration.strip().partition(" ")
    # Both "1 epoch" and "2 epochs". A bare number has an empty unit, which is refused.
    kind = unit.strip().removesuffix("s")
    try:
        count = float(number)
    except ValueError:
        count = math.nan
    if kind not in ("step", "epoch") or not math.isfinite(count):
        raise GETAError(f"{name} = {duration!r} is not like '200 steps' or '1.5 epochs'")
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
    """Steps of each stage; cool-down takes the rest of `total`.

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
        """Resolve the stages of a config. Raise GETAError when they do not fit into training."""
        lengths = {
            name: resolve_duration(getattr(config, name), total_steps, steps_per_epoch, f"GETAConfig.{name}")
            for name in ("warmup", "projection", "joint")
        }
        used = sum(lengths.values())
        if used > total_steps:
            raise GETAError(f"stages take {lengths}, {used} steps, but training has {total_steps}; shorten them")
        periods = {"projection": config.projection_periods, "joint": config.pruning_periods}
        for name, count in periods.items():
            # A period without a step would never start, so its reduction or its groups would silently be skipped.
            if lengths[name] < count:
                raise GETAError(
                    f"the {name} stage has {lengths[name]} of {total_steps} steps for {count} periods; "
                    f"train longer, lengthen GETAConfig.{name} or use fewer periods"
                )
        return cls(
            **lengths, total=total_steps, projection_periods=periods["projection"], pruning_periods=periods["joint"]
        )

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


def _in_period(stage: str, step: int, length: int, periods: int) -> Phase:
    # Periods differ by at most one step where the stage does not divide evenly.
    # 5 steps in 2 periods: step 2 gives ((2 + 1) * 2 - 1) // 5 = 1, so the periods are steps 0-1 and 2-4.
    period = ((step + 1) * periods - 1) // length
    start, end = (period * length) // periods, ((period + 1) * length) // periods
    return Phase(stage, period, step - start, end - start)
