"""What an operator call leaves in a graph: a mode that sees every operator, and one that sees calls before that."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from geta_hf.qadg.tracing.graph import Graph, Node, Ref, Value, map_nested

_CHOOSING = frozenset({"index", "index_put", "index_put_", "masked_scatter", "_unsafe_index"})
"""Operators whose effect on ids depends on the content of an input; it is kept where no parameter had a part in it."""


_RESTRIDES = frozenset({torch.ops.aten.as_strided.default, torch.ops.aten.as_strided_.default})

_CHOICES = frozenset({"index", "index_select", "_unsafe_index"})


class Recorder(TorchDispatchMode):
    """Writes every operator call into a graph; tensors are known by identity, so all of them are kept alive.

    Args:
        graph: to write to.
        real: whether to compute with the parameters, too; what they decide is then kept.
    """

    def __init__(self, graph: Graph, real: bool = False) -> None:
        super().__init__()
        self.graph = graph
        self.real = real
        self.module = [""]
        self._position: dict[int, int] = {}
        self._stand_in: dict[int, torch.Tensor] = {}
        self._alive: list[torch.Tensor] = []

    def add(self, tensor: torch.Tensor, value: Value) -> int:
        """Make `tensor` known as a new value."""
        self._position[id(tensor)] = len(self.graph.values)
        self._alive.append(tensor)
        self.graph.values.append(value)
        return len(self.graph.values) - 1

    def substitute(self, original: torch.Tensor, stand_in: torch.Tensor) -> None:
        """Let an operator that gets hold of `original` see `stand_in`, which is already known."""
        self._position[id(original)] = self._position[id(stand_in)]
        self._stand_in[id(original)] = stand_in
        self._alive.append(original)

    def find(self, tensor: torch.Tensor) -> int | None:
        """The value that `tensor` is; None for one never seen before."""
        return self._position.get(id(tensor))

    def value_of(self, tensor: torch.Tensor) -> int:
        """The value that `tensor` is; one never seen before is a constant."""
        if id(tensor) in self._position:
            return self._position[id(tensor)]
        data = None if tensor.is_meta else tensor.detach().cpu().clone()
        return self.add(tensor, Value(tuple(tensor.shape), tensor.dtype, "constant", data=data))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _RESTRIDES and _same_layout(*args):
            func, args = torch.ops.aten.alias.default, args[:1]
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
        return torch.device("cpu") if isinstance(item, torch.device) else item

    def _keep_content(self, args: Any) -> None:
        for item in (inner for argument in args for inner in (argument if isinstance(argument, list) else [argument])):
            if isinstance(item, torch.Tensor) and not item.is_meta and not item.is_floating_point():
                value = self.graph.values[self.value_of(item)]
                value.content = None if value.from_parameter else item.detach().clone()

    def _record(self, func: Any, inputs: dict[str, Any], tensors: list[torch.Tensor]) -> None:
        values = self.graph.values
        node = Node(func.overloadpacket.__name__, func, inputs, (), self.module[-1])
        sources = [values[position] for position in node.refs()]
        from_parameter = any(source.from_parameter for source in sources)
        from_input = any(source.from_input for source in sources)
        if node.op in _CHOICES and sources[0].weight_like and len(sources[0].shape) > 2:
            from_input = False  # a choice among matrices, the weights of experts, is still a weight
        for tensor in tensors:
            if id(tensor) not in self._position or torch.Tag.inplace_view in func.tags:
                self.add(tensor, Value(tuple(tensor.shape), tensor.dtype, "result"))
        for tensor in tensors:
            decided = self.real and from_parameter and not (tensor.is_floating_point() or tensor.is_complex())
            if (decided or node.random) and not tensor.is_meta:
                values[self._position[id(tensor)]].data = tensor.detach().clone()
        outputs = tuple(self._position[id(tensor)] for tensor in tensors)
        touched = [values[position] for position in outputs] + (sources[:1] if node.writes else [])
        for value in touched:
            value.from_parameter |= from_parameter
            value.from_input |= from_input
        self.graph.nodes.append(replace(node, outputs=outputs))

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        items: list[Any] = []

        def local(item: Any) -> Any:
            if isinstance(item, torch.Tensor):
                item = self._stand_in.get(id(item), item)
                item = item if item.is_meta else item.cpu()
                items.append(item)
            return item

        args = [map_nested(local, argument) for argument in args]
        kwargs = {name: map_nested(local, argument) for name, argument in kwargs.items()}
        if not any(item.is_meta for item in items):
            kwargs = {n: torch.device("cpu") if isinstance(a, torch.device) else a for n, a in kwargs.items()}
            return func(*args, **kwargs)
        args = [map_nested(_to_meta, argument) for argument in args]
        return func(*args, **{name: map_nested(_to_meta, argument) for name, argument in kwargs.items()})


_RECURRENT = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu"})


class KeptContent(TorchFunctionMode):
    """Makes tensors of numbers and lists off meta, where their content would be lost, before operators see them."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(place, list) for place in places):
                places = tuple(torch.tensor(place) if isinstance(place, list) else place for place in places)
                args = (args[0], places, *args[2:])
        if func in (torch.tensor, torch.as_tensor) and kwargs and kwargs.get("device") is not None:
            kwargs = kwargs | {"device": "cpu"}
        if getattr(func, "__name__", "") in _RECURRENT and not self.recorder.real:
            args = [map_nested(self._on_meta, argument) for argument in args]
        return func(*args, **(kwargs or {}))

    def _on_meta(self, item: Any) -> Any:
        """Recurrent layers compare devices before any operator runs."""
        if not isinstance(item, torch.Tensor) or item.is_meta:
            return item
        self.recorder.value_of(item)
        with _disable_current_modes():
            outline = torch.empty_like(item, device="meta")
        self.recorder.substitute(outline, item)
        return outline


def _same_layout(tensor: torch.Tensor, size: Any, stride: Any, offset: int | None = None) -> bool:
    """Whether striding a tensor anew changes nothing but the strides of dims of one element."""
    same = all(n == 1 or old == new for n, old, new in zip(size, tensor.stride(), stride, strict=False))
    return tuple(size) == tuple(tensor.shape) and same and offset in (None, tensor.storage_offset())


def _to_meta(item: Any) -> Any:
    if isinstance(item, torch.Tensor) and not item.is_meta:
        return torch.empty_like(item, device="meta")
    return torch.device("meta") if isinstance(item, torch.device) else item


def _bind(func: Any, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Every argument of a call by its schema name, defaults filled in."""
    bound = {}
    for position, argument in enumerate(func._schema.arguments):
        if position < len(args):
            bound[argument.name] = args[position]
        else:
            bound[argument.name] = kwargs.get(argument.name, argument.default_value)
    return bound
