"""Prune by a score, then round to one width: Taylor groups, FLAP, Wanda-sp, activations and magnitude.

Each score is in `scores.py`. Every method tries the pairs of share and width that meet the budget, and keeps the best
on held-back data. All but plain magnitude get the least squares and the GPTQ of this project.
"""

from __future__ import annotations

from dataclasses import dataclass

from eval.compare.job import Job
from eval.compare.method import Compressed
from eval.compare.shared import prune_then_round


@dataclass(frozen=True)
class PruneThenRound:
    """Remove the groups of the lowest scores, then give all weights one width.

    Attributes:
        score: a name of `CHOICES`.
        compensation: least squares and GPTQ; otherwise zeros, and rounding to nearest.
    """

    name: str
    score: str
    needs: str
    compensation: bool = True
    packages: tuple[str, ...] = ()

    def run(self, job: Job) -> Compressed:
        """Compress."""
        return prune_then_round(job, self.score, self.compensation)


METHODS = (
    PruneThenRound("magnitude, to nearest", "magnitude", "nothing", compensation=False),
    PruneThenRound("Taylor (LLM-Pruner) + GPTQ", "taylor", "gradients"),
    PruneThenRound("FLAP + GPTQ", "flap", "forward"),
    PruneThenRound("Wanda-sp + GPTQ", "wanda", "forward"),
    PruneThenRound("activations (Minitron) + GPTQ", "activation", "forward"),
)
