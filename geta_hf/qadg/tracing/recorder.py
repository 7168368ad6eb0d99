"""Write every operator call of a forward pass into a graph.

`Recorder` is a dispatch mode: it sits below autograd and decompositions, so it sees each call as an `aten` operator
with a schema, whatever Python code made it. Parameters are on meta and have shapes but no content. Operators that read
one run on meta too, so recording a model of billions of parameters takes little memory and time. All else (masks,
positions, indices) is computed for real, because its content decides what happens: where an index points, for example.

`KeptContent` is a function mode. It sits above and sees calls that are still Python, such as `x[[0, 2]]`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from geta_hf.qadg.tracing.graph import Graph, Node, Ref, Value, map_nested
from geta_hf.qadg.tracing.meta_results import run_on_meta

_CHOOSING = frozenset({"index", "index_put", "index_put_", "masked_scatter", "_unsafe_index"})
"""Operators whose effect on ids depends on the content of an input; it is kept where no parameter had a part in it."""

_RESTRIDES = frozenset({torch.ops.aten.as_strided.default, torch.ops.aten.as_strided_.default})

_CHOICES = frozenset({"index", "index_select", "_unsafe_index"})
"""Operators that choose among matrices, such as the weights of experts."""


class Recorder(TorchDispatchMode):
    """A mode that writes operator calls into a graph.

    Args:
        graph: to write to.
        real: whether to compute with the parameters, too; what they decide is then kept.

    Attributes:
        graph: what has been written.
        real: as given.
        module: paths of the modules that are running, the innermost last; whoever runs the model keeps it.
    """

    def __init__(self, graph: Graph, real: bool = False) -> None:
        super().__init__()
        self.graph = graph
        self.real = real
        self.module = [""]
        self._position: dict[int, int] = {}
        self._stand_in: dict[int, torch.Tensor] = {}
        # Tensors are known by id(), which Python gives to a new object once the old one is freed. So none may be.
        self._alive: list[torch.Tensor] = []

    def add(self, tensor: torch.Tensor, value: Value) -> int:
        """Make `tensor` known as a new value, and return the value's position."""
        self._position[id(tensor)] = len(self.graph.values)
        self._alive.append(tensor)
        self.graph.values.append(value)
        return len(self.graph.values) - 1

    def substitute(self, original: torch.Tensor, stand_in: torch.Tensor) -> None:
        """Let an operator that reads `original` see `stand_in`, which is already known.

        A model may hold on to a parameter elsewhere than in `_parameters`, in a list of its own for example.
        """
        self._position[id(original)] = self._position[id(stand_in)]
        self._stand_in[id(original)] = stand_in
        self._alive.append(original)

    def find(self, tensor: torch.Tensor) -> int | None:
        """Return the position of the value that `tensor` is; None for one never seen before."""
        return self._position.get(id(tensor))

    def value_of(self, tensor: torch.Tensor) -> int:
        """Return the position of the value that `tensor` is; one never seen before becomes a constant."""
        if id(tensor) in self._position:
            return self._position[id(tensor)]
        data = None if tensor.is_meta else tensor.detach().cpu().clone()
        return self.add(tensor, Value(tuple(tensor.shape), tensor.dtype, "constant", data=data))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _RESTRIDES and _same_layout(*args):
            # Some kernels do this to what they return. It has no rule, as other strides could mean anything.
            func = torch.ops.aten.alias.default
            args = args[:1]
        arguments = _bind(func, args, kwargs or {})
        inputs = {name: map_nested(self._to_ref, argument) for name, argument in arguments.items()}
        if func.overloadpacket.__name__ in _CHOOSING:
            self._keep_content(args)
        result = self._run(func, args, kwargs or {})
        results = result if isinstance(result, list | tuple) else (result,)
        tensors = [item for item in results if isinstance(item, torch.Tensor)]
        if tensors:
            self._record(func, inputs, tensors)
        return result

    def _to_ref(self, item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            return Ref(self.value_of(item))
        if isinstance(item, torch.device):
            return torch.device("cpu")
        return item

    def _keep_content(self, args: Any) -> None:
        """Keep what masks and indices hold, before an operator in place may change it."""
        for argument in args:
            items = argument if isinstance(argument, list) else [argument]
            for item in items:
                if isinstance(item, torch.Tensor) and not item.is_meta and not item.is_floating_point():
                    value = self.graph.values[self.value_of(item)]
                    value.content = None if value.from_parameter else item.detach().clone()

    def _record(self, func: Any, inputs: dict[str, Any], tensors: list[torch.Tensor]) -> None:
        """Append a node, and values for the tensors that it returned."""
        values = self.graph.values
        node = Node(func.overloadpacket.__name__, func, inputs, (), self.module[-1])
        sources = [values[position] for position in node.refs()]
        from_parameter = any(source.from_parameter for source in sources)
        from_input = any(source.from_input for source in sources)
        if node.op in _CHOICES and sources[0].weight_like and len(sources[0].shape) > 2:
            # A choice among matrices, the weights of experts, is still a weight, though an input chose it.
            from_input = False
        for tensor in tensors:
            # An operator in place returns the tensor that it was given: no new value. If it changes the shape, as
            # `unsqueeze_` does, the same tensor becomes another value, since a value has one shape.
            if id(tensor) not in self._position or torch.Tag.inplace_view in func.tags:
                self.add(tensor, Value(tuple(tensor.shape), tensor.dtype, "result"))
        for tensor in tensors:
            decided = self.real and from_parameter and not (tensor.is_floating_point() or tensor.is_complex())
            if (decided or node.random) and not tensor.is_meta:
                # Other parameters would decide otherwise, and chance too, so a replay uses what was recorded.
                values[self._position[id(tensor)]].data = tensor.detach().clone()
        outputs = tuple(self._position[id(tensor)] for tensor in tensors)
        touched = [values[position] for position in outputs]
        if node.writes:
            touched += sources[:1]
        for value in touched:
            value.from_parameter |= from_parameter
            value.from_input |= from_input
        self.graph.nodes.append(replace(node, outputs=outputs))

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run an operator on CPU, or on meta as soon as any of its tensors is there."""
        items: list[Any] = []

        def local(item: Any) -> Any:
            if not isinstance(item, torch.Tensor):
                return item
            item = self._stand_in.get(id(item), item)
            # A tensor that a module holds outside of its buffers is still on the device of the model.
            item = item if item.is_meta else item.cpu()
            items.append(item)
            return item

        args = [map_nested(local, argument) for argument in args]
        kwargs = {name: map_nested(local, argument) for name, argument in kwargs.items()}
        if any(item.is_meta for item in items):
            args = [map_nested(_to_meta, argument) for argument in args]
            kwargs = {name: map_nested(_to_meta, argument) for name, argument in kwargs.items()}
            return run_on_meta(func, args, kwargs)
        cpu = torch.device("cpu")
        kwargs = {name: cpu if isinstance(item, torch.device) else item for name, item in kwargs.items()}
        return func(*args, **kwargs)


_RECURRENT = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu"})


class KeptContent(TorchFunctionMode):
    """A mode that makes tensors of numbers and lists off meta, where their content would be lost.

    Args:
        recorder: the mode below it.
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            # torch turns a list of places into a tensor on the device of what is indexed, hence on meta.
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(place, list) for place in places):
                places = tuple(torch.tensor(place) if isinstance(place, list) else place for place in places)
                args = (args[0], places, *args[2:])
        if func in (torch.tensor, torch.as_tensor) and kwargs and kwargs.get("device") is not None:
            # `torch.tensor(numbers, device=x.device)`, with x on meta.
            kwargs = kwargs | {"device": "cpu"}
        if getattr(func, "__name__", "") in _RECURRENT and not self.recorder.real:
            args = [map_nested(self._on_meta, argument) for argument in args]
        return func(*args, **(kwargs or {}))

    def _on_meta(self, item: Any) -> Any:
        """Return a tensor on meta in place of a real one: recurrent layers compare devices before any operator runs."""
        if not isinstance(item, torch.Tensor) or item.is_meta:
            return item
        self.recorder.value_of(item)
        with _disable_current_modes():
            empty = torch.empty_like(item, device="meta")
        self.recorder.substitute(empty, item)
        return empty


def _same_layout(tensor: torch.Tensor, size: Any, stride: Any, offset: int | None = None) -> bool:
    """Return whether new strides change nothing but those of dims of one element, where they have no effect."""
    same = all(n == 1 or old == new for n, old, new in zip(size, tensor.stride(), stride, strict=False))
    return tuple(size) == tuple(tensor.shape) and same and offset in (None, tensor.storage_offset())


def _to_meta(item: Any) -> Any:
    if isinstance(item, torch.Tensor) and not item.is_meta:
        return torch.empty_like(item, device="meta")
    if isinstance(item, torch.device):
        return torch.device("meta")
    return item


def _bind(func: Any, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return every argument of a call by its schema name, defaults filled in."""
    bound = {}
    for position, argument in enumerate(func._schema.arguments):
        if position < len(args):
            bound[argument.name] = args[position]
        else:
            bound[argument.name] = kwargs.get(argument.name, argument.default_value)
    return bound
