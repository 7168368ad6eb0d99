"""How benchmarks/compare_versions.py reads tables, pairs its runs and takes ratios."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import compare_versions
from benchmarks.compare_versions import HERE, compare, main, read_figures

STEPS = """
BERT-base with 4 layers, fp32, batch 8x128, CPU, 1 threads
|             | plain    | GETA     | ratio (median) |
|-------------|----------|----------|----------------|
| joint       | 2025 ms  | 2161 ms  | 1.065          |
| peak memory | 1209 MiB | 1314 MiB | 1.087          |
"""
SPACES = """
| model     | parameters | build_space |
|-----------|------------|-------------|
| bert-base | 0.11 B     | 0.39        |

| layers of phi-2 | build_space | ms per layer |
|-----------------|-------------|--------------|
| 8               | 0.36        | 45.4         |
"""


def test_numbers_are_read_without_units_by_row_and_column() -> None:
    assert read_figures(STEPS, ("GETA", "ratio (median)")) == {
        "joint, GETA": 2161.0,
        "joint, ratio (median)": 1.065,
        "peak memory, GETA": 1314.0,
        "peak memory, ratio (median)": 1.087,
    }


def test_each_table_has_a_header_of_its_own() -> None:
    found = read_figures(SPACES, ("build_space",))
    assert found == {"model bert-base, build_space": 0.39, "layers of phi-2 8, build_space": 0.36}


def test_ratios_are_taken_within_pairs() -> None:
    pairs = [({"a": 2.0}, {"a": 1.0}), ({"a": 30.0}, {"a": 10.0}), ({"a": 4.0}, {"a": 4.0})]
    expected = {"this": 4.0, "other": 4.0, "ratio": 2.0, "low": 1.0, "high": 3.0, "minima": 2.0}
    assert compare(pairs) == {"a": expected}


def test_figures_that_a_run_lacks_or_that_are_zero_have_no_ratio() -> None:
    assert compare([({"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 1.0, "c": 0.0})]).keys() == {"a"}


def test_checkouts_take_turns_in_going_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    order = []

    def run(what: str, checkout: Path, arguments: list[str], cpu_time: bool) -> dict[str, float]:
        order.append(checkout)
        return {"seconds": 3.0 if checkout == HERE else 2.0}

    monkeypatch.setattr(compare_versions, "run", run)
    monkeypatch.setattr(sys, "argv", ["compare_versions.py", str(tmp_path), "--what", "export", "--pairs", "2"])
    main()
    assert order == [HERE, tmp_path, tmp_path, HERE]
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["figures"]["seconds"]["ratio"] == found["figures"]["seconds"]["high"] == 1.5


def test_each_checkout_is_what_its_run_imports(tmp_path: Path) -> None:
    script = tmp_path / "benchmarks" / "qadg.py"
    script.parent.mkdir()
    script.write_text("import os, sys\nprint('| a | build_space |')\nprint('| b |', len(sys.argv), '|')\n"
                      "assert os.environ['PYTHONPATH'] == os.getcwd()\n")  # fmt: skip
    assert compare_versions.run("qadg", tmp_path, ["x"]) == {"a b, build_space": 2.0}


@pytest.mark.parametrize("cpu_time", [False, True])
def test_the_clock_of_a_benchmark_and_of_what_it_starts(tmp_path: Path, cpu_time: bool) -> None:
    script = tmp_path / "benchmarks" / "qadg.py"
    script.parent.mkdir()
    program = "import time; print(int(time.perf_counter is time.process_time))"
    script.write_text(f"import subprocess, sys\nprint('| a | build_space |\\n| b |', end='', flush=True)\n"
                      f"subprocess.run([sys.executable, '-c', {program!r}], check=True)\n")  # fmt: skip
    assert compare_versions.run("qadg", tmp_path, [], cpu_time) == {"a b, build_space": float(cpu_time)}


def test_a_benchmark_without_figures_is_an_error(tmp_path: Path) -> None:
    script = tmp_path / "benchmarks" / "qadg.py"
    script.parent.mkdir()
    script.write_text("print('nothing')\n")
    with pytest.raises(ValueError, match="printed no table with a column of build_space"):
        compare_versions.run("qadg", tmp_path, [])
