"""Check that the files, folders and objects named in the guide for contributors and the glossary exist."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "geta_hf"
PAGES = ("CONTRIBUTING.md", "docs/glossary.md")
ROOMS = tuple(sorted(path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()))


def names_in(page: str) -> set[str]:
    """Return the texts in single backquotes on a page."""
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.S)
    return set(re.findall(r"`([^`\n]+)`", text))


def is_file(name: str) -> bool:
    """Return whether a path, relative to the repository or to the package, exists; a module may lack its suffix."""
    places = (ROOT / name, PACKAGE / name, PACKAGE / f"{name}.py")
    return any(place.exists() for place in places) or any(PACKAGE.glob(name))


def is_object(name: str) -> bool:
    """Return whether `room.module.Name` is an attribute of a module of the package."""
    module, _, attribute = name.rpartition(".")
    try:
        return hasattr(import_module(f"geta_hf.{module}"), attribute)
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("page", PAGES)
def test_every_path_exists(page: str) -> None:
    paths = {name for name in names_in(page) if re.fullmatch(r"[\w.*-]+(/[\w.*-]*)+|\w+\.py", name)}
    assert len(paths) > 5
    assert {path for path in paths if not is_file(path)} == set()


@pytest.mark.parametrize("page", PAGES)
def test_every_object_exists(page: str) -> None:
    objects = {name for name in names_in(page) if re.fullmatch(rf"({'|'.join(ROOMS)})(\.\w+)+", name)}
    objects -= {name for name in objects if name.endswith(".py")}
    assert {name for name in objects if not is_object(name)} == set()


def test_every_room_is_in_the_guide() -> None:
    guide = names_in("CONTRIBUTING.md")
    rooms = {path.name for path in PACKAGE.iterdir() if path.suffix == ".py" and not path.name.startswith("__")}
    rooms |= {f"{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")}
    assert rooms - guide == set()


def test_no_word_has_two_entries_in_the_glossary() -> None:
    entries = re.findall(r"^\*\*(.+?)\*\*", (ROOT / "docs/glossary.md").read_text(encoding="utf-8"), re.M)
    assert len(entries) > 40
    assert len(entries) == len(set(entries))
