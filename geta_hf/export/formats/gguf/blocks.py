"""Block types: how GGUF stores a tensor. Codes with one step size fit into blocks without another rounding.

A block holds 32 or 256 neighboring values of a row as small integers with a step size in half precision (and, in types
that end in K, a small integer factor for every 16 of them, which is 1 here). The layouts are those of ggml.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Bytes = npt.NDArray[np.uint8]
Codes = npt.NDArray[np.int8]

STEP_ERROR = 2**-11
"""The largest share by which a step size changes in half precision, unless it is too small or too large for it."""

_BLOCK, _LARGE_BLOCK = 32, 256

_LARGE = {2: "Q2_K", 3: "Q3_K", 6: "Q6_K"}
"""Bit widths for which blocks of 256 are smaller than those of 32. At 4 and 5 bits they are not."""

TERNARY = "TQ2_0"
"""The smallest type for 2 bits, whose three codes it holds exactly; CUDA has no kernels for it."""

_SMALL = {2: "Q4_0", 3: "Q4_0", 4: "Q4_0", 5: "Q5_0", 6: "Q8_0", 7: "Q8_0", 8: "Q8_0"}


@dataclass(frozen=True)
class Values:
    """The values of a tensor: floats, or codes with their step sizes.

    Attributes:
        floats: fp32, the values, d * n where there are codes.
        codes: int8 of the same shape (rows, columns); None where the values are not codes of at most 8 bits.
        step_size: fp32, shape (1,), (rows,) or (rows, blocks of 32 columns), where there are codes.
        bits: bit width of the codes; 0 without.
        four_levels: whether the codes are -3, -1, 1 and 3, at 2 bits. Default False.
    """

    floats: Tensor
    codes: Tensor | None = None
    step_size: Tensor | None = None
    bits: int = 0
    four_levels: bool = False

    def rows(self, order: Tensor) -> Values:
        """Return the values with the rows in another order."""
        step = self.step_size
        return Values(
            self.floats[order],
            None if self.codes is None else self.codes[order],
            step[order] if step is not None and step.numel() > 1 else step,
            self.bits,
            self.four_levels,
        )


def choose_type(values: Values, ternary: bool = False) -> str:
    """Return the smallest type that holds the values: exactly, or up to the half precision of a step size.

    Codes in rows that are no multiple of 32 long have no block type. They are stored as F16, like other floats.

    Args:
        values: what to store.
        ternary: whether 2 bits may be `TERNARY`. Default False.
    """
    if values.codes is not None and values.step_size is not None and _fits_half(values.step_size):
        columns = values.codes.shape[1]
        # The larger blocks have one step size for 256 columns.
        if columns % _LARGE_BLOCK == 0 and values.bits in _LARGE and values.step_size.dim() == 1:
            return TERNARY if ternary and values.bits == 2 and not values.four_levels else _LARGE[values.bits]
        if columns % _BLOCK == 0:
            return _SMALL[values.bits]
    floats = values.floats
    # Norms and biases are read as F32; they are few.
    if floats.dim() == 1:
        return "F32"
    largest = float(floats.abs().max()) if floats.numel() else 0.0
    error = float((floats - floats.half().float()).abs().max()) if floats.numel() else 0.0
    if error and torch.equal(floats, floats.bfloat16().float()):
        return "BF16"
    return "F16" if error <= STEP_ERROR * largest else "F32"


def _fits_half(step_size: Tensor) -> bool:
    error = (step_size.half().float() - step_size).abs()
    return bool((error <= STEP_ERROR * step_size).all())


def encode(values: Values, kind: str) -> Bytes:
    """Return the bytes of a tensor, with the bytes of a row as the last dim.

    Args:
        values: what to store.
        kind: as `choose_type` gives it, or "F32", "F16" or "BF16".
    """
    if kind in _FLOATS:
        return values.floats.to(_FLOATS[kind]).contiguous().view(torch.uint8).numpy()
    assert values.codes is not None and values.step_size is not None
    codes = values.codes.contiguous().numpy()
    size = _LARGE_BLOCK if kind.endswith("K") or kind == TERNARY else _BLOCK
    blocks = codes.reshape(codes.shape[0], -1, size)
    # One step size for all blocks of a row, or for each, as bytes in front of or behind each block.
    step = values.step_size.half().numpy()
    step = step[:, :, None] if step.ndim == 2 else step.reshape(-1, 1, 1)
    steps = np.ascontiguousarray(np.broadcast_to(step, (*blocks.shape[:2], 1))).view(np.uint8)
    pack = _q2_k_of_four_levels if values.four_levels and kind == "Q2_K" else _PACK[kind]
    packed: Bytes = pack(blocks, steps)
    return packed.reshape(codes.shape[0], -1)


_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _unsigned(codes: Codes, offset: int) -> Bytes:
    return (codes.astype(np.int16) + offset).astype(np.uint8)


def _constant(blocks: Codes, value: int, count: int) -> Bytes:
    return np.full((*blocks.shape[:2], count), value, dtype=np.uint8)


def _nibbles(unsigned: Bytes) -> Bytes:
    """Pack the first and the second half of each block into the low and the high half of bytes."""
    half = unsigned.shape[-1] // 2
    return ((unsigned[..., :half] & 15) | ((unsigned[..., half:] & 15) << 4)).astype(np.uint8)


def _quarters(unsigned: Bytes) -> Bytes:
    """Pack two bits of each value: byte j of a half block has those of values j, j + 32, j + 64 and j + 96."""
    parts = (unsigned & 3).reshape(*unsigned.shape[:2], 2, 4, 32)
    packed = parts[..., 0, :] | (parts[..., 1, :] << 2) | (parts[..., 2, :] << 4) | (parts[..., 3, :] << 6)
    return packed.reshape(*unsigned.shape[:2], -1).astype(np.uint8)


def _q4_0(blocks: Codes, steps: Bytes) -> Bytes:
    return np.concatenate([steps, _nibbles(_unsigned(blocks, 8))], -1)


def _q5_0(blocks: Codes, steps: Bytes) -> Bytes:
    unsigned = _unsigned(blocks, 16)
    high = np.packbits(unsigned >> 4, axis=-1, bitorder="little")
    return np.concatenate([steps, high, _nibbles(unsigned)], -1)


def _q8_0(blocks: Codes, steps: Bytes) -> Bytes:
    return np.concatenate([steps, blocks.view(np.uint8)], -1)


def _q2_k(blocks: Codes, steps: Bytes) -> Bytes:
    # Values are d * q - d with q = n + 1: the factor and the offset of all 16 parts are 1.
    return np.concatenate([_constant(blocks, 0x11, 16), _quarters(_unsigned(blocks, 1)), steps, steps], -1)


def _q2_k_of_four_levels(blocks: Codes, steps: Bytes) -> Bytes:
    # Values are 2 d * q - 3 d with q = (n + 3) / 2: the factor of all 16 parts is 2, and their offset 3.
    quarters = _quarters((_unsigned(blocks, 3) >> 1).astype(np.uint8))
    return np.concatenate([_constant(blocks, 0x32, 16), quarters, steps, steps], -1)


def _q3_k(blocks: Codes, steps: Bytes) -> Bytes:
    unsigned = _unsigned(blocks, 4)
    # Byte j has the third bits of values j, j + 32, and so on.
    third = np.packbits((unsigned >> 2).reshape(*blocks.shape[:2], 8, 32), axis=-2, bitorder="little")[..., 0, :]
    # Factors of 6 bits are stored plus 32: four bits of 33 here, its two high bits behind them.
    factors = [_constant(blocks, 0x11, 8), _constant(blocks, 0xAA, 4)]
    return np.concatenate([third, _quarters(unsigned), *factors, steps], -1)


def _q6_k(blocks: Codes, steps: Bytes) -> Bytes:
    unsigned = _unsigned(blocks, 32)
    low = _nibbles(unsigned.reshape(*blocks.shape[:2], 2, 128)).reshape(*blocks.shape[:2], -1)
    return np.concatenate([low, _quarters((unsigned >> 4).astype(np.uint8)), _constant(blocks, 1, 16), steps], -1)


def _tq2_0(blocks: Codes, steps: Bytes) -> Bytes:
    return np.concatenate([_quarters(_unsigned(blocks, 1)), steps], -1)


_PACK = {"Q4_0": _q4_0, "Q5_0": _q5_0, "Q8_0": _q8_0, "Q2_K": _q2_k, "Q3_K": _q3_k, "Q6_K": _q6_k, TERNARY: _tq2_0}
