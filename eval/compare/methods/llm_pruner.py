"""LLM-Pruner (arXiv 2305.11627): groups of the least Taylor score, then recovery by LoRA, then GPTQ."""

from __future__ import annotations

from dataclasses import dataclass

from eval.compare.job import Job
from eval.compare.method import Compressed
from eval.compare.shared import best_pair, pruned_model, round_with, train_low_rank


@dataclass(frozen=True)
class LLMPruner:
    """Prune, recover in float with low-rank matrices, merge, and round."""

    name: str = "LLM-Pruner: Taylor, LoRA, GPTQ"
    needs: str = "training"
    packages: tuple[str, ...] = ()

    def run(self, job: Job) -> Compressed:
        """Compress."""
        pair = best_pair(job, "taylor")
        model = pruned_model(job, pair.removed)
        train_low_rank(job, model, pair.removed)
        compressed = round_with(job, [pair], model)
        compressed.tokens += job.training_tokens()
        compressed.trained = True
        return compressed


METHODS = (LLMPruner(),)
