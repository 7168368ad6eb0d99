"""This project: `geta_hf.compress`, which chooses groups and widths together; and the same pipeline without pruning."""

from __future__ import annotations

from dataclasses import dataclass

from eval.compare.job import Job
from eval.compare.method import Compressed
from eval.compare.shared import round_with
from geta_hf.errors import GETAError


@dataclass(frozen=True)
class Ours:
    """Choose by gradients what to remove and how to round, under the budget in bytes alone."""

    name: str = "ours"
    needs: str = "gradients"
    packages: tuple[str, ...] = ()
    recovers: bool = True

    def run(self, job: Job) -> Compressed:
        """Compress."""
        return round_with(job, None)


@dataclass(frozen=True)
class Unpruned(Ours):
    """Spend the budget on widths alone."""

    name: str = "same, unpruned"

    def run(self, job: Job) -> Compressed:
        """Round."""
        return round_with(job, None, target_sparsity=0.0)


@dataclass(frozen=True)
class OneWidth(Ours):
    """Remove as much as the budget says, and keep its width for all weights, as the other methods must."""

    name: str = "ours, one width"

    def run(self, job: Job) -> Compressed:
        """Compress. Raise GETAError for a budget that names no width."""
        if job.budget.bits is None:
            raise GETAError(f"budget {job.budget.name} names no width; give one such as 30%@8")
        return round_with(job, None, bits=(job.budget.bits, job.budget.bits))


METHODS = (Ours(), OneWidth(), Unpruned())
