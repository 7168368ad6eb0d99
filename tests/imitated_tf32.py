"""Imitate on a CPU what a GPU does in TF32: it reads the inputs of fp32 products with 10 bits of mantissa."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class ImitatedTF32(TorchDispatchMode):
    """Round the inputs of fp32 products wherever torch's settings would let a GPU do so.

    Sums are split into two halves, as kernels for matrices of other sizes add up in another order: a difference in the
    last bit of fp32 then decides now and then which way the next product rounds its input. Attention of one kernel is
    run as plain products.

    Attributes:
        rounded: how many products had their inputs rounded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rounded = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operation = func.overloadpacket
        if operation in (aten.mm, aten.bmm) and args[0].dtype == torch.float32:
            return self._product(func, *args)
        if operation in (aten.addmm, aten.baddbmm) and args[1].dtype == torch.float32 and not kwargs:
            product = aten.mm.default if operation is aten.addmm else aten.bmm.default
            return args[0] + self._product(product, *args[1:])
        if operation is aten.convolution and args[0].dtype == torch.float32:
            return self._convolution(func, *args)
        return func(*args, **(kwargs or {}))

    def _read(self, operation: str, *tensors: Tensor) -> list[Tensor]:
        if torch._C._get_fp32_precision_getter("cuda", operation) != "tf32":
            return list(tensors)
        self.rounded += 1
        return [_ten_bits(tensor) for tensor in tensors]

    def _product(self, func: Any, left: Tensor, right: Tensor) -> Tensor:
        left, right = self._read("matmul", left, right)
        half = left.shape[-1] // 2
        return func(left[..., :half], right[..., :half, :]) + func(left[..., half:], right[..., half:, :])

    def _convolution(self, func: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        # Without cuDNN a convolution is a product.
        x, weight = self._read("conv" if torch.backends.cudnn.enabled else "matmul", x, weight)
        half = x.shape[1] // 2
        if rest[-1] != 1 or not half:
            return func(x, weight, bias, *rest)
        return func(x[:, :half], weight[:, :half], bias, *rest) + func(x[:, half:], weight[:, half:], None, *rest)


def _ten_bits(tensor: Tensor) -> Tensor:
    bits = tensor.contiguous().view(torch.int32)
    # To the nearest, ties to even: 13 of the 23 bits of the mantissa are dropped.
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)
