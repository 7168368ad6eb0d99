"""How redundant groups are forgotten in one step: what is measured of their slices, and Eqs. 13-14 on it.

All families and layers are handled at once; the sums over their slices are the only thing that processes exchange.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from geta_hf.config import GETAConfig
from geta_hf.qasso import forgetting
from geta_hf.qasso.shards import add_up, local
from geta_hf.qasso.slices import Named, Slice
from geta_hf.qasso.widths import Quantizers, Values
from geta_hf.quantization import functional


@dataclass
class Part:
    """One slice with all that Eqs. 13-14 need: fp32, shapes of the slice.

    Attributes:
        clip: sgn(x) · min(|x|, q_m)^t, and x where nothing is quantized.
        res: the rounding residue; None where nothing is quantized.
        layer: position of the weight's quantizer; -1 where nothing is quantized.
    """

    piece: Slice
    x: Tensor
    grad: Tensor
    step: Tensor
    clip: Tensor
    res: Tensor | None
    layer: int


def measure(piece: Slice, named: Named, quantizers: Quantizers, values: Values) -> Part:
    """u, clip and res of one remembered slice, after the base step; `values` are the flat (d, q_m, t)."""
    assert piece.x is not None and piece.grad is not None
    after = local(named[piece.tensor].detach()).index_select(piece.dim, piece.index)
    x, grad = piece.x.float(), piece.grad.float()
    prefix = quantizers.weights.get(piece.tensor)
    if prefix is None:
        return Part(piece, x, grad, x - after.float(), x, None, -1)
    d, q_m, t = (piece.inside(quantizers.along(prefix, value, x.dim())) for value in values)
    clip, res = forgetting.quantized_parts(x, d, q_m, t if f"{prefix}.t" in named else None)
    return Part(piece, x, grad, x - after.float(), clip, res, quantizers.position(piece.tensor))


def family_sums(parts: Sequence[Part], families: int) -> Tensor:
    """Σ over each family's slices of |clip|, g · clip, g · u and of ones, over all processes; shape (4, families)."""
    total = torch.zeros(4, families, device=parts[0].x.device)
    for part in parts:
        values = (part.clip.abs(), part.grad * part.clip, part.grad * part.step, torch.ones_like(part.clip))
        total.index_add_(1, part.piece.family, torch.stack([part.piece.sums(value) for value in values]))
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
    total = torch.zeros(2, len(pairs.key), device=parts[0].x.device)
    for part in parts:
        if part.res is not None:
            sums = torch.stack([part.piece.sums(part.grad * value) for value in (part.res, part.step)])
            total.index_add_(1, pair_positions(part, pairs, families), sums)
    return add_up(total, parts[0].piece.shard)


def forget_rates(sums: Tensor, steps_left: int, config: GETAConfig) -> tuple[Tensor, Tensor]:
    """γ of every family by the rule of the config, and which are forgotten already, bool; shape (families,) each.

    Args:
        sums: of `family_sums`.
        steps_left: K_p - k, at least 1.
    """
    magnitude = sums[0] / sums[3].clamp_min(1)
    forgotten = magnitude <= config.epsilon
    if config.forgetting == "uniform":
        rate = torch.where(forgotten, 0.0, 1.0 / steps_left)
    else:
        rate = forgetting.forget_rate(sums[1], sums[2], magnitude, steps_left, config.eta, config.epsilon)
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
        size: d, which may be multiplied with the slice; None where nothing is quantized.
    """
    piece, dims = part.piece, part.x.dim()
    quantized = part.clip if part.res is None or size is None else part.clip + size * part.res
    value = part.x - part.step - piece.along(rate[piece.family], dims) * quantized
    value = value.masked_fill(piece.along(forgotten[piece.family], dims), 0.0)
    parameter = local(named[piece.tensor].detach())
    parameter.index_copy_(piece.dim, piece.index, value.to(parameter.dtype))


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
        parts = [measure(piece, named, self.quantizers, values) for piece in self.slices]
        sums = family_sums(parts, self.families)
        rate, forgotten = forget_rates(sums, steps_left, config)
        sizes = None
        if self.pairs is not None:
            per_pair = pair_sums(parts, self.pairs, self.families)
            rate, sizes = step_sizes(rate, self.pairs, per_pair, values, bits, config)
            last = self.pairs.last
            self.quantizers.write_step_sizes(values[0].index_copy(0, self.pairs.layer[last], sizes[last]), named)
        for part in parts:
            forget(part, rate, forgotten, self._step_size(part, values[0], sizes), named)
        return torch.where(sums[3] > 0, rate, torch.nan)

    def _step_size(self, part: Part, d: Tensor, sizes: Tensor | None) -> Tensor | None:
        """The d that x^Q of a slice is taken with."""
        if part.layer < 0:
            return None
        if sizes is None or self.pairs is None:
            prefix = self.quantizers.prefixes[part.layer]
            return part.piece.inside(self.quantizers.along(prefix, d, part.x.dim()))
        return part.piece.along(sizes[pair_positions(part, self.pairs, self.families)], part.x.dim())
