"""Read YAML of strangers, such as the head of a model card, without what makes a few lines fill the memory."""

from __future__ import annotations

from typing import Any

import yaml

from geta_hf.errors import GETAError

_LONGEST, _DEEPEST = 200_000, 50
"""Characters, which are read in a second or two, and levels of nesting."""


class _PlainLoader(yaml.SafeLoader):
    """A safe loader that refuses aliases, which can double the values with every line, and deep nesting."""

    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias, such as *name; write its value instead")
        self._depth += 1
        if self._depth > _DEEPEST:
            raise yaml.YAMLError(f"more than {_DEEPEST} levels")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


def load_plain_yaml(text: str, where: str) -> Any:
    """Return the values of a YAML document.

    Args:
        text: of the document.
        where: how to call it in an error.

    Raises:
        GETAError: it is no YAML, has aliases, or is nested or long beyond what people write.
    """
    if len(text) > _LONGEST:
        raise GETAError(f"{where} can't be read ({len(text)} characters, more than {_LONGEST}); shorten or delete it")
    try:
        return yaml.load(text, Loader=_PlainLoader)
    # Values may be what their type refuses, such as a 13th month.
    except (yaml.YAMLError, ValueError, ArithmeticError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise GETAError(f"{where} can't be read ({reason}); correct or delete it") from error
