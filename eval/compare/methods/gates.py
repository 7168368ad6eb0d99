"""Methods that learn by stochastic gates what goes: Bayesian Bits and CoFi, as settings of this project's search.

Both use hard concrete gates (`sampling="hard_concrete"`). Where this differs from the papers, all methods of the table
differ alike: what is charged is the size of the folder, by a hinge to the budget instead of a fixed price (Bayesian
Bits) or a Lagrangian (CoFi), and the budget is then met exactly. CoFi's masks of whole layers and of the hidden size
are left out, since they change what a folder's config can say.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eval.compare.job import Job
from eval.compare.shared import ByTrainer, best_pair
from geta_hf.methods import SearchConfig

GATES: Mapping[str, Any] = {
    "sampling": "hard_concrete",
    # Both papers keep the temperature of Louizos et al. (arXiv 1712.01312).
    "temperature": 2 / 3,
    "final_temperature": 2 / 3,
    "warmup": 0.0,
    "search": 0.5,
}
"""Settings of both; half of the run remains for fine-tuning, as it does after QASSO's stages."""


def bayesian_bits(job: Job) -> SearchConfig:
    """Learn removal and widths of 2, 4 or 8 bits by nested gates (arXiv 2005.07093); loss of the next token."""
    return SearchConfig(**GATES, bit_choices=[0, 2, 4, 8], target_bytes=job.budget.bytes, grid=job.grid)


def cofi(job: Job) -> SearchConfig:
    """Learn by a gate on each head and channel what goes (arXiv 2204.00408), taught by predictions and hidden states.

    All weights have the width of the best pair that was found without training.
    """
    bits = best_pair(job, "taylor").weight_bits[0]
    return SearchConfig(
        **GATES,
        bits=(bits, bits),
        target_bytes=job.budget.bytes,
        distill_logits=1.0,
        distill_hidden=1.0,
        grid=job.grid,
    )


METHODS = (ByTrainer("Bayesian Bits", bayesian_bits), ByTrainer("CoFi, one width", cofi))
