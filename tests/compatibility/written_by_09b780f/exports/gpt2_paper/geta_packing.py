"""Integers of b bits as a bit stream: what a packed weight is on disk, and how it is read.

Code n is stored as the unsigned number n + 2^(b-1), least significant bit first, one after the other without gaps.
Eight codes fill exactly b bytes, so streams are taken as columns of eight codes and no bit is ever handled alone.
The unsigned 0 never occurs (|n| <= 2^(b-1) - 1), which is how a stream overwritten with zeros is noticed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .geta_errors import GETAError

MIN_BITS, MAX_BITS = 2, 16

BYTE_BITS = 8
"""Codes up to this width fit a byte, and can be read back from a weight in any floating-point type."""

ROWS_AT_ONCE = 1 << 13
"""Rows of eight codes handled at once: what is needed in between stays small, and in the processor's cache."""


def largest_code(bits: int) -> int:
    """The largest |n| that `bits` bits hold, 2^(bits-1) - 1."""
    return 2 ** (bits - 1) - 1


def stream_length(numel: int, bits: int) -> int:
    """Bytes of the stream of `numel` codes."""
    return (numel * bits + 7) // 8


def columns(bits: int) -> Iterator[tuple[int, int, int, int]]:
    """Where code j of eight lies in its b bytes: (j, first byte, bit within it, number of bytes touched)."""
    for j in range(8):
        first, shift = divmod(j * bits, 8)
        yield j, first, shift, (shift + bits + 7) // 8


def unpack(stream: Tensor, bits: int, numel: int) -> Tensor:
    """The codes of a stream.

    Args:
        stream: uint8 of shape (ceil(numel * bits / 8),), on any device.
        bits: 2 to 16.
        numel: number of codes.

    Returns:
        int8 up to 8 bits, int16 beyond, of shape (numel,), on the stream's device.

    Raises:
        GETAError: a stream that is not uint8 or has another length, or a code that is never written.
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
        if missing := -part.numel() % bits:
            part = torch.cat((part, part.new_zeros(missing)))
        codes[start : start + 8 * ROWS_AT_ONCE] = _to_codes(part.view(-1, bits), bits).view(-1)[: numel - start]
    if numel and int(codes.min()) < -largest_code(bits):
        raise GETAError(f"the {bits}-bit stream holds a code that is never written; the data is damaged")
    return codes


def _to_codes(rows: Tensor, bits: int) -> Tensor:
    """Bytes (n, bits) to signed codes (n, 8)."""
    # Among bytes, what is shifted out at the top is what the mask would take away.
    parts = rows if bits <= BYTE_BITS else rows.to(torch.int32)
    out = torch.empty(rows.shape[0], 8, dtype=parts.dtype, device=rows.device)
    for j, first, shift, touched in columns(bits):
        value = parts[:, first] >> shift
        for k in range(1, touched):
            value |= parts[:, first + k] << (8 * k - shift)
        out[:, j] = value
    codes = out.bitwise_and_(2**bits - 1).sub_(2 ** (bits - 1))
    return codes.view(torch.int8) if bits <= BYTE_BITS else codes
