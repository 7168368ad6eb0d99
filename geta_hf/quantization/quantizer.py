"""The quantizer of one tensor as a module: the parameters d, q_m and t and where they start."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from geta_hf.errors import GETAError
from geta_hf.quantization import functional
from geta_hf.quantization.fixed import FixedQuantizer, SinglePrecision

# Candidates for q_m, as shares of the largest magnitude.
_SHARES = torch.linspace(0.1, 1.0, 91)
_BINS = 4096
# Elements, or bins, handled at once: their places and counts are int64.
_CHUNK = 1 << 22


class Quantizer(SinglePrecision):
    """Learnable (d, q_m, t), fp32 whatever the dtype of the tensor (paper Sec. 3).

    `t` has shape (1,); `d` and `q_m` have shape (1,), or (channels,) where each output channel has its own.

    Attributes:
        channel_dim: the dim of the tensor that `d` and `q_m` run along; None for one pair for all of it.
        frozen: whether (d, q_m, t) stand still, so that no gradient is computed for them; False at first.

    Args:
        q_m: clipping values to start from, positive: a number, or a tensor of the shape above.
        bits: bit width to start from; sets d.
        learn_t: whether the exponent t is trained. Otherwise t stays exactly 1 and the linear path is taken.
        device: of the parameters.
        channel_dim: see above.
    """

    def __init__(
        self,
        q_m: float | Tensor,
        bits: float,
        learn_t: bool = False,
        device: torch.device | None = None,
        channel_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.learn_t, self.channel_dim, self.frozen = learn_t, channel_dim, False
        start = torch.as_tensor(q_m, dtype=torch.float32, device=device).detach().reshape(-1)
        self.q_m = nn.Parameter(start.clone())
        self.t = nn.Parameter(torch.ones(1, dtype=torch.float32, device=device), requires_grad=learn_t)
        self.d = nn.Parameter(functional.step_size(bits, self.q_m.detach(), self.t.detach()))

    @property
    def exponent(self) -> Tensor | None:
        """t where it is learned, None where it is 1 for good."""
        return self.t if self.learn_t else None

    def forward(self, x: Tensor) -> Tensor:
        """x^Q with straight-through gradients; shape and dtype of x."""
        return functional.fake_quantize(x, *self.broadcast_over(x), self.exponent, self.frozen)

    @torch.no_grad()
    def bits(self) -> Tensor:
        """The present bit width, real, the shape of d."""
        return functional.bit_width(self.d, self.q_m, self.t)

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """The integers n with x^Q = d · n, int32, shape of x."""
        return functional.integer_codes(x, *self.broadcast_over(x), self.exponent)

    def broadcast_over(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """d and q_m as they are broadcast over x."""
        if self.channel_dim is None:
            return self.d, self.q_m
        shape = [1] * x.dim()
        shape[self.channel_dim] = -1
        return self.d.view(shape), self.q_m.view(shape)

    def keep_channels(self, index: Tensor) -> None:
        """Let only the channels of `index` (int64, shape (kept,)) stay, in place."""
        for leaf in ("d", "q_m"):
            old: nn.Parameter = getattr(self, leaf)
            kept = old.detach().index_select(0, index.to(old.device))
            setattr(self, leaf, nn.Parameter(kept, requires_grad=old.requires_grad))

    def extra_repr(self) -> str:
        along = "" if self.channel_dim is None else f", channels={self.d.numel()}"
        return f"learn_t={self.learn_t}{along}"


def fixed_quantizer(quantizer: Quantizer, bits: int) -> FixedQuantizer:
    """What a quantizer has become after training, at its whole width `bits`."""
    parts = (quantizer.d,) if quantizer.exponent is None else (quantizer.d, quantizer.t)
    return FixedQuantizer(torch.cat(parts), bits)


def freeze_quantizers(model: nn.Module, frozen: bool = True) -> None:
    """Let (d, q_m, t) of a model stand still, as in cool-down: their gradients are zero and cost nothing."""
    for module in model.modules():
        if isinstance(module, Quantizer):
            module.frozen = frozen


def clipping_value(weight: Tensor, bits: int, method: str = "mse", name: str = "weight") -> float:
    """q_m to start from.

    Args:
        weight: the tensor to quantize, any shape, not all zero.
        bits: the width that q_m is to serve (only `mse` looks at it).
        method: `max` is the paper's max|W|; `mse` the clipping value of least squared error at `bits`, searched on a
            histogram of |W| so that its cost does not grow with the tensor.
        name: what to call the tensor in an error.

    Raises:
        GETAError: an unknown method, or a tensor that is all zero or not finite.
    """
    return float(_clipping(weight.reshape(1, -1), bits, method, name))


def channel_clipping_values(
    weight: Tensor, bits: int, method: str = "mse", name: str = "weight", channel_dim: int = 0
) -> Tensor:
    """`clipping_value` of every channel: fp32, shape (channels,).

    A channel that is all zero has no range of its own and gets the value of the whole tensor.

    Raises:
        GETAError: as `clipping_value`, for the whole tensor.
    """
    rows = weight.transpose(0, channel_dim).flatten(1)
    return _clipping(rows, bits, method, name)


@torch.no_grad()
def _clipping(rows: Tensor, bits: int, method: str, name: str) -> Tensor:
    """q_m of every row, shape (rows,)."""
    magnitude = rows.detach().float().abs()
    largest = magnitude.amax(dim=1) if magnitude.numel() else magnitude.new_zeros(1)
    whole = float(largest.max())
    if not 0.0 < whole < float("inf"):
        raise GETAError(f"{name}: max|W| is {whole}; a quantizer needs a finite tensor that is not all zero")
    check_clipping(method)
    values = largest
    if method == "mse":
        parts = zip(*(tensor.split(max(1, _CHUNK // _BINS)) for tensor in (magnitude, largest)), strict=True)
        values = largest * torch.cat([best_share(count_magnitudes(part, top), bits) for part, top in parts])
    empty = largest == 0
    return torch.where(empty, clipping_value(rows, bits, method, name), values) if bool(empty.any()) else values


def check_clipping(method: str) -> None:
    """Raise GETAError unless `method` is one of `mse` and `max`."""
    if method not in ("mse", "max"):
        raise GETAError(f"unknown clipping method {method!r}; choose 'mse' or 'max'")


def count_magnitudes(magnitude: Tensor, largest: Tensor) -> Tensor:
    """A histogram of every row from 0 to its `largest`.

    Args:
        magnitude: not negative, shape (rows, n).
        largest: shape (rows,), at least the row's maximum.

    Returns:
        How many elements fall into each bin, fp32, shape (rows, bins).
    """
    rows = magnitude.shape[0]
    factor = (_BINS / torch.where(largest > 0, largest, 1.0))[:, None]
    first = torch.arange(rows, device=magnitude.device)[:, None] * _BINS
    counts = torch.zeros(rows * _BINS, dtype=torch.int64, device=magnitude.device)
    for part in magnitude.split(max(1, _CHUNK // rows), dim=1):
        places = (part * factor).long().clamp_(max=_BINS - 1).add_(first)
        counts += torch.bincount(places.flatten(), minlength=rows * _BINS)
    return counts.view(rows, _BINS).float()


def best_share(counts: Tensor, bits: int) -> Tensor:
    """The clipping value of least squared error at `bits` bits.

    Args:
        counts: histograms as `count_magnitudes` gives them, shape (rows, bins).
        bits: the width.

    Returns:
        For every row, the clipping value as a share of the histogram's range, shape (rows,).
    """
    bins = counts.shape[1]
    centres = (torch.arange(bins, device=counts.device) + 0.5) / bins
    candidates = _SHARES.to(counts.device)[:, None]
    return candidates.flatten()[(counts @ squared_errors(centres, candidates, bits).t()).argmin(dim=1)]


def squared_errors(values: Tensor, clips: Tensor, bits: int) -> Tensor:
    """(x^Q - x)² of magnitudes at `bits` bits under several clipping values; broadcast against each other, t = 1."""
    step = clips / (2 ** (bits - 1) - 1)
    return (torch.round(torch.minimum(values, clips) / step) * step - values) ** 2
