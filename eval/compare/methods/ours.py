"""This project: `geta_hf.compress`, which chooses groups and widths together; and the same pipeline without pruning."""

from __future__ import annotations

from dataclasses import dataclass

from eval.compare.job import Job
from eval.compare.method import Compressed
from eval.compare.shared import round_with


@dataclass(frozen=True)
class Ours:
    """Choose by gradients what to remove and how to round, under the budget in bytes alone."""

    name: str = "ours"
    needs: str = "gradients"
    packages: tuple[str, ...] = ()

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


METHODS = (Ours(), Unpruned())
