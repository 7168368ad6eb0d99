"""What a run prints and logs: stages by name, each of a short run, and no bars of moments."""

from __future__ import annotations

import logging as standard_logging
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PrinterCallback, ProgressCallback
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import logging

from geta_hf import GETAError
from geta_hf.methods.qasso.schedule import STAGES
from geta_hf.training.console import (
    EveryStage,
    NotebookColumns,
    StagePrinter,
    StageProgress,
    name_stages,
    with_stage_name,
)
from geta_hf.utils.quiet import quiet, without_bars
from tests.training.test_trainer import trainer


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = trainer(tmp_path_factory.mktemp("short"), logging_steps=500)
    made.train()
    return made


def test_a_short_run_logs_each_stage_once(short: Any) -> None:
    logs = [entry for entry in short.state.log_history if "loss" in entry]
    assert [entry["stage"] for entry in logs] == [1, 2, 3, 4]
    summary = short.state.log_history[-1]
    assert summary["train_loss"] > 0 and summary["sparsity"] == 0.5 and summary["stage"] == 4


def test_printers_are_replaced_and_show_the_name(short: Any, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = [type(callback) for callback in short.callback_handler.callbacks]
    assert StagePrinter in kinds and PrinterCallback not in kinds and kinds.count(EveryStage) == 1
    short.log({"loss": 1.0})
    assert "'stage': 'cool-down'" in capsys.readouterr().out
    assert short.state.log_history[-1]["stage"] == 4  # what is stored remains a number


def test_the_bar_shows_the_name_too(tmp_path: Path) -> None:
    made = trainer(tmp_path, disable_tqdm=False)
    kinds = [type(callback) for callback in made.callback_handler.callbacks]
    assert StageProgress in kinds and ProgressCallback not in kinds
    assert with_stage_name(made.method, {"stage": 3, "loss": 1.0}) == {"stage": STAGES[2], "loss": 1.0}
    assert with_stage_name(made.method, {"eval_loss": 1.0}) == {"eval_loss": 1.0}


@pytest.mark.parametrize("strategy", ["no", "steps", "epoch"])
def test_the_table_in_a_notebook_has_the_columns_of_the_method(
    short: Any, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = pytest.importorskip("transformers.utils.notebook")
    monkeypatch.setattr(notebook.disp, "display", lambda *_, **__: SimpleNamespace(update=lambda _: None))
    table = notebook.NotebookProgressCallback()
    callbacks = [table]
    name_stages(callbacks, lambda: short.method)
    args = SimpleNamespace(eval_strategy=IntervalStrategy(strategy))
    state = SimpleNamespace(max_steps=8, log_history=[])
    table.on_train_begin(args, state, None)
    for step, epoch in ((4, 1.0), (8, 2.0)):
        state.global_step, state.epoch = step, epoch
        logs = {"loss": 1.5, **short.compression_state()}
        state.log_history.append(logs)
        for callback in callbacks:
            callback.on_log(args, state, None, logs=logs)
        if strategy != "no":
            for callback in callbacks:
                callback.on_evaluate(args, state, None, metrics={"eval_loss": 2.5})
    head, *rows = table.training_tracker.inner_table
    assert {"Stage", "Sparsity", "Mean Bits", "Relative BOPs"} <= set(head) and len(rows) == 2
    last = dict(zip(head, rows[-1], strict=True))
    assert (last["Training Loss"], last["Stage"], last["Sparsity"]) == (1.5, "cool-down", 0.5)
    assert rows[-1][0] == (2 if strategy == "epoch" else 8)
    assert strategy == "no" or last["Validation Loss"] == 2.5


def test_an_evaluation_alone_has_no_row_to_complete(short: Any) -> None:
    column = NotebookColumns(SimpleNamespace(training_tracker=None), lambda: short.method)
    column.on_evaluate(short.args, short.state, None)


def test_the_runs_own_export_is_replaced_and_no_other(short: Any, tmp_path: Path) -> None:
    own = Path(short.args.output_dir) / "export"
    short.export_model(own)
    written = (own / "model.safetensors").stat().st_mtime_ns
    short.export_model(own)
    assert (own / "model.safetensors").stat().st_mtime_ns > written
    short.export_model(tmp_path / "other")
    with pytest.raises(GETAError, match="exists already"):
        short.export_model(tmp_path / "other")
    (own / "geta_structure.json").unlink()  # some model, but no export
    with pytest.raises(GETAError, match="exists already"):
        short.export_model(own)


def test_bars_are_off_within_and_on_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    logging.enable_progress_bar()
    with without_bars():
        assert not logging.is_progress_bar_enabled()
        with without_bars():
            pass
        assert not logging.is_progress_bar_enabled()
    assert logging.is_progress_bar_enabled()


def test_commands_leave_out_warnings_about_the_future() -> None:
    with warnings.catch_warnings():
        warnings.resetwarnings()
        warnings.simplefilter("default")
        with quiet(), warnings.catch_warnings(record=True) as seen:
            warnings.warn("soon gone", FutureWarning, stacklevel=1)
            warnings.warn("look here", UserWarning, stacklevel=1)
    assert [str(one.message) for one in seen] in (["look here"], ["soon gone", "look here"])


def test_sizes_of_each_layer_are_read_without_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers reads them itself as it loads a config, and warns of that."""
    logger = standard_logging.getLogger("transformers.integrations.heterogeneity.configuration_utils")
    text = "Reading global config value for per-layer attribute `intermediate_size` on a heterogeneous config."
    seen: list[str] = []
    # After the filters.
    monkeypatch.setattr(logger, "callHandlers", lambda record: seen.append(record.getMessage()))
    logger.warning(text)
    with without_bars():
        with without_bars():
            logger.warning(text)
        logger.warning(text)
        logger.warning("something else")
    logger.warning(text)
    assert seen == [text, "something else", text]
