"""The recipe for classes and numbers: tiny runs, GLUE's tasks by name, and odd data."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import evaluate
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification

from geta_hf import GETAError
from geta_hf.evaluation.classification import GLUE, read_labeled, same_classes
from geta_hf.evaluation.rows import random_rows
from geta_hf.recipes import CONFIGS
from geta_hf.recipes import text_classification as recipe
from geta_hf.reporting.results import read_results
from tests.recipes.words import WORDS, word_tokenizer

QUICK = ["--use_cpu", "--disable_tqdm", "--report_to", "none", "--save_strategy", "no", "--learning_rate", "1e-2"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def write_bert(folder: Path, **changes: Any) -> Path:
    """A small BERT whose tokenizer knows whole words."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = BertConfig(vocab_size=len(WORDS), max_position_embeddings=32, hidden_dropout_prob=0.0, **sizes, **changes)
    BertForSequenceClassification(config).save_pretrained(folder)
    word_tokenizer(pad_token="<unk>", model_input_names=["input_ids", "attention_mask"]).save_pretrained(folder)
    return folder


def write_rows(path: Path, count: int, label: Any, seed: int = 0) -> Path:
    """Sentences of two words, with `label(first, second)`."""
    draw = random.Random(seed)
    pairs = [(draw.randrange(40), draw.randrange(40)) for _ in range(count)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "other", "label"])
        writer.writerows((f"w{one} w{two} .", f"w{two}", label(one, two)) for one, two in pairs)
    return path


def argv(folder: Path, label: Any, *more: str) -> list[str]:
    files = ["--train_file", str(write_rows(folder / "train.csv", 64, label))]
    files += ["--eval_file", str(write_rows(folder / "dev.csv", 30, label, seed=1))]
    model = ["--model_name_or_path", str(write_bert(folder / "model"))]
    return [*model, *files, "--output_dir", str(folder / "out"), "--per_device_train_batch_size", "8", *QUICK, *more]


def test_a_compressed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scores are those that scikit-learn gives the predictions of the exported folder, one text at a time."""

    def compute(predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"accuracy": accuracy_score(references, predictions), "f1": f1_score(references, predictions)}

    monkeypatch.setattr(evaluate, "load", lambda name, config=None: SimpleNamespace(compute=compute))
    words = argv(
        tmp_path, lambda one, two: "high" if one >= 20 else "low", "--metric", "glue", "--metric_config", "mrpc"
    )
    results = recipe.main([*words, "--max_steps", "60", "--geta.target_sparsity", "0.5", "--max_eval_rows", "20"])
    assert results["classes"] == ["high", "low"] and results["samples"] == 20 and results["train_rows"] == 64
    assert results["f1"] == results["before_export"]["f1"]
    assert results["start"] is None or results["start"]["samples"] == 20
    folder = tmp_path / "out" / "export"
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.config.id2label == {0: "high", 1: "low"}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    every = datasets.load_dataset("csv", data_files=str(tmp_path / "dev.csv"), split="train")
    rows = random_rows(every, 20, 0)
    with torch.no_grad():
        said = [int(model(**tokenizer(text, return_tensors="pt")).logits.argmax()) for text in rows["text"]]
    truth = [["high", "low"].index(label) for label in rows["label"]]
    assert results["accuracy"] == pytest.approx(100 * accuracy_score(truth, said)) and results["accuracy"] > 70
    assert results["f1"] == pytest.approx(100 * f1_score(truth, said))
    one = read_results(folder)["compressed"][0]
    assert (one.data, one.size, one.split) == ("dev.csv", "sample of 20 of 30", None)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["accuracy"] == results["accuracy"]


def test_numbers_are_predicted_for_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[list[float], list[float]]] = []

    def compute(predictions: list[float], references: list[float]) -> dict[str, float]:
        seen.append((predictions, references))
        return {"pearson": 0.5}

    monkeypatch.setattr(evaluate, "load", lambda name, config=None: SimpleNamespace(compute=compute))
    words = argv(tmp_path, lambda one, two: one / 8, "--pair_column", "other", "--metric", "glue")
    results = recipe.main([*words, "--max_steps", "2"])
    assert results["pearson"] == 50.0 and results["classes"] == []
    predictions, references = seen[-1]
    assert len(predictions) == 30 and all(isinstance(one, float) for one in predictions)
    assert (
        references[:2]
        == read_labeled(
            datasets.load_dataset("csv", data_files=str(tmp_path / "dev.csv"), split="train"), "text", "other", "label"
        ).labels[:2]
    )
    config = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "export").config
    assert config.num_labels == 1 and config.problem_type == "regression"


@pytest.mark.parametrize("task", GLUE)
def test_glue_by_name(task: str) -> None:
    data = recipe.DataArguments(task=task)
    assert (data.dataset_name, data.dataset_config, data.metric, data.metric_config) == (
        "nyu-mll/glue",
        task,
        "glue",
        task,
    )
    assert data.text_column and data.eval_split == ("validation_matched" if task == "mnli" else "validation")
    own = recipe.DataArguments(task=task, metric="accuracy", dataset_name="mine", eval_split="test", text_column="a")
    assert (own.dataset_name, own.metric, own.eval_split, own.text_column) == ("mine", "accuracy", "test", "a")


def test_numbers_have_no_accuracy(tmp_path: Path) -> None:
    with pytest.raises(GETAError, match="numbers have no accuracy; give metric, such as pearsonr"):
        recipe.main(argv(tmp_path, lambda one, two: one / 8))


def test_what_is_no_task() -> None:
    with pytest.raises(GETAError, match="task = 'sst3' must be one of GLUE's: cola"):
        recipe.DataArguments(task="sst3")
    with pytest.raises(GETAError, match="no data: give task"):
        recipe.load_data(recipe.DataArguments(), "model")


@pytest.mark.parametrize("name", ["bert_sst2", "minilm_texts"])
def test_ready_made_configs(name: str, tmp_path: Path) -> None:
    found = recipe.parse_arguments([str(CONFIGS / f"{name}.yaml"), "--output_dir", str(tmp_path)])
    assert found.geta is not None and found.data.text_column in ("sentence", "text")


def labeled(labels: list[Any], **options: Any) -> Any:
    rows = datasets.Dataset.from_dict({"text": ["w1"] * len(labels), "label": labels})
    return read_labeled(rows, "text", None, "label", **options)


def test_labels_of_every_kind() -> None:
    assert labeled(["b", "a", "b"]).labels == [1, 0, 1]
    assert labeled([0, 2, 2]).names == ["0", "1", "2"] and labeled([True, False]).labels == [1, 0]
    assert labeled([0.5, 1.0]).regression and labeled([1, 2], names=[]).labels == [1.0, 2.0]
    declared = datasets.Dataset.from_dict({"text": ["w1", "w2"], "label": ["no", "yes"]}).class_encode_column("label")
    assert read_labeled(declared, "text", None, "label").names == ["no", "yes"]
    # Numbers mean the declared names, also for a model that has them in another order.
    assert read_labeled(declared, "text", None, "label", ["yes", "no"]).labels == [1, 0]


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        (["a", "a"], None, "a single class, 'a'"),
        (["a", "c"], ["a", "b"], "'c' in row 1, which is none of the 2 classes a, b"),
        ([0, 3], ["a", "b"], "3 in row 1, which is none"),
        ([0, 1, -1], None, "-1 in row 2, which is none"),
        (["a"], [], "holds text, but the model predicts numbers"),
        ([[0], [1]], None, "holds list; labels are class numbers"),
    ],
)
def test_labels_that_can_not_be_used(labels: list[Any], names: list[str] | None, message: str) -> None:
    with pytest.raises(GETAError, match=message):
        labeled(labels, names=names)


def test_columns_that_are_missing_or_no_text() -> None:
    rows = datasets.Dataset.from_dict({"text": ["a", None], "label": [0, 1]})
    with pytest.raises(GETAError, match="no column 'other', only 'text', 'label'"):
        read_labeled(rows.select([0]), "text", "other", "label")
    with pytest.raises(GETAError, match="no column 'stars'"):
        read_labeled(rows.select([0]), "text", None, "stars")
    with pytest.raises(GETAError, match="holds None in row 1, which is not text"):
        read_labeled(rows, "text", None, "label")
    with pytest.raises(GETAError, match="a sample of 0 rows is empty"):
        random_rows(rows, 0)


def test_a_trained_models_order_of_classes_is_kept() -> None:
    config = BertConfig(id2label={0: "yes", 1: "no"})
    assert same_classes(config, ["no", "yes"]) == ["yes", "no"]
    assert same_classes(config, ["a", "b"]) == ["a", "b"]


def test_a_start_that_is_trained_is_scored(tmp_path: Path) -> None:
    """A new head is not, since its scores would mean nothing."""
    model, trained = recipe.load_classifier(str(write_bert(tmp_path / "m")), ["a", "b"])
    assert trained and model.config.label2id == {"a": 0, "b": 1}
    _, trained = recipe.load_classifier(str(tmp_path / "m"), ["a", "b", "c"])
    assert not trained
