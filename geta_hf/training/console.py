"""What a run shows: the stage by its name, a line for each stage of a short run, and its columns in a notebook."""

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


class NotebookColumns(TrainerCallback):
    """Add the metrics of the method to the rows of Trainer's table in a notebook, which has the losses alone.

    It must come after the callback of the table.

    Args:
        table: transformers' `NotebookProgressCallback`.
        method: returns the trainer's method at the time.
    """

    def __init__(self, table: Any, method: Callable[[], Method]) -> None:
        self.table = table
        self.method = method

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Complete the row of a log; with evaluations, a row belongs to one of them."""
        if logs and "loss" in logs and args.eval_strategy == IntervalStrategy.NO:
            self._complete(state, logs)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Complete the row of an evaluation by what was logged last."""
        logs = next((entry for entry in reversed(state.log_history) if "stage" in entry), None)
        if logs is not None:
            self._complete(state, logs)

    def _complete(self, state: Any, logs: dict[str, Any]) -> None:
        tracker = self.table.training_tracker  # of a training that goes on; an evaluation alone has none
        if tracker is None or tracker.inner_table is None or len(tracker.inner_table) < 2:
            return
        head, *_, last = tracker.inner_table
        named = with_stage_name(self.method(), logs)
        values = {_title(name): named[name] for name in self.method().metrics() if name in named}
        # The first column is the same, which makes it an update of the last row.
        tracker.write_line({head[0]: last[0], **values})


def _title(name: str) -> str:
    """Return the name of a metric as the table in a notebook spells its own: `mean_bits` is `Mean Bits`."""
    words = name.replace("bops", "BOPs").split("_")
    return " ".join(word[:1].upper() + word[1:] for word in words)


def name_stages(callbacks: list[TrainerCallback], method: Callable[[], Method]) -> None:
    """Replace Trainer's own printers in a list of callbacks, and add `EveryStage`; those of a user remain.

    The table in a notebook remains too, and `NotebookColumns` completes it.

    Args:
        callbacks: of a trainer's `callback_handler`, changed in place.
        method: returns the trainer's method at the time, which may be replaced before training.
    """
    for place, callback in enumerate(callbacks):
        if type(callback) is ProgressCallback:
            callbacks[place] = StageProgress(callback.max_str_len, method)
        elif type(callback) is PrinterCallback:
            callbacks[place] = StagePrinter(method)
    # By name, since its module needs IPython.
    tables = [callback for callback in callbacks if type(callback).__name__ == "NotebookProgressCallback"]
    callbacks += [NotebookColumns(table, method) for table in tables]
    callbacks.append(EveryStage(method))
