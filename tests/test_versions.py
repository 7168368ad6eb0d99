"""`make test-versions` tries the lowest versions that pyproject.toml allows."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_lowest_versions_allowed_are_tried() -> None:
    lowest = dict(re.findall(r'"(torch|transformers)>=([\d.]+)', (ROOT / "pyproject.toml").read_text()))
    assert lowest.keys() == {"torch", "transformers"}
    runs = re.findall(r"tests/versions/run\.sh(.*)", (ROOT / "Makefile").read_text())
    assert all(f'"{name}=={version}.*"' in runs[0] for name, version in lowest.items())
    assert '"torch==2.11.*"' in runs[1] and runs[-1].strip() == ""
