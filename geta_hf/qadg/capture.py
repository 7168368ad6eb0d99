"""Record one forward pass: multi-element parameters on meta, what does not depend on them computed for real."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import PreTrainedModel

from geta_hf.errors import GETAError
from geta_hf.qadg.graph import Graph, Node, Ref, Value, map_nested

_SETTINGS = {"use_cache": False, "_experts_implementation_internal": "batched_mm"}
"""Of every config while recording: a cache is no output, and the experts' fused kernel has no meta version."""

_CHOOSING = frozenset({"index", "index_put", "index_put_", "masked_scatter", "_unsafe_index"})
"""Operators whose effect on ids depends on the content of an input; it is kept where no parameter had a part in it."""


_RESTRIDES = frozenset({torch.ops.aten.as_strided.default, torch.ops.aten.as_strided_.default})

_CHOICES = frozenset({"index", "index_select", "_unsafe_index"})


class _Recorder(TorchDispatchMode):
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


class _KeptContent(TorchFunctionMode):
    """Makes tensors of numbers and lists off meta, where their content would be lost, before operators see them."""

    def __init__(self, recorder: _Recorder) -> None:
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


def capture(model: nn.Module, batch: Mapping[str, Any], times: int = 1) -> Graph:
    """Record `model(**batch)` in evaluation mode, without gradients and without computing with the parameters.

    Where that fails and the parameters are real, they are computed with after all: in some mixtures of experts the
    control flow depends on them. The model is as before afterwards: parameters, buffers, tying, hooks, training flags.

    Args:
        model: any module that returns tensors, tuples, lists or mappings of them (a `ModelOutput` is one). Of a
            mapping, what a part of the model made on the way is no output: nested mappings and `encoder_*`.
        batch: the keyword arguments of its forward; tensors of any device.
        times: how often to record, to see that the operators are the same every time.

    Returns:
        The graph. Values come in the order: parameters (as `named_parameters()`), buffers, inputs, the rest.

    Raises:
        GETAError: the batch is not a mapping, the forward raises, its output holds no tensor, or the operators were
            not the same every time.
    """
    if not isinstance(batch, Mapping):
        raise GETAError(f"batch is a {type(batch).__name__}; pass a dict of the model's keyword arguments instead")
    try:
        graph, real = _record(model, batch, real=False), False
    except GETAError:
        if any(parameter.is_meta for parameter in model.parameters()):
            raise
        graph, real = _record(model, batch, real=True), True
    for _ in range(times - 1):
        _check_same_path(model, graph, _record(model, batch, real))
    return graph


def _check_same_path(model: nn.Module, first: Graph, second: Graph) -> None:
    for one, other in zip_longest(_steps(first), _steps(second)):
        if one != other:
            step = one or other
            assert step is not None
            raise GETAError(
                f"{type(model).__name__} took another path when it ran the same batch a second time, first at "
                f"{step[0]} in {step[1] or 'the model'}; its control flow depends on a state of its own or on "
                "chance. Make its forward take the same path every time"
            )


def _steps(graph: Graph) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """What is done with parameters; the rest, such as a table of positions, may come from a cache another time."""
    for node in graph.nodes:
        if node.outputs and graph.values[node.outputs[0]].from_parameter:
            yield node.op, node.module, graph.values[node.outputs[0]].shape


def _record(model: nn.Module, batch: Mapping[str, Any], real: bool) -> Graph:
    graph = Graph()
    recorder = _Recorder(graph, real)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(_unchanged(model))
        stack.enter_context(_recordable(model))
        model.train().eval()  # both, since what a model cached in evaluation mode is dropped in training mode alone
        _swap_in_stand_ins(model, recorder)
        stack.enter_context(_module_paths(model, recorder))
        inputs = {name: _input(name, item, recorder) for name, item in batch.items()}
        try:
            # The maths path is made of plain operators, which need no attention rule of their own.
            with sdpa_kernel(SDPBackend.MATH), recorder, _KeptContent(recorder):
                output = model(**inputs)
        except Exception as error:
            raise GETAError(_failed_forward(model, batch, error)) from error
        graph.outputs = tuple(dict.fromkeys(recorder.value_of(tensor) for tensor in _main_tensors(output)))
    if not graph.outputs:
        raise GETAError(
            f"{type(model).__name__} returned a {type(output).__name__} without a tensor; "
            "pass a batch for which its forward returns logits or hidden states"
        )
    return graph


def _failed_forward(model: nn.Module, batch: Mapping[str, Any], error: Exception) -> str:
    shapes = [f"{n} {tuple(x.shape)}" if isinstance(x, torch.Tensor) else f"{n}={x!r}" for n, x in batch.items()]
    return (
        f"{type(model).__name__} cannot run the batch with inputs {', '.join(shapes) or 'none'}: "
        f"{type(error).__name__}: {error}. Pass a batch that model(**batch) accepts, with control flow that "
        "does not depend on the content of the parameters"
    )


def _input(name: str, item: Any, recorder: _Recorder) -> Any:
    if not isinstance(item, torch.Tensor):
        return item
    tensor = item.detach().cpu().clone()
    value = Value(tuple(item.shape), item.dtype, "input", (name,), tensor.clone(), from_input=True)
    recorder.add(tensor, value)
    return tensor


def _main_tensors(output: Any) -> list[torch.Tensor]:
    """What the model is there for; all tensors when that leaves none."""
    if isinstance(output, Mapping):
        main = {name: item for name, item in output.items() if not name.startswith("encoder_")}
        own = {name: item for name, item in main.items() if not isinstance(item, Mapping)}
        for fields in (own, main):
            if found := list(_tensors(fields)):
                return found
    return list(_tensors(output))


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from _tensors(list(output.values()))
    elif isinstance(output, list | tuple):
        for item in output:
            yield from _tensors(item)


@contextmanager
def _recordable(model: nn.Module) -> Iterator[None]:
    """Change what can't be recorded, in configs and in torch, for a while."""
    configs = {id(m.config): vars(m.config) for m in model.modules() if isinstance(m, PreTrainedModel)}
    before = [(fields, {name: fields[name] for name in _SETTINGS if name in fields}) for fields in configs.values()]
    fast = torch.backends.mha.get_fastpath_enabled()
    fused = torch.backends.mkldnn.set_flags(_enabled=False)[0]
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for fields, old in before:
            fields.update({name: _SETTINGS[name] for name in old})
        yield
    finally:
        torch.backends.mkldnn.set_flags(_enabled=fused)
        torch.backends.mha.set_fastpath_enabled(fast)
        for fields, old in before:
            fields.update(old)


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Leave every module's attributes, parameters, buffers, hooks and training flag as they were."""
    before = [(module, dict(module.__dict__), _containers(module)) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes, containers in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for container, content in containers:
                container.clear()
                (container.extend if isinstance(container, list) else container.update)(content)


def _containers(module: nn.Module) -> list[tuple[Any, Any]]:
    """The dicts and lists among a module's attributes, each with a copy: parameters, buffers, hooks, own caches."""
    return [(item, item.copy()) for item in module.__dict__.values() if isinstance(item, dict | list)]


@contextmanager
def _module_paths(model: nn.Module, recorder: _Recorder) -> Iterator[None]:
    paths = {id(module): path for path, module in model.named_modules()}

    def enter(module: nn.Module, args: Any) -> None:
        recorder.module.append(paths.get(id(module), recorder.module[-1]))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        recorder.module.pop()

    handles = (register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _swap_in_stand_ins(model: nn.Module, recorder: _Recorder) -> None:
    """Swap parameters and buffers through an identity map, so that what is tied stays tied."""
    stand_ins: dict[int, torch.Tensor] = {}
    for kind, named in (("parameter", model.named_parameters), ("buffer", model.named_buffers)):
        names: dict[int, list[str]] = {}
        originals: dict[int, torch.Tensor] = {}
        for name, tensor in named(remove_duplicate=False):
            names.setdefault(id(tensor), []).append(name)
            originals[id(tensor)] = tensor
        for key, original in originals.items():
            stand_in = _parameter_stand_in(original, recorder.real) if kind == "parameter" else _copy(original)
            data = None if kind == "parameter" or original.is_meta else _copy(original)
            value = Value(tuple(original.shape), original.dtype, kind, tuple(names[key]), data)
            value.from_parameter = kind == "parameter"
            recorder.add(stand_in, value)
            recorder.substitute(original, stand_in)
            stand_ins[key] = stand_in
    for module in model.modules():
        for slot in (module._parameters, module._buffers):
            slot.update({n: stand_ins[id(t)] for n, t in slot.items() if t is not None})  # type: ignore[misc]


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone() if tensor.is_meta else tensor.detach().cpu().clone()


def _parameter_stand_in(parameter: torch.Tensor, real: bool) -> nn.Parameter:
    """On meta; only one of a single element (a quantizer's step size, say) has no dims to track and stays real."""
    if real or (parameter.numel() == 1 and not parameter.is_meta):
        return nn.Parameter(_copy(parameter), requires_grad=parameter.requires_grad)
    return nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
