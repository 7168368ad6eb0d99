"""Where a run stands, as the few numbers that are logged."""

from __future__ import annotations

import torch

from geta_hf.methods.qasso.optimizer import QASSO
from geta_hf.methods.qasso.schedule import STAGES
from geta_hf.quantization.functional import FLOAT_BITS


def compression_state(qasso: QASSO) -> dict[str, float]:
    """Stage (1 warm-up, 2 projection, 3 joint, 4 cool-down), sparsity as a share of the prunable groups, bits, BOPs of
    the quantized layers relative to dense, and the mean γ."""
    removed, ledger = qasso.removed_mask, qasso.ledger
    widths = list(qasso.bits().values())
    bits, inputs = widths[: len(ledger.layers)], widths[len(ledger.layers) :]
    input_bits = torch.tensor(inputs, dtype=torch.float64) if inputs else float(FLOAT_BITS)
    weights, per_layer = ledger.weights(removed), torch.tensor(bits, dtype=torch.float64)
    state = {
        "stage": STAGES.index(qasso.phase.stage) + 1,
        "sparsity": round(qasso.removed_groups / ledger.groups, 4),
        "mean_bits": round(float((weights * per_layer).sum() / weights.sum()), 3),
        "min_bits": round(min(bits), 3),
        "max_bits": round(max(bits), 3),
        "relative_bops": round(ledger.relative_bops(removed, per_layer, input_bits), 5),
        "gamma": qasso.mean_gamma(),
    }
    if inputs:
        state["mean_input_bits"] = round(sum(inputs) / len(inputs), 3)
    return state
