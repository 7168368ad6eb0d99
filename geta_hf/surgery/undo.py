"""Keep what takes changes of a model back, until they are proved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Undoable:
    """Base of what describes a cut of a model: takes the cut back, or frees what that needs."""

    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False, kw_only=True)

    def restore(self) -> None:
        """Give the model back what it lost."""
        while self._undo:
            self._undo.pop()()

    def release(self) -> None:
        """Free the removed parts, which are held until then so that `restore` can put them back."""
        self._undo.clear()

    def later(self, undo: Callable[[], None]) -> None:
        """Let `restore` call a function, the last one first."""
        self._undo.append(undo)

    def set(self, holder: Any, name: str, value: Any) -> None:
        """Set an attribute, which `restore` sets to its value of before."""
        before = getattr(holder, name)
        self.later(lambda: setattr(holder, name, before))
        setattr(holder, name, value)
