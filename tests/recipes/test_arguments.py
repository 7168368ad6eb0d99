from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

import pytest
from transformers import TrainingArguments

from geta_hf import GETAConfig, GETAError, config
from geta_hf.config import CompressionConfig, above, setting, settings_of
from geta_hf.recipes import CONFIGS
from geta_hf.recipes import language_modeling as recipe
from geta_hf.recipes import question_answering as bert_squad
from geta_hf.recipes.arguments import describe_config, find_config
from tests.elsewhere import run_script

ROOT = Path(__file__).parent.parent.parent

MODEL = ["--model_name_or_path", "model", "--use_cpu"]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("Instruct: {a}\\nOutput: {b}", "Instruct: {a}\nOutput: {b}"),  # as a shell hands it on in single quotes
        ("Instruct: {a}\nOutput: {b}", "Instruct: {a}\nOutput: {b}"),
        ("'Q: {a} {b}'", "Q: {a} {b}"),
        ("{a}, {b}", "{a}, {b}"),
        ("null", None),
    ],
)
def test_a_template_stands_as_it_is(given: str, meant: str | None) -> None:
    assert recipe.parse_arguments([*MODEL, "--template", given]).data.template == meant


def test_text_is_no_yaml_and_the_rest_is(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-3").mkdir()
    options = [
        "--text_column",
        "no",
        "--learning_rate",
        "5e-5",
        "--resume_from_checkpoint",
        "true",
        "--geta.bits",
        "[4, 8]",
    ]
    found = recipe.parse_arguments([*MODEL, *options, "--output_dir", str(tmp_path)])
    assert found.data.text_column == "no" and found.training.learning_rate == 5e-5
    assert found.training.resume_from_checkpoint is True and found.geta is not None and found.geta.bits == (4, 8)
    assert isinstance(found.training, TrainingArguments)


@pytest.mark.parametrize("parse", [recipe.parse_arguments, bert_squad.parse_arguments])
@pytest.mark.parametrize(("asked", "message"), [("true", "has no checkpoint"), ("elsewhere", "is not a folder")])
def test_nothing_to_resume_from(parse: object, asked: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(GETAError, match=message):
        parse([*MODEL, "--resume_from_checkpoint", asked, "--output_dir", str(tmp_path)])  # type: ignore[operator]


@pytest.mark.parametrize("parse", [recipe.parse_arguments, bert_squad.parse_arguments])
def test_a_folder_that_the_export_would_not_replace_is_found_before_training(parse: object, tmp_path: Path) -> None:
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "thesis.txt").write_text("mine")
    with pytest.raises(GETAError, match=r"export is not a model folder.*choose another folder"):
        parse([*MODEL, "--output_dir", str(tmp_path)])  # type: ignore[operator]
    (tmp_path / "export" / "config.json").write_text("{}")
    (tmp_path / "export" / "thesis.txt").unlink()
    parse([*MODEL, "--output_dir", str(tmp_path)])  # type: ignore[operator]  # an earlier run's, which is replaced


def test_help_describes_every_argument_and_every_setting() -> None:
    done = run_script(ROOT / "recipes" / "bert_squad.py", "--help", COLUMNS="1000")
    assert done.returncode == 0, done.stderr
    shown = " ".join(done.stdout.split())
    for field in (*fields(bert_squad.ModelArguments), *fields(bert_squad.DataArguments)):
        assert f"--{field.name} " in shown and field.metadata["help"] in shown, field.name
    assert (
        "--learning_rate" in shown
        and "geta.method NAME one of qasso, one-shot, post-training, search (default: qasso)" in shown
    )
    for name, one in settings_of(GETAConfig).items():
        described = f"--geta.{name} VALUE {one.help} ({one.allowed}; default: {json.dumps(one.default)})"
        assert " ".join(described.split()) in shown, name


def test_both_recipes_print_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    for main in (bert_squad.main, recipe.main):
        for argv in ([], ["-h"]):
            assert main(argv) == {}
            assert describe_config() in capsys.readouterr().out


def test_help_lists_a_shared_setting_once_and_the_methods_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "CONFIG_CLASSES", dict(config.CONFIG_CLASSES))

    @dataclass
    class HuntConfig(CompressionConfig):
        method: ClassVar[str] = "hunt"
        temperature: float = setting(1.0, "Softmax temperature of a hunt.", above(0), section="Hunt")
        multiple_of: int = 8

    text = describe_config()
    assert "`target_sparsity` is 0.5." in " ".join(text.split()) and "{" not in text
    assert re.search(r"one of qasso, .*hunt \(default: qasso\)", text)
    assert text.count("--geta.target_sparsity ") == 1 == text.count("--geta.projection ")
    assert "Targets, every method:" in text and "Stages, method qasso:" in text and "Hunt, method hunt:" in text
    assert "Softmax temperature of a hunt. (a number above 0; default: 1.0)" in text
    assert text.count("--geta.multiple_of ") == 2 and "default: 8)" in text.partition("method hunt:")[2]


def test_the_method_chooses_the_config_class() -> None:
    named = recipe.parse_arguments([*MODEL, "--geta.method", "qasso", "--geta.mean_bits", "5"])
    assert named.geta == GETAConfig(mean_bits=5)
    with pytest.raises(GETAError, match=r"unknown method 'sparse'; known are \[.*'qasso'.*\]"):
        recipe.parse_arguments([*MODEL, "--geta.method", "sparse"])


@pytest.mark.parametrize("name", ["bert_squad", "bert_squad.yaml", "recipes/configs/bert_squad.yaml"])
def test_ready_made_configs_are_found_from_any_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config(name) == CONFIGS / "bert_squad.yaml"
    (tmp_path / "bert_squad.yaml").write_text("seed: 1")  # the user's own comes first
    assert find_config("bert_squad.yaml") == Path("bert_squad.yaml")
    assert find_config("bert_squad") == CONFIGS / "bert_squad.yaml"


@pytest.mark.parametrize("name", ["bert_squad.yml", "runs/bert_squad.yaml", "", "none"])
def test_a_config_that_does_not_exist_lists_those_that_do(name: str) -> None:
    hint = r" \(did you mean bert_squad\?\)" if "bert" in name else ""
    with pytest.raises(GETAError, match=rf"no such config file{hint}; give a YAML file, or one of bert_squad, .*qwen"):
        find_config(name)


def test_ready_made_configs_have_one_place() -> None:
    """The repository's `recipes/configs` is the package's folder, and the wheel contains its files."""
    assert (ROOT / "recipes" / "configs").resolve() == CONFIGS.resolve()
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert '"recipes/configs/*.yaml"' in pyproject
