"""Give every quantizer its final integer width: measure, allocate, and write the step sizes that follow.

`costs.bit_allocation` decides and touches nothing; here is what surrounds it on a model. QASSO does this when its joint
stage ends, and a method that rounds after training when training ends.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from geta_hf.costs.bit_allocation import BitAllocation, BitChoices, LearnedBits, allocate_bits
from geta_hf.costs.input_sensitivity import InputErrors
from geta_hf.costs.ledger import Ledger
from geta_hf.costs.quantizer_table import Named, Quantizers
from geta_hf.costs.sensitivity import measure_errors
from geta_hf.costs.targets import Target
from geta_hf.quantization.blocks import half_steps
from geta_hf.quantization.maths import FOUR_LEVEL_BITS, leave_zero
from geta_hf.utils.shards import from_first_process, local


def round_bits(
    quantizers: Quantizers,
    named: Named,
    weight_of: Callable[[str], Tensor | None],
    curvature: Tensor,
    ledger: Ledger,
    target: Target,
    removed: Tensor,
    choices: BitChoices,
    inputs: InputErrors | None = None,
    levels_decided: bool = False,
) -> BitAllocation:
    """Choose integer widths and set (d, q_m) to them, in place; waits for the device.

    Args:
        quantizers: all of the model, on its device.
        named: parameters by name, with all of the quantizers'.
        weight_of: returns the weight of a name as the model computes with it; None where it is not trained.
        curvature: ‖g‖² of each weight, averaged over recent steps, shape (layers,).
        ledger: sizes of the model.
        target: with the budgets of the widths.
        removed: bool, shape (groups,): groups that are zero for good.
        choices: allowed widths, and the rules.
        inputs: what rounding inputs costs; None where their widths are decided already.
        levels_decided: keep the grids of 2 bits as they are, since weights were trained on them. Default False.
    """
    values = quantizers.read(named)
    rounding = None  # a pass over all weights, which is saved where nothing depends on it
    if choices.needs_errors(target):
        rounding = measure_errors(
            quantizers, values, weight_of, choices.weights, choices.search_clipping, choices.four_levels
        )
    chosen = allocate_bits(
        _learned_bits(quantizers, named),
        rounding,
        curvature.cpu().double(),
        ledger,
        target,
        removed,
        choices,
        inputs,
    )
    return settle_bits(quantizers, named, weight_of, chosen, choices, levels_decided)


def settle_bits(
    quantizers: Quantizers,
    named: Named,
    weight_of: Callable[[str], Tensor | None],
    chosen: BitAllocation,
    choices: BitChoices,
    levels_decided: bool = False,
) -> BitAllocation:
    """Set (d, q_m) to chosen widths, in place, and choose between three and four levels at 2 bits.

    Args:
        quantizers, named, weight_of, choices, levels_decided: as in `round_bits`.
        chosen: the widths, and factors of clipping values. An input of width 0 remains as it is.

    Returns:
        What was written, the same on every process.
    """
    four_levels = None
    if levels_decided:
        prefixes = quantizers.prefixes[: quantizers.weight_layers]
        four_levels = torch.tensor([quantizers.has_four_levels(prefix) for prefix in prefixes])
    elif choices.four_levels and FOUR_LEVEL_BITS in chosen.weight_bits:
        chosen, four_levels = fit_four_levels(quantizers, named, weight_of, chosen, choices.search_clipping)
    chosen = _of_first_process(chosen)
    write_bits(quantizers, named, chosen, four_levels)
    return chosen


def fit_four_levels(
    quantizers: Quantizers,
    named: Named,
    weight_of: Callable[[str], Tensor | None],
    chosen: BitAllocation,
    search: bool,
) -> tuple[BitAllocation, Tensor]:
    """Find the layers that lose less where their rows of 2 bits have four levels, not three; waits for the device.

    Args:
        quantizers, named, weight_of: as in `round_bits`.
        chosen: the widths of layers, or of rows or columns.
        search: look for the clipping values of least error; otherwise the present ones are kept.

    Returns:
        The choice, with clipping values for the grid that each such row gets, and which layers get four levels, bool,
        shape (weight layers,).
    """
    layer = _layers_of_weights(quantizers)
    narrow = _bits_of(quantizers, chosen)[: len(layer)] == FOUR_LEVEL_BITS
    some = torch.zeros(quantizers.weight_layers, dtype=torch.bool)
    some[layer[narrow]] = True
    wanted = {name for name, own in zip(quantizers.own_weights, some.tolist(), strict=True) if own}
    values = quantizers.read(named)
    found = measure_errors(
        quantizers, values, lambda name: weight_of(name) if name in wanted else None, [FOUR_LEVEL_BITS], search, True
    )
    assert found.layer is not None and found.four_levels is not None
    four_levels = from_first_process(found.four_levels.to(torch.int64)).bool()
    if not search:
        return chosen, four_levels
    before = chosen.clip_factors
    if len(before) != len(found.layer):
        before = before[found.layer]
    factors = torch.where(found.known[found.layer] & narrow, found.clips[:, 0], before)
    return replace(chosen, clip_factors=factors), four_levels


def _layers_of_weights(quantizers: Quantizers) -> Tensor:
    """Return the layer of each entry of weights' quantizers, int64, on CPU; these come before those of inputs."""
    return quantizers.layer[quantizers.layer < quantizers.weight_layers].cpu()


def bits_of_entries(
    quantizers: Quantizers, weight_bits: Sequence[int], input_bits: Sequence[int], entry_bits: Tensor | None = None
) -> Tensor:
    """Return the width of each entry of all quantizers, fp32, shape (entries,), on CPU.

    Args:
        quantizers: all of the model.
        weight_bits, input_bits: of layers.
        entry_bits: of rows or columns, shape (entries of weights,). Default None: they are those of their layer.
    """
    bits = torch.tensor([*weight_bits, *input_bits], dtype=torch.float32)[quantizers.layer.cpu()]
    if entry_bits is not None:
        bits[: len(entry_bits)] = entry_bits.to(bits)
    return bits


def _bits_of(quantizers: Quantizers, chosen: BitAllocation) -> Tensor:
    return bits_of_entries(quantizers, chosen.weight_bits, chosen.input_bits, chosen.entry_bits)


def _learned_bits(quantizers: Quantizers, named: Named) -> LearnedBits:
    """Return the present widths, the same on every process."""
    # A width halfway between two integers must round alike everywhere.
    bits = from_first_process(quantizers.bits(named)).cpu().double()
    count = quantizers.weight_layers
    return LearnedBits(bits[:count], bits[count:], quantizers.input_positions())


def _of_first_process(chosen: BitAllocation) -> BitAllocation:
    """Return the first process's choice on all of them, so that a last digit of an error can't make them differ."""
    # Weights and inputs in one vector each, so that processes exchange two messages.
    count = len(chosen.weight_bits)
    factors = len(chosen.clip_factors)
    bits = from_first_process(torch.tensor([*chosen.weight_bits, *chosen.input_bits], dtype=torch.int64)).tolist()
    clips = from_first_process(torch.cat([chosen.clip_factors, chosen.input_clip_factors]))
    return BitAllocation(bits[:count], clips[:factors], bits[count:], clips[factors:])


def write_bits(quantizers: Quantizers, named: Named, chosen: BitAllocation, four_levels: Tensor | None = None) -> None:
    """Scale each q_m by its factor, then set d to the step size of the chosen width, in place.

    Weights of 2 bits, or their rows or columns of 2 bits, get four levels where `four_levels`, bool, shape (weight
    layers,), says so; all others have whole steps.

    Step sizes of weights are put on the grid of fp16, so that formats with such scales hold the very same values.
    Entries of width 0 remain as they are.
    """
    present_d, present_q_m, t = quantizers.read(named)
    device = t.device
    q_m = present_q_m * _entry_factors(quantizers, chosen).to(device)
    bits = _bits_of(quantizers, chosen)
    levels = 2.0 ** (bits.to(device) + quantizers.extra.to(device) - 1) - 1
    four = set_four_levels(quantizers, bits, four_levels).to(device)
    # With four levels the step that is stored is a third of d.
    parts = torch.where(four, 3.0, 1.0)
    d = _half_steps(quantizers, q_m**t / (levels * parts)) * parts
    # q_m follows d, so that the width remains an integer.
    q_m = (d * levels) ** (1 / t)
    given = (bits > 0).to(device)
    quantizers.write_clipping(torch.where(given, q_m, present_q_m), named)
    quantizers.write_step_sizes(torch.where(given, d, present_d), named)


def keep_off_zero(quantizers: Quantizers, named: Named, frozen: Collection[str] = ()) -> None:
    """Move weights of four levels that are exactly zero off it, next to where they are: zero is none of these.

    Args:
        quantizers: all of the model.
        named: parameters by name.
        frozen: names of weights that nothing may change. Default: none.
    """
    for prefix, weight in zip(quantizers.prefixes, quantizers.own_weights, strict=False):
        if quantizers.has_four_levels(prefix) and weight in named and weight not in frozen:
            leave_zero(local(named[weight].detach()))


def set_four_levels(quantizers: Quantizers, bits: Tensor, wanted: Tensor | None) -> Tensor:
    """Let quantizers have four levels or whole steps; return which entries have four, bool, shape (entries,), on CPU.

    Args:
        quantizers: all of the model.
        bits: as `bits_of_entries` returns them, on CPU.
        wanted: bool, shape (weight layers,): whose entries of 2 bits have four levels; None for none.
    """
    found = torch.zeros(len(bits), dtype=torch.bool)
    if wanted is not None:
        layer = _layers_of_weights(quantizers)
        found[: len(layer)] = wanted.cpu()[layer] & (bits[: len(layer)] == FOUR_LEVEL_BITS)
    # Layers with tied weights share one quantizer, which is named by the first of them.
    for prefix, span in quantizers.spans.items():
        if prefix in quantizers.modules:
            quantizers.modules[prefix].set_four_levels(found[span])
    return found


def _half_steps(quantizers: Quantizers, d: Tensor) -> Tensor:
    """Return the step sizes of weights on the grid of fp16, those of inputs as they are."""
    d = d.clone()
    for prefix in quantizers.prefixes[: quantizers.weight_layers]:
        span = quantizers.spans[prefix]
        d[span] = half_steps(d[span], small=prefix in quantizers.blocks)
    return d


def _entry_factors(quantizers: Quantizers, chosen: BitAllocation) -> Tensor:
    """Return what each entry of the flat q_m is to be multiplied by, shape (entries,)."""
    factors = torch.cat([chosen.clip_factors, chosen.input_clip_factors])
    if len(factors) == len(quantizers.layer):
        return factors
    # One for each layer, where some have an entry for each channel.
    return factors[quantizers.layer.to(factors.device)]
