"""LoRAPrune (arXiv 2305.18403): scores from the gradients of LoRA's matrices alone, pruning while they train."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eval.compare.job import Job
from eval.compare.method import Compressed
from eval.compare.scores import CHOICES, Choice
from eval.compare.shared import (
    LOW_RANK_RATE,
    best_pair,
    least_removed,
    low_rank,
    remaining_elements,
    round_with,
    share_of,
    slices_of,
    train,
)
from geta_hf.methods.one_shot.choice import Candidate
from geta_hf.methods.qasso.slices import group_sums

MOMENTUM = 0.9
"""Of the moving average of scores."""


def importance(weight: Tensor, a: Tensor, b: Tensor, grad_a: Tensor, grad_b: Tensor) -> Tensor:
    """Return (ĝ · (W + BA))² of each element, with ĝ = ∂B A + B ∂A - ∂B ∂A estimated from LoRA's gradients (Eq. 8).

    Args:
        weight: W, shape (out, in).
        a, b: shapes (rank, in) and (out, rank).
        grad_a, grad_b: their gradients.
    """
    gradient = grad_b @ a + b @ grad_a - grad_b @ grad_a
    return (gradient * (weight + b @ a)).square()


@dataclass(frozen=True)
class LoRAPrune:
    """Remove groups in the first half of the steps, train on for the second, merge, and round."""

    name: str = "LoRAPrune + GPTQ"
    needs: str = "training"
    packages: tuple[str, ...] = ()

    def run(self, job: Job) -> Compressed:
        """Compress."""
        pair = best_pair(job, "taylor")
        model = job.load()
        choice = CHOICES["taylor"]
        labels = [cut for cut in job.ledger.labels if cut.tensor in {entry.weight for entry in job.ledger.layers}]
        average = torch.zeros(job.ledger.groups, dtype=torch.float64)
        removed = job.ledger.nothing
        with low_rank(job, model, removed) as added:
            originals = {
                name: model.get_submodule(name.removesuffix(".weight")).parametrizations.weight.original
                for name in added
            }

            def watch(step: int) -> None:
                nonlocal removed
                found = {}
                for name, part in added.items():
                    assert part.a.grad is not None and part.b.grad is not None
                    # Its factor belongs to B, so that W + BA is what the layer computes with.
                    gradients = (part.a.grad, part.b.grad / part.scale)
                    found[name] = importance(originals[name].detach(), part.a, part.scale * part.b, *gradients).detach()
                own = group_sums(labels, found, job.ledger.groups, lambda x, _: x).double().cpu()
                average.mul_(MOMENTUM).add_(own, alpha=1 - MOMENTUM)
                scores = average.masked_fill(removed, -math.inf)  # what is removed stays so
                removed = self._removed_by(step, job, scores, choice, pair.weight_bits)
                for name, mask in remaining_elements(job, removed).items():
                    added[name].mask.copy_(mask)
                    originals[name].data.mul_(mask)

            trained = [item for part in added.values() for item in (part.a, part.b)]
            train(job, model, trained, watch=watch, rate=LOW_RANK_RATE)
        # Norms and biases of removed groups, too.
        slices_of(job, model, removed)()
        final = Candidate(share_of(removed, job.ledger), removed, pair.weight_bits)
        compressed = round_with(job, [final], model)
        compressed.tokens += job.training_tokens()
        compressed.trained = True
        return compressed

    @staticmethod
    def _removed_by(step: int, job: Job, scores: Tensor, choice: Choice, bits: Sequence[int]) -> Tensor:
        """Return what is removed after a step: from the full size to the budget in equal parts of the first half."""
        widths = torch.tensor(bits)
        full = job.ledger.stored_bytes(job.ledger.nothing, widths)
        progress = min((step + 1) / math.ceil(job.steps / 2), 1.0)
        allowed = full + progress * min(job.budget.bytes - full, 0)
        found = least_removed(
            job.space.trainable, scores, choice, lambda mask: job.ledger.stored_bytes(mask, widths) <= allowed
        )
        assert found is not None  # the pair was found by the same choice
        return found


METHODS = (LoRAPrune(),)
