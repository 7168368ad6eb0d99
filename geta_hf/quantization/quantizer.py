"""Make the quantizer of one tensor a module: the parameters d, q_m and t, and the bit width that they give."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geta_hf.errors import GETAError
from geta_hf.quantization import functional
from geta_hf.quantization.blocks import block_of_input, join_blocks, split_blocks
from geta_hf.quantization.clipping import Histogram
from geta_hf.quantization.fixed import FixedQuantizer, SinglePrecision
from geta_hf.quantization.linear import quantized_linear
from geta_hf.quantization.lora import LowRank
from geta_hf.quantization.maths import block_count

GRIDS = ("layer", "channel", "block32")
"""What has a step size of its own: a layer, an output channel, or 32 neighboring inputs of an output channel."""

BY_INPUT, UNSIGNED = "by_input", "unsigned_codes"
"""Names of buffers that some quantizers have: those with a step size for each input, those without negative codes."""


class Quantizer(SinglePrecision):
    """Learnable (d, q_m, t), fp32 whatever the dtype of the tensor (paper Sec. 3).

    `t` has shape (1,); `d` and `q_m` have shape (1,), or (channels,) where each output channel has its own, or
    (channels, blocks) where each block of 32 inputs of a channel has its own.

    Attributes:
        channel_dim: the dim of the tensor that `d` and `q_m` run along; None for one pair for the entire tensor.
        scales_inputs: whether `channel_dim` is that of a layer's inputs, and not of its outputs.
        unsigned: whether there are no negative codes, as for what comes out of a ReLU: b bits then have 2^b - 1 steps
            up to q_m, and what is negative becomes 0 (PACT, arXiv 1805.06085).
        order: int64, shape (inputs,), where there are blocks: the inputs in the order of their blocks; else None.
        four_levels: whether x^Q is one of -q_m, -q_m/3, q_m/3 and q_m (each to the power of t), which is the grid of a
            weight whose final width is 2; see `quantization.maths`. False at first; in checkpoints.
        levels: the same as a buffer, shape (1,), or (channels,) where only some channels have this grid.
        frozen: whether (d, q_m, t) get no update, so that no gradient is computed for them; False at first.
        histogram: of the magnitudes that calibration met, relative to q_m at that time; None where it was not run.

    Args:
        q_m: clipping values to start from, positive: a number, or a tensor of the shape above.
        bits: bit width to start from; sets d.
        learn_t: whether the exponent t is trained. Default False: t stays exactly 1 and the linear path is taken.
        device: of the parameters. Default None: that of `q_m`, or the default device.
        channel_dim: see above. Default None.
        inputs: of each output channel of a matrix, where each block of them has a (d, q_m). Default None.
        by_input: whether `channel_dim` is that of a layer's inputs. Default False.
        unsigned: see above. Default False.
    """

    order: Tensor | None
    levels: Tensor

    def __init__(
        self,
        q_m: float | Tensor,
        bits: float,
        learn_t: bool = False,
        device: torch.device | None = None,
        channel_dim: int | None = None,
        inputs: int | None = None,
        by_input: bool = False,
        unsigned: bool = False,
    ) -> None:
        super().__init__()
        self.learn_t = learn_t
        self.channel_dim = channel_dim
        self.frozen = False
        self.histogram: Histogram | None = None
        # Shape (1,) and never 0-d: FSDP2 refuses to shard a 0-d parameter.
        start = torch.as_tensor(q_m, dtype=torch.float32, device=device).detach()
        start = start.reshape(-1) if inputs is None else start.reshape(-1, block_count(inputs))
        # In checkpoints, since blocks are formed over what remains when groups are removed.
        self.register_buffer("order", None if inputs is None else torch.arange(inputs, device=start.device))
        # In checkpoints: a width of 2 that is still learned does not tell which grid it is.
        self.register_buffer("levels", torch.zeros(1, dtype=torch.uint8, device=start.device))
        self._natural = True
        self._four_levels = False
        self._some_four_levels = False
        self.scales_inputs = by_input
        if by_input:
            # In checkpoints, where the shape of d tells nothing of a square weight.
            self.register_buffer(BY_INPUT, torch.ones(1, dtype=torch.int8, device=start.device))
        self.unsigned = unsigned
        if unsigned:
            self.register_buffer(UNSIGNED, torch.ones(1, dtype=torch.int8, device=start.device))
        self.q_m = nn.Parameter(start.clone())
        # A parameter even where it is not learned, so that checkpoints have the same names under every config.
        self.t = nn.Parameter(torch.ones(1, dtype=torch.float32, device=device), requires_grad=learn_t)
        # d is derived from the bits, since only q_m can be measured on the tensor.
        self.d = nn.Parameter(functional.step_size(bits + int(unsigned), self.q_m.detach(), self.t.detach()))

    @property
    def exponent(self) -> Tensor | None:
        """The exponent t where it is learned; None where it is always 1."""
        return self.t if self.learn_t else None

    @property
    def four_levels(self) -> bool:
        """Whether the grid of all channels has four levels."""
        # Known without a look at the device.
        return self._four_levels

    @property
    def some_four_levels(self) -> bool:
        """Whether the grid has four levels in some channels, and in others not; `levels` tells which."""
        return self._some_four_levels

    def set_four_levels(self, four_levels: bool | Tensor = True) -> None:
        """Let the grid have four levels, or whole steps of d again; d and q_m must be those of 2 bits.

        Args:
            four_levels: for all channels, or bool, shape (channels,). Default True.
        """
        chosen = torch.as_tensor(four_levels).reshape(-1)
        # One entry says it of all channels, as in checkpoints of before there were several.
        alike = bool((chosen == chosen[0]).all())
        self.levels = (chosen[:1] if alike else chosen).to(self.levels)
        self._note_levels()

    def _note_levels(self) -> None:
        if not self.levels.is_meta:
            self._some_four_levels = len(self.levels) > 1
            self._four_levels = not self._some_four_levels and bool(self.levels)

    @property
    def step(self) -> Tensor:
        """What `codes` are multiplied by, in the shape of d: d itself, or a third of it where there are four levels."""
        if self._some_four_levels:
            return torch.where(self.levels.bool(), functional.four_level_step(self.d), self.d)
        return functional.four_level_step(self.d) if self._four_levels else self.d

    @property
    def grid(self) -> str:
        """What has a step size of its own, one of `GRIDS`."""
        if self.order is not None:
            return "block32"
        return "layer" if self.channel_dim is None else "channel"

    @property
    def block_order(self) -> Tensor | None:
        """The order of the inputs in their blocks; None where it is natural, or where there are no blocks."""
        # Known without a look at the device.
        return None if self._natural else self.order

    def forward(self, x: Tensor) -> Tensor:
        """Return x^Q with straight-through gradients; shape and dtype of x."""
        if self.unsigned:
            x = F.relu(x)
        if self.order is None:
            levels = self.over(x, self.levels.bool()) if self._some_four_levels else self._four_levels
            return functional.fake_quantize(x, *self.broadcast_over(x), self.exponent, self.frozen, four_levels=levels)
        rows = functional.fake_quantize(
            self._rows(x),
            self.d,
            self.q_m,
            self.exponent,
            self.frozen,
            blocks=True,
            order=self.block_order,
            four_levels=self._four_levels,
        )
        return self._rows(rows)

    def _rows(self, x: Tensor) -> Tensor:
        """Return a matrix as (out, in), or the reverse."""
        return x.t() if self.channel_dim else x

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, low_rank: LowRank | None = None) -> Tensor:
        """Return the product of x with a quantized weight, see `quantized_linear`.

        Args:
            x: shape (…, in).
            weight: shape (out, in), whatever dim the output channels run along in the layer.
            bias, low_rank: as in `quantized_linear`.
        """
        d: Tensor = self.d
        q_m: Tensor = self.q_m
        levels: bool | Tensor = self._four_levels
        if self.order is None and self.channel_dim is not None:
            shape = (1, -1) if self.scales_inputs else (-1, 1)
            d, q_m = d.view(shape), q_m.view(shape)
            if self._some_four_levels:
                levels = self.levels.bool().view(shape)
        return quantized_linear(
            x,
            weight,
            bias,
            d,
            q_m,
            self.exponent,
            self.frozen,
            low_rank,
            blocks=self.order is not None,
            order=self.block_order,
            four_levels=levels,
        )

    @torch.no_grad()
    def bits(self) -> Tensor:
        """Return the present bit width, a real number, in the shape of d."""
        # Without a sign, a grid of as many steps takes a bit less.
        return functional.bit_width(self.d, self.q_m, self.t) - int(self.unsigned)

    def _codes_of_power(self, x: Tensor) -> Tensor:
        """Return `codes` where t is learned.

        Kernels differ in the last digit of a power, and training leaves weights next to where their code changes. So
        the codes are those of the very kernel that training rounds with.
        """
        return torch.round(self(x.float()) / self.over(x, self.step)).to(torch.int32)

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """Return the integers n with x^Q = step · n, int32, in the shape of x; see `step`."""
        if self.exponent is not None:
            return self._codes_of_power(x)
        if self._some_four_levels:
            pair = (functional.four_level_codes, functional.integer_codes)
            four, whole = (own(x, *self.broadcast_over(x)) for own in pair)
            return torch.where(self.over(x, self.levels.bool()), four, whole)
        codes_of = functional.four_level_codes if self._four_levels else functional.integer_codes
        if self.order is None:
            return codes_of(x, *self.broadcast_over(x))
        rows = self._rows(x)
        codes = codes_of(split_blocks(rows, self.block_order), self.d.reshape(-1, 1), self.q_m.reshape(-1, 1))
        return self._rows(join_blocks(codes, rows.shape[1], self.block_order)).contiguous()

    def broadcast_over(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return d and q_m in shapes that broadcast over x; with blocks these are copies of the shape of x."""
        return self.over(x, self.d), self.over(x, self.q_m)

    def over(self, x: Tensor, values: Tensor) -> Tensor:
        """Return values in the shape of d in a shape that broadcasts over x; with blocks a copy of the shape of x."""
        if self.order is not None:
            block = block_of_input(len(self.order), self.block_order, self.d.device)
            return self._rows(values[:, block])
        if self.channel_dim is None:
            return values
        shape = [1] * x.dim()
        shape[self.channel_dim] = -1
        return values.view(shape)

    def set_order(self, order: Tensor) -> None:
        """Set the order of the inputs in their blocks, int64, shape (inputs,), in place; d and q_m do not follow it."""
        assert self.order is not None
        self.order.copy_(order)
        self._note_order()

    def _note_order(self) -> None:
        if self.order is not None and not self.order.is_meta:
            self._natural = torch.equal(self.order, torch.arange(len(self.order), device=self.order.device))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # Checkpoints of before there were four levels.
        levels = state_dict.setdefault(f"{prefix}levels", torch.zeros_like(self.levels))
        if self.channel_dim is not None and len(levels) in (1, len(self.d)) and len(levels) != len(self.levels):
            # Whether channels have one grid or several is decided in training.
            self.levels = self.levels.new_zeros(len(levels))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._note_order()
        self._note_levels()

    def keep_inputs(self, index: Tensor) -> None:
        """Keep only the inputs of `index`, int64, ascending, shape (kept,), in place; their blocks must be formed.

        d and q_m become new parameters, as in `keep_channels`.

        Raises:
            GETAError: the inputs to be removed lie among those that remain, so that blocks of 32 would change.
        """
        assert self.order is not None
        kept = index.to(self.order.device)
        if not torch.equal(self.order[: len(kept)], kept):
            raise GETAError(
                f"{len(kept)} of {len(self.order)} inputs remain, but the blocks of 32 are those of all inputs, so a "
                f"cut would change step sizes; remove groups by a method (GETATrainer or geta_hf.compress), which "
                f"forms the blocks of what remains, or choose grid='channel'"
            )
        blocks = torch.arange(block_count(len(kept)), device=self.d.device)
        self._keep(1, blocks)
        self.order = torch.arange(len(kept), device=self.order.device)
        self._note_order()

    def keep_channels(self, index: Tensor) -> None:
        """Keep only the channels of `index`, int64, shape (kept,), in place.

        d and q_m become new parameters, so an optimizer that holds the old ones must be made again.
        """
        self._keep(0, index)
        if self._some_four_levels:
            self.set_four_levels(self.levels.bool()[index.to(self.levels.device)])

    def _keep(self, dim: int, index: Tensor) -> None:
        for leaf in ("d", "q_m"):
            old: nn.Parameter = getattr(self, leaf)
            kept = old.detach().index_select(dim, index.to(old.device))
            setattr(self, leaf, nn.Parameter(kept, requires_grad=old.requires_grad))

    def extra_repr(self) -> str:
        channels = "" if self.channel_dim is None else f", channels={self.d.shape[0]}"
        blocks = "" if self.order is None else f", blocks={self.d.shape[1]}"
        levels = ", four levels" if self._four_levels else ", four levels in some" if self._some_four_levels else ""
        return f"learn_t={self.learn_t}{channels}{blocks}{levels}"


def fixed_quantizer(quantizer: Quantizer, bits: int) -> FixedQuantizer:
    """Return a quantizer as it is used after training, at its integer bit width `bits`.

    Args:
        quantizer: one for an entire tensor, whose bit width is `bits` already.
        bits: 2 to 16.
    """
    parts = (quantizer.d,) if quantizer.exponent is None else (quantizer.d, quantizer.t)
    return FixedQuantizer(torch.cat(parts), bits, quantizer.unsigned)


def freeze_quantizers(model: nn.Module, frozen: bool = True) -> None:
    """Freeze (d, q_m, t) of all quantizers of a model, as in cool-down: their gradients are zero and cost nothing.

    Args:
        model: with quantizers attached.
        frozen: False lets them learn again. Default True.
    """
    for module in model.modules():
        if isinstance(module, Quantizer):
            module.frozen = frozen
