"""Suggest the name that a misspelled one may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return " (did you mean ...?)" with the name most like `word`, or "" if none is alike.

    A name that ends with `.word` counts as the likest: a key that belongs into a section.

    >>> did_you_mean("learning_rat", ["learning_rate", "seed"])
    ' (did you mean learning_rate?)'
    >>> did_you_mean("bits", ["geta.bits", "seed"])
    ' (did you mean geta.bits?)'
    >>> did_you_mean("xyz", ["seed"]), did_you_mean("", ["seed"])
    ('', '')
    """
    if not word:  # with which every name begins
        return ""
    names = list(known)
    found = [name for name in names if name.endswith(f".{word}")]
    found += [name for name in names if name.startswith(word)]
    # Names of sections are compared without them as well: `target_sparsty` is like `geta.target_sparsity`.
    bare = {name.rpartition(".")[2]: name for name in reversed(names)} | {name: name for name in names}
    found += [bare[name] for name in difflib.get_close_matches(word, bare, n=1, cutoff=0.7)]
    return f" (did you mean {found[0]}?)" if found else ""
