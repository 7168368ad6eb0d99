"""The joint stage's end: widths become whole numbers that meet the budget, and d is computed anew for them."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from geta_hf.costs import sensitivity
from geta_hf.costs.ledger import Ledger
from geta_hf.costs.quantizer_table import Named, Quantizers
from geta_hf.costs.targets import BOPS, BYTES, Target
from geta_hf.quantization.functional import FLOAT_BITS, clip_power, step_size
from geta_hf.utils.shards import agree, local, shard_of

if TYPE_CHECKING:
    from geta_hf.config import GETAConfig
    from geta_hf.methods.qasso.optimizer import QASSO

logger = logging.getLogger(__name__)


def settle_widths(qasso: QASSO, named: Named) -> None:
    """Whole widths inside the bounds, by the rule and the budget of the config; (d, q_m, t) then stand still.

    Where widths are free to move, so does q_m: the clipping value of least squared error at 8 bits is far too wide for
    4. Waits for the device.
    """
    quantizers, config = qasso.quantizers, qasso.config
    learned = agree(quantizers.bits(named)).cpu().double()
    count = quantizers.weight_layers
    inputs = _input_widths(learned[count:], config)
    chosen, clips = _weight_widths(qasso, named, learned[:count], inputs)
    d, q_m, t = quantizers.read(named)
    device = d.device
    layer_bits = torch.tensor([*chosen, *inputs], dtype=torch.float32, device=device)
    q_m = q_m * torch.cat([clips.to(device), torch.ones(len(inputs), device=device)])[quantizers.layer]
    quantizers.write_clipping(q_m, named)
    quantizers.write_step_sizes(step_size(layer_bits[quantizers.layer], q_m, t), named)


def _input_widths(learned: Tensor, config: GETAConfig) -> list[int]:
    low, high = config.activation_bits or config.bits
    return sensitivity.nearest(learned, list(range(low, high + 1))) if len(learned) else []


def _weight_widths(qasso: QASSO, named: Named, learned: Tensor, inputs: Sequence[int]) -> tuple[list[int], Tensor]:
    """The width of every weight, and by what its q_m is multiplied, shape (layers,)."""
    config, target, ledger = qasso.config, qasso.goal, qasso.ledger
    widths = [width for width in config.widths if width <= math.floor(config.final_upper_bits + 1e-6)]
    if not target.budgets or len(widths) == 1:
        return sensitivity.nearest(learned, widths), torch.ones(len(learned))
    gone, input_bits = qasso.gone, _bits_of_inputs(qasso.quantizers, inputs)
    errors, clips = _errors(qasso, named, widths)
    per_bit = torch.stack([_cost_per_bit(unit, ledger, gone, input_bits) for unit in target.budgets])
    costs = per_bit[..., None] * torch.tensor(widths, dtype=torch.float64).diff()
    if config.bit_rule == "sensitivity":
        curvature = sensitivity.mean_square(qasso.curvature.cpu().double(), ledger.weights(gone))
        priority = sensitivity.by_sensitivity(errors, curvature, costs[0])
        trained = torch.tensor([weight in named for weight in qasso.quantizers.own_weights])
        # Of a weight that is not trained no gradient is known, so it is taken for an average one.
        priority[~trained] = priority[trained].mean(0) if bool(trained.any()) else 0.0
    else:
        priority = sensitivity.by_learned_width(learned, widths)
    left = [_left_to_spend(target, unit, ledger, gone, float(widths[0]), input_bits) for unit in target.budgets]
    steps = agree(torch.tensor(sensitivity.spend(priority, costs, left)))
    return [widths[step] for step in steps.tolist()], clips[torch.arange(len(steps)), steps]


def _bits_of_inputs(quantizers: Quantizers, inputs: Sequence[int]) -> Tensor:
    """Width of each quantized weight's input, 32 where it is float, float64, shape (layers,)."""
    of_inputs = dict(zip(quantizers.prefixes[quantizers.weight_layers :], inputs, strict=True))
    names = [f"{weight.rpartition('.')[0]}.input_quantizer" for weight in quantizers.own_weights]
    return torch.tensor([of_inputs.get(name, FLOAT_BITS) for name in names], dtype=torch.float64)


def _cost_per_bit(unit: str, ledger: Ledger, gone: Tensor, input_bits: Tensor) -> Tensor:
    """What one more bit of each layer adds to what a budget counts, shape (layers,)."""
    weights = ledger.weights(gone)
    if unit == BYTES:
        return weights / 8
    if unit == BOPS:
        one, uses = torch.ones(len(weights), dtype=torch.float64), [layer.uses for layer in ledger.layers]
        macs = weights * input_bits * torch.tensor(uses, dtype=torch.float64)
        return macs / macs.sum() * ledger.relative_bops(gone, one, input_bits)
    return weights / weights.sum()


def _left_to_spend(target: Target, unit: str, ledger: Ledger, gone: Tensor, lowest: float, input_bits: Tensor) -> float:
    """What of a budget is left with all layers at the lowest width."""
    budget, spent = target.budgets[unit], target.spent(unit, ledger, gone, lowest, input_bits)
    # Every packed weight ends on a whole byte, and numbers in the header may grow by a digit.
    reserve = 2 * len(ledger.layers) + 64 if unit == BYTES else 0
    if budget - reserve < spent:
        logger.warning(
            "%s: %g were to be left, but with all layers at %g bits it is %g; what was pruned left the costly layers",
            unit,
            budget,
            lowest,
            spent,
        )
    return budget - reserve - spent


def _errors(qasso: QASSO, named: Named, widths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """`sensitivity.rounding_errors` of every weight, on CPU, shape (layers, widths) each; 0 and 1 of untrained ones."""
    quantizers, config = qasso.quantizers, qasso.config
    search = config.clipping == "mse" and not config.learn_exponent
    _, q_m, t = quantizers.read(named)
    errors = torch.zeros(quantizers.weight_layers, len(widths), dtype=torch.float64)
    clips = torch.ones(quantizers.weight_layers, len(widths))
    for position, weight in enumerate(quantizers.own_weights):
        if weight in named:
            found = _error_of(quantizers, weight, qasso.frozen.merged(weight, named), q_m, t, widths, search)
            errors[position], clips[position] = (value.cpu() for value in found)
    return errors, clips


def _error_of(
    quantizers: Quantizers, name: str, weight: Tensor, q_m: Tensor, t: Tensor, widths: Sequence[int], search: bool
) -> tuple[Tensor, Tensor]:
    prefix = quantizers.weights[name]
    shard, values = shard_of(weight), local(weight).float()
    clip, power = (quantizers.along(prefix, value, weight.dim()) for value in (q_m, t))
    if shard is not None and clip.dim() > 1 and clip.shape[shard.dim] > 1:
        clip = clip.narrow(shard.dim, shard.start, shard.stop - shard.start)
    if not search:  # what is rounded is min(|x|, q_m)^t
        values, clip = clip_power(values, clip, power), clip**power
    return sensitivity.rounding_errors(values.abs() / clip, clip**2, widths, search, shard)
