"""Choose which groups to remove and how many bits weights keep: candidates for one budget, which are then tried.

How much pruning and rounding cost after compensation cannot be told from gradients alone. So several splits of the
budget between them are made, each by what is expected to cost least, and the caller keeps the one that measures best.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from geta_hf.costs.bit_allocation import BitChoices, LearnedBits, allocate_bits, size_reserve
from geta_hf.costs.joint_allocation import ExpectedLosses, allocate_jointly
from geta_hf.costs.ledger import ROUNDING, Ledger
from geta_hf.costs.selection import Limits, find_chunks, take_count, take_until
from geta_hf.costs.sensitivity import RoundingErrors
from geta_hf.costs.targets import BOPS, BYTES, GROUPS, MEAN_BITS, PARAMETERS, Target, most_removed, solve_target
from geta_hf.errors import GETAError
from geta_hf.methods.one_shot.config import OneShotConfig
from geta_hf.qadg.group_labels import family_of_group
from geta_hf.qadg.group_types import Family

RATES = (2.0, 4.0)
"""What the expected loss of a removal is multiplied by before it competes with that of rounding.

Compensation lowers both, by how much cannot be told before, so several rates are tried."""

SHARES = (0.1, 0.2, 0.3)
"""Shares of the prunable parameters whose removal is tried, too: what groups lose together is not what each loses."""

NO_PRUNING_FROM = 4.0
"""Bits for each weight, step sizes not counted, from which on nothing is pruned.

Rounding alone then costs less, where nothing is trained."""


@dataclass(frozen=True)
class Candidate:
    """One split of the budget.

    Attributes:
        share: of the prunable parameters that is removed.
        removed: bool, shape (groups,).
        weight_bits: integer width of each weight of the ledger.
    """

    share: float
    removed: Tensor
    weight_bits: list[int]


@dataclass(frozen=True)
class Losses:
    """What removing and rounding are expected to cost, in one unit.

    Attributes:
        removal: float64, shape (groups,).
        rounding: float64, shape (layers, widths): of each weight of the ledger, at its full size.
        widths: integer widths, ascending.
    """

    removal: Tensor
    rounding: Tensor
    widths: Sequence[int]


def budget_of(config: OneShotConfig) -> tuple[str, float]:
    """Return the unit and the amount of what widths may spend."""
    if config.target_bytes is not None:
        return BYTES, float(config.target_bytes)
    if config.target_bops is not None:
        return BOPS, config.target_bops
    assert config.wanted_mean_bits is not None
    return MEAN_BITS, config.wanted_mean_bits


def bits_per_weight(ledger: Ledger, unit: str, amount: float) -> float:
    """Return how many bits a budget leaves for each quantized weight if no group is removed, step sizes counted."""
    weights = float(ledger.weights(ledger.nothing).sum())
    if unit == MEAN_BITS:
        return amount
    if unit == BOPS:
        return amount / ledger.relative_bops(ledger.nothing, 1.0)
    rest = ledger.stored_bytes(ledger.nothing, 0.0) - ledger.scale_bytes()
    return 8 * (amount - rest) / weights


def find_candidates(
    config: OneShotConfig, families: Sequence[Family], ledger: Ledger, losses: Losses
) -> list[Candidate]:
    """Return the splits of the budget to try; one alone where the config leaves nothing to try.

    Args:
        config: with targets and limits.
        families: those that may lose groups, in the order of the ledger's groups.
        ledger: sizes of the model.
        losses: of removing and of rounding.

    Raises:
        GETAError: a target out of reach; names the one that can be reached.
    """
    check_budget(config, families, ledger)
    unit, amount = budget_of(config)
    if config.target_sparsity is not None or config.target_parameters is not None:
        target = solve_target(config, families, ledger)
        return [_at(_removed(target, config, families, ledger, losses), unit, amount, config, ledger, losses)]
    lowest = float(config.widths[0])
    found: list[Candidate] = []
    if _spent(ledger.nothing, unit, lowest, ledger) + size_reserve(unit, ledger) <= amount * (1 + ROUNDING):
        found.append(_at(ledger.nothing, unit, amount, config, ledger, losses))
    # Step sizes take their part of a size, but say nothing of how finely weights are rounded.
    steps = 8 * ledger.scale_bytes() / float(ledger.weights(ledger.nothing).sum()) if unit == BYTES else 0.0
    if found and bits_per_weight(ledger, unit, amount) - steps >= NO_PRUNING_FROM:
        return found
    for rate in RATES:
        expected = ExpectedLosses(losses.removal * rate, losses.rounding, losses.widths)
        joint = allocate_jointly(families, Limits.of(config), ledger, expected, unit, amount)
        if not any(torch.equal(joint.removed, other.removed) for other in found):
            found.append(Candidate(_share_of(joint.removed, ledger), joint.removed, joint.weight_bits))
    dense = ledger.prunable_parameters(ledger.nothing)
    for share in SHARES:
        removed = _removed(Target(PARAMETERS, (1 - share) * dense, lowest), config, families, ledger, losses)
        if _spent(removed, unit, lowest, ledger) + size_reserve(unit, ledger) <= amount * (1 + ROUNDING):
            found.append(_at(removed, unit, amount, config, ledger, losses))
    return found


def find_single_kinds(
    config: OneShotConfig, families: Sequence[Family], ledger: Ledger, losses: Losses, share: float
) -> list[Candidate]:
    """Return splits that remove groups of one kind alone, to be tried once it is known which share does best.

    Heads and channels are scored alike, but how well the rest makes up for either differs from model to model: where
    layers have few heads, each is missed more than its score says.

    Args:
        config, families, ledger, losses: as in `find_candidates`.
        share: of the prunable parameters to remove; at 0, as where rounding alone does best, the smallest of `SHARES`.

    Returns:
        A split for each kind of family that can reach the share alone; none where there is one kind only, or where the
        config says how much to remove.
    """
    kinds = dict.fromkeys(family.kind for family in families)
    if len(kinds) < 2 or config.target_sparsity is not None or config.target_parameters is not None:
        return []
    unit, amount = budget_of(config)
    lowest = float(config.widths[0])
    left = (1 - (share or SHARES[0])) * ledger.prunable_parameters(ledger.nothing)
    number = {kind: place for place, kind in enumerate(kinds)}
    kind_of_group = torch.tensor([number[family.kind] for family in families])[family_of_group(families)]
    # Scores are to be finite: what may not go comes after everything else.
    beyond = 1e12 * max(float(losses.removal.max()), 1e-30)
    found = []
    for kind in range(len(kinds)):
        others = kind_of_group != kind
        own = dataclasses.replace(losses, removal=losses.removal.masked_fill(others, beyond))
        removed = _removed(Target(PARAMETERS, left, lowest), config, families, ledger, own)
        reached = not bool((removed & others).any())
        if reached and _spent(removed, unit, lowest, ledger) + size_reserve(unit, ledger) <= amount * (1 + ROUNDING):
            found.append(_at(removed, unit, amount, config, ledger, losses))
    return found


def check_budget(config: OneShotConfig, families: Sequence[Family], ledger: Ledger) -> None:
    """Raise GETAError for a target out of reach; names the one that can be reached. No losses are needed for that.

    Args:
        config: with targets and limits.
        families: those that may lose groups.
        ledger: sizes of the model.
    """
    for name in ("target_sparsity", "target_parameters"):
        if getattr(config, name) and not families:
            raise GETAError(
                f"{name} = {getattr(config, name)} asks for less, but nothing in the model may be pruned; switch "
                f"families on by `prune`, or give a size or mean_bits alone"
            )
    if config.target_sparsity is not None or config.target_parameters is not None:
        solve_target(config, families, ledger)
        return
    unit, amount = budget_of(config)
    lowest = float(config.widths[0])
    everything = most_removed(families, Limits.of(config))
    _check_reachable(unit, amount, _spent(everything, unit, lowest, ledger), lowest)


def _check_reachable(unit: str, amount: float, reachable: float, lowest: float) -> None:
    """Raise GETAError for a budget below what can be reached."""
    if reachable <= amount * (1 + ROUNDING):
        return
    wanted, least = (f"{amount:,.0f}", f"{reachable:,.0f}") if unit == BYTES else (f"{amount:.4g}", f"{reachable:.4g}")
    raise GETAError(
        f"target_{unit} = {wanted} can't be reached: with families at their least and {lowest:g} bits it is {least}; "
        f"raise it, or lower bits or min_kept"
    )


def _spent(removed: Tensor, unit: str, bits: float, ledger: Ledger) -> float:
    return Target(unit, 0.0, bits).spent(unit, ledger, removed, bits)


def _share_of(removed: Tensor, ledger: Ledger) -> float:
    """Return the share of the prunable parameters that a removal takes."""
    dense = ledger.prunable_parameters(ledger.nothing)
    return 1 - ledger.prunable_parameters(removed) / max(dense, 1)


def _removed(
    target: Target, config: OneShotConfig, families: Sequence[Family], ledger: Ledger, losses: Losses
) -> Tensor:
    """Return the groups of the least expected loss for each parameter, as many as a target of pruning asks for."""
    removed = ledger.nothing
    if not families:
        return removed
    sizes = torch.cat([torch.full((family.size,), float(max(family.parameters, 1))) for family in families])
    chunks = find_chunks(families, losses.removal / sizes.double(), removed, Limits.of(config))
    if target.unit == GROUPS:
        taken = take_count(chunks, int(ledger.groups - target.amount))
    else:
        taken = take_until(chunks, removed, lambda mask: target.remaining(ledger, mask), target.amount)
    removed[taken] = True
    return removed


def _at(removed: Tensor, unit: str, amount: float, config: OneShotConfig, ledger: Ledger, losses: Losses) -> Candidate:
    """Spend what a removal leaves of the budget on widths."""
    layers = len(ledger.layers)
    remaining = ledger.weights(removed)
    share = remaining / ledger.weights(ledger.nothing)
    # Of a weight that loses rows or columns, the expected loss shrinks with its elements.
    rounding = RoundingErrors(
        losses.rounding * share[:, None], torch.ones(layers, len(losses.widths)), torch.ones(layers, dtype=torch.bool)
    )
    allocation = allocate_bits(
        LearnedBits(torch.zeros(layers, dtype=torch.float64), torch.zeros(0, dtype=torch.float64), [-1] * layers),
        rounding,
        remaining,  # as many as there are elements, so that each counts once: the losses are weighted already
        ledger,
        Target(unit, amount, float(config.widths[0]), {unit: amount}),
        removed,
        BitChoices(weights=config.widths, inputs=[]),
    )
    return Candidate(_share_of(removed, ledger), removed, allocation.weight_bits)
