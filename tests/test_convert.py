"""From a checkpoint or an exported folder to a folder of any format."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForQuestionAnswering

from geta_hf import GETAConfig
from geta_hf.checkpoints import PROGRESS_NAME
from geta_hf.cli import main
from geta_hf.convert import convert
from geta_hf.errors import GETAError
from tests.test_trainer import SMALL, trainer

IDS = {"input_ids": torch.arange(3, 19).view(2, 8)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a checkpoint from its middle, and what its trainer exported."""
    folder = tmp_path_factory.mktemp("run")
    config = GETAConfig(**SMALL, activation_bits=(4, 8), embedding_bits=8)
    made = trainer(folder / "run", config, save_strategy="steps", save_steps=10)
    made.train()
    made.save_model(str(folder / "run" / f"checkpoint-{made.state.global_step}"))
    made.export_model(folder / "exported")
    return folder


def test_a_checkpoint_becomes_what_its_trainer_exported(run: Path, tmp_path: Path) -> None:
    report = convert(run / "run", tmp_path / "out")
    assert report is not None
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", run / "exported"))
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for name in ("geta_structure.json", "geta_config.json", "config.json"):
        assert json.loads((tmp_path / "out" / name).read_text()) == json.loads((run / "exported" / name).read_text())


def test_a_checkpoint_from_before_the_end_is_refused(run: Path, tmp_path: Path) -> None:
    first = min(run.glob("run/checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    with pytest.raises(GETAError, match="before the end of the joint stage"):
        convert(first, tmp_path / "out")
    (first / PROGRESS_NAME).unlink()
    with pytest.raises(GETAError, match=PROGRESS_NAME):
        convert(first, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_exported_folder_is_written_anew(run: Path, tmp_path: Path) -> None:
    assert convert(run / "exported", tmp_path / "out") is None
    first, again = run / "exported", tmp_path / "out"
    assert {path.name for path in first.iterdir()} == {path.name for path in again.iterdir()}
    assert (first / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    models = [AutoModelForQuestionAnswering.from_pretrained(folder) for folder in (first, again)]
    with torch.no_grad():
        outputs = [model(**IDS).start_logits for model in models]
    assert torch.equal(*outputs)


def test_the_command_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["export", str(run / "run"), str(out), "--embedding-bits", "4"]) == 0
    assert "geta format" in capsys.readouterr().out
    bits = json.loads((out / "geta_structure.json").read_text())["bits"]
    assert bits["bert.embeddings.word_embeddings"] == 4
    assert main(["export", str(run / "run"), str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["export", str(run / "exported"), str(tmp_path / "other"), "--embedding-bits", "4"]) == 2
    assert "is an export already" in capsys.readouterr().err
    assert main(["export", str(run), str(tmp_path / "other")]) == 2
    assert "neither a checkpoint" in capsys.readouterr().err
    assert main(["export", str(run / "exported"), str(tmp_path / "other"), "--format", "vanilla"]) == 2
    assert not (tmp_path / "other").exists()


KILLED = """
import os, sys
from geta_hf.convert import convert
from pathlib import Path
steps = int(sys.argv[3])
original = Path.rename
def rename(self, target):
    global steps
    if steps == 0:
        os._exit(9)
    steps -= 1
    return original(self, target)
Path.rename = rename
convert(sys.argv[1], sys.argv[2], overwrite=True)
"""


@pytest.mark.parametrize("steps", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_killed_while_it_replaces_a_folder_nothing_is_lost(run: Path, tmp_path: Path, steps: int) -> None:
    """Between the two renames the old folder stands under another name beside it."""
    convert(run / "exported", tmp_path / "out")
    whole = (tmp_path / "out" / "model.safetensors").read_bytes()
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(run / "exported"), str(tmp_path / "out"), str(steps)]
    assert subprocess.run(command, env=dict(os.environ), check=False).returncode == 9
    assert not (tmp_path / "out").exists() or (tmp_path / "out" / "model.safetensors").read_bytes() == whole
    left = [path for path in tmp_path.glob("**/model.safetensors") if path.read_bytes() == whole]
    assert left
