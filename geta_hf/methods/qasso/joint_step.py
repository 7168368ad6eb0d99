"""One step of the joint stage on the redundant groups: lines 16 to 19 of Algorithm 2, on all families at once.

The sums over slices are the only thing that processes exchange, and there is no loop over groups or families.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from geta_hf.config import GETAConfig
from geta_hf.costs.quantizer_table import Quantizers, Values
from geta_hf.methods.qasso.equations import forgetting_rate, joint_step_size, rounding_residue
from geta_hf.methods.qasso.slices import Named, Slice, remember, sum_others
from geta_hf.quantization.functional import clip_power, step_size
from geta_hf.quantization.maths import quantize_four_levels
from geta_hf.utils.shards import add_up, local
from geta_hf.utils.upload import upload


def needs_gradients(config: GETAConfig) -> bool:
    """Return whether a rule of the config asks for g and u of redundant slices (Eqs. 13 and 14)."""
    return config.forgetting == "paper" or config.bit_rule == "paper"


@dataclass
class RedundantSlices:
    """The redundant slices of one period, and how they are forgotten.

    Attributes:
        slices: with x and g as they were before the base step.
        pairs: None where d is not set by Eq. 14.
        families: number of all families.
        quantizers: all of the model.
    """

    slices: Sequence[Slice]
    pairs: LayerFamilyPairs | None
    families: int
    quantizers: Quantizers

    @classmethod
    def of(cls, slices: Sequence[Slice], families: int, quantizers: Quantizers, config: GETAConfig) -> RedundantSlices:
        """Prepare the slices of a period that begins, by the rules of a config."""
        pairs = find_pairs(slices, families, quantizers) if config.bit_rule == "paper" else None
        return cls(slices, pairs, families, quantizers)

    def remember(self, named: Named, config: GETAConfig) -> None:
        """Keep x, and g where a rule needs it, as they are before the base step."""
        remember(self.slices, named, needs_gradients(config))

    def forget(
        self, named: Named, values: Values, steps_remaining: int, bits: tuple[float, float], config: GETAConfig
    ) -> Tensor:
        """Do lines 16 to 19 of Algorithm 2 after the base step, in place.

            16: γ by Eq. 13, or 1 / (K_p - k) under `forgetting="uniform"`
            17: d by Eq. 14, or unchanged unless `bit_rule="paper"`
            18: x^Q = clip + d · res                                              (Eq. 9)
            19: [x]_R <- [x]_R - [u]_R - γ [x^Q]_R                                (Eq. 6)

        Args:
            named: parameters by name; the base optimizer has subtracted u.
            values: flat (d, q_m, t) as they are now, shape (entries,) each.
            steps_remaining: K_p - k, at least 1.
            bits: (b_l, b_u) in force.
            config: the rules, with η, ξ and ε.

        Returns:
            γ, shape (families,); NaN where a family has no redundant group.
        """
        descent = needs_gradients(config)
        steps = [measure_slice(piece, named, self.quantizers, values, descent) for piece in self.slices]
        sums = family_sums(steps, self.families)
        rate, forgotten = forgetting_rates(sums, steps_remaining, config)
        sizes = None
        if self.pairs is not None:
            per_pair = pair_sums(steps, self.pairs, self.families)
            rate, sizes = step_sizes(rate, self.pairs, per_pair, values, bits, config)
            # A layer has one d though several families cut it: that of its last pair is taken.
            last = self.pairs.last
            d = values[0].index_copy(0, self.pairs.layer[last], sizes[last])
            self.quantizers.write_step_sizes(d, named)
        for step in steps:
            # `after` was read before any slice is written, so an element in both redundant rows and redundant columns
            # of a tensor is not shrunk twice.
            shrink_slice(step, rate, forgotten, self._step_size(step, sizes), named)
        return torch.where(sums[1] > 0, rate, torch.nan)

    def _step_size(self, step: SliceStep, sizes: Tensor | None) -> Tensor | None:
        """Return the d of Eq. 14 for each position of a slice."""
        if step.layer < 0 or sizes is None or self.pairs is None:
            return None
        return step.piece.along(sizes[pair_positions(step, self.pairs, self.families)], step.after.dim())


# --- what is measured of a slice --------------------------------------------------------------------------------------


@dataclass
class SliceStep:
    """One redundant slice after the base step; all tensors are fp32 and have the shape of the slice.

    Attributes:
        piece: the slice.
        after: the values that the base optimizer stepped to, x - u.
        clip: sgn(x) · min(|x|, q_m)^t of the values before (Eq. 10), and x itself where nothing is quantized.
        layer: position of the weight's quantizer; -1 where nothing is quantized.
        d: its step size, broadcastable against the slice.
        res: the rounding residue (Eq. 11); None where nothing is quantized or no rule asks for it.
        four_levels: whether the grid has four levels, so that x^Q is never 0 where x is not.
        grad, step: g and u; None where no rule asks for them.
    """

    piece: Slice
    after: Tensor
    clip: Tensor
    layer: int = -1
    d: Tensor | None = None
    res: Tensor | None = None
    four_levels: bool = False
    grad: Tensor | None = None
    step: Tensor | None = None

    def quantized(self, size: Tensor | None) -> Tensor:
        """Return x^Q = clip + d · res (Eq. 9), with d = `size` where Eq. 14 set one.

        The residue is the one of the step size before Eq. 14, since Proposition 5.1 speaks of these two quantities.
        """
        if self.d is None:
            return self.clip
        if size is not None and self.res is not None:
            return self.clip + size * self.res
        if self.four_levels:
            return quantize_four_levels(self.clip, self.d, self.d)
        return (self.clip / self.d).round_().mul_(self.d)


def measure_slice(piece: Slice, named: Named, quantizers: Quantizers, values: Values, descent: bool) -> SliceStep:
    """Measure what the rules need of one remembered slice, after the base step.

    Args:
        piece: with x, and with g where `descent` holds.
        named: parameters by name.
        quantizers: all of the model.
        values: flat (d, q_m, t), shape (entries,) each.
        descent: whether Eqs. 13 and 14 are to be computed, which take g, u and res as well.
    """
    assert piece.x is not None
    after = piece.read(local(named[piece.tensor].detach())).float()
    x = piece.x.float()
    # A bias, or a layer that is not quantized, is forgotten as it is: x^Q = x.
    step = SliceStep(piece, after, x)
    prefix = quantizers.weights.get(piece.tensor)
    if prefix is not None:
        d, q_m, t = (_inside(piece, quantizers, prefix, value, x.dim()) for value in values)
        exponent = t if f"{prefix}.t" in named else None
        step.clip = clip_power(x, q_m, exponent)
        step.layer = quantizers.position(piece.tensor)
        step.d = d
        step.four_levels = quantizers.has_four_levels(prefix)
        # Only Eqs. 13 and 14 read it, and it is as large as the slice.
        step.res = rounding_residue(step.clip, d) if descent else None
    if descent:
        assert piece.grad is not None
        step.grad = piece.grad.float()
        step.step = x - after
    return step


def _inside(piece: Slice, quantizers: Quantizers, prefix: str, value: Tensor, dims: int) -> Tensor:
    """Return what one flat vector holds of a slice's quantizer, broadcastable against the slice."""
    if prefix in quantizers.blocks:
        return piece.inside_blocks(*quantizers.block_table(prefix, value))
    return piece.inside(quantizers.along(prefix, value, dims))


def family_sums(steps: Sequence[SliceStep], families: int) -> Tensor:
    """Return Σ over each family's redundant slices and all processes, shape (4, families).

    The rows are Σ |clip|, the number of elements, ⟨g, clip⟩ and ⟨g, u⟩; the last two are 0 where not measured.
    """
    total = torch.zeros(4, families, device=steps[0].after.device)
    for step in steps:
        dim = step.piece.dim
        # |clip|, not clip: a signed mean is about 0 for weights of both signs, and γ would silently stay 0.
        magnitude = sum_others(step.clip.abs(), dim)
        # The number of elements at each index; one number for all, so that nothing has to be counted on the device.
        elements = step.clip.numel() // max(len(magnitude), 1)
        sums = [magnitude, torch.full_like(magnitude, elements)]
        if step.grad is not None and step.step is not None:
            sums += [sum_others(step.grad * value, dim) for value in (step.clip, step.step)]
        step.piece.by_family.add_to(total[: len(sums)], torch.stack(sums))
    return add_up(total, steps[0].piece.shard)


# --- line 16 ----------------------------------------------------------------------------------------------------------


def forgetting_rates(sums: Tensor, steps_remaining: int, config: GETAConfig) -> tuple[Tensor, Tensor]:
    """Return γ of every family, and which are forgotten already (bool); shape (families,) each.

    Args:
        sums: of `family_sums`, shape (4, families).
        steps_remaining: K_p - k, at least 1.
        config: the rule, η and ε.
    """
    # Families without a redundant group have no elements: 0 / 1 rather than NaN.
    magnitude = sums[0] / sums[1].clamp_min(1)  # Eq. 12
    forgotten = magnitude <= config.epsilon
    if config.forgetting == "uniform":
        rate = torch.where(forgotten, 0.0, 1.0 / steps_remaining)
    else:
        rate = forgetting_rate(sums[2], sums[3], magnitude, steps_remaining, config.eta, config.epsilon)
    return rate, forgotten


# --- line 17 ----------------------------------------------------------------------------------------------------------


@dataclass
class LayerFamilyPairs:
    """The (layer, family) pairs for which Eq. 14 finds a step size: two families may cut one layer.

    Attributes:
        key: int64, ascending, shape (pairs,): layer · families + family.
        layer, family: int64, shape (pairs,).
        last: int64, shape (layers that lose groups,): positions of each layer's last pair, whose d the layer takes.
    """

    key: Tensor
    layer: Tensor
    family: Tensor
    last: Tensor


def find_pairs(slices: Sequence[Slice], families: int, quantizers: Quantizers) -> LayerFamilyPairs:
    """Return all pairs of the redundant slices, the same on every process."""
    found: set[int] = set()
    for piece in slices:
        layer = quantizers.position(piece.tensor)
        if layer >= 0:
            found.update(layer * families + family for family in piece.families)
    # Ascending, so that the pairs of a layer are adjacent and positions are found by bisection.
    key = torch.tensor(sorted(found), dtype=torch.int64)
    of_layer = torch.div(key, max(families, 1), rounding_mode="floor")
    last = torch.nonzero(torch.diff(of_layer, append=of_layer.new_full((1,), -1))).flatten()
    of_family = key - of_layer * families
    return LayerFamilyPairs(*upload([key, of_layer, of_family, last], quantizers.layer.device))


def pair_positions(step: SliceStep, pairs: LayerFamilyPairs, families: int) -> Tensor:
    """Return the pair that each position of a slice belongs to, int64, shape (indices,)."""
    return torch.searchsorted(pairs.key, step.layer * families + step.piece.family)


def pair_sums(steps: Sequence[SliceStep], pairs: LayerFamilyPairs, families: int) -> Tensor:
    """Return ⟨g_l, res_l⟩ and ⟨g_l, u_l⟩ over each pair's slices and all processes, shape (2, pairs)."""
    total = torch.zeros(2, len(pairs.key), device=steps[0].after.device)
    for step in steps:
        if step.res is not None and step.grad is not None and step.step is not None:
            dim = step.piece.dim
            # γ is of a family, over all layers; d is of one layer, so its inner products are of that layer's slices
            # alone.
            sums = torch.stack([sum_others(step.grad * value, dim) for value in (step.res, step.step)])
            for family, of_family in step.piece.by_family.of(sums):
                total.index_add_(1, torch.searchsorted(pairs.key, step.layer * families + family), of_family)
    return add_up(total, steps[0].piece.shard)


def step_sizes(
    rate: Tensor, pairs: LayerFamilyPairs, sums: Tensor, values: Values, bits: tuple[float, float], config: GETAConfig
) -> tuple[Tensor, Tensor]:
    """Return γ, shrunk where a step size was infeasible, shape (families,), and d of every pair, shape (pairs,).

    Args:
        rate: γ, shape (families,).
        pairs: of (layer, family).
        sums: of `pair_sums`, shape (2, pairs).
        values: flat (d, q_m, t), one entry a layer.
        bits: (b_l, b_u) in force.
        config: η and ξ.
    """
    d, q_m, t = (value[pairs.layer] for value in values)
    # More bits are a finer grid, so b_u gives d_min and b_l gives d_max.
    bounds = step_size(bits[1], q_m, t), step_size(bits[0], q_m, t)
    rate, sizes = joint_step_size(rate, pairs.family, sums[0], sums[1], bounds, config.eta, config.xi)
    # Eq. 14 divides by γ; where nothing is forgotten there is nothing to balance, and d is kept.
    return rate, torch.where(rate[pairs.family] > 0, sizes, d)


# --- lines 18 and 19 --------------------------------------------------------------------------------------------------


def shrink_slice(step: SliceStep, rate: Tensor, forgotten: Tensor, size: Tensor | None, named: Named) -> None:
    """Set one slice to x - u - γ x^Q (Eq. 6), in place; to zero at once where its family is forgotten.

    Args:
        step: the slice after the base step.
        rate: γ, shape (families,).
        forgotten: bool, shape (families,).
        size: d by Eq. 14, broadcastable against the slice; None where it is not set.
        named: parameters by name.
    """
    piece = step.piece
    dims = step.after.dim()
    value = step.after - step.quantized(size) * piece.along(rate[piece.family], dims)
    value = value.masked_fill_(piece.along(forgotten[piece.family], dims), 0.0)
    # The difference is taken in fp32 and rounded once, to the type of the parameter.
    parameter = local(named[piece.tensor].detach())
    piece.write(parameter, value.to(parameter.dtype))
