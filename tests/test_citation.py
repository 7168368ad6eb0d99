"""Check the required keys of the citation file (CFF 1.2.0), and that it agrees with the package."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import geta_hf

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def citation() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))


def check_authors(work: dict[str, Any]) -> None:
    """Raise AssertionError unless every author is a person with both names or an entity with a name."""
    assert work["authors"]
    for author in work["authors"]:
        person = bool(author.get("family-names")) and bool(author.get("given-names"))
        assert person or author.get("name"), author


def test_it_has_the_required_keys(citation) -> None:
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software"
    assert citation["message"] and citation["title"]
    check_authors(citation)


def test_version_and_license_are_those_of_the_package(citation) -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert citation["version"] == geta_hf.__version__
    assert citation["license"] == re.search(r'^license = "(.*)"$', project, re.M).group(1)


@pytest.mark.parametrize(
    ("words", "year", "count", "url"),
    [
        ("Automatic Joint Structured Pruning", 2025, 8, "https://arxiv.org/abs/2502.16638"),
        ("Channel-wise Mixed-Precision", 2024, 6, "https://arxiv.org/abs/2407.01054"),
    ],
)
def test_both_papers_are_referenced(citation, words: str, year: int, count: int, url: str) -> None:
    (work,) = [work for work in citation["references"] if words in work["title"]]
    assert work["type"] in ("article", "conference-paper")
    assert (work["year"], work["url"], len(work["authors"])) == (year, url, count)
    check_authors(work)
    assert all("family-names" in author for author in work["authors"])
