"""Compression without training of a model that answers questions: every cell once, within its bytes, and as a table."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval import one_shot_questions
from eval.results_file import read_results
from geta_hf import GETAError
from geta_hf.recipes import demo_data


def options(folder: Path, *more: str) -> list[str]:
    files = ["--train_file", str(folder / "train.json"), "--eval_file", str(folder / "dev.json")]
    given = ["--model", str(folder / "model"), *files, "--work", str(folder / "work")]
    return [*given, "--windows", "8", "--questions", "4", *more]


def test_cells_are_kept_and_tabled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    demo_data.write(tmp_path, train_questions=40, eval_questions=10, layers=1)
    methods = ["ours", "magnitude, to nearest"]
    given = options(tmp_path, "--methods", *methods, "--budgets", "4.2", "0.01")
    one_shot_questions.main(given)
    printed = capsys.readouterr().out
    lines = {(line["method"], line["bits"]): line for line in read_results(tmp_path / "work")}
    assert list(lines) == [("dense", None), *((name, bits) for bits in (4.2, 0.01) for name in methods)]
    assert all(line["bytes"] < lines["dense", None]["bytes"] / 2 for key, line in lines.items() if key[1] == 4.2)
    assert lines["ours", 4.2]["bytes"] == pytest.approx(lines[methods[1], 4.2]["bytes"], rel=0.02)
    # Not even a model whose families are at their least is as small as that.
    assert "can't be reached" in lines["ours", 0.01]["reason"]
    assert "out of reach" in printed and "f1 lost" in printed
    monkeypatch.setattr(one_shot_questions, "compress", lambda *_, **__: pytest.fail("a finished cell is run again"))
    one_shot_questions.main(given)
    with pytest.raises(GETAError, match="results under other settings"):
        one_shot_questions.main([*given, "--grid", "block32"])
    assert not (tmp_path / "work" / "cell_exported").exists()
