"""Keep what takes changes of a model back, until they are proved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from geta_hf.surgery.shorter_config import Change


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

    def apply(self, changes: Iterable[Change], model: nn.Module) -> None:
        """Give attributes of modules and of their configurations the values of a smaller model."""
        for change in changes:
            holder: Any = model.get_submodule(change.module)
            for name in change.path:
                holder = getattr(holder, name)
            self.set(holder, change.name, change.value)

    def cut_list(self, module: nn.Module, kept: Sequence[int]) -> None:
        """Keep some of the modules that are named by their places, in order; others of a module remain.

        The remaining ones are counted again, as the smaller model names its own.
        """
        before = module._modules
        self.later(lambda: setattr(module, "_modules", before))
        others = {name: child for name, child in before.items() if not name.isdecimal()}
        module._modules = {**others, **{str(place): before[str(old)] for place, old in enumerate(kept)}}
