"""Check that what documents name and link exists, that their code is narrow, and that their commands are understood."""

from __future__ import annotations

import ast
import re
import shlex
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import yaml

from geta_hf.cli import _parser
from geta_hf.export.formats import FORMATS
from geta_hf.recipes import CONFIGS, RECIPES

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
    # What a command makes is named too.
    assert {path for path in paths if not is_file(path)} <= {"build/site", "dist"}


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


# --- all pages --------------------------------------------------------------------------------------------------------

SITE = sorted((ROOT / "docs").rglob("*.md"))


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def anchor(heading: str) -> str:
    """Return the anchor of a heading, as the site and the usual viewers of a repository make it."""
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower())


@pytest.mark.parametrize("page", SITE, ids=shown)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    links = re.findall(r"\]\(((?!\w+:)[^)\s]+)\)", text)
    for path, _, wanted in (link.partition("#") for link in links):
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), path
        if wanted:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.M)
            assert wanted in map(anchor, headings), f"{path}#{wanted}"


def test_the_guide_lists_every_format_and_the_guides_every_recipe() -> None:
    formats = (ROOT / "docs/guides/export.md").read_text(encoding="utf-8")
    assert {name for name in FORMATS if f"`{name}`" not in formats} == {"geta"}
    guides = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs/guides").glob("*.md"))
    named = {path.stem for path in CONFIGS.glob("*.yaml") if f"geta-hf train {path.stem}" in guides}
    kinds = {yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()).get("recipe") for name in named}
    assert kinds >= set(RECIPES)


def test_every_page_is_in_the_navigation() -> None:
    named = set(re.findall(r"([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M))
    pages = {str(page.relative_to(ROOT / "docs")) for page in SITE}
    assert pages - named == set()
    assert {name for name in named - pages if not (ROOT / "docs" / name).with_suffix(".ipynb").is_file()} == {
        "changelog.md",
        "contributing.md",
    }


@pytest.mark.parametrize("page", [page for page in SITE if page.parent.name in ("guides", "concepts")], ids=shown)
def test_code_of_guides_is_python_and_narrow(page: Path) -> None:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
    for language, code in blocks:
        assert max(map(len, code.splitlines())) < 90
        if language == "python":
            ast.parse(code)


@pytest.mark.parametrize("page", [ROOT / "README.md", *SITE], ids=shown)
def test_commands_of_pages_are_understood(page: Path) -> None:
    text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
    parser = _parser()
    for line in re.findall(r"^geta-hf ([a-z].*)$|`geta-hf ([a-z][^`]* [^`]*)`", text, re.M):
        words = shlex.split("".join(line), comments=True)
        if "..." not in words:
            parser.parse_args(words)


def test_the_drawn_graph_is_that_of_today(tmp_path: Path) -> None:
    """The site is built without PyTorch, so the page is kept; `docs/site/draw_graph.py` draws it again."""
    drawer = spec_from_file_location("draw_graph", ROOT / "docs" / "site" / "draw_graph.py")
    assert drawer is not None and drawer.loader is not None
    module = module_from_spec(drawer)
    drawer.loader.exec_module(module)
    module.draw(tmp_path / "graph.html")
    assert (tmp_path / "graph.html").read_text(encoding="utf-8") == module.PAGE.read_text(encoding="utf-8")
