"""Metrics against scikit-learn, and what is said when one can't be had."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import evaluate
import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from geta_hf import GETAError
from geta_hf.evaluation.metrics import load_metric, metric_names, task_result

SCRIPT = """
import datasets
import evaluate
from sklearn.metrics import accuracy_score, f1_score


class Pair(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        f1 = f1_score(references, predictions)
        return {"accuracy": accuracy_score(references, predictions), "f1": f1, "each": [0.0, 1.0]}
"""


@pytest.fixture
def answers() -> tuple[list[int], list[int]]:
    draw = np.random.default_rng(0)
    return draw.integers(0, 2, 50).tolist(), draw.integers(0, 2, 50).tolist()


def test_accuracy_needs_no_library(answers: tuple[list[int], list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "evaluate", None)
    predictions, references = answers
    found = load_metric("accuracy").compute(predictions, references)
    assert found["accuracy"] == pytest.approx(100 * accuracy_score(references, predictions))
    right = np.array(predictions) == np.array(references)
    assert found["accuracy_stderr"] == pytest.approx(100 * right.std(ddof=1) / np.sqrt(50))
    assert found["samples"] == 50
    with pytest.raises(GETAError, match=r"metric glue \(sst2\) needs `pip install evaluate`"):
        load_metric("glue", "sst2")


def test_a_script_of_evaluate(
    answers: tuple[list[int], list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path / "metrics"))
    (tmp_path / "pair.py").write_text(SCRIPT)
    predictions, references = answers
    found = load_metric(str(tmp_path / "pair.py")).compute(predictions, references)
    assert found["f1"] == pytest.approx(100 * f1_score(references, predictions))
    assert set(found) == {"accuracy", "accuracy_stderr", "f1", "samples"}  # a list is no single number


def fake(compute: Any) -> Any:
    return lambda name, config=None: SimpleNamespace(compute=compute)


def test_only_shares_are_percent(answers: tuple[list[int], list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    def compute(predictions: list[int], references: list[int]) -> dict[str, Any]:
        return {"matthews_correlation": matthews_corrcoef(references, predictions), "mse": np.float64(7.5), "bad": None}

    monkeypatch.setattr(evaluate, "load", fake(compute))
    predictions, references = answers
    found = load_metric("glue", "cola").compute(predictions, references)
    expected = 100 * matthews_corrcoef(references, predictions)
    assert found == {"matthews_correlation": pytest.approx(expected), "mse": 7.5, "samples": 50}


def test_what_a_metric_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(predictions: Any, references: Any) -> Any:
        raise ValueError("no such class")

    monkeypatch.setattr(evaluate, "load", fake(refuse))
    with pytest.raises(GETAError, match=r"the metric m \(c\) refuses these predictions: no such class"):
        load_metric("m", "c").compute([1], [1])
    monkeypatch.setattr(evaluate, "load", fake(lambda **_: {"each": [1, 2]}))
    with pytest.raises(GETAError, match=r"gives no single number, but \['each'\]"):
        load_metric("m").compute([1], [1])
    with pytest.raises(GETAError, match="no sample to score"):
        load_metric("accuracy").compute([], [])


@pytest.mark.parametrize("error", [ConnectionError("no network"), FileNotFoundError("x"), ImportError("no nltk")])
def test_a_metric_that_can_not_be_loaded(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, config: str | None = None) -> None:
        raise error

    monkeypatch.setattr(evaluate, "load", load)
    with pytest.raises(GETAError, match=rf"rouge can't be loaded: {error}. Without a network, give the path"):
        load_metric("rouge")


def test_scores_on_a_card() -> None:
    scores = {"accuracy": 75.0, "accuracy_stderr": 5.0, "f1": 60.0, "samples": 40}
    one = task_result(scores, "sst2", "validation", 100)
    assert (one.data, one.split, one.size) == ("sst2", "validation", "sample of 40 of 100")
    assert one.metrics == {"accuracy": 75.0, "f1": 60.0} and one.stderr == {"accuracy": 5.0}
    assert metric_names(scores) == ["accuracy", "f1"]
