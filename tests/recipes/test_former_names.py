"""The recipes' former names run the same recipes, with classes that other processes can find."""

from __future__ import annotations

import pickle
import runpy
import sys
from pathlib import Path

import pytest

from geta_hf.recipes import language_modeling, question_answering
from tests.elsewhere import run_script
from tests.recipes.test_question_answering import arguments_for

ROOT = Path(__file__).resolve().parents[2]
NAMES = {"bert_squad": question_answering, "phi2_commonsense": language_modeling}


def script(name: str) -> Path:
    return ROOT / "recipes" / f"{name}.py"


@pytest.mark.parametrize("name", NAMES)
def test_help_is_that_of_the_recipe(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(script(name)), "--help"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    runpy.run_path(sys.argv[0], run_name="__main__")  # as Python runs a script; any exit would be an error
    shown = capsys.readouterr().out
    assert NAMES[name].__doc__ in shown and "--model_name_or_path" in shown


def test_an_error_is_one_line(tmp_path: Path) -> None:
    done = run_script(script("phi2_commonsense"), str(tmp_path / "none.yaml"))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in done.stderr


def test_a_run_under_the_former_name(tmp_path: Path) -> None:
    """With workers that load the data."""
    done = run_script(script("bert_squad"), *arguments_for(tmp_path, "--dataloader_num_workers", "2"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "export" / "config.json").is_file()


@pytest.mark.parametrize("name", NAMES)
def test_the_classes_are_found_by_other_processes(name: str) -> None:
    names = runpy.run_path(str(script(name)), run_name="__mp_main__")  # as a spawned worker does
    assert names["main"] is NAMES[name].main
    data = NAMES[name].DataArguments()
    assert pickle.loads(pickle.dumps(data)) == data
