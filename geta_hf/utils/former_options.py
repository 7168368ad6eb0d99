"""Let options of a command be given in their former spelling, with a line that says so."""

from __future__ import annotations

import argparse
import sys
from typing import Any


class FormerlyUnderscored(argparse.Action):
    """Store the value of an option, and report the use of its former spelling on stderr."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        """Store the value."""
        if option is not None and "_" in option:
            present = option.replace("_", "-")
            print(
                f"{parser.prog}: {option} is now {present}; the next version drops the former spelling", file=sys.stderr
            )
        setattr(namespace, self.dest, values)


def add_renamed(command: argparse.ArgumentParser, option: str, **options: Any) -> None:
    """Add an option such as `--two-words` that was `--two_words` before, and can still be given so.

    Args:
        command: the parser.
        option: in its present spelling.
        options: as for `add_argument`; no `action`.
    """
    former = f"--{option[2:].replace('-', '_')}"
    command.add_argument(option, former, action=FormerlyUnderscored, **options)
