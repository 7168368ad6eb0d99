"""Move a choice to the likeliest one that a hardware cost allows.

The cost of a layer is no sum over groups: it depends on the product of outputs and inputs, and is measured, or counted
in tiles. So groups are priced by the slope of the cost at the full model, widths by the cost of their layer at what
remains, of which rows or columns with a choice of their own have their share. The price is raised until the cost
itself, counted exactly, is met, and what one price more takes too much is given back by its worth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from geta_hf.costs.ledger import ROUNDING, Ledger
from geta_hf.costs.selection import Limits, find_chunks
from geta_hf.costs.targets import most_removed
from geta_hf.errors import GETAError
from geta_hf.methods.search.choices import WidthChoices
from geta_hf.methods.search.objective import Objective
from geta_hf.qadg.group_types import Family

_HALVINGS = 40
_HIGHEST = 1e30

_PASSED = 16
"""How many changes that do not fit are passed over before the next width is tried."""


@dataclass(frozen=True)
class Steps:
    """A choice on the way to a cost.

    Attributes:
        removed: bool, shape (groups,).
        steps: int64, shape (choices,): the position of the width of each choice.
    """

    removed: Tensor
    steps: Tensor


class CostTarget:
    """What a hardware cost allows; on CPU.

    Args:
        families: those that may lose groups.
        limits: what they keep.
        ledger: sizes of the model.
        objective: with the cost, and the most of it that may remain.
        choices: what rows and columns follow which choice.
    """

    def __init__(
        self,
        families: Sequence[Family],
        limits: Limits,
        ledger: Ledger,
        objective: Objective,
        choices: WidthChoices,
    ) -> None:
        assert objective.target_cost is not None
        self.families = families
        self.limits = limits
        self.ledger = ledger
        self.objective = objective
        self.choices = choices
        self.budget = objective.target_cost

    def cost(self, choice: Steps) -> float:
        """Return the cost of a choice, relative to the full model at the widest width."""
        with torch.no_grad():
            keep = (~choice.removed).double()
            return float(self.objective.hardware_cost(keep, self._shares(keep, choice.steps)))

    def allows(self, choice: Steps) -> bool:
        """Return whether a choice costs no more than the target."""
        return self.cost(choice) <= self.budget * (1 + ROUNDING)

    def check(self, narrower: bool = False) -> None:
        """Raise GETAError where even the cheapest model is above the target.

        Args:
            narrower: whether a size is limited too, for which the cheapest model has to have the narrowest widths.
        """
        cheapest = self._cheapest(narrower)
        if not self.allows(cheapest):
            width = "narrowest" if narrower else "cheapest"
            raise GETAError(
                f"target_cost = {self.budget:g} can't be reached: with families at their least and every weight at its "
                f"{width} width the cost is {self.cost(cheapest):.4g} of the full model's; raise it, or lower min_kept "
                f"or the widths"
            )

    def _cheapest(self, narrower: bool) -> Steps:
        removed = most_removed(self.families, self.limits)
        costs = self._of_widths(removed)
        return Steps(removed, torch.zeros(len(costs), dtype=torch.int64) if narrower else costs.argmin(1))

    def meet(self, start: Steps, widths: Tensor, keep: Tensor, narrower: bool = False) -> Steps:
        """Return a choice that the cost allows: the given one where it does, else one moved as little as it asks for.

        Args:
            start: the likeliest choice that other targets allow.
            widths: nats that each width of each choice is less likely than the best one, shape (choices, widths).
            keep: nats by which it is likelier that each group remains than that it is removed, shape (groups,).
            narrower: only narrower widths than those of `start`: sizes that other targets limit then do not rise.
        """
        if self.allows(start):
            return start
        widths = widths - widths.gather(1, start.steps[:, None])
        if narrower:
            beyond = torch.arange(widths.shape[1]) > start.steps[:, None]
            widths = widths.masked_fill(beyond, torch.inf)
        saved = self._slope(start).clamp_min(1e-30)
        chunks = find_chunks(self.families, keep / saved, start.removed, self.limits)

        def at(price: float) -> Steps:
            removed = start.removed.clone()
            removed[chunks.first(int((chunks.scores < price).sum()))] = True
            return Steps(removed, (widths + price * self._of_widths(removed)).argmin(1))

        high = 1.0
        while not self.allows(at(high)) and high < _HIGHEST:
            high *= 4
        if not self.allows(at(high)):
            # Costs that are no sum over rows may rise where their share of a layer falls.
            return self._cheapest(narrower)
        low = 0.0
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            if self.allows(at(middle)):
                high = middle
            else:
                low = middle
        return self._refined(at(high), at(low), widths, keep)

    def _refined(self, found: Steps, before: Steps, widths: Tensor, keep: Tensor) -> Steps:
        """Take back what the budget has room for: one price moves many groups where they are alike."""
        extra = torch.nonzero(found.removed & ~before.removed).flatten()
        # The likeliest first; in halves, since one more group of a family needs as many of it as before.
        extra = extra[keep[extra].argsort(descending=True, stable=True)]
        if not self.limits.uniform and self.limits.multiple_of == 1:
            found = self._with_groups(found, extra)
        # Twice for each width: what a small change of one choice leaves may be room for another one.
        for _ in range(2 * widths.shape[1]):
            likelier = self._with_widths(found, widths)
            if torch.equal(likelier.steps, found.steps):
                break
            found = likelier
        return found

    def _with_widths(self, found: Steps, widths: Tensor) -> Steps:
        """Return a choice with likelier widths where the budget has room for them, the most gain for its cost first."""
        present = widths.gather(1, found.steps[:, None])
        gains = present - widths
        costs = self._of_widths(found.removed)
        more = costs - costs.gather(1, found.steps[:, None])
        # Of each choice the best move for what it costs; one that costs nothing is the best of all.
        worth = torch.where(gains > 0, gains / more.clamp_min(1e-30), -torch.inf)
        best, target = worth.max(1)
        movers = torch.nonzero(best > 0).flatten()
        movers = movers[best[movers].argsort(descending=True, stable=True)]
        for _ in range(_PASSED):
            if not len(movers):
                break
            fitting = self._most(found, movers, target)
            chosen = movers[:fitting]
            found = Steps(found.removed, found.steps.index_copy(0, chosen, target[chosen]))
            movers = movers[fitting + 1 :]
        return found

    def _most(self, found: Steps, movers: Tensor, target: Tensor) -> int:
        """Return how many of `movers`, from the first on, may move to the widths of `target` together."""
        low = 0
        high = len(movers) + 1
        while high - low > 1:
            middle = (low + high) // 2
            own = movers[:middle]
            if self.allows(Steps(found.removed, found.steps.index_copy(0, own, target[own]))):
                low = middle
            else:
                high = middle
        return low

    def _with_groups(self, found: Steps, extra: Tensor) -> Steps:
        """Return a choice with as many groups back as the budget allows, the first ones of `extra`."""
        low = 0
        high = len(extra) + 1
        while high - low > 1:
            middle = (low + high) // 2
            if self.allows(self._without(found, extra[:middle])):
                low = middle
            else:
                high = middle
        return self._without(found, extra[:low])

    @staticmethod
    def _without(found: Steps, back: Tensor) -> Steps:
        removed = found.removed.clone()
        removed[back] = False
        return Steps(removed, found.steps)

    def _slope(self, choice: Steps) -> Tensor:
        """Return how much the cost falls with each group of a choice, relative, float64, shape (groups,)."""
        keep = (~choice.removed).double().requires_grad_()
        with torch.enable_grad():
            cost = self.objective.hardware_cost(keep, self._shares(keep, choice.steps))
            (slope,) = torch.autograd.grad(cost, keep)
        return slope

    def _of_widths(self, removed: Tensor) -> Tensor:
        """Return the relative cost of each choice at each width, float64, shape (choices, widths)."""
        costs = [self.cost_of_layers(removed, step) for step in range(len(self.objective.widths))]
        return self.choices.spread((~removed).double(), torch.stack(costs, 1))

    @torch.no_grad()
    def cost_of_layers(self, removed: Tensor, step: int) -> Tensor:
        """Return the relative cost of each weight at one width, float64, shape (layers,).

        Args:
            removed: bool, shape (groups,).
            step: the position of the width.
        """
        keep = (~removed).double()
        shares = keep.new_zeros(len(self.ledger.layers), len(self.objective.widths))
        shares[:, step] = 1
        return self.objective.layer_costs(keep, shares) / self.objective.full_cost(keep)

    def _shares(self, keep: Tensor, steps: Tensor) -> Tensor:
        """Return the share of each width in what remains of each weight, shape (layers, widths)."""
        chosen = torch.nn.functional.one_hot(steps, len(self.objective.widths)).double()
        return self.choices.by_weight(keep, chosen)
