"""Run the quantizer as Triton kernels: one pass over memory forward, one backward.

Every tensor is taken as a matrix in its memory layout: a single row for one quantizer, else a row or a column per
channel. The backward pass writes one partial sum of each reduction per tile; they are added in a fixed order, so the
gradients are the same bit for bit from run to run.

Values with t = None equal the pure functions exactly. With t they may differ in the last place of exp and log, and so
by one step where z / d lies that close to a tie.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from geta_hf.quantization.kernels.kernel import Gradients, Kernel

TINY = tl.constexpr(1e-12)  # that of quantization.functional, which can't be imported from here
TILE = 2048  # elements that one program works on: 16 per thread


@triton.jit
def _place(rows: tl.tensor, cols: tl.tensor, R: tl.constexpr, C: tl.constexpr) -> tuple:
    """Return this program's tile: its row and column among the tiles, and the rows and columns of the matrix in it."""
    # 64-bit, since positions beyond the edge exceed 2^31 before a tensor's size does; and cdiv would add to the size.
    across, program = (cols - 1) // C + 1, tl.program_id(0).to(tl.int64)
    down, right = program // across, program % across
    return down, right, down * R + tl.arange(0, R), right * C + tl.arange(0, C)


@triton.jit
def _of_channels(
    values: tl.tensor, i: tl.tensor, j: tl.tensor, rows: tl.tensor, cols: tl.tensor, BY_ROW: tl.constexpr
) -> tl.tensor:
    """Load what `values` holds for each row or column, broadcastable against the tile."""
    if BY_ROW:
        # 1 and not 0 beyond the edge, since values are divided by it.
        return tl.load(values + i, i < rows, 1.0)[:, None]
    else:
        return tl.load(values + j, j < cols, 1.0)[None, :]


@triton.jit
def _signed_z(x: tl.tensor, q_m: tl.tensor, t: tl.tensor, NONLINEAR: tl.constexpr) -> tuple:
    """Return sgn(x) · min(|x|, q_m)^t and ln min(|x|, q_m); computed by comparisons, which let NaN through."""
    z = tl.where(tl.abs(x) > q_m, q_m, tl.abs(x))
    log = tl.log(tl.where(z < TINY, TINY, z))
    if NONLINEAR:
        z = tl.where(x == 0, 0.0, tl.exp(t * log))
    return tl.where(x < 0, -z, z), log


@triton.jit
def _round(value: tl.tensor) -> tl.tensor:
    """Round half to even, as torch.round: adding 2^23 leaves no bits for a fraction; larger values have none."""
    magnitude = tl.abs(value)
    rounded = tl.where(magnitude < 8388608.0, (magnitude + 8388608.0) - 8388608.0, magnitude)
    return tl.where(value < 0, -rounded, rounded)


@triton.jit
def _nearest(value: tl.tensor, FOUR: tl.constexpr) -> tl.tensor:
    """Round half to even; where FOUR holds, to the nearest of -3, -1, 1 and 3, and an exact 0 to 0."""
    if FOUR:
        magnitude = tl.abs(value)
        odd = tl.where(magnitude >= 2.0, 3.0, tl.where(magnitude > 0.0, 1.0, magnitude))  # the last one keeps NaN
        return tl.where(value < 0, -odd, odd)
    else:
        return _round(value)


@triton.jit
def _forward(
    x: tl.tensor,
    d: tl.tensor,
    q_m: tl.tensor,
    t: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    cols: tl.tensor,
    NONLINEAR: tl.constexpr,
    BY_ROW: tl.constexpr,
    FOUR: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
) -> None:
    _, _, i, j = _place(rows, cols, R, C)
    offset, mask = i.to(tl.int64)[:, None] * cols + j[None, :], (i < rows)[:, None] & (j < cols)[None, :]
    step, clip = _of_channels(d, i, j, rows, cols, BY_ROW), _of_channels(q_m, i, j, rows, cols, BY_ROW)
    signed_z, _ = _signed_z(tl.load(x + offset, mask, 0.0).to(tl.float32), clip, tl.load(t), NONLINEAR)
    tl.store(out + offset, (_nearest(tl.div_rn(signed_z, step), FOUR) * step).to(out.dtype.element_ty), mask)


@triton.jit
def _backward(
    grad: tl.tensor,
    x: tl.tensor,
    d: tl.tensor,
    q_m: tl.tensor,
    t: tl.tensor,
    grad_x: tl.tensor,
    partial: tl.tensor,
    rows: tl.tensor,
    cols: tl.tensor,
    SUMS: tl.constexpr,
    NONLINEAR: tl.constexpr,
    BY_ROW: tl.constexpr,
    FOUR: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
) -> None:
    down, right, i, j = _place(rows, cols, R, C)
    offset, mask = i.to(tl.int64)[:, None] * cols + j[None, :], (i < rows)[:, None] & (j < cols)[None, :]
    clip = _of_channels(q_m, i, j, rows, cols, BY_ROW)
    g, value = tl.load(grad + offset, mask, 0.0).to(tl.float32), tl.load(x + offset, mask, 0.0).to(tl.float32)
    inside = tl.where(tl.abs(value) <= clip, g, 0.0)
    tl.store(grad_x + offset, inside.to(grad_x.dtype.element_ty), mask)
    if SUMS:
        step, exponent = _of_channels(d, i, j, rows, cols, BY_ROW), tl.load(t)
        signed_z, log = _signed_z(value, clip, exponent, NONLINEAR)
        scaled = tl.div_rn(signed_z, step)
        # As in the pure function, g - inside lets a NaN in g reach every sum.
        of_q = (g - inside) * signed_z * exponent / clip
        axis: tl.constexpr = 1 if BY_ROW else 0
        # partial is (2 or 3, tiles along the reduced dim, channels).
        tiles = tl.cdiv(cols, C) if BY_ROW else tl.cdiv(rows, R)
        channels = rows if BY_ROW else cols
        channel = i if BY_ROW else j
        place = partial + (right if BY_ROW else down) * channels + channel
        tl.store(place, tl.sum(g * (_nearest(scaled, FOUR) - scaled), axis), channel < channels)
        tl.store(place + tiles * channels, tl.sum(of_q, axis), channel < channels)
        if NONLINEAR:
            tl.store(place + 2 * tiles * channels, tl.sum(g * signed_z * log, axis), channel < channels)


@dataclass(frozen=True)
class _Layout:
    """A tensor as a matrix of channels: rows where `by_row`, else columns."""

    rows: int
    cols: int
    by_row: bool

    @property
    def channels(self) -> int:
        return self.rows if self.by_row else self.cols

    @property
    def tile(self) -> tuple[int, int]:
        """(rows, columns) of one program's tile, powers of two; wide enough to read full lines of memory."""
        # Along a row sums stay in the tile; down a column many rows are wanted in it, so that few partial sums
        # remain.
        cols = min(TILE if self.by_row else 64, triton.next_power_of_2(self.cols))
        return min(TILE // cols, triton.next_power_of_2(self.rows)), cols

    @property
    def tiles(self) -> tuple[int, int]:
        """Number of tiles from top to bottom and from left to right."""
        return triton.cdiv(self.rows, self.tile[0]), triton.cdiv(self.cols, self.tile[1])

    @property
    def reduced(self) -> int:
        """Number of tiles that one channel's sum is spread over."""
        return self.tiles[1] if self.by_row else self.tiles[0]

    def spread(self, value: Tensor) -> Tensor:
        """Return `value` for each channel, fp32, contiguous, shape (channels,)."""
        return value.detach().reshape(-1).expand(self.channels).contiguous()


def _layout(x: Tensor, *values: Tensor) -> _Layout | None:
    """Return how x is laid out in memory; None where channels are neither its first nor its last dim."""
    shape = (1,) * x.dim()
    for value in values:
        shape = torch.broadcast_shapes(shape, value.shape)
    wide = [dim for dim, size in enumerate(shape) if size > 1]
    if x.numel() == 0 or len(shape) != x.dim() or len(wide) > 1:
        return None
    if not wide:
        return _Layout(1, x.numel(), True)
    if wide[0] == 0:
        return _Layout(shape[0], x.numel() // shape[0], True)
    return _Layout(x.numel() // shape[-1], shape[-1], False) if wide[0] == x.dim() - 1 else None


def triton_kernel(eager: Kernel) -> Kernel:
    """Return the Triton kernel, with `eager` for what it does not cover: empty tensors, channels of an inner dim."""
    four_levels = eager.four_levels

    def steps_of(d: Tensor) -> Tensor:
        return d / 3 if four_levels else d

    def quantize(x: Tensor, d: Tensor, q_m: Tensor, t: Tensor | None) -> Tensor:
        layout = _layout(x, d, q_m)
        if layout is None:
            return eager.quantize(x, d, q_m, t)
        x, step, clip = x.detach().contiguous(), layout.spread(steps_of(d)), layout.spread(q_m)
        out = torch.empty_like(x)
        with torch.cuda.device_of(x):
            # Without fusion below: a fused multiply-add rounds once less than the pure functions, and a value near a
            # tie would get another code.
            _forward[(layout.tiles[0] * layout.tiles[1],)](
                *(x, step, clip, step if t is None else t.detach(), out, layout.rows, layout.cols),
                *(t is not None, layout.by_row, four_levels, *layout.tile),
                enable_fp_fusion=False,
            )
        return out

    def gradients(grad: Tensor, x: Tensor, d: Tensor, q_m: Tensor, t: Tensor | None) -> Gradients:
        layout = _layout(x, d, q_m)
        if layout is None:
            return eager.gradients(grad, x, d, q_m, t)
        kinds = 2 if t is None else 3
        partial = torch.empty(kinds, layout.reduced, layout.channels, dtype=torch.float32, device=x.device)
        step, clip = layout.spread(steps_of(d)), layout.spread(q_m)
        grad_x = _run_backward(layout, grad, x, step, clip, t, partial, four_levels)
        sums = partial.sum(1)
        of_d = sums[0] / 3 if four_levels else sums[0]
        grad_t = None if t is None else sums[2].sum_to_size(1)
        return grad_x, _shaped(of_d, d), _shaped(sums[1], q_m), grad_t

    def straight_through(grad: Tensor, x: Tensor, q_m: Tensor) -> Tensor:
        layout = _layout(x, q_m)
        if layout is None:
            return eager.straight_through(grad, x, q_m)
        clip = layout.spread(q_m)
        return _run_backward(layout, grad, x, clip, clip, None, None)

    return Kernel("triton", quantize, gradients, straight_through, four_levels)


def _run_backward(
    layout: _Layout,
    grad: Tensor,
    x: Tensor,
    step: Tensor,
    clip: Tensor,
    t: Tensor | None,
    partial: Tensor | None,
    four_levels: bool = False,
) -> Tensor:
    """Return the gradient of x; `partial`, where given, is filled with the sums of each tile."""
    grad, x = grad.contiguous(), x.detach().contiguous()
    grad_x, exponent = torch.empty_like(grad), torch.ones_like(clip[:1]) if t is None else t.detach()
    with torch.cuda.device_of(x):
        _backward[(layout.tiles[0] * layout.tiles[1],)](
            # Triton needs some pointer where there are no sums; nothing is written to it.
            *(grad, x, step, clip, exponent, grad_x, clip if partial is None else partial, layout.rows, layout.cols),
            *(partial is not None, t is not None, layout.by_row, four_levels, *layout.tile),
            enable_fp_fusion=False,
        )
    return grad_x


def _shaped(channels: Tensor, like: Tensor) -> Tensor:
    """Return the sums of the channels in the shape of `like`: one sum in total where `like` is one value for all."""
    return (channels.sum() if like.numel() == 1 else channels).reshape(like.shape)
