"""Hold a recorded forward pass as plain data: values, and the operators that made them.

This is the trace graph (V, E) that paper Alg. 1 starts from: nodes are its vertices, and an edge runs from the node
that made a value to each node that reads it. Tensors are referred to by position, so a graph does not need the model
any more, and can be replayed with other weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Ref:
    """A tensor in a node's inputs: the position of its value in `Graph.values`."""

    value: int


@dataclass
class Value:
    """One tensor of the forward pass.

    Attributes:
        shape: its shape.
        dtype: its element type.
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
        """Return the number of elements."""
        return int(torch.Size(self.shape).numel())

    @property
    def weight_like(self) -> bool:
        """Return whether it is a parameter, or made of parameters alone (a fake-quantized weight, say)."""
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
        body: the nodes that a merged branch was made of, in order.
    """

    op: str
    func: torch._ops.OpOverload | None
    inputs: dict[str, Any]
    outputs: tuple[int, ...]
    module: str
    body: tuple[Node, ...] = ()

    def refs(self) -> Iterator[int]:
        """Yield the values it reads, in the order of its arguments; one that is read twice comes twice."""
        # One level of nesting is enough: an `aten` schema has lists of tensors (`cat`), but no lists of lists.
        for argument in self.inputs.values():
            items = argument if isinstance(argument, list | tuple) else (argument,)
            for item in items:
                if isinstance(item, Ref):
                    yield item.value

    def refs_with_body(self) -> Iterator[int]:
        """Yield the values that it and the nodes of its body read, including those made within the body."""
        yield from self.refs()
        for inner in self.body:
            yield from inner.refs()

    @property
    def pointwise(self) -> bool:
        """Return whether torch itself declares the operator to be elementwise."""
        # From torch's own tags, so that activations added in later versions need no entry here.
        return self.func is not None and torch.Tag.pointwise in self.func.tags

    @property
    def random(self) -> bool:
        """Return whether it draws random numbers."""
        return self.func is not None and torch.Tag.nondeterministic_seeded in self.func.tags

    @property
    def writes(self) -> bool:
        """Return whether it changes one of its inputs in place."""
        return self.func is not None and self.func._schema.is_mutable

    def call(self, inputs: dict[str, Any]) -> Any:
        """Run the operator on `inputs`, which have the names of `self.inputs`; a merged branch has no operator."""
        assert self.func is not None
        # Stored by name, as rules read them; the operator takes some by position alone.
        schema = self.func._schema.arguments
        positional = [inputs[argument.name] for argument in schema if not argument.kwarg_only]
        keywords = {argument.name: inputs[argument.name] for argument in schema if argument.kwarg_only}
        return self.func(*positional, **keywords)


@dataclass
class Graph:
    """A forward pass: values, nodes in the order of execution, and the values that the model returns."""

    values: list[Value] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    outputs: tuple[int, ...] = ()

    def consumers(self) -> dict[int, list[int]]:
        """Return for every value the positions of the nodes that read it, ascending."""
        readers: dict[int, list[int]] = {}
        for position, node in enumerate(self.nodes):
            # A node that reads a value twice, such as x * x, is one reader.
            for value in dict.fromkeys(node.refs()):
                readers.setdefault(value, []).append(position)
        return readers

    def producers(self) -> dict[int, int]:
        """Return for every computed value the position of the node that made it, or that last wrote to it."""
        # Later nodes overwrite earlier ones, which is what an operator in place does to its value.
        return {value: position for position, node in enumerate(self.nodes) for value in node.outputs}


def map_nested(function: Callable[[Any], Any], argument: Any) -> Any:
    """Apply `function` to an operator's argument, or to each item when it is a list or tuple."""
    if isinstance(argument, list | tuple):
        # The type is kept, as some operators insist on a list.
        return type(argument)(function(item) for item in argument)
    return function(argument)
