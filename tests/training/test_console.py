"""What a run prints and logs: stages by name, each of a short run, and no bars of moments."""

from __future__ import annotations

import logging as standard_logging
import warnings
from pathlib import Path
from typing import Any

import pytest
from transformers import PrinterCallback, ProgressCallback
from transformers.utils import logging

from geta_hf import GETAError
from geta_hf.methods.qasso.schedule import STAGES
from geta_hf.training.console import EveryStage, StagePrinter, StageProgress, with_stage_name
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
