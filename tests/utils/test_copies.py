"""Copies of modules whose attributes `copy.deepcopy` refuses."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from geta_hf.utils.copies import copy_module


class Cache:
    """An object of the user's own, with a lock inside."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows
        self.lock = threading.Lock()


def made() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def numbers() -> Any:
    yield from range(3)


KEPT = {
    "a lock": lambda _: threading.Lock(),
    "a lock in a list": lambda _: [threading.RLock()],
    "a lock in a dict of an object": lambda _: {"cache": Cache([1])},
    "an open file": lambda path: (path / "log").open("w"),
    "a Python generator": lambda _: numbers(),
    "a module of Python": lambda _: threading,
    "a lambda": lambda _: lambda x: x,
    "a partial around a lock": lambda _: partial(print, threading.Lock()),
}


@pytest.mark.parametrize("kind", KEPT)
def test_attributes_that_cannot_be_copied_do_not_prevent_a_copy(kind: str, tmp_path: Path) -> None:
    model = made()
    model[0].extra = KEPT[kind](tmp_path)
    copied = copy_module(model)
    assert hasattr(copied[0], "extra")
    x = torch.randn(2, 3)
    assert torch.equal(copied(x), model(x))
    assert copied[0].weight is not model[0].weight
    if kind == "an open file":
        model[0].extra.close()


def test_an_activation_is_copied_without_its_graph() -> None:
    model = made()
    model.last = model(torch.randn(2, 3))
    model[1].seen = [{"x": model.last * 2}]
    copied = copy_module(model)
    assert torch.equal(copied.last, model.last) and not copied.last.requires_grad
    assert torch.equal(copied[1].seen[0]["x"], model.last * 2)
    assert model.last.grad_fn is not None  # the model's own is unchanged


def test_an_object_around_a_lock_is_copied() -> None:
    model = made()
    model.cache = Cache([torch.ones(2)])
    copied = copy_module(model)
    copied.cache.rows[0].zero_()
    assert model.cache.rows[0].sum() == 2
    assert copied.cache.lock is model.cache.lock


def test_a_method_of_a_module_belongs_to_the_copy() -> None:
    model = made()
    model[2].lock = threading.Lock()
    model.run = model[2].forward
    model.later = partial(model[0].forward)
    copied = copy_module(model)
    assert copied.run.__self__ is copied[2]
    assert copied.later.func.__self__ is copied[0]


def test_a_generator_of_torch_starts_where_the_original_is() -> None:
    model = made()
    model.random = torch.Generator().manual_seed(3)
    copied = copy_module(model)
    assert torch.equal(torch.rand(3, generator=copied.random), torch.rand(3, generator=model.random))


def test_what_is_shared_takes_the_place_of_the_original() -> None:
    model = made()
    model.tied = [model[0].weight]
    copied = copy_module(model, {id(p): p for p in model.parameters()})
    assert copied[0].weight is model[0].weight is copied.tied[0]
    assert copied[0] is not model[0]
