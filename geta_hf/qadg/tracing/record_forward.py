"""Record one forward pass of a model: the trace graph that paper Alg. 1 starts from.

Parameters of several elements are swapped for stand-ins on meta, so that nothing is computed with them; what does not
depend on them is computed for real. The recorder (`recorder.py`) sees the calls. This module prepares the model for it,
and restores every attribute of every module afterwards, as it is the user's model and not a copy.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import zip_longest
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from transformers import PreTrainedModel

from geta_hf.errors import GETAError
from geta_hf.qadg.tracing.graph import Graph, Value
from geta_hf.qadg.tracing.recorder import KeptContent, Recorder
from geta_hf.utils.model_io import map_tensors
from geta_hf.utils.module_state import devices_of
from geta_hf.utils.process_state import exclusive, plain_kernels, random_state_kept

_SETTINGS = {"use_cache": False, "_experts_implementation_internal": "batched_mm"}
"""Fields of every config while recording: a cache is no output, and experts' fused kernel has no meta version."""


def record_forward(model: nn.Module, batch: Mapping[str, Any], times: int = 1) -> Graph:
    """Record `model(**batch)` in evaluation mode, without gradients and without computing with the parameters.

    Where that fails and the parameters are real, they are computed with after all: in some mixtures of experts the
    control flow depends on them. The model is as before afterwards: parameters, buffers, tying, hooks, training flags.

    Args:
        model: any module that returns tensors, tuples, lists or mappings of them (a `ModelOutput` is one). In a
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
    real = False
    try:
        graph = _record(model, batch, real)
    except GETAError:
        if any(parameter.is_meta for parameter in model.parameters()):
            raise
        # Some mixtures of experts count the tokens of each expert, which on meta has no answer.
        real = True
        graph = _record(model, batch, real)
    for _ in range(times - 1):
        _check_same_path(model, graph, _record(model, batch, real))
    return graph


def check_same_path(model: nn.Module, batch: Mapping[str, Any], graph: Graph) -> None:
    """Record the model on the batch again and compare with a graph that is at hand.

    Args:
        model: as in `record_forward`.
        batch: as in `record_forward`.
        graph: what `record_forward` gave for them, its branches not merged.

    Raises:
        GETAError: the operators are not the same.
    """
    _check_same_path(model, graph, record_forward(model, batch))


def _check_same_path(model: nn.Module, first: Graph, second: Graph) -> None:
    """Raise an error when two recordings differ: a graph of one path says nothing about the others."""
    for one, other in zip_longest(_steps(first), _steps(second)):
        if one != other:
            # Of two recordings of unequal length one ends first, and `zip_longest` gives None.
            step = one or other
            assert step is not None
            raise GETAError(
                f"{type(model).__name__} took another path when it ran the same batch a second time, first at "
                f"{step[0]} in {step[1] or 'the model'}; its control flow depends on a state of its own or on "
                "chance. Make its forward take the same path every time"
            )


def _steps(graph: Graph) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Yield what is done with parameters; the rest, such as a table of positions, may come from a cache next time."""
    for node in graph.nodes:
        if node.outputs and graph.values[node.outputs[0]].from_parameter:
            yield node.op, node.module, graph.values[node.outputs[0]].shape


def _record(model: nn.Module, batch: Mapping[str, Any], real: bool) -> Graph:
    graph = Graph()
    recorder = Recorder(graph, real)
    with ExitStack() as stack:
        stack.enter_context(exclusive())
        stack.enter_context(torch.no_grad())
        # A forward that draws random numbers must not change those that the user's training draws next.
        stack.enter_context(random_state_kept(devices_of(model)))
        stack.enter_context(unchanged(model))
        stack.enter_context(_recordable(model))
        stack.enter_context(plain_kernels())
        # Both, since what a model cached in evaluation mode is only dropped in training mode.
        model.train().eval()
        _swap_in_stand_ins(model, recorder)
        stack.enter_context(_module_paths(model, recorder))
        inputs = {name: _input(name, item, recorder) for name, item in batch.items()}
        try:
            # The maths path is made of plain operators, which need no attention rule of their own.
            with sdpa_kernel(SDPBackend.MATH), recorder, KeptContent(recorder):
                output = model(**inputs)
        except Exception as error:
            raise GETAError(_failed_forward(model, batch, error)) from error
        graph.outputs = tuple(dict.fromkeys(recorder.value_of(tensor) for tensor in main_tensors(output)))
    if not graph.outputs:
        raise GETAError(
            f"{type(model).__name__} returned a {type(output).__name__} without a tensor; "
            "pass a batch for which its forward returns logits or hidden states"
        )
    return graph


def _failed_forward(model: nn.Module, batch: Mapping[str, Any], error: Exception) -> str:
    shapes = []
    for name, item in batch.items():
        # Shapes rather than contents, which is what a reader of the error can compare.
        shapes.append(f"{name} {tuple(item.shape)}" if isinstance(item, torch.Tensor) else f"{name}={item!r}")
    return (
        f"{type(model).__name__} cannot run the batch with inputs {', '.join(shapes) or 'none'}: "
        f"{type(error).__name__}: {error}. Pass a batch that model(**batch) accepts, with control flow that "
        "does not depend on the content of the parameters"
    )


def _input(name: str, item: Any, recorder: Recorder) -> Any:
    """Return a copy of an input, its tensors registered with the recorder; those in lists and dicts included."""

    def copied(given: torch.Tensor) -> torch.Tensor:
        # Two copies: the forward may write to the one that it gets.
        tensor = given.detach().cpu().clone()
        value = Value(tuple(given.shape), given.dtype, "input", (name,), tensor.clone(), from_input=True)
        recorder.add(tensor, value)
        return tensor

    return map_tensors(copied, item)


def main_tensors(output: Any) -> list[torch.Tensor]:
    """Return the tensors that the model is there for; all tensors if there are none.

    These are pinned later. If the hidden states of an encoder counted as outputs, they could not be pruned, for no
    other reason than that a sequence-to-sequence model returns them along the way.
    """
    if isinstance(output, Mapping):
        main = {name: item for name, item in output.items() if not name.startswith("encoder_")}
        # In CLIP's output, for example, the outputs of its two towers are nested mappings.
        own = {name: item for name, item in main.items() if not isinstance(item, Mapping)}
        for fields in (own, main):
            found = list(_tensors(fields))
            if found:
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
    """Turn off in the configs what can't be recorded, while the context lasts."""
    # By identity, as the modules of a model share their config, which is to be restored once.
    configs = {id(m.config): vars(m.config) for m in model.modules() if isinstance(m, PreTrainedModel)}
    before = [(fields, {name: fields[name] for name in _SETTINGS if name in fields}) for fields in configs.values()]
    try:
        for fields, old in before:
            fields.update({name: _SETTINGS[name] for name in old})
        yield
    finally:
        for fields, old in before:
            fields.update(old)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Restore every module's attributes, parameters, buffers, hooks and training flag at the end."""
    before = [(module, dict(module.__dict__), _containers(module)) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes, containers in before:
            # In place, as others hold the same dicts: the handle of a hook refers to the dict that the hook is in.
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for container, content in containers:
                container.clear()
                if isinstance(container, list):
                    container.extend(content)
                else:
                    container.update(content)


def _containers(module: nn.Module) -> list[tuple[Any, Any]]:
    """Return the dicts and lists among a module's attributes, each with a copy: parameters, buffers, hooks, caches."""
    return [(item, item.copy()) for item in module.__dict__.values() if isinstance(item, dict | list)]


@contextmanager
def _module_paths(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Tell the recorder which module is running; one that is not the model's own counts as part of its caller."""
    paths = {id(module): path for path, module in model.named_modules()}
    thread = threading.get_ident()

    def enter(module: nn.Module, args: Any) -> None:
        # Global hooks see the models of all threads, such as one that is being trained.
        if threading.get_ident() == thread:
            recorder.module.append(paths.get(id(module), recorder.module[-1]))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() == thread:
            recorder.module.pop()

    # Global hooks: the hooks of the modules themselves belong to the user and are not touched.
    handles = (register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _swap_in_stand_ins(model: nn.Module, recorder: Recorder) -> None:
    """Swap parameters and buffers for stand-ins, through an identity map, so that tied ones remain tied.

    A stand-in for each *name* would make two values out of a tied weight, of which one could be pruned alone.
    """
    stand_ins: dict[int, torch.Tensor] = {}
    for role, named in (("parameter", model.named_parameters), ("buffer", model.named_buffers)):
        names: dict[int, list[str]] = {}
        originals: dict[int, torch.Tensor] = {}
        # With duplicates, or a tied weight would have the first of its names only.
        for name, tensor in named(remove_duplicate=False):
            names.setdefault(id(tensor), []).append(name)
            originals[id(tensor)] = tensor
        for key, original in originals.items():
            data = None
            if role == "parameter":
                stand_in: torch.Tensor = _parameter_stand_in(original, recorder.real)
            else:
                stand_in = _copy(original)
                data = None if original.is_meta else _copy(original)
            value = Value(tuple(original.shape), original.dtype, role, tuple(names[key]), data)
            # Buffers are no parameters: a table of positions can be computed for real, and its content decides about
            # indices.
            value.from_parameter = role == "parameter"
            recorder.add(stand_in, value)
            recorder.substitute(original, stand_in)
            stand_ins[key] = stand_in
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            swapped = {name: stand_ins[id(tensor)] for name, tensor in tensors.items() if tensor is not None}
            tensors.update(swapped)  # type: ignore[arg-type]


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone() if tensor.is_meta else tensor.detach().cpu().clone()


def _parameter_stand_in(parameter: torch.Tensor, real: bool) -> nn.Parameter:
    """Return a stand-in on meta, or a real one for a parameter of a single element, such as a quantizer's step size.

    That has no dims to track, and code often reads it as a number, which meta cannot give.
    """
    if real or (parameter.numel() == 1 and not parameter.is_meta):
        return nn.Parameter(_copy(parameter), requires_grad=parameter.requires_grad)
    return nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
