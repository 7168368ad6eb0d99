"""The few numbers about a run that are logged next to the loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from geta_hf.costs.ledger import Ledger
from geta_hf.methods.qasso.schedule import STAGES
from geta_hf.quantization.functional import FLOAT_BITS


def compression_metrics(
    stage: str, ledger: Ledger, removed: Tensor, bits: Sequence[float], input_bits: Sequence[float], gamma: float
) -> dict[str, float]:
    """Return the numbers to log.

    Args:
        stage: one of STAGES.
        ledger: sizes of the model.
        removed: bool, shape (groups,): groups that are zero for good.
        bits: present width of each quantized weight.
        input_bits: present width of each quantized input; none where inputs are float.
        gamma: mean forgetting rate of the latest step.

    Returns:
        `stage` (1 warm-up, 2 projection, 3 joint, 4 cool-down), `sparsity` (share of the prunable groups that are
        removed), `mean_bits` over the remaining weights, `min_bits`, `max_bits`, `relative_bops` of quantized layers
        (dense is 1), `gamma`, and with quantized inputs `mean_input_bits`.
    """
    # BOPs count a float side as 32 bits.
    per_input = torch.tensor(input_bits, dtype=torch.float64) if input_bits else float(FLOAT_BITS)
    weights = ledger.weights(removed)
    per_layer = torch.tensor(bits, dtype=torch.float64)
    metrics = {
        "stage": STAGES.index(stage) + 1,
        # Groups that are being forgotten do not count: they may still be far from zero.
        "sparsity": round(int(removed.sum()) / ledger.groups, 4),
        "mean_bits": round(float((weights * per_layer).sum() / weights.sum()), 3),
        "min_bits": round(min(bits), 3),
        "max_bits": round(max(bits), 3),
        "relative_bops": round(ledger.relative_bops(removed, per_layer, per_input), 5),
        "gamma": gamma,
    }
    if input_bits:
        metrics["mean_input_bits"] = round(sum(input_bits) / len(input_bits), 3)
    return metrics
