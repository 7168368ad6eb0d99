from __future__ import annotations

import math
import statistics
from typing import Any

import pytest

from geta_hf.evaluation import COMMONSENSE, Evaluation, Score, TextScore, side_by_side
from geta_hf.evaluation.scores import difference, read_scores
from geta_hf.evaluation.table import text_table


def results(tasks: dict[str, dict[str, list[float]]], groups: dict[str, tuple[list[str], float]]) -> dict[str, Any]:
    """What lm-eval gives: task -> metric -> scores by question; group -> (members, its acc)."""
    own = {
        task: {"alias": task, "sample_len": 2, "name": task}
        | {f"{metric},none": statistics.fmean(values) for metric, values in metrics.items()}
        | {f"{metric}_stderr,none": 0.1 for metric in metrics}
        for task, metrics in tasks.items()
    }
    of_groups = {
        name: {"alias": name, "acc,none": value, "acc_stderr,none": "N/A"} for name, (_, value) in groups.items()
    }
    samples = {
        task: [
            {"doc_id": place, "filter": "none", **dict(zip(metrics, values, strict=True))}
            for place, values in enumerate(zip(*metrics.values(), strict=True))
        ]
        for task, metrics in tasks.items()
    }
    members = {name: inner for name, (inner, _) in groups.items()}
    return {"results": {**own, **of_groups}, "groups": of_groups, "group_subtasks": members, "samples": samples}


def test_scores_keep_every_question_and_groups_their_members() -> None:
    tasks = {"a": {"acc": [1.0, 0.0]}, "b": {"acc": [1.0, 1.0, 0.0, 0.0, 0.0], "acc_norm": [1.0] * 5}}
    scores = read_scores(results(tasks, {"even": (["a", "b"], 0.45), "sized": (["a", "b"], 3 / 7)}))
    assert list(scores) == ["a", "b", "even", "sized"]
    assert scores["a"] == {"acc": Score(0.5, 0.1, (1.0, 0.0))}
    assert list(scores["b"]) == ["acc", "acc_norm"]
    assert scores["even"]["acc"] == Score(0.45, None, members=(("a", "acc"), ("b", "acc")))
    assert scores["sized"]["acc"] == Score(pytest.approx(3 / 7), None)  # weighed by size: no plain mean


def test_a_perplexity_is_no_mean_over_questions() -> None:
    found = results({"a": {"perplexity": [-1.0, -3.0]}}, {})
    found["results"]["a"]["perplexity,none"] = math.exp(2.0)
    assert read_scores(found)["a"]["perplexity"] == Score(math.exp(2.0), 0.1)


def test_the_suite_has_the_mean_of_its_metrics() -> None:
    tasks = {name: {"acc": [0.0, place / 10], "acc_norm": [1.0, place / 10]} for place, name in enumerate(COMMONSENSE)}
    suite = read_scores(results(tasks, {}))["commonsense"]
    assert suite["mean_acc"].value == pytest.approx(sum(range(7)) / 20 / 7)
    assert suite["mean"].value == pytest.approx(sum(range(7)) / 20 / 7 + 5 / 7 / 2)  # five of them by acc_norm
    assert suite["mean"].stderr == pytest.approx(0.1 * math.sqrt(7) / 7)
    assert suite["mean"].members == tuple(COMMONSENSE.items())
    del tasks["boolq"]
    assert "commonsense" not in read_scores(results(tasks, {}))


def evaluation(**questions: list[float]) -> Evaluation:
    scores = {name: {"acc": Score(statistics.fmean(own), 0.2, tuple(own))} for name, own in questions.items()}
    mean = statistics.fmean(one["acc"].value for one in scores.values())
    members = tuple((name, "acc") for name in scores)
    return Evaluation("m", {**scores, "group": {"acc": Score(mean, 0.1, members=members)}})


def test_differences_are_paired_by_question() -> None:
    one, other = evaluation(a=[1, 0, 1, 1], b=[0, 0]), evaluation(a=[1, 0, 0, 1], b=[0, 1])
    value, stderr = difference(one, other, "a", "acc")
    assert (value, stderr) == (pytest.approx(-0.25), pytest.approx(statistics.stdev([0, 0, -1, 0]) / 2))
    assert stderr is not None and stderr < math.hypot(0.2, 0.2)
    value, whole = difference(one, other, "group", "acc")
    assert value == pytest.approx((-0.25 + 0.5) / 2)
    assert whole == pytest.approx(math.hypot(stderr, statistics.stdev([0, 1]) / math.sqrt(2)) / 2)
    assert difference(one, one, "group", "acc") == (0, 0)


def test_without_the_same_questions_there_is_no_error() -> None:
    one = evaluation(a=[1, 0, 1], b=[0, 1])
    for other in (evaluation(a=[1, 0], b=[0, 1]), evaluation(a=[0], b=[1])):
        assert difference(one, other, "a", "acc")[1] is None
        assert difference(one, other, "group", "acc")[1] is None


def test_the_table_puts_models_side_by_side() -> None:
    table = side_by_side({"dense": evaluation(a=[1, 0, 1, 1]), "small": evaluation(a=[1, 0, 0, 1])})
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert lines[0] == ["task", "metric", "dense", "small", "small - dense"]
    assert lines[2] == ["a", "acc", "75.00 ± 20.00", "50.00 ± 20.00", "-25.00 ± 25.00"]
    assert lines[3] == ["group", "acc, 1 tasks", "75.00 ± 10.00", "50.00 ± 10.00", "-25.00 ± 25.00"]
    alone = side_by_side({"m": Evaluation("m", {"l": {"perplexity": Score(12.3456, None)}})})
    assert alone.splitlines()[2].split() == ["|", "l", "|", "perplexity", "|", "12.35", "|"]


def test_texts_have_three_units() -> None:
    table = text_table({"m": {"t.txt": TextScore(math.log(2), 10, 20, 8)}})
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert cells[0] == ["text", "unit", "m"]
    assert [row[1:] for row in cells[2:]] == [
        ["nats per token", "0.6931"],
        ["perplexity", "2.0000"],
        ["bits per byte", "0.5000"],
    ]
