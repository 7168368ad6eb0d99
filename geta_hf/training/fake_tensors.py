"""Run models on tensors without data, and count the bytes that are alive at every moment."""

from __future__ import annotations

import logging
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim.optimizer import _foreach_supported_types as optimizer_types
from torch.utils._foreach_utils import _foreach_supported_types as function_types
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from geta_hf.quantization.kernels import Kernel
from geta_hf.utils.copies import copy_module
from geta_hf.utils.process_state import exclusive

Model = TypeVar("Model", bound=nn.Module)


def outline_of(tensor: Tensor, mode: FakeTensorMode, device: torch.device) -> Tensor:
    """Return a tensor of the same shape and dtype on `device`, without data."""
    with mode:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)


def without_data(model: Model, mode: FakeTensorMode, device: torch.device) -> Model:
    """Copy a model so that its tensors hold no data; tied tensors stay tied."""
    # deepcopy takes these in place of the tensors, which would be copied with their data.
    memo: dict[int, Any] = {id(b): outline_of(b, mode, device) for b in model.buffers()}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(outline_of(parameter, mode, device), parameter.requires_grad)
    return copy_module(model, memo)


def _quantize(x: Tensor, d: Tensor, q_m: Tensor, t: Tensor | None) -> Tensor:
    return torch.empty_like(x)


def _gradients(grad: Tensor, x: Tensor, d: Tensor, q_m: Tensor, t: Tensor | None) -> Any:
    return torch.empty_like(grad), *(None if value is None else torch.empty_like(value) for value in (d, q_m, t))


def _straight_through(grad: Tensor, x: Tensor, q_m: Tensor) -> Tensor:
    return torch.empty_like(grad)


OUTLINE = Kernel("outline", _quantize, _gradients, _straight_through)
"""What the fused kernels allocate; the pure functions, which fake tensors would get, make a temporary a line."""


@contextmanager
def outlines(mode: FakeTensorMode) -> Iterator[None]:
    """Enter a fake tensor mode in which experts run in any dtype and optimizers take the path of the tensors' device.

    Torch knows the grouped product's shapes for bfloat16 alone, and logs the stack of whatever fails, which is
    suppressed.
    """
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    with exclusive(), warnings.catch_warnings(), _foreach_supported(), mode, _Grouped():
        # Asked for by transformers' look at alignment, of which tensors without data have none.
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        logger.disabled, before = True, logger.disabled
        try:
            yield
        finally:
            logger.disabled = before


@contextmanager
def _foreach_supported() -> Iterator[None]:
    """Let torch choose an optimizer's implementation for tensors without data as for real ones on the same device.

    On CUDA the default is foreach, but for types of tensors that torch lists; DTensor adds itself to the lists as well.
    """
    lists = (optimizer_types, function_types)
    for types in lists:
        types.append(FakeTensor)
    try:
        yield
    finally:
        for types in lists:
            types.remove(FakeTensor)


class _Grouped(TorchDispatchMode):
    """Give every grouped matrix product an output of the right shape."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return (_grouped if func is torch.ops.aten._grouped_mm.default else func)(*args, **kwargs)


def _grouped(
    a: Tensor, b: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Return the shape of a grouped product: one product a group where both or neither have groups."""
    groups: tuple[int, ...] = ()
    if a.dim() == b.dim():
        groups = (a.shape[0],) if a.dim() == 3 else (offs.numel(),)  # type: ignore[union-attr]
    return a.new_empty(*groups, a.shape[-2], b.shape[-1], dtype=dtype or a.dtype)


class Live(TorchDispatchMode):
    """Count the bytes that are alive, by part, and keep the counts at the highest level."""

    def __init__(self) -> None:
        super().__init__()
        self.now: Counter[str] = Counter()
        self.highest: Counter[str] = Counter()
        self.peak = self.level = 0
        self._part: dict[int, str] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        # By storage, since a view takes no memory of its own.
        for value in tree_leaves(out):
            if isinstance(value, Tensor) and id(value.untyped_storage()) not in self._part:
                self.hold(value, "activations")
        return out

    def hold(self, tensor: Tensor, part: str) -> None:
        """Count a tensor's storage under a part until it is freed; one that is counted already changes its part."""
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._part:
            self.now[self._part[key]] -= size
        else:
            self.level += size
            # A storage dies with the last tensor or autograd node that holds it, so its life is the memory's own.
            weakref.finalize(storage, self._drop, key, size)
        self._part[key] = part
        self.now[part] += size
        # A copy at each new peak: the parts that are alive then, and not the highest of each part by itself.
        if self.level > self.peak:
            self.peak, self.highest = self.level, self.now.copy()

    def _drop(self, key: int, size: int) -> None:
        self.level -= size
        # Removed at once, since Python gives the id to the next object.
        self.now[self._part.pop(key)] -= size
