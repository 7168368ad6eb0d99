"""`geta-hf train`: the recipe that a config names, its help, and what a misspelled word may mean."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from geta_hf import GETAError, __version__
from geta_hf.cli import main
from geta_hf.recipes import CONFIGS, RECIPES, language_modeling, question_answering
from geta_hf.recipes.arguments import apply_overrides, describe_config, split_config
from geta_hf.utils.suggestions import did_you_mean
from tests.elsewhere import run_script
from tests.recipes.test_question_answering import arguments_for

ROOT = Path(__file__).parent.parent.parent


def test_the_command_runs_the_recipe_of_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And all spellings of a value reach it."""
    argv = [*arguments_for(tmp_path, "--disable_tqdm=true"), "max-steps=2", "--warmup-steps=1"]
    found = []
    monkeypatch.setattr(question_answering, "run", lambda arguments: found.append(arguments) or {})
    assert main(["train", *argv]) == 0
    (arguments,) = found
    assert (arguments.training.max_steps, arguments.training.warmup_steps) == (2, 1)
    assert arguments.output == tmp_path / "out" and arguments.geta is None


def test_every_ready_made_config_names_its_recipe() -> None:
    for path in CONFIGS.glob("*.yaml"):
        assert yaml.safe_load(path.read_text())["recipe"] in RECIPES, path


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help_without_a_config_lists_recipes_configs_and_settings(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *argv]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: geta-hf train CONFIG.yaml") and describe_config() in shown
    assert all(name in shown for name in (*RECIPES, *(path.stem for path in CONFIGS.glob("*.yaml"))))


@pytest.mark.parametrize("argv", [["demo", "--help"], ["-h", "demo"], ["--help", "recipe=question_answering"]])
def test_help_with_a_config_is_the_recipes(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *argv]) == 0
    shown = capsys.readouterr().out
    assert str(question_answering.__doc__) in shown and "--doc_stride" in shown and describe_config() in shown


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["none.yaml"], "none.yaml: no such config file"),
        (["seed=1"], "the command line names no recipe; add `recipe:`, one of question_answering"),
        (["demo", "recipe=question"], "there is no recipe 'question' (did you mean question_answering?); choose one"),
        (["demo", "--recipe", "[1]"], "there is no recipe '[1]'; choose one"),
        (["demo", "stray"], "'stray': expected --key value or key=value"),
    ],
)
def test_what_is_wrong_is_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *argv]) == 2
    assert capsys.readouterr().err.startswith(f"geta-hf: {message}")


def test_a_config_without_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text("seed: 1")
    assert main(["train", str(tmp_path / "mine.yaml")]) == 2
    assert f"{tmp_path / 'mine.yaml'} names no recipe; add `recipe:`" in capsys.readouterr().err


def test_a_file_with_an_equals_sign_is_a_config(tmp_path: Path) -> None:
    (tmp_path / "a=b.yaml").write_text("seed: 1")
    assert split_config([str(tmp_path / "a=b.yaml"), "x=1"]) == (str(tmp_path / "a=b.yaml"), ["x=1"])
    assert split_config(["a=b"]) == (None, ["a=b"])
    assert split_config([]) == (None, [])


def test_spellings_of_overrides() -> None:
    values: dict[str, object] = {}
    apply_overrides(values, ["a=1", "--b=x=y", "--c-d", "2", "--e", "--geta.mean-bits=5", "f="])
    assert values == {"a": 1, "b": "x=y", "c_d": 2, "e": True, "geta": {"mean_bits": 5}, "f": None}


@pytest.mark.parametrize("spelling", ["--no_evaluate_before_export", "--no-evaluate-before-export=true"])
def test_switches_can_be_turned_off_as_the_help_says(spelling: str) -> None:
    found = question_answering.parse_arguments(["--model_name_or_path", "m", "--use_cpu", spelling])
    assert found.data.evaluate_before_export is False


def test_a_recipes_script_refuses_another_recipes_config() -> None:
    with pytest.raises(GETAError, match="is for the recipe question_answering, not language_modeling"):
        language_modeling.parse_arguments(["demo"])


def test_the_likest_name_is_suggested() -> None:
    known = ["learning_rate", "geta.bits", "geta.target_sparsity", "lora"]
    assert did_you_mean("target_sparsty", known) == " (did you mean geta.target_sparsity?)"
    assert did_you_mean("learn", known) == " (did you mean learning_rate?)"
    assert did_you_mean("qqq", known) == ""


def test_versions(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert shown == f"geta-hf {__version__} (torch {torch.__version__}, transformers {transformers.__version__})\n"


def test_former_spellings_are_taken_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(tmp_path), "--data_dir", "d", "--batch-size", "2"]) == 2
    error = capsys.readouterr().err
    assert "geta-hf eval: --data_dir is now --data-dir; the next version drops the former spelling" in error
    assert "--batch_size" not in error and "nothing to score" in error


@pytest.mark.parametrize("command", ["inspect", "export", "compress", "eval", "report", "push"])
def test_options_of_commands_have_dashes(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Those that had underscores before come after their present spelling."""
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = capsys.readouterr().out
    for former in re.findall(r"--[a-z]+_[a-z_]+", shown):
        assert former[2:].replace("_", "-") in shown, former


@pytest.mark.slow
def test_two_processes_run_it_as_a_module(tmp_path: Path) -> None:
    argv = arguments_for(tmp_path, "--max_steps", "40", "--geta.target_sparsity", "0.5")
    words = ["launch", "--num_processes", "2", "--cpu", "--mixed_precision", "no", "-m", "geta_hf", "train", *argv]
    script = tmp_path / "launch.py"
    lines = ["import sys", "from accelerate.commands.accelerate_cli import main", f"sys.argv[1:] = {words!r}", "main()"]
    script.write_text("\n".join(lines))
    done = run_script(script, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["steps"] == 40 and (tmp_path / "out" / "export" / "model.safetensors").is_file()
