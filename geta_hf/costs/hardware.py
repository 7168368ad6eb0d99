"""What one layer costs on hardware, as differentiable functions of what is expected to remain of it.

A search has no shapes yet, only probabilities: of each output to be computed at some width, and of each input to
remain. `Expected` holds their sums. The gradients flow to both sides, so that a group is charged for its own outputs
and for the inputs that it adds to the next layer.

The formulas are those of "Joint Pruning and Channel-wise Mixed-Precision Quantization" (arXiv 2407.01054) and of its
code. Once all probabilities are 0 or 1, they count the layer that remains.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from geta_hf.errors import GETAError

MPIC_MACS = {
    8: {2: 2.5, 4: 2.3, 8: 2.1},
    4: {2: 3.9, 4: 3.5, 8: 2.1},
    2: {2: 6.5, 4: 4.0, 8: 2.2},
}
"""MACs of one cycle of MPIC, by the width of the input and of the weight."""

MPIC_HERTZ = 250e6
MPIC_WATTS = 5.3825e-3


@dataclass(frozen=True)
class LayerShape:
    """What no search changes of a layer.

    Attributes:
        name: of the layer, for errors.
        outputs: rows of the full weight.
        inputs: columns of the full weight, so 1 for a depthwise convolution.
        kernel: height and width; (1, 1) for a linear layer.
        positions: height and width of the output; (tokens, 1) for a linear layer.
        depthwise: whether each output reads one input alone.
    """

    name: str
    outputs: int
    inputs: int
    kernel: tuple[int, int] = (1, 1)
    positions: tuple[int, int] = (1, 1)
    depthwise: bool = False

    @property
    def area(self) -> int:
        """The number of positions of the kernel."""
        return self.kernel[0] * self.kernel[1]

    @property
    def uses(self) -> int:
        """The number of positions of the output, each of which uses every weight once."""
        return self.positions[0] * self.positions[1]


@dataclass(frozen=True)
class Expected:
    """What is expected to remain of a layer.

    Attributes:
        outputs: shape (widths,): expected number of outputs at each width.
        inputs: expected number of inputs of each output, 0-d; or of those at each width, shape (widths,), where a width
            belongs to a column.
        widths: the widths of weights, without 0.
        input_shares: width of the input -> its probability, where that is chosen too. Default None: a cost is told.
    """

    outputs: Tensor
    inputs: Tensor
    widths: Sequence[int]
    input_shares: Mapping[int, Tensor] | None = None

    def inputs_at(self, number: int) -> Tensor:
        """Return the expected number of inputs that are read at the width of this position, 0-d."""
        return self.inputs[number] if self.inputs.dim() else self.inputs


def size_bits(shape: LayerShape, expected: Expected) -> Tensor:
    """Return the bits of the weight, 0-d: area · Σ inputs_p · outputs_p · p.

    >>> import torch
    >>> half = Expected(torch.tensor([8.0]), torch.tensor(4.0), [8])  # of a 3x3 convolution from 8 to 16 channels
    >>> float(size_bits(LayerShape("conv", 16, 8, kernel=(3, 3)), half))
    2304.0
    """
    by_width = zip(expected.widths, expected.inputs * expected.outputs, strict=True)
    return shape.area * torch.stack([width * elements for width, elements in by_width]).sum()


def bit_operations(shape: LayerShape, expected: Expected, input_bits: Tensor | float) -> Tensor:
    """Return MACs · b_w · b_a, 0-d, for an input of a mean width of `input_bits`."""
    return size_bits(shape, expected) * shape.uses * input_bits


def mpic_cycles(shape: LayerShape, expected: Expected, input_shares: Mapping[int, Tensor | float]) -> Tensor:
    """Return the cycles on MPIC, 0-d.

    Args:
        shape, expected: of the layer.
        input_shares: width of the input -> its probability; {8: 1.0} for an input of 8 bits.

    Raises:
        GETAError: a width for which no speed is known.
    """
    total = expected.outputs.new_zeros(())
    macs = expected.inputs * expected.outputs * (shape.area * shape.uses)
    for bits, share in input_shares.items():
        for number, width in enumerate(expected.widths):
            speed = MPIC_MACS.get(bits, {}).get(width)
            if speed is None:
                raise GETAError(
                    f"{shape.name}: no speed of MPIC is known for weights of {width} bits and inputs of {bits}; its "
                    f"widths are {sorted(MPIC_MACS)}: set them by bit_choices and activation_bits"
                )
            total = total + share * macs[number] / speed
    return total


def mpic_joules(shape: LayerShape, expected: Expected, input_shares: Mapping[int, Tensor | float]) -> Tensor:
    """Return the energy on MPIC in joules, 0-d; arguments as in `mpic_cycles`."""
    return mpic_cycles(shape, expected, input_shares) / MPIC_HERTZ * MPIC_WATTS


# --- a measured table -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MeasuredShape:
    """Times of one full shape, over a grid of remaining outputs and inputs.

    Attributes:
        outputs, inputs: the numbers of the grid, ascending; the last ones are those of the full shape.
        seconds: width -> times, shape (outputs, inputs).
    """

    outputs: tuple[int, ...]
    inputs: tuple[int, ...]
    seconds: Mapping[int, Tensor]


class LatencyTable:
    """Measured times of layers; between two measured sizes they are interpolated, and a layer of no size takes none.

    Args:
        shapes: (outputs, inputs) of the full layer -> its times.
        notes: what the file says of how it was measured. Default None: nothing.

    >>> import torch
    >>> times = MeasuredShape((4, 8), (16,), {4: torch.tensor([[1e-6], [2e-6]])})
    >>> table = LatencyTable({(8, 16): times})
    >>> expected = Expected(torch.tensor([6.0]), torch.tensor(16.0), [4])
    >>> round(1e6 * float(table.seconds(LayerShape("up", 8, 16), expected)), 3)
    1.5
    """

    def __init__(
        self, shapes: Mapping[tuple[int, int], MeasuredShape], notes: Mapping[str, object] | None = None
    ) -> None:
        for full, measured in shapes.items():
            _check_measured(full, measured)
        self.shapes = dict(shapes)
        self.notes = dict(notes or {})
        self._moved: dict[tuple[object, ...], tuple[Tensor, Tensor, Tensor]] = {}

    def seconds(self, shape: LayerShape, expected: Expected) -> Tensor:
        """Return the time of a layer, 0-d: the sum over its widths, each of which is a product of its own.

        Raises:
            GETAError: the table lacks the shape or a width.
        """
        measured = self._measured(shape, expected.widths)
        total = expected.outputs.new_zeros(())
        for number, width in enumerate(expected.widths):
            times, outputs, inputs = self._on_device(measured, width, total)
            along = _interpolate(outputs, times, expected.outputs[number])
            total = total + _interpolate(inputs, along, expected.inputs_at(number))
        return total

    def _on_device(self, measured: MeasuredShape, width: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return times and both grids, which begin with a size of 0, where `like` is; copied there once."""
        key = (measured.outputs[-1], measured.inputs[-1], width, like.device, like.dtype)
        if key not in self._moved:
            outputs, inputs = (torch.tensor([0.0, *grid]).to(like) for grid in (measured.outputs, measured.inputs))
            self._moved[key] = (measured.seconds[width].to(like), outputs, inputs)
        return self._moved[key]

    def check(self, shapes: Sequence[LayerShape], widths: Sequence[int]) -> None:
        """Raise GETAError where the table lacks a layer's shape, or a width of it."""
        for shape in shapes:
            self._measured(shape, widths)

    def _measured(self, shape: LayerShape, widths: Sequence[int]) -> MeasuredShape:
        measured = self.shapes.get((shape.outputs, shape.inputs * shape.area))
        if measured is None:
            raise GETAError(
                f"{shape.name}: the latency table has no layer of {shape.outputs} outputs and "
                f"{shape.inputs * shape.area} inputs; write it with `geta-hf measure` on this model"
            )
        missing = [width for width in widths if width not in measured.seconds]
        if missing:
            raise GETAError(
                f"{shape.name}: the latency table has no times at {missing[0]} bits, only at "
                f"{sorted(measured.seconds)}; measure that width, or leave it out of bit_choices"
            )
        return measured

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as JSON."""
        rows = [
            {
                "outputs": list(measured.outputs),
                "inputs": list(measured.inputs),
                "seconds": {str(width): times.tolist() for width, times in measured.seconds.items()},
            }
            for measured in self.shapes.values()
        ]
        Path(path).write_text(json.dumps({"measured": self.notes, "layers": rows}) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LatencyTable:
        """Read what `save` wrote. Raise GETAError for a file that is no such table."""
        try:
            stored = json.loads(Path(path).read_text(encoding="utf-8"))
            found = [
                MeasuredShape(
                    tuple(row["outputs"]),
                    tuple(row["inputs"]),
                    {int(width): torch.tensor(times) for width, times in row["seconds"].items()},
                )
                for row in stored["layers"]
            ]
            notes = dict(stored.get("measured", {}))
            return cls({(measured.outputs[-1], measured.inputs[-1]): measured for measured in found}, notes)
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise GETAError(f"{path} can't be read as a latency table ({error}); measure it again") from error


def _check_measured(full: tuple[int, int], measured: MeasuredShape) -> None:
    grids = (measured.outputs, measured.inputs)
    ends = tuple(grid[-1] if grid else 0 for grid in grids)
    if ends != full or any(sorted(set(grid)) != list(grid) or grid[0] < 1 for grid in grids):
        raise GETAError(f"a latency table of the shape {full} has the sizes {grids}; they must rise to the full shape")
    for width, times in measured.seconds.items():
        if times.shape != (len(measured.outputs), len(measured.inputs)) or not bool(torch.isfinite(times).all()):
            raise GETAError(
                f"the latency table of the shape {full} has times of shape {tuple(times.shape)} at {width} bits; "
                f"there must be a finite one for each of its sizes {grids}"
            )


def _interpolate(points: Tensor, values: Tensor, at: Tensor) -> Tensor:
    """Return the values along dim 0 at one place between the points of a grid, 0 at the first; differentiable."""
    full = torch.cat([values.new_zeros(1, *values.shape[1:]), values])
    # The slope of the segment is kept at its end, so that a full layer still has a gradient. Places remain tensors, as
    # a GPU would have to be waited for to make numbers of them.
    place = torch.searchsorted(points, at.detach()[None]).clamp(1, len(points) - 1)
    low, high = points[place - 1], points[place]
    share = ((at - low) / (high - low)).view(-1, *[1] * (values.dim() - 1))
    return torch.lerp(full[place - 1], full[place], share)[0]
