"""Say where a model has attention heads that the dependency graph did not find, and why."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from geta_hf.qadg.group_types import Family
from geta_hf.qadg.space import PruningSpace

_HEADS = re.compile(r"(?:^|_)n?heads?$")
_KINDS = ("heads", "query_heads")


def missing_heads(model: nn.Module, space: PruningSpace) -> tuple[str, ...]:
    """Return one sentence for each kind of module that counts heads and has no family of heads.

    A module counts heads by an integer attribute above 1, such as `num_heads` or `n_head`. Modules of the same name
    but for numbers are one kind, and numbers appear as `*`.

    Args:
        model: on any device.
        space: its pruning space.
    """
    found: dict[str, None] = {}
    with_heads = [member.tensor for family in space.families if family.kind in _KINDS for member in family.members]
    for path, name, count in _counting_heads(model):
        inside = f"{path}." if path else ""
        if any(tensor.startswith(inside) for tensor in with_heads):
            continue
        where = _pattern(path) or type(model).__name__
        found[f"no heads are found in {where} ({name} = {count}): {_reason(inside, space)}"] = None
    return tuple(found)


def _counting_heads(model: nn.Module) -> Iterator[tuple[str, str, int]]:
    """Yield path, attribute and number of heads of the innermost modules that count them around a matrix."""
    counts: dict[str, tuple[str, int]] = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if type(value) is int and value > 1 and _HEADS.search(name):
                counts.setdefault(_with_matrices(model, path), (name, value))
    for path, (name, value) in counts.items():
        inside = f"{path}." if path else ""
        if not any(other != path and other.startswith(inside) for other in counts):
            yield path, name, value


def _with_matrices(model: nn.Module, path: str) -> str:
    """Return the path, or the closest one around it, below which there is a matrix."""
    while path and all(parameter.dim() < 2 for parameter in model.get_submodule(path).parameters()):
        path = path.rpartition(".")[0]
    return path


def _reason(inside: str, space: PruningSpace) -> str:
    unsupported = [one for one in space.unsupported if f"{one.module}.".startswith(inside)]
    if unsupported:
        return f"{unsupported[0].operator} is not followed there ({unsupported[0].reason})"
    others = [family for family in space.families if _cuts_within(family, inside)]
    if others:
        return (
            f"its forward takes heads one by one or merges them with another dimension, so that only "
            f"{_pattern(others[0].name)} is found there"
        )
    return (
        "nothing in its forward splits a dimension into heads that can be followed; reshape queries, keys and values "
        "to (batch, length, heads, head size) once, for all heads together"
    )


def _pattern(path: str) -> str:
    return re.sub(r"\b\d+\b", "*", path)


def _cuts_within(family: Family, inside: str) -> bool:
    return family.kind != "residual" and any(member.tensor.startswith(inside) for member in family.members)
