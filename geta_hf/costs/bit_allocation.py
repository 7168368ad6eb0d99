"""Choose the final integer bit width of every quantizer, by what rounding costs and what the target allows.

`allocate_bits` is a pure function of plain data. Measuring its inputs, and writing the step sizes that follow from its
result, are up to the caller, so that any method can use it, also after training.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from geta_hf.config import CompressionConfig
from geta_hf.costs import sensitivity
from geta_hf.costs.input_sensitivity import InputErrors
from geta_hf.costs.ledger import Ledger
from geta_hf.costs.product_allocation import ProductCosts, allocate_products
from geta_hf.costs.sensitivity import RoundingErrors
from geta_hf.costs.targets import BOPS, BYTES, MEAN_BITS, Target
from geta_hf.quantization.functional import FLOAT_BITS

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BitChoices:
    """The widths that are allowed, and the rule that chooses among them.

    Attributes:
        weights: integer widths of weights, ascending.
        inputs: integer widths of layers' inputs, ascending.
        by_sensitivity: spend the budget where the expected loss falls most; otherwise move the learned widths together
            until they meet it.
        search_clipping: let clipping values follow the widths; otherwise they are kept.
        four_levels: whether weights of 2 bits get four levels.
    """

    weights: Sequence[int]
    inputs: Sequence[int]
    by_sensitivity: bool = True
    search_clipping: bool = True
    four_levels: bool = False

    @classmethod
    def of(
        cls,
        config: CompressionConfig,
        by_sensitivity: bool = True,
        search_clipping: bool = True,
        four_levels: bool = False,
    ) -> BitChoices:
        """Return the choices that a config allows, none of them above the upper bound at the end of training."""
        # A `bit_reduction` of the user's own may end between two integers.
        highest = math.floor(config.final_upper_bits + 1e-6)
        return cls(
            weights=[bits for bits in config.widths if bits <= highest],
            inputs=config.input_widths or list(range(config.bits[0], config.bits[1] + 1)),
            by_sensitivity=by_sensitivity,
            search_clipping=search_clipping,
            four_levels=four_levels,
        )

    def needs_errors(self, target: Target) -> bool:
        """Return whether there is anything to choose by rounding errors: a budget, and more than one width."""
        return bool(target.budgets) and len(self.weights) > 1


@dataclass(frozen=True)
class LearnedBits:
    """The real widths that training ended with.

    Attributes:
        weights: float64, shape (layers,): widths of the quantized weights.
        inputs: float64, shape (inputs,): widths of the quantized inputs.
        input_of: for each layer the position of its input in `inputs`; -1 where the input is float.
    """

    weights: Tensor
    inputs: Tensor
    input_of: Sequence[int]


@dataclass(frozen=True)
class BitAllocation:
    """The widths that were chosen.

    Attributes:
        weight_bits: integer width of each quantized weight.
        clip_factors: float32, shape (layers,) or (entries,): what each q_m of weights is to be multiplied by.
        input_bits: integer width of each quantized input.
        input_clip_factors: float32, shape (inputs,): what each input's q_m is to be multiplied by.
        entry_bits: int64, shape (entries,): the width of each entry of the weights' quantizers, where those of a layer
            differ; `weight_bits` has the widest. Default None: they do not.
    """

    weight_bits: list[int]
    clip_factors: Tensor
    input_bits: list[int]
    input_clip_factors: Tensor
    entry_bits: Tensor | None = None


def allocate_bits(
    learned: LearnedBits,
    rounding: RoundingErrors | None,
    curvature: Tensor,
    ledger: Ledger,
    target: Target,
    removed: Tensor,
    choices: BitChoices,
    inputs: InputErrors | None = None,
) -> BitAllocation:
    """Choose integer widths inside the limits that spend the target's budgets.

    Clipping values follow the widths: the one of least squared error at 8 bits is far too wide for 4.

    Widths of inputs are decided by a budget of BOPs together with those of weights. Without such a budget their plain
    mean is at most `target.input_bits`, spent where the expected loss falls most, and under the rule that moves learned
    widths, each is rounded.

    Args:
        learned: the widths so far. They decide where there is no budget, or where the rule moves them together.
        rounding: squared errors at each of `choices.weights`; None where `choices.needs_errors` says that none are
            needed. Then each width is rounded to the nearest choice, and clipping values are kept.
        curvature: float64, shape (layers,): ‖g‖² of each weight, averaged over recent steps; read by the sensitivity
            rule only.
        ledger: sizes of the model.
        target: with the budgets.
        removed: bool, shape (groups,): groups that are cut away, and cost nothing any more.
        choices: allowed widths, and the rule.
        inputs: expected losses at each of `choices.inputs`; None where widths of inputs are decided already, and each
            is rounded to the nearest choice.
    """
    if inputs is not None and BOPS in target.budgets and len(choices.inputs) > 1:
        return _allocate_both(learned, rounding, curvature, ledger, target, removed, choices, inputs)
    # Inputs first: BOPs are products of both widths, so a bit of a weight costs more where its input is wider.
    input_bits, input_clips = _allocate_inputs(learned, target, choices, inputs)
    if rounding is None:
        weight_bits = sensitivity.nearest(learned.weights, choices.weights)
        return BitAllocation(weight_bits, torch.ones(len(weight_bits)), input_bits, input_clips)
    widths = choices.weights
    per_layer = _bits_of_inputs(learned.input_of, input_bits)
    per_bit = torch.stack([_cost_per_bit(unit, ledger, removed, per_layer) for unit in target.budgets])
    # Steps between widths need not be one bit: from 4 to 8 under choices (2, 4, 8) costs 4.
    costs = per_bit[..., None] * torch.tensor(widths, dtype=torch.float64).diff()
    if choices.by_sensitivity:
        priority = _sensitivity_priority(rounding, curvature, ledger.weights(removed), costs[0])
    else:
        priority = sensitivity.by_learned_width(learned.weights, widths)
    budgets = [_remaining_budget(target, unit, ledger, removed, float(widths[0]), per_layer) for unit in target.budgets]
    steps = sensitivity.allocate(priority, costs, budgets)
    # Step k of a layer is width k, so the same number finds the clipping value of that width.
    clips = rounding.clips_at(steps)
    return BitAllocation([widths[step] for step in steps], clips, input_bits, input_clips)


def _allocate_inputs(
    learned: LearnedBits, target: Target, choices: BitChoices, inputs: InputErrors | None
) -> tuple[list[int], Tensor]:
    """Return the width of each input and the factor of its clipping value, where no BOPs have to be met."""
    count = len(learned.inputs)
    if not count or inputs is None or not choices.by_sensitivity:
        return (sensitivity.nearest(learned.inputs, choices.inputs) if count else []), torch.ones(count)
    widths = choices.inputs
    # Every input counts alike, so a mean of B bits is B · inputs in total.
    costs = torch.tensor(widths, dtype=torch.float64).diff().expand(count, -1)
    priority = sensitivity.by_sensitivity(_known_losses(inputs), torch.ones(count, dtype=torch.float64), costs)
    steps = sensitivity.allocate(priority, costs[None], [(target.input_bits - widths[0]) * count])
    return [widths[step] for step in steps], inputs.clips[torch.arange(count), torch.tensor(steps)]


def _allocate_both(
    learned: LearnedBits,
    rounding: RoundingErrors | None,
    curvature: Tensor,
    ledger: Ledger,
    target: Target,
    removed: Tensor,
    choices: BitChoices,
    inputs: InputErrors,
) -> BitAllocation:
    """Spend a budget of BOPs on the widths of weights and of inputs, whose product it counts."""
    count = len(learned.inputs)
    weights = ledger.weights(removed)
    layers = len(weights)
    widths = list(choices.weights)
    if rounding is None:
        # Weights have one width only, or are rounded to the nearest; there is nothing to choose for them.
        fixed = sensitivity.nearest(learned.weights, choices.weights)
        gains = torch.zeros(layers, 0, dtype=torch.float64)
    else:
        fixed = [widths[0]] * layers
        gains = _weight_gains(rounding, curvature, weights, learned, choices)
    if choices.by_sensitivity:
        of_inputs = _per_bit(_known_losses(inputs), choices.inputs)
    else:
        of_inputs = sensitivity.by_learned_width(learned.inputs, choices.inputs)
    lowest = torch.tensor(fixed, dtype=torch.float64)
    lowest_inputs = _bits_of_inputs(learned.input_of, [choices.inputs[0]] * count)
    budgets = {unit: _remaining_budget(target, unit, ledger, removed, lowest, lowest_inputs) for unit in target.budgets}
    one_bit = torch.ones(layers, dtype=torch.float64)
    chosen = allocate_products(
        ProductCosts(
            # What each layer adds to relative BOPs with one bit in its weight and in its input.
            macs=_cost_per_bit(BOPS, ledger, removed, one_bit).tolist(),
            shares=(weights / weights.sum()).tolist(),
            input_of=list(learned.input_of),
        ),
        [(widths if gains.shape[1] else [bits]) for bits in fixed],
        list(choices.inputs),
        gains,
        of_inputs,
        (budgets[BOPS], budgets.get(MEAN_BITS, math.inf)),
        by_cost=choices.by_sensitivity,
    )
    weight_steps, input_steps = chosen
    weight_bits = fixed if rounding is None else [widths[step] for step in weight_steps]
    clips = torch.ones(layers)
    if rounding is not None:
        clips = rounding.clips_at(weight_steps)
    input_clips = inputs.clips[torch.arange(count), torch.tensor(input_steps)]
    if not choices.by_sensitivity:
        input_clips = torch.ones(count)
    return BitAllocation(weight_bits, clips, [choices.inputs[step] for step in input_steps], input_clips)


def _weight_gains(
    rounding: RoundingErrors, curvature: Tensor, weights: Tensor, learned: LearnedBits, choices: BitChoices
) -> Tensor:
    """Return what each step of each weight is worth, for each bit, shape (layers, steps)."""
    if not choices.by_sensitivity:
        return sensitivity.by_learned_width(learned.weights, choices.weights)
    one = torch.tensor(choices.weights, dtype=torch.float64).diff().expand(len(weights), -1)
    return _sensitivity_priority(rounding, curvature, weights, one)


def _per_bit(losses: Tensor, widths: Sequence[int]) -> Tensor:
    steps = torch.tensor(widths, dtype=torch.float64).diff().expand(len(losses), -1)
    return sensitivity.by_sensitivity(losses, torch.ones(len(losses), dtype=torch.float64), steps)


def _known_losses(inputs: InputErrors) -> Tensor:
    """Return expected losses; where gradients were all zero, those of inputs that matter alike."""
    if not inputs.losses.numel() or bool((inputs.losses[:, 0] > 0).any()):
        return inputs.losses
    logger.warning("the gradients of all inputs were zero, so their widths are chosen as if they mattered alike")
    return inputs.equal


def _sensitivity_priority(rounding: RoundingErrors, curvature: Tensor, weights: Tensor, cost: Tensor) -> Tensor:
    """Return how much one more bit lowers the expected loss per unit of cost, shape (layers, steps).

    Args:
        weights: remaining elements of each layer, shape (layers,).
        cost: of each step, in the unit of the first budget, shape (layers, steps).
    """
    if len(curvature) and not bool((curvature > 0).any()):
        logger.warning("the gradients of all weights were zero, so their widths are chosen by rounding errors alone")
        curvature = weights
    per_element = sensitivity.mean_square(curvature, weights)
    priority = sensitivity.by_sensitivity(rounding.errors, per_element, cost)
    known = rounding.known
    # No gradient of an untrained weight is known, so it is taken for an average one.
    priority[~known] = priority[known].mean(0) if bool(known.any()) else 0.0
    return priority


def _bits_of_inputs(input_of: Sequence[int], input_bits: Sequence[int]) -> Tensor:
    """Return the width of each weight's input, 32 where it is float, float64, shape (layers,)."""
    bits = [FLOAT_BITS if position < 0 else input_bits[position] for position in input_of]
    return torch.tensor(bits, dtype=torch.float64)


def _cost_per_bit(unit: str, ledger: Ledger, removed: Tensor, input_bits: Tensor) -> Tensor:
    """Return what one more bit of each layer adds to what a budget counts, shape (layers,)."""
    weights = ledger.weights(removed)
    if unit == BYTES:
        return weights / 8
    if unit == BOPS:
        one_bit = torch.ones(len(weights), dtype=torch.float64)
        uses = torch.tensor([layer.uses for layer in ledger.layers], dtype=torch.float64)
        macs = weights * input_bits * uses
        # The share of each layer, scaled so that they add up to the BOPs of the model with one bit in every weight.
        return macs / macs.sum() * ledger.relative_bops(removed, one_bit, input_bits)
    return weights / weights.sum()


def size_reserve(unit: str, ledger: Ledger) -> int:
    """Return how much of a budget is left unspent, so that rounding up within the file never exceeds it."""
    # Each packed weight ends on a full byte, and numbers in the header may grow by a digit.
    return 2 * len(ledger.layers) + 64 if unit == BYTES else 0


def _remaining_budget(
    target: Target, unit: str, ledger: Ledger, removed: Tensor, lowest: Tensor | float, input_bits: Tensor
) -> float:
    """Return what remains of a budget once all layers have the lowest width."""
    budget = target.budgets[unit]
    spent = target.spent(unit, ledger, removed, lowest, input_bits)
    reserve = size_reserve(unit, ledger)
    # A warning and no error, as most of the training is done: a model at its lowest widths is better than none.
    if budget - reserve < spent:
        logger.warning(
            "%s: the target is %g, but with all layers at %g bits it is %g; the costly layers lost too few groups",
            unit,
            budget,
            float(torch.as_tensor(lowest).min()),
            spent,
        )
    return budget - reserve - spent
