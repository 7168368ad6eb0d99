"""Training with `GETATrainer`: HESSO (arXiv 2409.09085) and rounding after it; and joint training with a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eval.compare.job import Job
from eval.compare.shared import ByTrainer, best_pair
from geta_hf import GETAConfig
from geta_hf.methods import PostTrainingConfig

SCHEDULE: Mapping[str, Any] = {"warmup": 0.1, "projection": 0.1, "joint": 0.3, "pruning_periods": 5}
"""Half of the run in cool-down, as in the paper's runs; fewer periods, since these runs are short."""


def hesso(job: Job) -> PostTrainingConfig:
    """Remove groups by HESSO's score while float weights train, then round to one width by GPTQ.

    The width is that of the best pair that was found without training.
    """
    bits = best_pair(job, "taylor").weight_bits[0]
    return PostTrainingConfig(
        **SCHEDULE,
        target_bytes=job.budget.bytes,
        bits=(bits, bits),
        saliency="hesso",
        clipping="mse",
        rounding="compensated",
        grid=job.grid,
    )


def joint(job: Job) -> GETAConfig:
    """Learn groups and widths together (QASSO), taught by the dense model, with both compensations.

    The size is split between pruning and widths by what both are expected to cost.
    """
    return GETAConfig(
        **SCHEDULE,
        target_bytes=job.budget.bytes,
        bits=(2, 8),
        split="early",
        saliency="mask_fisher",
        distill_logits=1.0,
        compensate=True,
        rounding="compensated",
        grid=job.grid,
    )


METHODS = (ByTrainer("HESSO, then GPTQ", hesso), ByTrainer("ours, trained (QASSO)", joint))
