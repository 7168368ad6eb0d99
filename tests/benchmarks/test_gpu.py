"""The list of parts of benchmarks/on_gpu.sh, what is run again, the table, and the scores of the seven tasks."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import __main__ as driver
from benchmarks.gpu import seven_tasks
from benchmarks.gpu.figures import Figure, read, table, write
from benchmarks.gpu.parts import PARTS, Setup, _smoke_rows, run_seven_tasks, test_figures
from geta_hf.evaluation import evaluate

test_figures.__test__ = False  # type: ignore[attr-defined]


def test_figures_survive_their_file_and_are_held_against_targets(tmp_path: Path) -> None:
    figures = [
        Figure("ratio", 1.04, most=1.05),
        Figure("memory", 1.2, most=1.15, note="of 3 GB"),
        Figure("speed", 2.4, "tokens/s", least=2.5),
        Figure("waits", None, most=0, note="needs a GPU"),
        Figure("plain", 12345.0, "ms"),
    ]
    write(tmp_path / "a.json", "a", {"device": "CPU"}, figures)
    assert read(tmp_path / "a.json") == figures
    assert [figure.verdict() for figure in figures] == ["met", "missed", "missed", "", ""]
    shown = table(tmp_path, ["a", "absent"])
    assert "2.4 tokens/s" in shown and "at least 2.5" in shown and "missed; of 3 GB" in shown and "absent" not in shown
    assert "missed" not in table(tmp_path, ["a"], verdicts=False)
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("printed", "code", "expected"),
    [
        ("3 passed, 2 skipped in 1s", 0, [0, 3, 2]),
        ("1 failed, 3 passed, 1 error in 1s", 1, [2, 3, 0]),
        ("no module named pytest", 1, [1, 0, 0]),
    ],
)
def test_a_run_of_tests_that_breaks_is_a_failure(printed: str, code: int, expected: list[int]) -> None:
    assert [figure.value for figure in test_figures(printed, code)] == expected


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    started: list[str] = []

    def run(part: str, chosen: argparse.Namespace) -> str:
        started.append(part)
        return "done in 0 s"

    monkeypatch.setattr(driver, "run_child", run)
    monkeypatch.setattr("signal.signal", lambda *arguments: None)
    return started


def test_a_part_that_has_its_json_is_not_run_again(
    children: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "smoke").mkdir()
    write(tmp_path / "smoke" / "memory.json", "memory", {}, [Figure("kept", 7.0)])
    assert driver.main(["--out", str(tmp_path), "memory", "phi2"]) == 0
    assert children == ["phi2"]
    assert "kept" in capsys.readouterr().out


def test_what_a_part_needs_must_be_set_but_to_try_it() -> None:
    assert driver.lacking("squad_bert", {"DATA": "x"}, smoke=False) == ["MINILM"]
    assert driver.lacking("squad_bert", {}, smoke=True) == []
    assert driver.lacking("steps_bert", {}, smoke=False) == []
    assert {name for part in PARTS.values() for name in part.needs} == set(driver.PATHS)


def test_an_unknown_part_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        driver.main(["nothing"])
    assert "unknown part nothing" in capsys.readouterr().err


def test_the_seven_tasks_are_scored_and_their_scores_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup(tmp_path, smoke=True, paths={})
    figures = run_seven_tasks(setup)
    assert [figure.name for figure in figures] == [f"smoke, {task}: acc" for task in seven_tasks.TASKS]
    monkeypatch.setattr(seven_tasks, "score", lambda *arguments: pytest.fail("scored again"))
    assert run_seven_tasks(setup) == figures


def test_prompts_are_those_of_lm_eval() -> None:
    row: dict[str, Any] = {"sentence": "Ann saw Eve, so _ waved.", "option1": "Ann", "option2": "Eve", "answer": "2"}
    item = seven_tasks.TASKS["winogrande"][1](row)
    assert item.pairs == (("Ann saw Eve, so Ann", " waved."), ("Ann saw Eve, so Eve", " waved."))
    assert item.gold == 1
    row = {"activity_label": "Sport", "ctx_a": "A [b] man.", "ctx_b": "he", "endings": ["x [title] y"], "label": "0"}
    assert seven_tasks.TASKS["hellaswag"][1](row).pairs == (("Sport: A man. He", " x. y"),)


@pytest.mark.slow
def test_scores_are_those_of_lm_eval(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    rows = _smoke_rows(tmp_path / "rows")
    run_seven_tasks(Setup(tmp_path, smoke=True, paths={}))
    expected = evaluate(str(tmp_path / "smoke_bytes"), list(seven_tasks.TASKS), data_dir=rows, device="cpu").scores
    for task in seven_tasks.TASKS:
        found = json.loads((tmp_path / "seven_tasks" / f"smoke, {task}.json").read_text())
        for metric, score in expected[task].items():
            assert found[metric] == score.value, (task, metric)


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_every_part_runs_with_tiny_sizes(part: str, tmp_path: Path) -> None:
    assert driver.main(["--out", str(tmp_path), "--smoke", part]) == 0
    found = json.loads((tmp_path / "smoke" / f"{part}.json").read_text())
    assert found["figures"] and found["machine"]["smoke"]
