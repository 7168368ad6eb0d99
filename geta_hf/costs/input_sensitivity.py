"""Estimate what rounding the input of each layer costs at every width, in the unit of the estimate for weights.

What rounding costs at the present width shows in training by itself: the straight-through gradient of d is
∂f/∂d = Σ g · (x^Q - x) / d, so d · ∂f/∂d = ⟨g, x^Q - x⟩, and the mean of its square is, like v Σ (x - x^Q)² of weights,
an estimate of twice the loss under H = E[g gᵀ]. How it changes with the width comes from the histogram of magnitudes
that calibration counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from geta_hf.quantization.clipping import Histogram, search_clipping, squared_error


@dataclass(frozen=True)
class InputErrors:
    """Hold what rounding each quantized input to each of some widths costs; on CPU.

    Attributes:
        losses: float64, shape (inputs, widths): expected loss, in the unit of v Σ (x - x^Q)² of weights.
        clips: float32, shape (inputs, widths): the clipping value for each width, relative to the present one.
        equal: float64, shape (inputs, widths): the losses of inputs to which a change of the same size matters alike.
    """

    losses: Tensor
    clips: Tensor
    equal: Tensor


def input_errors(
    square: Tensor, bits: Tensor, widths: Sequence[int], histograms: Sequence[Histogram | None], search: bool
) -> InputErrors:
    """Estimate the loss that rounding each input costs at every width.

    Args:
        square: mean of ⟨g, x^Q - x⟩² of each input at its present width, shape (inputs,).
        bits: the present widths, real, shape (inputs,).
        widths: integer widths, ascending.
        histograms: magnitudes of each input relative to its clipping value; None where they are not known, and errors
            are taken to fall by four with every bit.
        search: look for a better clipping value at each width; otherwise the present one is kept.
    """
    shares = torch.zeros(len(histograms), len(widths), dtype=torch.float64)
    clips = torch.ones(len(histograms), len(widths))
    for position, histogram in enumerate(histograms):
        if histogram is None:
            shares[position] = torch.tensor([_steps(width) ** -2 for width in widths], dtype=torch.float64)
        else:
            shares[position], clips[position] = error_shares(histogram, widths, search)
    present = (2.0 ** (bits.double().cpu() - 1) - 1) ** 2
    return InputErrors(square.double().cpu()[:, None] * present[:, None] * shares, clips, shares)


def error_shares(histogram: Histogram, widths: Sequence[int], search: bool) -> tuple[Tensor, Tensor]:
    """Return the squared error at each width in the unit of that of a single step, and its clipping value.

    An error e at n steps counts as e / (e' n'²), where e' is the rounding error at the largest width, of n' steps. Of
    values spread evenly it is 1 / n².

    Args:
        histogram: of magnitudes, relative to the present clipping value.
        widths: integer widths, ascending.
        search: see `input_errors`.

    Returns:
        Float64 and float32, shape (widths,) each.
    """
    present = 1.0 / histogram.top
    if search:
        errors, clips = search_clipping(histogram.counts, widths)
    else:
        errors = torch.stack([squared_error(histogram.counts, present, width) for width in widths])
        clips = torch.ones(len(widths))
    # The gradient of d sees rounding alone, and not what lies beyond the clipping value.
    reference = float(squared_error(histogram.counts, present, widths[-1], clipped=False))
    unit = max(reference, torch.finfo(torch.float32).tiny) * _steps(widths[-1]) ** 2
    # At the largest width the clipping value is the one that was trained for it.
    return errors.double() / unit, (clips / clips[-1]).clamp(max=1.0)


def _steps(width: int) -> float:
    return 2.0 ** (width - 1) - 1
