"""What a run prints: the stage by its name, and a line for each stage of a short run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from geta_hf.methods import Method


def with_stage_name(method: Method, logs: dict[str, Any]) -> dict[str, Any]:
    """Return logs with the name of the stage in place of its number."""
    if "stage" not in logs:
        return logs
    return {**logs, "stage": method.stages[int(logs["stage"]) - 1]}


class StageProgress(ProgressCallback):
    """Print logs above the bar, with the stage by its name."""

    def __init__(self, max_str_len: int, method: Callable[[], Method]) -> None:
        super().__init__(max_str_len)
        self.method = method

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Print the logs."""
        super().on_log(args, state, control, with_stage_name(self.method(), logs), **kwargs)


class StagePrinter(PrinterCallback):
    """Print logs where there is no bar, with the stage by its name."""

    def __init__(self, method: Callable[[], Method]) -> None:
        self.method = method

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Print the logs."""
        super().on_log(args, state, control, with_stage_name(self.method(), logs), **kwargs)


class EveryStage(TrainerCallback):
    """Log when a stage begins, in runs too short for `logging_steps` to show each stage."""

    def __init__(self, method: Callable[[], Method]) -> None:
        self.method = method
        self._last: str | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a log."""
        method = self.method()
        short = state.logging_steps and state.max_steps < len(method.stages) * state.logging_steps
        if args.logging_strategy == IntervalStrategy.STEPS and short and method.stage != self._last:
            self._last = method.stage
            control.should_log = True


def name_stages(callbacks: list[TrainerCallback], method: Callable[[], Method]) -> None:
    """Replace Trainer's own printers in a list of callbacks, and add `EveryStage`; those of a user remain.

    Args:
        callbacks: of a trainer's `callback_handler`, changed in place.
        method: returns the trainer's method at the time, which may be replaced before training.
    """
    for place, callback in enumerate(callbacks):
        if type(callback) is ProgressCallback:
            callbacks[place] = StageProgress(callback.max_str_len, method)
        elif type(callback) is PrinterCallback:
            callbacks[place] = StagePrinter(method)
    callbacks.append(EveryStage(method))
