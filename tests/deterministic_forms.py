"""Refuse on a CPU what a GPU does not compute in the same way every time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

# Those that raise on a GPU under `torch.use_deterministic_algorithms(True)`, by its documentation.
_WITHOUT = frozenset(
    {
        "histc",
        "put_",
        "nll_loss2d_forward",
        "_ctc_loss_backward",
        "avg_pool3d_backward",
        "_adaptive_avg_pool2d_backward",
        "_adaptive_avg_pool3d_backward",
        "adaptive_max_pool2d_backward",
        "fractional_max_pool2d_backward",
        "fractional_max_pool3d_backward",
        "max_unpool2d",
        "max_unpool3d",
        "grid_sampler_2d_backward",
        "grid_sampler_3d_backward",
        "reflection_pad1d_backward",
        "reflection_pad2d_backward",
        "reflection_pad3d_backward",
        "upsample_linear1d_backward",
        "upsample_bilinear2d_backward",
        "upsample_bicubic2d_backward",
        "upsample_trilinear3d_backward",
    }
)

# Those that add up entries with the same index in any order, though there is another form that may be asked for.
_IN_ANY_ORDER = frozenset(
    name + ending for name in ("index_add", "scatter_add", "scatter_reduce", "index_put") for ending in ("", "_")
)


class DeterministicForms(TorchDispatchMode):
    """Raise for operators on floats that have no deterministic form on a GPU, or have it on request only.

    Attributes:
        seen: names of the operators that have run.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        self.seen.add(name)
        if name in _WITHOUT or _raises(name, func, args, kwargs):
            raise AssertionError(f"{name} has no deterministic form on a GPU")
        if name in _IN_ANY_ORDER and args[0].is_floating_point() and _repeats(name, args, kwargs):
            raise AssertionError(f"{name} adds up in any order on a GPU")
        return func(*args, **kwargs)


def _raises(name: str, func: Any, args: Any, kwargs: Any) -> bool:
    if name == "bincount":
        return (args[1] if len(args) > 1 else kwargs.get("weights")) is not None
    if name in ("cumsum", "cumsum_"):
        dtype = kwargs.get("dtype") or args[0].dtype
        return dtype.is_floating_point
    if name in ("median", "nanmedian"):
        return "dim" in str(func)
    return name in ("scatter_reduce", "scatter_reduce_") and "prod" in (*args[3:], kwargs.get("reduce"))


def _repeats(name: str, args: Any, kwargs: Any) -> bool:
    if name.startswith("index_put"):
        if not (args[3] if len(args) > 3 else kwargs.get("accumulate", False)):
            return False
        index = torch.stack([each.flatten() for each in args[1] if each is not None])
        return torch.unique(index, dim=1).shape[1] < index.shape[1]
    if name.startswith("scatter_reduce") and {"amin", "amax"} & set(args):
        return False  # which is the same in any order
    index: Tensor = args[2]
    return index.dim() == 1 and len(index.unique()) < len(index)
