"""What a search adds to the loss: λ times what exceeds a target, and λ times a hardware cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from geta_hf.costs.expected_sizes import ExpectedSizes
from geta_hf.costs.hardware import (
    Expected,
    LatencyTable,
    LayerShape,
    bit_operations,
    mpic_cycles,
    mpic_joules,
    size_bits,
)
from geta_hf.costs.hardware_ne16 import ne16_cycles
from geta_hf.costs.targets import Target
from geta_hf.quantization.functional import FLOAT_BITS


@dataclass
class InputChoices:
    """The choices of widths of layers' inputs.

    Attributes:
        widths: to choose from, fp32, shape (widths,).
        input_of: for each quantized weight the position of its layer's input, int64; -1 where it is float.
        mean: the most of their plain mean; None where BOPs decide.
    """

    widths: Tensor
    input_of: Tensor
    mean: float | None

    def to(self, device: torch.device) -> None:
        """Bring everything to where the probabilities are."""
        self.widths = self.widths.to(device)
        self.input_of = self.input_of.to(device)

    def bits(self, shares: Tensor) -> Tensor:
        """Return the expected width of the input of each quantized weight, shape (layers,).

        Args:
            shares: the probability of each width of each input, shape (inputs, widths).
        """
        of_inputs = torch.cat([shares @ self.widths, shares.new_full((1,), float(FLOAT_BITS))])
        return of_inputs[self.input_of]


LayerCost = Callable[[LayerShape, Expected], Tensor]


@dataclass(frozen=True)
class HardwareCost:
    """A cost that is added to the loss.

    Attributes:
        cost: of one layer.
        shapes: of each quantized weight, in the order of the ledger's.
        output_dims: weight name -> the dim of its outputs, where it is not 0.
    """

    cost: LayerCost
    shapes: Sequence[LayerShape]
    output_dims: Mapping[str, int]


class Objective:
    """The terms as functions of the probabilities.

    Args:
        sizes: of the model.
        target: of the run. Its amount, and each of its budgets, has a hinge of its own.
        widths: of weights.
        strength: λ of the hinges.
        hardware: a further cost; None where none is added.
        cost_weight: λ of it.
        target_cost: the most of the further cost, relative to the full model at the widest width; None for no limit.
        inputs: choices of the widths of inputs; None where there is one for all.

    Attributes:
        input_shares: the probability of each width of each input, shape (inputs, widths), that the terms are taken at;
            None where there is one width for all.
    """

    def __init__(
        self,
        sizes: ExpectedSizes,
        target: Target,
        widths: Sequence[int],
        strength: float,
        hardware: HardwareCost | None = None,
        cost_weight: float = 0.0,
        target_cost: float | None = None,
        inputs: InputChoices | None = None,
    ) -> None:
        self.sizes = sizes
        self.widths = list(widths)
        self.strength = strength
        self.hardware = hardware
        self.cost_weight = cost_weight
        self.target_cost = target_cost
        self.input_bits = target.input_bits
        self.inputs = inputs
        self.input_shares: Tensor | None = None
        # As numbers, since a GPU would have to be waited for to read them.
        self._input_widths = [] if inputs is None else inputs.widths.tolist()
        self._input_positions = [] if inputs is None else inputs.input_of.tolist()
        # A target of zero groups or parameters is no share of anything; what remains is then measured as it is.
        self.targets = {
            unit: max(amount, 1e-9) for unit, amount in {target.unit: target.amount, **target.budgets}.items()
        }
        self._full_cost: float | None = None
        self._widths = torch.tensor([float(width) for width in self.widths])

    def to(self, device: torch.device) -> None:
        """Bring everything to where the probabilities are."""
        self.sizes.to(device)
        if self.inputs is not None:
            self.inputs.to(device)
        if self._widths.device != device:
            self._widths = self._widths.to(device)

    def bits(self, shares: Tensor) -> Tensor:
        """Return the expected width of each quantized weight, shape (layers,)."""
        return shares @ self._widths

    def bits_of_inputs(self) -> Tensor | float:
        """Return the expected width of the layers' inputs: one for all, or shape (layers,)."""
        if self.inputs is None or self.input_shares is None:
            return self.input_bits
        return self.inputs.bits(self.input_shares)

    def excess(self, keep: Tensor, shares: Tensor) -> Tensor:
        """Return by which share each target is exceeded, 0 where it is met, shape (targets,)."""
        bits = self.bits(shares)
        inputs = self.bits_of_inputs()
        relative = [self.sizes.amount(unit, keep, bits, inputs) / amount for unit, amount in self.targets.items()]
        if self.inputs is not None and self.inputs.mean is not None and self.input_shares is not None:
            relative.append((self.input_shares @ self.inputs.widths).mean() / self.inputs.mean)
        if self.target_cost is not None:
            relative.append(self.hardware_cost(keep, shares) / self.target_cost)
        return (torch.stack(relative) - 1).clamp_min(0)

    def hardware_cost(self, keep: Tensor, shares: Tensor) -> Tensor:
        """Return the hardware cost relative to that of the full model at the widest width, 0-d."""
        return self.layer_costs(keep, shares).sum() / self.full_cost(keep)

    def full_cost(self, keep: Tensor) -> float:
        """Return the hardware cost of the full model at the widest width, in its own unit; counted once.

        Args:
            keep: shape (groups,); read for its device and type alone.
        """
        if self._full_cost is None:
            widest = keep.new_zeros(len(self.sizes.ledger.layers), len(self.widths))
            widest[:, -1] = 1
            present = self.input_shares
            if present is not None:
                self.input_shares = torch.zeros_like(present)
                self.input_shares[:, -1] = 1
            self._full_cost = float(self.layer_costs(torch.ones_like(keep), widest).sum().detach())
            self.input_shares = present
        return self._full_cost

    def layer_costs(self, keep: Tensor, shares: Tensor) -> Tensor:
        """Return the hardware cost of each quantized weight, in the cost's own unit, shape (layers,)."""
        own = self.hardware
        assert own is not None
        expected = self.sizes.of_layers(keep, shares, self.widths, own.output_dims)
        if self.inputs is not None and self.input_shares is not None:
            expected = self._with_inputs(expected, self.input_shares)
        return torch.stack([own.cost(*pair) for pair in zip(own.shapes, expected, strict=True)])

    def _with_inputs(self, expected: Sequence[Expected], shares: Tensor) -> list[Expected]:
        assert self.inputs is not None
        widths = [int(width) for width in self._input_widths]
        found = []
        for one, position in zip(expected, self._input_positions, strict=True):
            own = None
            if position >= 0:
                own = {width: shares[position, number] for number, width in enumerate(widths)}
            found.append(replace(one, input_shares=own))
        return found

    def loss(self, keep: Tensor, shares: Tensor, ramp: float) -> Tensor:
        """Return what is added to the loss, 0-d.

        Args:
            keep: the probability that each group remains, shape (groups,).
            shares: the probability of each width, shape (layers, widths).
            ramp: the share of λ that is in force.
        """
        total = ramp * self.strength * self.excess(keep, shares).sum()
        if self.hardware is not None:
            total = total + ramp * self.cost_weight * self.hardware_cost(keep, shares)
        return total


def layer_cost(name: str, input_bits: float, table: LatencyTable | None = None) -> LayerCost:
    """Return the cost of a name in `config.Cost` other than none.

    Args:
        name: of the cost.
        input_bits: the width of the layers' inputs where it is not chosen; float ones count as 8 bits on MPIC, which
            has no others.
        table: for `latency`.
    """
    one_width: dict[int, Tensor | float] = {8 if input_bits == FLOAT_BITS else int(input_bits): 1.0}

    def shares(expected: Expected) -> Mapping[int, Tensor | float]:
        return one_width if expected.input_shares is None else expected.input_shares

    def mean(expected: Expected) -> Tensor | float:
        if expected.input_shares is None:
            return input_bits
        return torch.stack([width * share for width, share in expected.input_shares.items()]).sum()

    costs: dict[str, LayerCost] = {
        "size": size_bits,
        "bitops": lambda shape, expected: bit_operations(shape, expected, mean(expected)),
        "mpic_cycles": lambda shape, expected: mpic_cycles(shape, expected, shares(expected)),
        "mpic_energy": lambda shape, expected: mpic_joules(shape, expected, shares(expected)),
        "ne16_cycles": ne16_cycles,
    }
    if table is not None:
        costs["latency"] = table.seconds
    return costs[name]
