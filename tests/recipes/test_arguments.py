from __future__ import annotations

from pathlib import Path

import pytest
from transformers import TrainingArguments

from geta_hf import GETAError
from recipes import language_modeling as recipe
from recipes import question_answering as bert_squad

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
@pytest.mark.parametrize(("asked", "message"), [("true", "holds no checkpoint"), ("elsewhere", "is no folder")])
def test_nothing_to_resume_from(parse: object, asked: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(GETAError, match=message):
        parse([*MODEL, "--resume_from_checkpoint", asked, "--output_dir", str(tmp_path)])  # type: ignore[operator]
