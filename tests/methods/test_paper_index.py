"""Every function and every test that the index of the paper names is there, and so is every line of Algorithm 2."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PACKAGE, TESTS = ROOT / "geta_hf", ROOT / "tests"
PAGE = (ROOT / "docs" / "paper_index.md").read_text(encoding="utf-8")
NAMES = sorted(set(re.findall(r"`([^`\n]+)`", PAGE)))
ROOMS = "|".join(sorted(path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()))

OBJECTS = [name for name in NAMES if re.fullmatch(rf"({ROOMS})(\.\w+)+", name)]
TEST_FUNCTIONS = [name for name in NAMES if "::" in name]
PATHS = [name for name in NAMES if re.fullmatch(r"\w+(/\w+)*(/|\.py)", name)]
OTHERS = {"geta_hf", "tests", "GETAConfig.paper()", "net.1", "net.10", "res"}


def is_there(name: str) -> bool:
    """Return whether a dotted name is an attribute of a module, or of a class in one."""
    parts = name.split(".")
    for count in range(len(parts) - 1, 0, -1):
        try:
            found = import_module(".".join(["geta_hf", *parts[:count]]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def test_every_name_is_checked() -> None:
    assert set(NAMES) - OTHERS == {*OBJECTS, *TEST_FUNCTIONS, *PATHS}
    assert min(len(OBJECTS), len(TEST_FUNCTIONS), len(PATHS)) > 20


@pytest.mark.parametrize("name", OBJECTS)
def test_functions_are_there(name: str) -> None:
    assert is_there(name)


@pytest.mark.parametrize("name", TEST_FUNCTIONS)
def test_tests_are_there(name: str) -> None:
    path, _, function = name.partition("::")
    assert re.search(rf"^def {function}\(", (TESTS / path).read_text(encoding="utf-8"), re.M)


@pytest.mark.parametrize("name", PATHS)
def test_files_are_there(name: str) -> None:
    assert (PACKAGE / name).exists() or (TESTS / name).exists()


def test_a_name_that_is_not_there_is_found_out() -> None:
    assert is_there("methods.qasso.optimizer.QASSO.step")
    assert not is_there("methods.qasso.optimizer.QASSO.stop") and not is_there("methods.qasso.forgetting.forget_rate")


def test_every_line_of_algorithm_2_has_its_place_in_the_optimizer() -> None:
    """Lines 1 and 23 are inputs and outputs; 3, 5, 8-10, 13, 20 and 21 begin and end loops, as the schedule does."""
    source = (PACKAGE / "methods" / "qasso" / "optimizer.py").read_text(encoding="utf-8")
    lines = {int(number) for number in re.findall(r"^ {8}(\d+): ", source, re.M)}
    assert lines >= {2, 4, 6, 7, 11, 12, 14, 15, 16, 17, 18, 19, 22}
