"""Weights that are cut or quantized but not trained, as under LoRA, and the adapters that move them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from geta_hf.qadg.group_labels import GroupLabels
from geta_hf.quantization.lora import merge

Named = Mapping[str, Tensor]


@dataclass(frozen=True)
class Adapter:
    """The trained matrices that move a frozen weight: W + scale · B A.

    Attributes:
        a, b: their names; shapes (r, in) and (out, r).
        scale: of their product.
        transposed: whether W is (in, out).
    """

    a: str
    b: str
    scale: float
    transposed: bool = False

    def follow(self, cut: GroupLabels) -> GroupLabels:
        """Return the labels of A or B that take the same rows or columns off B A as `cut` takes off W."""
        # Row i of B A is row i of B times A, and column j is B times column j of A, so each side has one counterpart.
        of_output = cut.dim == (1 if self.transposed else 0)
        return replace(cut, tensor=self.b, dim=0) if of_output else replace(cut, tensor=self.a, dim=1)


@dataclass(frozen=True)
class FrozenWeights:
    """The weights that are not trained though they are cut or quantized.

    Attributes:
        names: the tensors; the base optimizer holds them, but they have no gradient when it steps.
        adapters: weight -> the matrices that move it.
    """

    names: Collection[str] = frozenset()
    adapters: Mapping[str, Adapter] = field(default_factory=dict)

    def merged(self, name: str, named: Named) -> Tensor:
        """Return the value that the model computes with, of a frozen tensor or any other."""
        value = named[name].detach()
        if name not in self.adapters:
            return value
        own = self.adapters[name]
        # GPT-2's Conv1D keeps W as (in, out), so there the product is added transposed.
        return merge(value, named[own.a].detach(), named[own.b].detach(), own.scale, own.transposed)

    def with_adapters(self, labels: Sequence[GroupLabels]) -> list[GroupLabels]:
        """Return the labels, and those of the adapters that follow from them."""
        return [*labels, *(self.adapters[cut.tensor].follow(cut) for cut in labels if cut.tensor in self.adapters)]
