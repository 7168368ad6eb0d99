"""Solve what a run is to end with before it starts: how much is removed, in which unit, and what widths may spend."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from geta_hf.config import CompressionConfig
from geta_hf.costs.ledger import ROUNDING, Ledger
from geta_hf.costs.selection import Chunks, Limits, take_count, take_until
from geta_hf.errors import GETAError
from geta_hf.qadg.group_labels import family_starts
from geta_hf.qadg.group_types import Family
from geta_hf.quantization.functional import FLOAT_BITS

logger = logging.getLogger(__name__)

GROUPS, PARAMETERS, BOPS, BYTES, MEAN_BITS = "groups", "parameters", "bops", "bytes", "mean bits"


@dataclass(frozen=True)
class Target:
    """What one run is to end with; amounts are what remains.

    Attributes:
        unit: GROUPS, PARAMETERS, BOPS or BYTES: what pruning is counted in.
        amount: how much of it remains; for GROUPS exact, otherwise at most.
        bits: mean width that `amount` was solved for.
        budgets: what widths may spend at most of MEAN_BITS, BOPS or BYTES; empty where the learned ones are kept.
        input_bits: mean width of the layers' inputs that is planned with; 32 where they are not quantized.
    """

    unit: str
    amount: float
    bits: float
    budgets: Mapping[str, float] = field(default_factory=dict)
    input_bits: float = FLOAT_BITS

    def remaining(self, ledger: Ledger, removed: Tensor) -> float:
        """Return how much of the model remains without the groups of `removed`, bool (groups,), in `unit`."""
        if self.unit == GROUPS:
            return int((~removed).sum())
        if self.unit == PARAMETERS:
            return ledger.prunable_parameters(removed)
        return self.spent(self.unit, ledger, removed, self.bits)

    def spent(
        self, unit: str, ledger: Ledger, removed: Tensor, bits: Tensor | float, input_bits: Tensor | None = None
    ) -> float:
        """Return the BOPS, BYTES or MEAN_BITS of a model without these groups.

        Args:
            unit: BOPS, BYTES or MEAN_BITS.
            ledger: sizes of the model.
            removed: bool, shape (groups,).
            bits: of each layer's weight, shape (layers,), or one number for all.
            input_bits: of each layer's input; by default the planned width.
        """
        if unit == BOPS:
            return ledger.relative_bops(removed, bits, self.input_bits if input_bits is None else input_bits)
        if unit == BYTES:
            return ledger.stored_bytes(removed, bits, self.input_bits < FLOAT_BITS)
        weights = ledger.weights(removed)
        return float((weights * bits).sum() / weights.sum())


@dataclass(frozen=True)
class SplitBounds:
    """The ends between which a size can be split, if all families lose the same share.

    Attributes:
        fewest, narrowest: the fewest groups to remove, and the mean width of weights that goes with it.
        most, widest: the most groups to remove, and the mean width of weights that goes with it.
    """

    fewest: int
    narrowest: float
    most: int
    widest: float


def most_removed(families: Sequence[Family], limits: Limits, share: float = 1.0) -> Tensor:
    """Return bool (groups,): about `share` of every family removed, or what limits allow; the last groups of each."""
    removed = torch.zeros(sum(family.size for family in families), dtype=torch.bool)
    for start, family in zip(family_starts(families), families, strict=True):
        end = start + family.size
        removed[end - _nearest_removal(family, limits, share * family.size) : end] = True
    return removed


def _nearest_removal(family: Family, limits: Limits, wanted: float) -> int:
    """Return the count nearest to `wanted` that a family can lose in complete chunks."""
    # The common case in one line of arithmetic: a search calls this up to 20 times over all families.
    if limits.multiple(family) == 1 and not limits.restricted(family):
        return min(math.floor(wanted + 0.5), family.size - limits.least(family))
    removed = 0
    for size in limits.chunks(family, family.size):
        # To the nearest chunk: beyond its middle one more is nearer than one less.
        if removed + size / 2 > wanted:
            break
        removed += size
    return removed


def take_due(target: Target, ledger: Ledger, chunks: Chunks, removed: Tensor, done: int, periods: int) -> Tensor:
    """Return the numbers of the groups that are due, so that `done` of `periods` of the way to the target is done then.

    Args:
        target: what the run is to end with.
        ledger: sizes of the model.
        chunks: those that may be removed, the lowest scores first.
        removed: bool, shape (groups,): groups that are removed already.
        done: periods that will be over then.
        periods: of the run.
    """
    dense = target.remaining(ledger, ledger.nothing)
    if target.unit != GROUPS:
        # A straight line from the full model to the target: after period p of P, (p + 1) / P of the removal is done.
        wanted = dense + (target.amount - dense) * done / periods
        return take_until(chunks, removed, lambda mask: target.remaining(ledger, mask), wanted)
    # In integers, so that the last period ends at exactly K (Eq. 4b).
    due = (int(dense - target.amount) * done) // periods
    taken = take_count(chunks, due - int(removed.sum()), exact=done == periods)
    if done == periods and int(removed.sum()) + len(taken) < due:
        count = int(removed.sum()) + len(taken)
        logger.warning("%d of K = %d groups are removed: no chunk is small enough for the rest", count, due)
    return taken


def solve_target(config: CompressionConfig, families: Sequence[Family], ledger: Ledger) -> Target:
    """Turn the targets of a config into amounts.

    Args:
        config: with targets and limits.
        families: those that may lose groups.
        ledger: sizes of the model.

    Raises:
        GETAError: a target below what the widths and the groups that families keep allow; says what is reachable.
    """
    size_unit, size = _size(config)
    blank = Target(GROUPS, ledger.groups, float(config.widths[-1]), input_bits=_input_range(config)[1])
    # A size alone says nothing of how it splits into pruning and widths, so that is solved for as well.
    if size_unit is not None and config.target_sparsity is None and config.target_parameters is None:
        return _solve_size(replace(blank, unit=size_unit, amount=size), config, families, ledger)
    target = _solve_pruning(blank, config, families, ledger)
    if size_unit is None:
        mean = config.wanted_mean_bits
        return target if mean is None else replace(target, bits=mean, budgets={MEAN_BITS: mean})
    return _solve_widths(replace(target, budgets={size_unit: size}), config, families, ledger)


def _input_range(config: CompressionConfig) -> tuple[float, float]:
    """Return the lowest and the highest width of inputs that can be planned; the same where BOPs do not decide it."""
    if config.activation_bits is None:
        return FLOAT_BITS, FLOAT_BITS
    mean = config.wanted_mean_input_bits
    if mean is None:
        return float(config.activation_bits[0]), float(config.activation_bits[1])
    return mean, mean


def _size(config: CompressionConfig) -> tuple[str | None, float]:
    if config.target_bops is not None:
        return BOPS, config.target_bops
    return (None, math.inf) if config.target_bytes is None else (BYTES, config.target_bytes)


def _solve_pruning(blank: Target, config: CompressionConfig, families: Sequence[Family], ledger: Ledger) -> Target:
    """Return the target of a share of groups or of parameters."""
    least = most_removed(families, Limits.of(config))
    if config.target_parameters is None:
        share = config.target_sparsity or 0.0
        removed = math.floor(share * ledger.groups + 0.5)
        reachable = int(least.sum())
        if removed > reachable:
            # Rounded down, so that the number in the message can be asked for.
            best = math.floor(1000 * reachable / max(ledger.groups, 1)) / 1000
            raise GETAError(
                f"target_sparsity = {share} asks for K = {removed} of {ledger.groups} groups, but every one of the "
                f"{len(families)} families keeps its least, so at most {reachable} can go: lower target_sparsity to "
                f"{best}, or min_kept"
            )
        return replace(blank, amount=ledger.groups - removed)
    dense = ledger.prunable_parameters(ledger.nothing)
    rest = ledger.prunable_parameters(least)
    amount = (1 - config.target_parameters) * dense
    if amount < rest * (1 - ROUNDING):
        best = math.floor(1000 * (1 - rest / dense)) / 1000
        raise GETAError(
            f"target_parameters = {config.target_parameters} leaves {amount:,.0f} of {dense:,} prunable parameters, "
            f"but families that keep their least hold {rest:,}: lower it to {best}"
        )
    return replace(blank, unit=PARAMETERS, amount=max(amount, rest))


def _solve_size(target: Target, config: CompressionConfig, families: Sequence[Family], ledger: Ledger) -> Target:
    """Return the target of a size alone or with a mean width, by choosing the width for which the model is pruned.

    Up to half of the groups are removed before widths become narrower than the middle.
    """
    lowest = float(config.widths[0])
    highest = float(config.widths[-1])
    least = most_removed(families, Limits.of(config))
    # Widths are chosen under the same budget when the joint stage ends; here only what pruning has to reckon with.
    bits = config.mean_bits
    inputs = _input_range(config)
    budgets = {target.unit: target.amount}
    narrow = replace(target, input_bits=inputs[0])
    _check_size(narrow, ledger, least, bits or lowest, "families at their least", "bits, mean_bits or min_kept")
    _warn_if_loose(target, ledger, ledger.nothing, bits or highest)
    half = most_removed(families, Limits.of(config), 0.5)
    middle = (inputs[0], sum(inputs) / 2)
    if bits is not None:
        planned = _widest(target, ledger, half, (bits, bits), middle)
        return replace(planned, budgets={**budgets, MEAN_BITS: bits})
    return replace(_widest(target, ledger, half, (lowest, (lowest + highest) / 2), middle), budgets=budgets)


def _solve_widths(target: Target, config: CompressionConfig, families: Sequence[Family], ledger: Ledger) -> Target:
    """Return the target of a share to prune and a size, with the mean width for both if all layers lose alike."""
    removed = even_removal(target, families, ledger, Limits.of(config))
    lowest = float(config.widths[0])
    highest = float(config.widths[-1])
    ((unit, size),) = target.budgets.items()
    sized = replace(target, unit=unit, amount=size)
    inputs = _input_range(config)
    narrow = replace(sized, input_bits=inputs[0])
    _check_size(narrow, ledger, removed, lowest, "all that is to be pruned removed", "bits, or prune more")
    _warn_if_loose(sized, ledger, removed, highest)
    planned = _widest(sized, ledger, removed, (lowest, highest), inputs)
    return replace(target, bits=planned.bits, input_bits=planned.input_bits)


def _check_size(sized: Target, ledger: Ledger, removed: Tensor, bits: float, pruned: str, remedy: str) -> None:
    """Raise GETAError where a size is out of reach; the message says what can be reached."""
    reachable = sized.spent(sized.unit, ledger, removed, bits)
    if reachable > sized.amount * (1 + ROUNDING):
        raise GETAError(
            f"{_named(sized)} can't be reached: with {pruned}, at {bits:g} bits it is "
            f"{_figure(sized.unit, reachable)}; raise it, or lower {remedy}"
        )


def _warn_if_loose(sized: Target, ledger: Ledger, removed: Tensor, bits: float) -> None:
    """Warn where the widest widths meet a size already."""
    most = sized.spent(sized.unit, ledger, removed, bits)
    if most < sized.amount:
        logger.warning(
            "%s limits nothing: at %g bits it is %s as it is", _named(sized), bits, _figure(sized.unit, most)
        )


def _widest(
    target: Target, ledger: Ledger, removed: Tensor, bits: tuple[float, float], input_bits: tuple[float, float]
) -> Target:
    """Return the target with the widest means of weights and inputs at which a removal meets the amount.

    Both rise together, from the first to the second of each pair; they are the first ones where no others meet it.
    """

    def at(share: float) -> Target:
        of_weights = bits[0] + (bits[1] - bits[0]) * share
        of_inputs = input_bits[0] + (input_bits[1] - input_bits[0]) * share
        return replace(target, bits=of_weights, input_bits=of_inputs)

    def fits(planned: Target) -> bool:
        return planned.spent(target.unit, ledger, removed, planned.bits) <= target.amount

    if fits(at(1.0)):
        return at(1.0)
    # The size is not linear in the widths (scales, header), but it rises with them, so bisection finds them.
    low = 0.0
    high = 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if fits(at(middle)):
            low = middle
        else:
            high = middle
    return at(low)


def even_removal(target: Target, families: Sequence[Family], ledger: Ledger, limits: Limits) -> Tensor:
    """Return the groups removed if every family loses the same share and the target is met, bool (groups,)."""
    low = 0.0
    high = 1.0
    # 2^-20 of a family is less than a group of any family here.
    for _ in range(20):
        middle = (low + high) / 2
        if target.remaining(ledger, most_removed(families, limits, middle)) <= target.amount:
            high = middle
        else:
            low = middle
    return most_removed(families, limits, high)


def split_bounds(target: Target, config: CompressionConfig, families: Sequence[Family], ledger: Ledger) -> SplitBounds:
    """Return between what a size alone can be split: from the lowest widths to the highest.

    Args:
        target: of `solve_target`, of a size alone.
        config: with the limits.
        families: those that may lose groups.
        ledger: sizes of the model.
    """
    limits = Limits.of(config)
    inputs = _input_range(config)
    widths = (float(config.widths[0]), float(config.widths[-1]))
    ends = []
    for bits, input_bits in zip(widths, inputs, strict=True):
        removed = even_removal(replace(target, bits=bits, input_bits=input_bits), families, ledger, limits)
        # Where nothing has to be removed, or no more can be, widths spend the rest.
        ends.append((int(removed.sum()), _widest(target, ledger, removed, widths, inputs).bits))
    (fewest, narrowest), (most, widest) = ends
    return SplitBounds(fewest, narrowest, most, widest)


def _named(sized: Target) -> str:
    return f"target_{sized.unit} = {sized.amount:{',.0f' if sized.unit == BYTES else '.4g'}}"


def _figure(unit: str, amount: float) -> str:
    """Return an amount that can be reached as text, rounded up, so that what is read can be asked for."""
    if unit == BYTES:
        return f"{math.ceil(amount):,}"
    # Four significant digits, whether the amount is .0625 of BOPs or a mean of 4.5 bits.
    digits = 3 - math.floor(math.log10(amount))
    return f"{math.ceil(amount * 10**digits - ROUNDING) / 10**digits:.{digits}f}"
