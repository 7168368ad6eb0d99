"""Paths of before the package had rooms: each gives the present module, with a warning."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from geta_hf.utils.former_modules import FORMER, offer_former_modules


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
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", lines], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_path_that_never_was_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("geta_hf.nothing")


def test_the_finder_is_added_once() -> None:
    before = list(sys.meta_path)
    offer_former_modules()
    assert sys.meta_path == before
