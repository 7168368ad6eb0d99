"""What is published is complete: the source distribution names every file, and each notebook of the docs runs."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
BY_ITSELF = {"LICENSE", "MANIFEST.in", "README.md", "pyproject.toml"}
"""What setuptools includes unasked."""


@pytest.mark.skipif(shutil.which("git") is None or not (ROOT / ".git").exists(), reason="needs a clone")
def test_the_source_distribution_holds_every_file_of_the_repository() -> None:
    found = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    manifest = (ROOT / "MANIFEST.in").read_text(encoding="utf-8")
    folders = re.findall(r"^graft (\S+)$", manifest, re.MULTILINE)
    files = {name for line in re.findall(r"^include (.+)$", manifest, re.MULTILINE) for name in line.split()}
    tracked = {name for name in found.stdout.splitlines() if (ROOT / name).exists()}
    assert len(tracked) > 500 and all((ROOT / folder).is_dir() for folder in folders)
    missing = {name for name in tracked if not any(name.startswith(f"{folder}/") for folder in folders)}
    assert missing - files - BY_ITSELF == set()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run_from_top_to_bottom(notebook: Path) -> None:
    """On a CPU and without a network. Each ends with assertions of its own about what it shows."""
    spec = importlib.util.spec_from_file_location("run_notebooks", ROOT / "docs" / "site" / "run_notebooks.py")
    runner = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(runner)
    done = runner.execute(notebook)
    assert done.cells[-1].cell_type == "code" and done.cells[-1].source.startswith("assert")
    assert all(cell.execution_count for cell in done.cells if cell.cell_type == "code")


def test_there_are_three_notebooks_with_saved_outputs() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["classification", "language_model", "question_answering"]
    for path in NOTEBOOKS:
        text = path.read_text(encoding="utf-8")
        assert "image/svg+xml" in text and '"output_type": "error"' not in text
