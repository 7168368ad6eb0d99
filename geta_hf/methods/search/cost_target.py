"""Move a choice to the likeliest one that a hardware cost allows.

The cost of a layer is no sum over groups: it depends on the product of outputs and inputs, and is measured, or counted
in tiles. So groups are priced by the slope of the cost at the full model, widths by the cost of their layer at what
remains, and the price is raised until the cost itself, counted exactly, is met.
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
from geta_hf.methods.search.objective import Objective
from geta_hf.qadg.group_types import Family

_HALVINGS = 60


@dataclass(frozen=True)
class Steps:
    """A choice on the way to a cost.

    Attributes:
        removed: bool, shape (groups,).
        steps: int64, shape (layers,): the position of each weight's width.
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
    """

    def __init__(self, families: Sequence[Family], limits: Limits, ledger: Ledger, objective: Objective) -> None:
        assert objective.target_cost is not None
        self.families = families
        self.limits = limits
        self.ledger = ledger
        self.objective = objective
        self.budget = objective.target_cost

    def cost(self, choice: Steps) -> float:
        """Return the cost of a choice, relative to the full model at the widest width."""
        with torch.no_grad():
            return float(self.objective.hardware_cost((~choice.removed).float(), self._shares(choice.steps)))

    def check(self) -> None:
        """Raise GETAError where even the cheapest model is above the target."""
        removed = most_removed(self.families, self.limits)
        cheapest = Steps(removed, self._of_widths(removed).argmin(1))
        if (least := self.cost(cheapest)) > self.budget * (1 + ROUNDING):
            raise GETAError(
                f"target_cost = {self.budget:g} can't be reached: with families at their least and every weight at its "
                f"cheapest width the cost is {least:.4g} of the full model's; raise it, or lower min_kept or the widths"
            )

    def meet(self, start: Steps, widths: Tensor, keep: Tensor) -> Steps:
        """Return a choice that the cost allows: the given one where it does, else one with more removed or narrower.

        Args:
            start: the likeliest choice that other targets allow.
            widths: nats that each width of each weight is less likely than the best one, shape (layers, widths).
            keep: nats by which it is likelier that each group remains than that it is removed, shape (groups,).
        """
        if self.cost(start) <= self.budget:
            return start
        # Only narrower than before: sizes that other targets limit then do not rise.
        beyond = torch.arange(widths.shape[1]) > start.steps[:, None]
        widths = (widths - widths.gather(1, start.steps[:, None])).masked_fill(beyond, torch.inf)
        saved = self._slope(start).clamp_min(1e-30)
        chunks = find_chunks(self.families, keep / saved, start.removed, self.limits)

        def at(price: float) -> Steps:
            removed = start.removed.clone()
            removed[chunks.first(int((chunks.scores < price).sum()))] = True
            return Steps(removed, (widths + price * self._of_widths(removed)).argmin(1))

        high = 1.0
        while self.cost(at(high)) > self.budget and high < 1e30:
            high *= 4
        low = 0.0
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            if self.cost(at(middle)) <= self.budget:
                high = middle
            else:
                low = middle
        return self._refined(at(high), at(low), start, widths, keep)

    def _refined(self, found: Steps, before: Steps, start: Steps, widths: Tensor, keep: Tensor) -> Steps:
        """Take back what the budget has room for: one price moves many groups where they are alike."""
        extra = torch.nonzero(found.removed & ~before.removed).flatten()
        # The likeliest first; in halves, since one more group of a family needs as many of it as before.
        extra = extra[keep[extra].argsort(descending=True, stable=True)]
        if not self.limits.uniform and self.limits.multiple_of == 1:
            found = self._with_groups(found, extra)
        for number in (widths.gather(1, found.steps[:, None])[:, 0]).argsort(descending=True).tolist():
            for wider in range(int(start.steps[number]), int(found.steps[number]), -1):
                steps = found.steps.clone()
                steps[number] = wider
                raised = Steps(found.removed, steps)
                if widths[number, wider] < widths[number, found.steps[number]] and self.cost(raised) <= self.budget:
                    found = raised
                    break
        return found

    def _with_groups(self, found: Steps, extra: Tensor) -> Steps:
        """Return a choice with as many groups back as the budget allows, the first ones of `extra`."""
        low = 0
        high = len(extra) + 1
        while high - low > 1:
            middle = (low + high) // 2
            if self.cost(self._without(found, extra[:middle])) <= self.budget:
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
        keep = (~choice.removed).float().requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(self.objective.hardware_cost(keep, self._shares(choice.steps)), keep)
        return slope.double()

    def _of_widths(self, removed: Tensor) -> Tensor:
        """Return the relative cost of each weight at each width, float64, shape (layers, widths)."""
        return torch.stack([self.cost_of_layers(removed, step) for step in range(len(self.objective.widths))], 1)

    @torch.no_grad()
    def cost_of_layers(self, removed: Tensor, step: int) -> Tensor:
        """Return the relative cost of each weight at one width, float64, shape (layers,).

        Args:
            removed: bool, shape (groups,).
            step: the position of the width.
        """
        keep = (~removed).float()
        steps = torch.full((len(self.ledger.layers),), step)
        costs = self.objective.layer_costs(keep, self._shares(steps)).double()
        return costs / self.objective.full_cost(keep)

    def _shares(self, steps: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(steps, len(self.objective.widths)).float()
