"""Time the layers of a model at several sizes and widths on this machine: the latency table of a search."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from transformers.pytorch_utils import Conv1D

from geta_hf.costs.hardware import LatencyTable, MeasuredShape
from geta_hf.errors import GETAError
from geta_hf.inference.layers import FLOAT, IntegerLayer, fits_integers, set_path
from geta_hf.inference.prepare import Compute, check_compute, wanted_path
from geta_hf.quantization import select_layers
from geta_hf.quantization.fixed import FixedQuantizer
from geta_hf.serialization.bitpack import largest_code
from geta_hf.serialization.encode import pack_layer
from geta_hf.serialization.packed_layers import PackedLayer, packed_layers

MOST_BITS = 8
_ROUNDS = 5
_SECONDS = 0.01  # of one round


@dataclass(frozen=True)
class Conditions:
    """What layers are timed under.

    Attributes:
        tokens: rows of the input of a linear layer.
        compute: see `prepare_for_inference`.
        activation_bits: width of the inputs; None where they are not rounded.
        device: where layers run.
    """

    tokens: int = 128
    compute: Compute = "auto"
    activation_bits: int | None = None
    device: str = "cpu"

    def notes(self) -> dict[str, object]:
        """Return what a table should say of itself."""
        return {
            "tokens": self.tokens,
            "compute": self.compute,
            "activation_bits": self.activation_bits,
            "device": self.device,
            "threads": torch.get_num_threads(),
        }


def measure_latency(
    model: nn.Module,
    widths: Sequence[int] = range(2, MOST_BITS + 1),
    points: int = 4,
    conditions: Conditions | None = None,
    include: Sequence[str] | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> LatencyTable:
    """Time each linear layer that would be quantized, at some of its rows and columns, on the path that it would take.

    Layers of one shape are timed once, and widths that are stored alike in memory too. A smaller layer never counts as
    slower than a larger one, which noise could make it.

    Args:
        model: whose layers are taken by their shapes alone; its weights may be on meta.
        widths: of weights, 2 to 8. Default: all of them.
        points: sizes of each side, evenly up to the full one; 2 or more. Default 4.
        conditions: under which layers run. Default None: 128 tokens, float inputs, on the CPU.
        include: regular expressions over module names, as in a config. Default None: the layers of repeated blocks.
        report: called with a line for each shape. Default: nothing is reported.

    Returns:
        The table for `SearchConfig(cost="latency")`.

    Raises:
        GETAError: a width, a number of tokens or a device that there is none of, or a layer that is not linear.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(8, 16))
        >>> table = measure_latency(model, [4], points=2, conditions=Conditions(tokens=2), include=["0"])
        >>> list(table.shapes)
        [(16, 8)]
    """
    given = conditions or Conditions()
    _check(widths, points, given)
    shapes = {_shape_of(name, layer): None for name, layer in select_layers(model, include).items()}
    found = {}
    for outputs, inputs in shapes:
        found[outputs, inputs] = _measure_shape(outputs, inputs, sorted(set(widths)), points, given)
        slowest = max(float(times[-1, -1]) for times in found[outputs, inputs].seconds.values())
        report(f"{outputs} x {inputs}: {1e6 * slowest:,.1f} µs")
    return LatencyTable(found, given.notes())


def _check(widths: Sequence[int], points: int, conditions: Conditions) -> None:
    if not widths or any(not 2 <= width <= MOST_BITS for width in widths):
        raise GETAError(f"widths are {list(widths)}; give one or more from 2 to {MOST_BITS}")
    if points < 2:
        raise GETAError(f"points is {points}; a table needs 2 or more sizes of each side")
    if conditions.tokens < 1:
        raise GETAError(f"tokens is {conditions.tokens}; time layers on one row of input or more")
    bits = conditions.activation_bits
    if bits is not None and not 2 <= bits <= 16:
        raise GETAError(f"activation_bits is {bits}; inputs have 2 to 16 bits")
    check_compute(conditions.compute)
    try:
        torch.empty(1, device=conditions.device)
    except (RuntimeError, AssertionError) as error:
        raise GETAError(f"device {conditions.device!r} can't be used: {str(error).splitlines()[0]}") from error


def _shape_of(name: str, layer: nn.Module) -> tuple[int, int]:
    """Return outputs and inputs of a layer."""
    rows, *columns = layer.get_parameter("weight").shape
    if len(columns) != 1:
        raise GETAError(
            f"{name} is a {type(layer).__name__}, whose time depends on its positions too; only linear layers are "
            f"measured, so choose another cost, such as bitops"
        )
    return (columns[0], rows) if isinstance(layer, Conv1D) else (rows, columns[0])


def _measure_shape(
    outputs: int, inputs: int, widths: Sequence[int], points: int, conditions: Conditions
) -> MeasuredShape:
    sides = (_grid(outputs, points), _grid(inputs, points))
    seconds = {width: torch.zeros(len(sides[0]), len(sides[1]), dtype=torch.float64) for width in widths}
    for row, rows in enumerate(sides[0]):
        for column, columns in enumerate(sides[1]):
            # Of widths that are stored alike, such as 5 to 8 bits in a byte, one is timed.
            known: dict[tuple[object, ...], float] = {}
            for width in widths:
                layer, layout = _layer_of(rows, columns, width, conditions)
                if layout not in known:
                    known[layout] = _seconds(layer, columns, conditions)
                seconds[width][row, column] = known[layout]
    for times in seconds.values():
        times.copy_(times.cummax(0).values.cummax(1).values)
    return MeasuredShape(*sides, seconds)


def _grid(size: int, points: int) -> tuple[int, ...]:
    return tuple(sorted({max(1, math.ceil(size * number / points)) for number in range(1, points + 1)}))


def _layer_of(outputs: int, inputs: int, width: int, conditions: Conditions) -> tuple[nn.Module, tuple[object, ...]]:
    """Return a packed layer on the path that it would take, and how it is stored."""
    generator = torch.Generator().manual_seed(0)
    most = largest_code(width)
    codes = torch.randint(-most, most + 1, (outputs, inputs), generator=generator)
    home = nn.ModuleDict({"layer": nn.Linear(inputs, outputs, device=conditions.device)})
    bits = conditions.activation_bits
    own = None
    if bits is not None:
        own = FixedQuantizer(torch.tensor([4.0 / largest_code(bits)]), bits).to(conditions.device)
    pack_layer("layer", home["layer"], codes, width, torch.full((outputs,), 0.01), own)
    layer: PackedLayer = packed_layers(home)["layer"]
    path = FLOAT
    if conditions.compute != "float" and fits_integers(layer):
        path = wanted_path(layer, conditions.compute)
    set_path("layer", layer, path)
    return layer, (path, isinstance(layer, IntegerLayer) and layer.halved)


@torch.no_grad()
def _seconds(layer: nn.Module, inputs: int, conditions: Conditions) -> float:
    """Return the time of one call, the least of some rounds: other programs can only add to it."""
    x: Tensor = torch.randn(conditions.tokens, inputs, device=conditions.device)
    timer = Timer("layer(x)", globals={"layer": layer, "x": x}, num_threads=torch.get_num_threads())
    once = timer.timeit(1).mean
    count = max(1, min(1000, round(_SECONDS / max(once, 1e-9))))
    return float(min(timer.timeit(count).mean for _ in range(_ROUNDS)))
