"""How redundant groups are forgotten in one step: what is measured of their slices, and Eqs. 13-14 on it.

All families and layers are handled at once; the sums over their slices are the only thing that processes exchange.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from geta_hf.config import GETAConfig
from geta_hf.costs.quantizer_table import Quantizers, Values
from geta_hf.methods.qasso import forgetting
from geta_hf.methods.qasso.slices import Named, Slice
from geta_hf.quantization import functional
from geta_hf.utils.shards import add_up, local


@dataclass
class Part:
    """One slice after the base step: fp32, shapes of the slice.

    Attributes:
        after: the values that the base optimizer stepped to.
        clip: sgn(x) · min(|x|, q_m)^t of the values before, and x itself where nothing is quantized.
        layer: position of the weight's quantizer; -1 where nothing is quantized.
        d: its step size, which may be multiplied with the slice.
        res: the rounding residue; None where nothing is quantized or no rule asks for it.
        grad, step: g and u; None where no rule asks for them.
    """

    piece: Slice
    after: Tensor
    clip: Tensor
    layer: int = -1
    d: Tensor | None = None
    res: Tensor | None = None
    grad: Tensor | None = None
    step: Tensor | None = None

    def quantized(self, size: Tensor | None) -> Tensor:
        """x^Q = clip + d · res, with d = `size` where Eq. 14 set one."""
        if self.d is None:
            return self.clip
        if size is not None and self.res is not None:
            return self.clip + size * self.res
        return (self.clip / self.d).round_().mul_(self.d)


def measure(piece: Slice, named: Named, quantizers: Quantizers, values: Values, descent: bool) -> Part:
    """What the rules need of one remembered slice, after the base step.

    Args:
        values: flat (d, q_m, t).
        descent: whether Eqs. 13-14 are to be computed, which take g, u and res as well.
    """
    assert piece.x is not None
    after, x = piece.take(local(named[piece.tensor].detach())).float(), piece.x.float()
    prefix = quantizers.weights.get(piece.tensor)
    part = Part(piece, after, x)
    if prefix is not None:
        d, q_m, t = (piece.inside(quantizers.along(prefix, value, x.dim())) for value in values)
        exponent = t if f"{prefix}.t" in named else None
        part = Part(piece, after, functional.clip_power(x, q_m, exponent), quantizers.position(piece.tensor), d)
        part.res = forgetting.rounding_residue(part.clip, d) if descent else None
    if descent:
        assert piece.grad is not None
        part.grad, part.step = piece.grad.float(), x - after
    return part


def family_sums(parts: Sequence[Part], families: int) -> Tensor:
    """Σ over each family's slices and all processes of |clip|, of ones, and, where measured, of g · clip and g · u.

    Returns:
        Shape (4, families); zeros for what was not measured.
    """
    total = torch.zeros(4, families, device=parts[0].after.device)
    for part in parts:
        piece, family = part.piece, part.piece.family
        total[0].index_add_(0, family, piece.sums(part.clip.abs()))
        elements = part.clip.numel() // max(len(family), 1)
        total[1].index_add_(0, family, torch.full(family.shape, float(elements), device=family.device))
        if part.grad is not None and part.step is not None:
            total[2].index_add_(0, family, piece.sums(part.grad * part.clip))
            total[3].index_add_(0, family, piece.sums(part.grad * part.step))
    return add_up(total, parts[0].piece.shard)


@dataclass
class Pairs:
    """The (layer, family) pairs for which Eq. 14 finds a step size.

    Attributes:
        key: int64, ascending, shape (pairs,): layer · families + family.
        layer, family: int64, shape (pairs,).
        last: int64: positions of each layer's last pair, whose d the layer takes.
    """

    key: Tensor
    layer: Tensor
    family: Tensor
    last: Tensor


def find_pairs(slices: Sequence[Slice], families: int, quantizers: Quantizers) -> Pairs:
    """All pairs of the redundant slices, the same on every process."""
    layers = [(quantizers.position(piece.tensor), piece) for piece in slices]
    keys = sorted({layer * families + f for layer, piece in layers if layer >= 0 for f in piece.families})
    key = torch.tensor(keys, dtype=torch.int64)
    layer = torch.div(key, max(families, 1), rounding_mode="floor")
    last = torch.nonzero(torch.diff(layer, append=layer.new_full((1,), -1))).flatten()
    device = quantizers.layer.device
    return Pairs(key.to(device), layer.to(device), (key - layer * families).to(device), last.to(device))


def pair_positions(part: Part, pairs: Pairs, families: int) -> Tensor:
    """int64, shape of the slice's index: the pair that each position belongs to."""
    return torch.searchsorted(pairs.key, part.layer * families + part.piece.family)


def pair_sums(parts: Sequence[Part], pairs: Pairs, families: int) -> Tensor:
    """⟨g_l, res_l⟩ and ⟨g_l, u_l⟩ of every pair over its redundant slices and all processes, shape (2, pairs)."""
    total = torch.zeros(2, len(pairs.key), device=parts[0].after.device)
    for part in parts:
        if part.res is not None and part.grad is not None and part.step is not None:
            sums = torch.stack([part.piece.sums(part.grad * value) for value in (part.res, part.step)])
            total.index_add_(1, pair_positions(part, pairs, families), sums)
    return add_up(total, parts[0].piece.shard)


def forget_rates(sums: Tensor, steps_left: int, config: GETAConfig) -> tuple[Tensor, Tensor]:
    """γ of every family by the rule of the config, and which are forgotten already, bool; shape (families,) each.

    Args:
        sums: of `family_sums`.
        steps_left: K_p - k, at least 1.
    """
    magnitude = sums[0] / sums[1].clamp_min(1)
    forgotten = magnitude <= config.epsilon
    if config.forgetting == "uniform":
        rate = torch.where(forgotten, 0.0, 1.0 / steps_left)
    else:
        rate = forgetting.forget_rate(sums[2], sums[3], magnitude, steps_left, config.eta, config.epsilon)
    return rate, forgotten


def step_sizes(
    rate: Tensor, pairs: Pairs, sums: Tensor, values: Values, bits: tuple[float, float], config: GETAConfig
) -> tuple[Tensor, Tensor]:
    """Eq. 14: γ, shrunk where a step size was infeasible, and d of every pair.

    Args:
        rate: γ, shape (families,).
        sums: of `pair_sums`.
        values: flat (d, q_m, t), one entry a layer.
        bits: (b_l, b_u) in force.
    """
    d, q_m, t = (value[pairs.layer] for value in values)
    bounds = functional.step_size(bits[1], q_m, t), functional.step_size(bits[0], q_m, t)
    rate, sizes = forgetting.joint_step_size(rate, pairs.family, sums[0], sums[1], bounds, config.eta, config.xi)
    return rate, torch.where(rate[pairs.family] > 0, sizes, d)  # γ = 0: d stays


def forget(part: Part, rate: Tensor, forgotten: Tensor, size: Tensor | None, named: Named) -> None:
    """The joint stage's update x_R <- x_R - u_R - γ x^Q_R of one slice, in place; zero at once where forgotten.

    Args:
        rate, forgotten: shape (families,).
        size: d by Eq. 14, which may be multiplied with the slice; None where it is not set.
    """
    piece, dims = part.piece, part.after.dim()
    value = part.after - part.quantized(size) * piece.along(rate[piece.family], dims)
    value = value.masked_fill_(piece.along(forgotten[piece.family], dims), 0.0)
    parameter = local(named[piece.tensor].detach())
    piece.put(parameter, value.to(parameter.dtype))


@dataclass
class Redundant:
    """The redundant slices of one period and the rules by which they are forgotten.

    Attributes:
        slices: with x and g as they were before the base step.
        pairs: None where d is not set by Eq. 14.
        families: number of all families.
    """

    slices: Sequence[Slice]
    pairs: Pairs | None
    families: int
    quantizers: Quantizers

    def forget(
        self, named: Named, values: Values, steps_left: int, bits: tuple[float, float], config: GETAConfig
    ) -> Tensor:
        """One joint step after the base step, in place.

        Args:
            values: flat (d, q_m, t) as they are now.
            steps_left: K_p - k, at least 1.
            bits: (b_l, b_u) in force.

        Returns:
            γ, shape (families,); NaN where a family has no redundant group.
        """
        descent = needs_gradients(config)
        parts = [measure(piece, named, self.quantizers, values, descent) for piece in self.slices]
        sums = family_sums(parts, self.families)
        rate, forgotten = forget_rates(sums, steps_left, config)
        sizes = None
        if self.pairs is not None:
            per_pair = pair_sums(parts, self.pairs, self.families)
            rate, sizes = step_sizes(rate, self.pairs, per_pair, values, bits, config)
            last = self.pairs.last
            self.quantizers.write_step_sizes(values[0].index_copy(0, self.pairs.layer[last], sizes[last]), named)
        for part in parts:
            forget(part, rate, forgotten, self._step_size(part, sizes), named)
        return torch.where(sums[1] > 0, rate, torch.nan)

    def _step_size(self, part: Part, sizes: Tensor | None) -> Tensor | None:
        """The d of Eq. 14 for each position of a slice."""
        if part.layer < 0 or sizes is None or self.pairs is None:
            return None
        return part.piece.along(sizes[pair_positions(part, self.pairs, self.families)], part.after.dim())


def needs_gradients(config: GETAConfig) -> bool:
    """Whether a rule of the config asks for g and u of redundant slices."""
    return config.forgetting == "paper" or config.bit_rule == "paper"
