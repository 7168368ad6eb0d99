"""Compute operators on meta, and remember what they returned.

On meta an operator only says what shape, strides and dtype its result has. For many that takes torch a millisecond of
Python, and the layers of a model, and every recording of it, ask the same again. So what was returned is remembered by
what was asked: the operator, its plain arguments, and the layout of its tensors.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

_LIMIT = 4096
"""Calls that are remembered. All forwards of a model with hundreds of layers make some hundreds of different ones."""

_Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]

_known: dict[Hashable, tuple[bool, tuple[_Layout, ...]]] = {}
"""Call -> whether it returned one tensor and no tuple, and the layouts of what it returned."""


def run_on_meta(func: torch._ops.OpOverload, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """Return what an operator returns for tensors on meta: `func(*args, **kwargs)`, computed or from memory.

    Only new tensors are made from memory. An operator that writes, or that returns a view or what it was given, runs
    every time.

    Args:
        func: the operator.
        args: its positional arguments, all tensors on meta.
        kwargs: its keyword arguments, likewise.
    """
    key = _key(func, args, kwargs)
    if key is None:
        return func(*args, **kwargs)
    if key not in _known:
        result = func(*args, **kwargs)
        _remember(key, [*args, *kwargs.values()], result)
        return result
    single, layouts = _known[key]
    made = tuple(torch.empty_strided(shape, stride, dtype=dtype, device="meta") for shape, stride, dtype in layouts)
    return made[0] if single else made


def _key(func: torch._ops.OpOverload, args: list[Any], kwargs: dict[str, Any]) -> Hashable | None:
    """Return all that a result on meta depends on; None for a call that is not remembered."""
    if any(argument.alias_info is not None for argument in func._schema.arguments):
        return None
    arguments = [_described(item) for item in args]
    arguments += [(name, _described(item)) for name, item in sorted(kwargs.items())]
    # Of a division of integers, the result has the default dtype.
    key = (func, torch.get_default_dtype(), *arguments)
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _described(item: Any) -> Any:
    if isinstance(item, Tensor):
        return (
            tuple(item.shape),
            item.stride(),
            item.dtype,
            item.storage_offset(),
            item.is_conj(),
            item.is_neg(),
        )
    if isinstance(item, list | tuple):
        return tuple(map(_described, item))
    # The type too: 1, 1.0 and True are equal, but as operands they give results of other dtypes.
    return type(item), item


def _remember(key: Hashable, arguments: list[Any], result: Any) -> None:
    single = isinstance(result, Tensor)
    results = (result,) if single else result
    if not isinstance(results, tuple) or not all(type(item) is Tensor and item.is_meta for item in results):
        return
    # Some operators return what they were given although their schema does not say so.
    storages = {item.untyped_storage()._cdata for item in results}
    for argument in arguments:
        for item in argument if isinstance(argument, list | tuple) else [argument]:
            if isinstance(item, Tensor):
                storages.discard(item.untyped_storage()._cdata)
    if len(storages) < len(results):
        return
    if any(item.layout is not torch.strided or item.storage_offset() for item in results):
        return
    if len(_known) >= _LIMIT:
        _known.clear()
    _known[key] = (single, tuple((tuple(item.shape), item.stride(), item.dtype) for item in results))
