"""What operators return on meta is the same from memory, and only what depends on nothing else comes from there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from geta_hf.qadg.tracing import meta_results
from geta_hf.qadg.tracing.meta_results import run_on_meta

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meta_results, "_known", {})


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _layouts(result: Any) -> list[tuple[Any, ...]]:
    results = [result] if isinstance(result, Tensor) else result
    return [(tuple(item.shape), item.stride(), item.dtype, item.device.type, type(item)) for item in results]


_CALLS: dict[str, Callable[[], tuple[Any, list[Any], dict[str, Any]]]] = {
    "one tensor": lambda: (aten.addmm.default, [_meta(5), _meta(2, 3), _meta(3, 5)], {}),
    "strides": lambda: (aten.gelu.default, [_meta(4, 6).t()], {}),
    "several": lambda: (aten.native_layer_norm.default, [_meta(2, 8), [8], _meta(8), _meta(8), 1e-5], {}),
    "a list of tensors": lambda: (aten.cat.default, [[_meta(2, 3), _meta(4, 3)]], {}),
    "no tensor given": lambda: (aten.arange.default, [7], {"dtype": torch.int32, "device": torch.device("meta")}),
}


@pytest.mark.parametrize("call", _CALLS)
def test_the_same_from_memory(call: str) -> None:
    func, args, kwargs = _CALLS[call]()
    first = run_on_meta(func, args, kwargs)
    assert len(meta_results._known) == 1
    func, args, kwargs = _CALLS[call]()
    again = run_on_meta(func, args, kwargs)
    assert len(meta_results._known) == 1
    assert _layouts(again) == _layouts(first) == _layouts(func(*args, **kwargs))
    assert type(again) is type(first)
    assert again is not first


def test_what_a_result_depends_on_tells_calls_apart() -> None:
    numbers = _meta(3, dtype=torch.int64)
    assert [run_on_meta(aten.add.Scalar, [numbers, other], {}).dtype for other in (1, 1.0, True)] == [
        torch.int64,
        torch.float32,
        torch.int64,
    ]
    before = torch.get_default_dtype()
    assert run_on_meta(aten.div.Scalar, [numbers, 2], {}).dtype is torch.float32
    try:
        torch.set_default_dtype(torch.float64)
        assert run_on_meta(aten.div.Scalar, [numbers, 2], {}).dtype is torch.float64
    finally:
        torch.set_default_dtype(before)
    assert run_on_meta(aten.relu.default, [_meta(4, 6)], {}).stride() == (6, 1)
    assert run_on_meta(aten.relu.default, [_meta(6, 4).t()], {}).stride() == (1, 4)
    kept = {"dtype": torch.bfloat16}
    assert run_on_meta(aten._to_copy.default, [_meta(2)], kept).dtype is torch.bfloat16
    assert run_on_meta(aten._to_copy.default, [_meta(2)], {"dtype": torch.float16}).dtype is torch.float16


def test_views_and_writes_always_run() -> None:
    for _ in range(2):
        tensor = _meta(4, 6)
        view = run_on_meta(aten.view.default, [tensor, [24]], {})
        assert view.untyped_storage()._cdata == tensor.untyped_storage()._cdata
        assert run_on_meta(aten.relu_.default, [tensor], {}) is tensor
    assert not meta_results._known


def test_what_was_given_is_given_back_every_time() -> None:
    """An operator may return its argument although its schema says that it makes a new tensor."""

    class Given:
        _schema = aten.relu.default._schema

        def __call__(self, tensor: Tensor) -> Tensor:
            return tensor

    given: Any = Given()
    for _ in range(2):
        tensor = _meta(3)
        assert run_on_meta(given, [tensor], {}) is tensor
    assert not meta_results._known


def test_no_more_than_a_limit_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meta_results, "_LIMIT", 3)
    for size in range(1, 9):
        run_on_meta(aten.relu.default, [_meta(size)], {})
        assert len(meta_results._known) <= 3
