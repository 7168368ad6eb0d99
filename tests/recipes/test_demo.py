"""`make demo` keeps its promises: the dense model learns the task, the compressed one keeps half of the groups."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from geta_hf.export.export import PICTURE_NAME
from geta_hf.reporting.comparison import read_structure
from recipes import demo


@pytest.mark.slow
def test_demo_learns_compresses_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        demo.main(tmp_path)
    finally:
        torch.set_num_threads(threads)
    scores = {name: json.loads((tmp_path / name / "results.json").read_text()) for name in ("dense", "compressed")}
    assert scores["dense"]["em"] > 90 and scores["compressed"]["em"] > 90
    structure = read_structure(tmp_path / "compressed" / "export")
    before = sum(total for _, total in structure.kept.values())
    assert before == 4 * (8 + 256) and sum(kept for kept, _ in structure.kept.values()) == before // 2
    assert all(4 <= bits <= 8 for bits in structure.bits.values()) and len(structure.bits) == 24
    assert (tmp_path / "compressed" / "export" / PICTURE_NAME).stat().st_size > 10_000
    assert "relative BOPs, paper" in capsys.readouterr().out
