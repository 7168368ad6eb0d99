"""A recorded forward pass as plain data: values, and the operators that made them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Ref:
    """Stands for a tensor in a node's inputs: the position of its value in `Graph.values`."""

    value: int


@dataclass
class Value:
    """One tensor of the forward pass.

    Attributes:
        role: `parameter`, `buffer`, `input`, `constant` or `result`.
        names: the `state_dict()` names of a parameter or buffer (several when tied, the canonical one first), or
            the name of an input.
        data: the content of a buffer, input or constant, on CPU, and of a decision (an integer or boolean result
            that parameters had a part in) where those were computed with; None for the rest.
        content: of a mask or an index that an operator chooses by, when no parameter had a part in it.
        from_parameter: whether a parameter had a part in it.
        from_input: whether an input of the model had a part in it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    role: str
    names: tuple[str, ...] = ()
    data: torch.Tensor | None = None
    content: torch.Tensor | None = None
    from_parameter: bool = False
    from_input: bool = False

    @property
    def elements(self) -> int:
        """The number of elements."""
        return int(torch.Size(self.shape).numel())

    @property
    def weight_like(self) -> bool:
        """Whether it is a parameter, or made of parameters alone (a fake-quantized weight, say)."""
        return self.from_parameter and not self.from_input


@dataclass(frozen=True)
class Node:
    """One operator call.

    Attributes:
        op: the operator's name without overload, such as `addmm`; `attached` and `inserted` are merged branches.
        func: the operator; None for a merged branch.
        inputs: every argument by its schema name, defaults filled in, tensors as `Ref`.
        outputs: positions of the tensors it returns.
        module: dotted path of the module that called it.
        body: the nodes that a merged branch stands for, in order.
    """

    op: str
    func: torch._ops.OpOverload | None
    inputs: dict[str, Any]
    outputs: tuple[int, ...]
    module: str
    body: tuple[Node, ...] = ()

    def refs(self) -> Iterator[int]:
        """The values it reads, in the order of its arguments."""
        for argument in self.inputs.values():
            for item in argument if isinstance(argument, list | tuple) else (argument,):
                if isinstance(item, Ref):
                    yield item.value

    @property
    def pointwise(self) -> bool:
        """Whether torch itself declares the operator to be elementwise."""
        return self.func is not None and torch.Tag.pointwise in self.func.tags

    @property
    def random(self) -> bool:
        """Whether it draws random numbers."""
        return self.func is not None and torch.Tag.nondeterministic_seeded in self.func.tags

    @property
    def writes(self) -> bool:
        """Whether it changes one of its inputs in place."""
        return self.func is not None and self.func._schema.is_mutable

    def call(self, inputs: dict[str, Any]) -> Any:
        """Run the operator on `inputs`, which have the names of `self.inputs`."""
        assert self.func is not None
        schema = self.func._schema.arguments
        positional = [inputs[argument.name] for argument in schema if not argument.kwarg_only]
        return self.func(*positional, **{a.name: inputs[a.name] for a in schema if a.kwarg_only})


@dataclass
class Graph:
    """A forward pass: values, nodes in the order of execution, and the values that the model returns."""

    values: list[Value] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    outputs: tuple[int, ...] = ()

    def consumers(self) -> dict[int, list[int]]:
        """For every value, the positions of the nodes that read it."""
        readers: dict[int, list[int]] = {}
        for position, node in enumerate(self.nodes):
            for value in dict.fromkeys(node.refs()):
                readers.setdefault(value, []).append(position)
        return readers

    def producers(self) -> dict[int, int]:
        """For every computed value, the position of the node that made it."""
        return {value: position for position, node in enumerate(self.nodes) for value in node.outputs}


def map_nested(function: Callable[[Any], Any], argument: Any) -> Any:
    """Apply `function` to an operator's argument, or to each item when it is a list or tuple."""
    if isinstance(argument, list | tuple):
        return type(argument)(function(item) for item in argument)
    return function(argument)
