"""`geta-hf eval` on labeled data: SQuAD, classes and written texts, dense beside compressed, and in the card."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import evaluate
import pytest
import torch
from sklearn.metrics import f1_score
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    LlamaConfig,
)

from geta_hf import attach_quantizers, export
from geta_hf.cli import main
from geta_hf.evaluation import squad
from geta_hf.evaluation.rows import read_rows
from geta_hf.evaluation.squad_features import load_questions, sample
from geta_hf.qadg import PruningSpace
from geta_hf.recipes import demo_data
from geta_hf.reporting.results import read_results
from tests.recipes.test_text_classification import write_bert, write_rows


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def small(model: Any, source: Path, folder: Path) -> Path:
    attach_quantizers(model, initial_bits=8)
    batch = {"input_ids": torch.arange(4, 12)[None]}
    export(model, folder, space=PruningSpace(()), batch=batch, processing_class=AutoTokenizer.from_pretrained(source))
    return folder


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("questions")
    demo_data.write(home, train_questions=2, eval_questions=12, layers=1)
    small(BertForQuestionAnswering.from_pretrained(home / "model"), home / "model", home / "small")
    return home


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("classes")
    write_bert(home / "model", id2label={0: "low", 1: "high"}, label2id={"low": 0, "high": 1})
    write_rows(home / "dev.csv", 20, lambda one, two: "high" if one >= 20 else "low")
    small(BertForSequenceClassification.from_pretrained(home / "model"), home / "model", home / "small")
    return home


def test_squad_dense_beside_compressed_and_in_the_card(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = str(questions / "dev.json")
    output = questions / "scores.json"
    options = ["--data", data, "--limit", "8", "--device", "cpu", "--card", "--output", str(output)]
    assert main(["eval", str(questions / "small"), "--dense", str(questions / "model"), *options]) == 0
    shown = capsys.readouterr().out
    chosen = sample(load_questions(data), 8, 0)
    for name, column in (("model", "dense"), ("small", "small")):
        loaded = squad.load_folder(questions / name, torch.device("cpu"))
        expected = squad.score(squad.predict(*loaded, chosen, progress=False), chosen)
        written = json.loads((questions / f"scores_{column}.json").read_text())
        assert (written["em"], written["f1"]) == (expected["em"], expected["f1"])
        assert (written["samples"], written["total"]) == (8, 12) and f"{expected['f1']:.2f} ±" in shown
    found = read_results(questions / "small")
    assert {side: one[0].size for side, one in found.items()} == dict.fromkeys(
        ("dense", "compressed"), "sample of 8 of 12"
    )
    assert "| dev.json, sample of 8 of 12 | dense" in shown and "sample of 8 of 12" in (
        questions / "small" / "README.md"
    ).read_text(encoding="utf-8")


def test_classes_by_a_metric_of_evaluate(
    classes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against scikit-learn over predictions one at a time."""
    compute = lambda predictions, references: {"f1": f1_score(references, predictions)}  # noqa: E731
    monkeypatch.setattr(evaluate, "load", lambda name, config=None: SimpleNamespace(compute=compute))
    data = str(classes / "dev.csv")
    assert main(["eval", str(classes / "small"), "--data", data, "--metric", "f1", "--device", "cpu"]) == 0
    model = AutoModelForSequenceClassification.from_pretrained(classes / "small")
    tokenizer = AutoTokenizer.from_pretrained(classes / "small")
    rows = datasets.load_dataset("csv", data_files=data, split="train")
    with torch.no_grad():
        said = [int(model(**tokenizer(text, return_tensors="pt")).logits.argmax()) for text in rows["text"]]
    truth = [["low", "high"].index(label) for label in rows["label"]]
    shown = capsys.readouterr().out
    assert "dev.csv, 20" in shown and f"| {100 * f1_score(truth, said):.2f}" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--glue", "sst3"], "task = 'sst3' must be one of GLUE's"),
        (["--glue", "sst2", "--data", "x"], "--data and --glue are each given alone"),
        (["--data", "{data}", "--tasks", "piqa"], "--data and --glue are each given alone"),
        (["--data", "{data}", "--label-column", "stars"], "no column 'stars'"),
        (["--data", "{data}", "--limit", "0"], "limit is 0"),
        (["--data", "{data}", "--batch-size", "x"], "--batch-size x: give a number"),
        (["--data", "nowhere.csv"], "nowhere.csv can't be read"),
    ],
)
def test_what_is_wrong_is_one_line(
    classes: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [option.format(data=classes / "dev.csv") for option in options]
    assert main(["eval", str(classes / "small"), *words]) == 2
    assert message in capsys.readouterr().err


def test_models_that_can_not_be_scored(
    classes: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "llama")
    data = ["--data", str(classes / "dev.csv")]
    assert main(["eval", str(tmp_path / "llama"), *data]) == 2
    assert "LlamaForCausalLM can't be scored on labeled data" in capsys.readouterr().err
    assert main(["eval", str(tmp_path), *data]) == 2
    assert "no config.json in this folder" in capsys.readouterr().err
    assert main(["eval", str(classes / "small"), "--dense", str(questions / "model"), *data]) == 2
    assert "models of several kinds can't be compared" in capsys.readouterr().err
    assert main(["eval", str(questions / "model"), "--glue", "sst2"]) == 2
    assert "GLUE is for text classification, and the model is for question answering" in capsys.readouterr().err


def test_a_local_file_is_read_without_a_bar(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    datasets.enable_progress_bars()
    assert len(read_rows(str(tmp_path / "rows.jsonl"), None, None, "train")) == 1
    assert "Generating" not in capfd.readouterr().err
    assert not datasets.are_progress_bars_disabled()
