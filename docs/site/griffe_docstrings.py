"""Adapt docstrings to Markdown: examples become code blocks, and arguments described together get a line each."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import griffe

_PROMPT = re.compile(r"( *)>>> ")
_TOGETHER = re.compile(r"^( {4})([\w*]+), ([\w*, ]+): (.+)$", re.MULTILINE)


class AdaptDocstrings(griffe.Extension):
    """Change the text of every docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Adapt the docstring of one object."""
        if obj.docstring is not None:
            text = _TOGETHER.sub(_one_each, obj.docstring.value)
            obj.docstring.value = "\n".join(_fenced(text.splitlines()))


def _one_each(found: re.Match[str]) -> str:
    indent, first, others, text = found.groups()
    lines = [f"{indent}{name}: see `{first}`." for name in others.split(", ")]
    # The description of the first may go on in the next lines.
    return "\n".join([*lines, f"{indent}{first}: {text}"])


def _fenced(lines: list[str]) -> Iterator[str]:
    """Yield the lines, with a fence around each run of lines from a prompt to the next blank line."""
    indent = None
    for line in lines:
        prompt = _PROMPT.match(line)
        if indent is None and prompt:
            indent = prompt[1]
            yield f"{indent}```pycon"
        if indent is not None and not line.strip():
            yield f"{indent}```"
            indent = None
        yield line
    if indent is not None:
        yield f"{indent}```"
