"""Make the quantizer of one tensor a module: the parameters d, q_m and t, and the bit width that they give."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from geta_hf.quantization import functional
from geta_hf.quantization.clipping import Histogram
from geta_hf.quantization.fixed import FixedQuantizer, SinglePrecision


class Quantizer(SinglePrecision):
    """Learnable (d, q_m, t), fp32 whatever the dtype of the tensor (paper Sec. 3).

    `t` has shape (1,); `d` and `q_m` have shape (1,), or (channels,) where each output channel has its own.

    Attributes:
        channel_dim: the dim of the tensor that `d` and `q_m` run along; None for one pair for the entire tensor.
        frozen: whether (d, q_m, t) get no update, so that no gradient is computed for them; False at first.
        histogram: of the magnitudes that calibration met, relative to q_m at that time; None where it was not run.

    Args:
        q_m: clipping values to start from, positive: a number, or a tensor of the shape above.
        bits: bit width to start from; sets d.
        learn_t: whether the exponent t is trained. Default False: t stays exactly 1 and the linear path is taken.
        device: of the parameters. Default None: that of `q_m`, or the default device.
        channel_dim: see above. Default None.
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
        self.learn_t = learn_t
        self.channel_dim = channel_dim
        self.frozen = False
        self.histogram: Histogram | None = None
        # Shape (1,) and never 0-d: FSDP2 refuses to shard a 0-d parameter.
        start = torch.as_tensor(q_m, dtype=torch.float32, device=device).detach().reshape(-1)
        self.q_m = nn.Parameter(start.clone())
        # A parameter even where it is not learned, so that checkpoints have the same names under every config.
        self.t = nn.Parameter(torch.ones(1, dtype=torch.float32, device=device), requires_grad=learn_t)
        # d is derived from the bits, since only q_m can be measured on the tensor.
        self.d = nn.Parameter(functional.step_size(bits, self.q_m.detach(), self.t.detach()))

    @property
    def exponent(self) -> Tensor | None:
        """The exponent t where it is learned; None where it is always 1."""
        return self.t if self.learn_t else None

    def forward(self, x: Tensor) -> Tensor:
        """Return x^Q with straight-through gradients; shape and dtype of x."""
        return functional.fake_quantize(x, *self.broadcast_over(x), self.exponent, self.frozen)

    @torch.no_grad()
    def bits(self) -> Tensor:
        """Return the present bit width, a real number, in the shape of d."""
        return functional.bit_width(self.d, self.q_m, self.t)

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """Return the integers n with x^Q = d · n, int32, in the shape of x."""
        return functional.integer_codes(x, *self.broadcast_over(x), self.exponent)

    def broadcast_over(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return d and q_m in shapes that broadcast over x."""
        if self.channel_dim is None:
            return self.d, self.q_m
        shape = [1] * x.dim()
        shape[self.channel_dim] = -1
        return self.d.view(shape), self.q_m.view(shape)

    def keep_channels(self, index: Tensor) -> None:
        """Keep only the channels of `index`, int64, shape (kept,), in place.

        d and q_m become new parameters, so an optimizer that holds the old ones must be made again.
        """
        for leaf in ("d", "q_m"):
            old: nn.Parameter = getattr(self, leaf)
            kept = old.detach().index_select(0, index.to(old.device))
            setattr(self, leaf, nn.Parameter(kept, requires_grad=old.requires_grad))

    def extra_repr(self) -> str:
        channels = "" if self.channel_dim is None else f", channels={self.d.numel()}"
        return f"learn_t={self.learn_t}{channels}"


def fixed_quantizer(quantizer: Quantizer, bits: int) -> FixedQuantizer:
    """Return a quantizer as it is used after training, at its integer bit width `bits`.

    Args:
        quantizer: one for an entire tensor, whose bit width is `bits` already.
        bits: 2 to 16.
    """
    parts = (quantizer.d,) if quantizer.exponent is None else (quantizer.d, quantizer.t)
    return FixedQuantizer(torch.cat(parts), bits)


def freeze_quantizers(model: nn.Module, frozen: bool = True) -> None:
    """Freeze (d, q_m, t) of all quantizers of a model, as in cool-down: their gradients are zero and cost nothing.

    Args:
        model: with quantizers attached.
        frozen: False lets them learn again. Default True.
    """
    for module in model.modules():
        if isinstance(module, Quantizer):
            module.frozen = frozen
