"""Copy modules whatever their attributes hold: caches of activations, locks, open files, generators."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

_ATOMS = (type(None), bool, int, float, complex, str, bytes, type, FunctionType, torch.dtype, torch.device)

Copied = TypeVar("Copied", bound=nn.Module)


def copy_module(module: Copied, shared: Mapping[int, Any] | None = None) -> Copied:
    """Return a deep copy of a module, as `copy.deepcopy`, which no attribute prevents.

    A tensor with a graph, such as an activation that was cached in training, is in the copy without its graph. What can
    be copied by no means, such as a lock, an open file or a Python generator, is the same object in both. A torch
    generator is another one in the same state.

    Args:
        module: unchanged.
        shared: id of an object -> what takes its place in the copy, such as a parameter that both are to share.
    """
    memo = dict(shared or {})
    known: dict[int, Any] = {id(part): part for part in module.modules()}
    known |= {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    seen: set[int] = set()
    for part in module.modules():
        _prepare(part, memo, known, seen)
    return copy.deepcopy(module, memo)


def _prepare(value: Any, memo: dict[int, Any], known: Mapping[int, Any], seen: set[int]) -> None:
    """Enter into `memo` what takes the place of everything below `value` that `copy.deepcopy` refuses."""
    if isinstance(value, _ATOMS) or id(value) in seen or id(value) in memo:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        if not value.is_leaf:
            memo[id(value)] = value.detach()
        return
    if isinstance(value, torch.Generator):
        memo[id(value)] = value.clone_state()
        return
    if isinstance(value, nn.Module | dict | list | tuple | set | MethodType | partial):
        for item in _inside(value):
            _prepare(item, memo, known, seen)
    elif not _copyable(value, memo, known):
        # An object that only holds a lock is copied, around the same lock.
        for item in () if isinstance(value, ModuleType) else _inside(value):
            _prepare(item, memo, known, seen)
        if not _copyable(value, memo, known):
            memo[id(value)] = value


def _copyable(value: Any, memo: Mapping[int, Any], known: Mapping[int, Any]) -> bool:
    try:
        # Modules count as copied here: one that an object refers to is not copied for a trial.
        copy.deepcopy(value, {**known, **memo})
    except Exception:  # each type has its own way to refuse
        return False
    return True


def _inside(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list | tuple | set):
        yield from value
    elif isinstance(value, MethodType):
        yield value.__self__
    elif isinstance(value, partial):
        yield from (value.func, *value.args, *value.keywords.values())
    else:
        yield from getattr(value, "__dict__", {}).values()
