"""A checkpoint is complete or not there: training and export take the newest complete one, and say so."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from geta_hf.cli import main
from geta_hf.errors import GETAError
from geta_hf.training.checkpoints import is_finished
from geta_hf.training.complete import MARK_NAME, fault_of, newest_to_export, newest_to_resume
from tests.training.test_trainer import STEPS, trainer

LAST, BEFORE = f"checkpoint-{STEPS}", "checkpoint-20"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run with two checkpoints from its cool-down and one from before."""
    folder = tmp_path_factory.mktemp("run")
    trainer(folder, save_steps=10, logging_steps=50).train()
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


FILES = [
    "config.json",
    "geta_config.json",
    "geta_progress.json",
    "geta_world.json",
    "model.safetensors",
    "optimizer.pt",
    "rng_state.pth",
    "scheduler.pt",
    "trainer_state.json",
    "training_args.bin",
]


def test_the_mark_lists_every_file(run: Path) -> None:
    mark = json.loads((run / LAST / MARK_NAME).read_text())
    held = {path.name for path in (run / LAST).iterdir()} - {MARK_NAME}
    assert mark["complete"] and set(FILES) <= set(mark["files"]) == held
    assert fault_of(run / LAST, training=True) is None


@pytest.mark.parametrize("way", ["missing", "cut short"])
@pytest.mark.parametrize("name", FILES)
def test_one_file_less_and_the_checkpoint_before_is_taken(
    run: Path, name: str, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    if way == "missing":
        (run / LAST / name).unlink()
    else:
        os.truncate(run / LAST / name, (run / LAST / name).stat().st_size - 1)
    with caplog.at_level(logging.WARNING):
        assert newest_to_resume(run).name == BEFORE
    assert f"{LAST} is not complete ({name} is {way}), so {run / BEFORE} is taken" in caplog.text
    found = newest_to_export(run, is_finished)
    assert found is not None and found.name == BEFORE


@pytest.mark.parametrize("name", ["config.json", "geta_config.json", "geta_progress.json", "model.safetensors"])
def test_a_file_of_full_size_that_holds_zeros(run: Path, name: str) -> None:
    """Disks leave such files where a machine stopped before their content was written."""
    path = run / LAST / name
    path.write_bytes(bytes(path.stat().st_size))
    assert newest_to_resume(run).name == BEFORE
    found = newest_to_export(run, is_finished)
    assert found is not None and found.name == BEFORE


def test_a_mark_whose_sizes_are_no_numbers(run: Path) -> None:
    (run / LAST / MARK_NAME).write_text(json.dumps({"complete": True, "files": {"model.safetensors": None}}))
    assert newest_to_resume(run).name == BEFORE


@pytest.mark.parametrize("count", range(len(FILES)))
def test_a_kill_at_any_file_leaves_the_checkpoint_before(run: Path, count: int) -> None:
    """Whatever was written by then, and in whatever order."""
    (run / LAST / MARK_NAME).write_text(json.dumps({"complete": False}))
    for name in FILES[count:]:
        (run / LAST / name).unlink()
    assert newest_to_resume(run).name == BEFORE
    assert newest_to_export(run, is_finished) == run / BEFORE


def test_checkpoints_of_earlier_versions_count_by_what_they_hold(run: Path) -> None:
    for folder in run.glob("checkpoint-*"):
        (folder / MARK_NAME).unlink()
    assert newest_to_resume(run).name == newest_to_export(run, is_finished).name == LAST  # type: ignore[union-attr]
    os.truncate(run / LAST / "optimizer.pt", 2000)
    assert newest_to_resume(run).name == BEFORE
    assert newest_to_export(run, is_finished) == run / LAST  # its model is complete
    (run / LAST / "model.safetensors").unlink()
    assert newest_to_export(run, is_finished) == run / BEFORE


def test_a_run_without_optimizer_states_is_still_exported(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    for path in run.glob("*/optimizer.pt"):
        path.unlink()
    with caplog.at_level(logging.WARNING):
        assert newest_to_export(run, is_finished) == run / LAST
    assert (
        f"{LAST} is not complete (optimizer.pt is missing), but an export needs no more than its model" in caplog.text
    )
    with pytest.raises(GETAError, match=r"no complete checkpoint to resume from \(checkpoint-24: optimizer.pt is"):
        newest_to_resume(run)


def test_training_and_the_command_go_on_from_the_newest_complete_one(
    run: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    (run / LAST / "scheduler.pt").unlink()
    made = trainer(run)
    with pytest.raises(GETAError, match=r"checkpoint-24 has no scheduler.pt"):
        made.train(resume_from_checkpoint=str(run / LAST))
    (run / BEFORE / "rng_state.pth").rename(run / "kept")
    with pytest.raises(GETAError, match=r"checkpoint-20 is not complete: rng_state.pth is missing. .*=True takes"):
        made.train(resume_from_checkpoint=str(run / BEFORE))
    (run / "kept").rename(run / BEFORE / "rng_state.pth")
    with caplog.at_level(logging.WARNING):
        assert main(["export", str(run), str(tmp_path / "out")]) == 0
        made.train(resume_from_checkpoint=True)
    assert caplog.text.count(f"so {run / BEFORE} is taken") == 2
    assert made.state.global_step == STEPS and fault_of(run / LAST, training=True) is None  # written again


def test_no_checkpoint_at_all_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(GETAError, match=r"no checkpoint to resume from; leave resume_from_checkpoint out"):
        newest_to_resume(tmp_path / "nowhere")
    with pytest.raises(GETAError, match=r"is no folder to resume from"):
        trainer(tmp_path / "run").train(resume_from_checkpoint=str(tmp_path / "nowhere"))


class Killed(BaseException):
    pass


def test_the_older_checkpoint_is_deleted_only_once_the_new_one_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(tmp_path, save_steps=1, save_total_limit=1)
    save, saved = made._save_rng_state, []

    def kill(folder: str) -> None:
        saved.append(Path(folder).name)
        if len(saved) == 2:
            raise Killed
        save(folder)

    monkeypatch.setattr(made, "_save_rng_state", kill)
    with pytest.raises(Killed):
        made.train()
    assert saved == ["checkpoint-1", "checkpoint-2"] and made.args.save_total_limit == 1
    assert newest_to_resume(tmp_path).name == "checkpoint-1"
    assert fault_of(tmp_path / "checkpoint-2", training=True) == "its writing was cut off"
    again = trainer(tmp_path, save_steps=1, save_total_limit=1)
    again.add_callback(StopAt(3))
    again.train(resume_from_checkpoint=True)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def test_a_loss_that_is_not_finite_names_a_checkpoint_only_where_there_is_one(run: Path, tmp_path: Path) -> None:
    made = trainer(tmp_path / "fresh")
    made._bad_loss = torch.ones((), dtype=torch.bool)
    with pytest.raises(GETAError, match="start again, as no checkpoint was saved"):
        made._check_finite()
    made.args.output_dir = str(run)
    with pytest.raises(GETAError, match=f"resume from {run / LAST}, which is intact"):
        made._check_finite()
