"""Paths of before the package had rooms: each gives the present module, with a warning."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from pathlib import Path

import pytest

from geta_hf.utils.former_modules import FORMER, offer_former_modules
from tests.elsewhere import run_code

PACKAGE = Path(__file__).parents[2] / "geta_hf"


@pytest.mark.parametrize("former", FORMER)
def test_a_former_path_gives_the_present_module(former: str) -> None:
    sys.modules.pop(f"geta_hf.{former}", None)
    present = importlib.import_module(f"geta_hf.{FORMER[former]}")
    spec = present.__spec__
    with pytest.warns(DeprecationWarning, match="is now geta_hf"):
        found = importlib.import_module(f"geta_hf.{former}")
    assert found is present and found.__spec__ is spec
    assert found.__name__ == f"geta_hf.{FORMER[former]}"


def test_imports_as_they_were_written_work() -> None:
    lines = "from geta_hf.qasso import QASSO; from geta_hf.trainer import GETATrainer; import geta_hf.export.packing\n"
    lines += "from geta_hf.qasso.optimizer import QASSO as same; import geta_hf\n"
    lines += "assert QASSO is same is geta_hf.QASSO and GETATrainer is geta_hf.GETATrainer"
    done = run_code(lines, PACKAGE.parent)
    assert done.returncode == 0, done.stderr


def test_names_that_moved_are_given_with_a_warning() -> None:
    named = {
        "geta_hf.export.rehearse": "geta_hf.surgery.trial_cut.try_cuts",
        "geta_hf.export.check_ties": "geta_hf.serialization.tied_weights.check_ties",
        "geta_hf.methods.qasso.Ledger": "geta_hf.costs.ledger.Ledger",
        "geta_hf.qadg.Frozen": "geta_hf.qadg.group_types.UnsupportedOperator",
        "geta_hf.qadg.space.Member": "geta_hf.qadg.group_types.Member",
    }
    for former, present in named.items():
        (old, name), (new, attribute) = former.rsplit(".", 1), present.rsplit(".", 1)
        with pytest.warns(DeprecationWarning, match=f"is now {re.escape(present)}"):
            found = getattr(importlib.import_module(old), name)
        assert found is getattr(importlib.import_module(new), attribute)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = importlib.import_module("geta_hf.export").nothing


def test_no_former_path_hides_a_present_module() -> None:
    """A module of today under a path of before would be found first."""
    for former in FORMER:
        path = PACKAGE / former.replace(".", "/")
        assert not path.with_suffix(".py").exists() and not (path / "__init__.py").exists(), former


def test_the_package_itself_uses_present_paths() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any(name.removeprefix("geta_hf.") in FORMER for name in names), path


def test_a_path_that_never_was_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("geta_hf.nothing")


def test_the_finder_is_added_once() -> None:
    before = list(sys.meta_path)
    offer_former_modules()
    assert sys.meta_path == before
