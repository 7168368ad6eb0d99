"""The layout holds: rooms in one direction, no circles, few loose modules, and each room says its one job."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "geta_hf"
LOOSE = 8


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the contracts of `folder`'s pyproject.toml on the package beside it."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    return subprocess.run(
        [*command, "--no-logo", "--no-cache"], cwd=folder, capture_output=True, text=True, check=False
    )


def test_imports_run_in_one_direction_without_circles():
    found = lint(ROOT)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("costs/ledger.py", "import geta_hf.methods.qasso.optimizer"),
        ("qadg/tracing/graph.py", "import geta_hf.qadg.space"),
        ("reporting/hub.py", "def late():\n    import geta_hf.training.trainer"),
        ("inference/products.py", "import geta_hf.inference.layers"),
        ("training/plan.py", "import geta_hf.methods.qasso.schedule"),
        ("compress.py", "import geta_hf.recipes.run"),
    ],
)
def test_an_import_in_the_wrong_direction_is_caught(module: str, line: str, tmp_path: Path):
    shutil.copytree(PACKAGE, tmp_path / "geta_hf", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "geta_hf" / module).open("a", encoding="utf-8") as file:
        file.write(f"\n\n{line}\n")
    assert lint(tmp_path).returncode == 1


def test_few_modules_lie_loose():
    loose = [path.name for path in PACKAGE.glob("*.py") if not path.name.startswith("__")]
    assert len(loose) <= LOOSE, loose


@pytest.mark.parametrize("room", sorted(path.parent for path in PACKAGE.rglob("__init__.py")), ids=lambda p: p.name)
def test_every_room_says_its_job(room: Path):
    docstring = ast.get_docstring(ast.parse((room / "__init__.py").read_text(encoding="utf-8")))
    assert docstring, f"{room.name} has no docstring"
    first = docstring.split("\n\n")[0]
    assert len(first) > 20, f"{room.name} does not say what it is for"
