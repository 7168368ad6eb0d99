"""Cycles of a layer on the accelerator NE16, by its tiles: differentiable in what is expected to remain.

NE16 computes 3x3 positions of 32 outputs (16 of a depthwise layer) from 16 inputs at a time; inputs have 8 bits. The
model and its constants are those of the code of arXiv 2407.01054. In it, the width of weights matters for 3x3 kernels
alone. Rounding to full tiles passes gradients as if there were none.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from geta_hf.costs.hardware import Expected, LayerShape

_INPUTS = 16
_OUTPUTS = 32
_OUTPUTS_DEPTHWISE = 16
_MEMORY_BITS = 256  # of one cycle
_FIFO = 6
_INDEX = 2
_SIDE = 3  # of the tile of positions
_BUFFER = 25  # positions of inputs that a 3x3 pass reads


def ne16_cycles(shape: LayerShape, expected: Expected) -> Tensor:
    """Return the cycles of a layer, 0-d: the sum over its widths, each of which is a pass of its own.

    >>> import torch
    >>> expected = Expected(torch.tensor([64.0]), torch.tensor(64.0), [8])
    >>> float(ne16_cycles(LayerShape("linear", 64, 64), expected))
    628.0
    """
    threes = (shape.kernel[0] // _SIDE) * (shape.kernel[1] // _SIDE)
    ones = shape.area - _SIDE**2 * threes
    total = expected.outputs.new_zeros(())
    for number, width in enumerate(expected.widths):
        outputs, inputs = expected.outputs[number], expected.inputs_at(number)
        cycles = torch.zeros_like(total)
        if threes:
            cycles = cycles + threes * _pass_cycles(shape, outputs, inputs, width, three=True)
        if ones:
            cycles = cycles + ones * _pass_cycles(shape, outputs, inputs, width, three=False)
        # Where a width belongs to a column, there is no pass for one that no column has.
        total = total + torch.where(inputs > 0, cycles, 0.0)
    return total


def _pass_cycles(shape: LayerShape, outputs: Tensor, inputs: Tensor, width: int, three: bool) -> Tensor:
    """Return the cycles of one pass over the kernel, 3x3 or 1x1."""
    tile = _OUTPUTS_DEPTHWISE if shape.depthwise else _OUTPUTS
    of_positions = math.ceil(shape.positions[0] / _SIDE) * math.ceil(shape.positions[1] / _SIDE)
    of_inputs = torch.ones_like(inputs) if shape.depthwise else _through(inputs / _INPUTS, torch.ceil)
    full = _through(outputs / tile, torch.floor)
    rest = outputs + (torch.remainder(outputs, tile) - outputs).detach()
    cycles = full * _tile_cycles(torch.full_like(outputs, float(tile)), of_inputs, width, three, shape.depthwise)
    of_rest = _tile_cycles(rest, of_inputs, width, three, shape.depthwise)
    # By `where`, as a GPU would have to be waited for to know whether there is a rest.
    return of_positions * (cycles + torch.where(rest > 0, of_rest, 0.0))


def _tile_cycles(outputs: Tensor, of_inputs: Tensor, width: int, three: bool, depthwise: bool) -> Tensor:
    """Return the cycles of one tile of up to 32 outputs over all inputs."""
    reads = math.ceil(_INPUTS * 8 / _MEMORY_BITS)
    load = _FIFO + _BUFFER * reads if three else 10 + 9 * reads
    offset = _FIFO + outputs if depthwise else _FIFO
    product = _FIFO + (outputs * width if three else outputs)
    normalize = 9 + _through(outputs, torch.ceil)  # ceil(4 k / 4)
    written = _OUTPUTS_DEPTHWISE if depthwise else _OUTPUTS
    write = 3 + 9 * math.ceil(written * 8 / _MEMORY_BITS) + 1
    return of_inputs * (load + offset + product + _INDEX) + normalize + write


def _through(value: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
    """Return a rounded value with the gradient of the value itself."""
    return value + (rounding(value) - value).detach()
