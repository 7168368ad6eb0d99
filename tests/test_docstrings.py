"""Every public name explains itself: a docstring with an example that runs."""

from __future__ import annotations

import doctest
import inspect
import tempfile
from pathlib import Path

import pytest
from transformers.utils import logging as transformers_logging

import geta_hf

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
VERBS_NOT = ("What", "Whether", "Which", "Where", "How")


def example_of(name: str) -> doctest.DocTest | None:
    text = inspect.getdoc(getattr(geta_hf, name)) or ""
    test = doctest.DocTestParser().get_doctest(text, {"geta_hf": geta_hf}, name, None, None)
    return test if test.examples else None


@pytest.mark.parametrize("name", geta_hf.__all__)
def test_every_public_name_has_an_example_that_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    transformers_logging.disable_progress_bar()
    example = example_of(name)
    assert example is not None, f"geta_hf.{name} has no example in its docstring"
    output: list[str] = []
    runner = doctest.DocTestRunner(optionflags=FLAGS, verbose=False)
    runner.run(example, out=output.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(output)


@pytest.mark.parametrize("name", geta_hf.__all__)
def test_docstrings_of_public_functions_begin_with_a_verb(name: str):
    value = getattr(geta_hf, name)
    if inspect.isfunction(value):
        first = (inspect.getdoc(value) or "").split()[0]
        assert first not in VERBS_NOT, f"geta_hf.{name} begins with {first!r}"
        assert not first.endswith("s") or first in ("Pass", "Process"), f"geta_hf.{name}: {first!r} is no imperative"


def test_a_wrong_example_is_caught():
    wrong = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, None)
    runner = doctest.DocTestRunner(optionflags=FLAGS, verbose=False)
    runner.run(wrong, out=lambda _: None)
    assert runner.summarize(verbose=False).failed == 1
