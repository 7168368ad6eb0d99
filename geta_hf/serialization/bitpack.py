"""Define the bit stream that a packed weight is on disk, and read it.

Code n of b bits is stored as the unsigned number n + 2^(b-1), least significant bit first, one after another without
gaps. Eight codes fill exactly b bytes, so a stream is processed as rows of b bytes (eight codes each), one column of
all rows at a time, and no bit is handled alone. The unsigned 0 never occurs (|n| <= 2^(b-1) - 1), which is how a stream
that was overwritten with zeros is noticed.

A weight of 2 bits may have four levels instead, whose codes n are -3, -1, 1 and 3: these are stored as (n + 3) / 2, so
that every unsigned number occurs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from geta_hf.errors import GETAError

MIN_BITS, MAX_BITS = 2, 16

BYTE_BITS = 8
"""Codes up to this bit width fit a byte, and can be read back from a weight in any floating-point type."""

ROWS_AT_ONCE = 1 << 13
"""Rows of eight codes processed at once: temporaries remain small and in the processor's cache."""


def largest_code(bits: int, four_levels: bool = False) -> int:
    """Return the largest |n| that `bits` bits hold: 2^(bits-1) - 1, or 3 where there are four levels."""
    return 3 if four_levels else 2 ** (bits - 1) - 1


def stream_length(numel: int, bits: int) -> int:
    """Return the length in bytes of a stream of `numel` codes of `bits` bits."""
    return (numel * bits + 7) // 8


def columns(bits: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield where code j of eight lies in its b bytes: (j, first byte, first bit in it, number of bytes touched)."""
    for j in range(8):
        first, shift = divmod(j * bits, 8)
        yield j, first, shift, (shift + bits + 7) // 8


def unpack(stream: Tensor, bits: int, numel: int, four_levels: bool = False) -> Tensor:
    """Decode a stream into its codes.

    Args:
        stream: uint8 of shape (ceil(numel * bits / 8),), on any device.
        bits: 2 to 16.
        numel: number of codes.
        four_levels: whether they are -3, -1, 1 and 3, at 2 bits. Default False.

    Returns:
        Codes n, int8 up to 8 bits and int16 beyond, of shape (numel,), on the stream's device.

    Raises:
        GETAError: the stream is not uint8 or has another length, or it holds a code that is never written.
    """
    expected = stream_length(numel, bits)
    if stream.dtype != torch.uint8 or tuple(stream.shape) != (expected,):
        raise GETAError(
            f"{numel} codes of {bits} bits are a uint8 stream of {expected} bytes, not {stream.dtype} of shape "
            f"{tuple(stream.shape)}"
        )
    codes = torch.empty(numel, dtype=torch.int8 if bits <= BYTE_BITS else torch.int16, device=stream.device)
    for start in range(0, numel, 8 * ROWS_AT_ONCE):
        part = stream[start // 8 * bits :][: ROWS_AT_ONCE * bits]
        # The last row may be incomplete: its codes need fewer than b bytes.
        if missing := -part.numel() % bits:
            part = torch.cat((part, part.new_zeros(missing)))
        codes[start : start + 8 * ROWS_AT_ONCE] = _to_codes(part.view(-1, bits), bits).view(-1)[: numel - start]
    if four_levels:
        return codes.mul_(2).add_(1)
    # Only the unsigned 0 gives this code, and no export writes it.
    if numel and int(codes.min()) < -largest_code(bits):
        raise GETAError(f"the {bits}-bit stream holds a code that is never written; the data is damaged")
    return codes


def _to_codes(rows: Tensor, bits: int) -> Tensor:
    """Turn bytes (n, bits) into signed codes (n, 8)."""
    # A byte suffices for codes of up to 8 bits: what a shift pushes out at its top, the mask would remove anyway.
    parts = rows if bits <= BYTE_BITS else rows.to(torch.int32)
    out = torch.empty(rows.shape[0], 8, dtype=parts.dtype, device=rows.device)
    for j, first, shift, touched in columns(bits):
        value = parts[:, first] >> shift
        for k in range(1, touched):
            value |= parts[:, first + k] << (8 * k - shift)
        out[:, j] = value
    # As uint8 the difference wraps around to the two's complement, which is int8 under another name.
    codes = out.bitwise_and_(2**bits - 1).sub_(2 ** (bits - 1))
    return codes.view(torch.int8) if bits <= BYTE_BITS else codes
