"""Run a recorded graph again in double precision, whole or with atoms removed, asserting every shape on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from geta_hf.qadg.propagation.flow import Flow
from geta_hf.qadg.propagation.keep_masks import KeepMasks
from geta_hf.qadg.propagation.rules_compute import FAKE_QUANTIZERS, reduced
from geta_hf.qadg.propagation.rules_conv import batch_statistics
from geta_hf.qadg.propagation.rules_index import single_pick
from geta_hf.qadg.propagation.rules_shape import FACTORIES
from geta_hf.qadg.tracing.graph import Node, Ref, map_nested

Weights = Mapping[int, Callable[[], torch.Tensor]]
"""Makes a parameter or buffer when the replay comes to it; it is dropped after its last use."""


class ReplayError(RuntimeError):
    """An operator failed, or gave another shape than the ids say; the message names it and its module."""


class Replay:
    """One forward of the graph on sliced tensors, or on full ones of which the slices are zero.

    Args:
        flow: the propagated graph.
        removed: for every id, whether it is an atom that leaves; shape (ids,). None removes nothing.
        zeroed: keep every shape; means and norms run over what stays, with its count as their divisor.
    """

    def __init__(self, flow: Flow, removed: NDArray[np.bool_] | None = None, zeroed: bool = False) -> None:
        self.flow = flow
        self.zeroed = zeroed
        self._staying = KeepMasks(flow, removed)
        self._env: dict[int, torch.Tensor] = {}
        self._weights: Weights = {}
        self._read = {ref for node in flow.graph.nodes for ref in node.refs_with_body()}

    def run(self, weights: Weights) -> list[torch.Tensor]:
        """The model's outputs for the given parameters and buffers (already sliced), inputs and constants as recorded.

        Raises:
            ReplayError: the slices do not fit together.
        """
        graph = self.flow.graph
        last_use = {ref: position for position, node in enumerate(graph.nodes) for ref in node.refs_with_body()}
        self._env, self._weights = {}, weights
        with torch.no_grad():
            for position, node in enumerate(graph.nodes):
                self._step(node)
                for ref in [*node.refs_with_body(), *node.outputs]:
                    if last_use.get(ref, -1) <= position and ref not in graph.outputs:
                        self._env.pop(ref, None)
            return [self._tensor(value) for value in graph.outputs]

    def kept(self, value: int, dim: int) -> torch.Tensor | None:
        """The indices that a tensor still has along a dim; None when all of them."""
        return None if self.zeroed else self.staying(value, dim)

    def staying(self, value: int, dim: int) -> torch.Tensor | None:
        """The indices that do not leave along a dim; None when none does."""
        mask = self._staying.mask(value, dim)
        return None if mask is None else torch.from_numpy(np.flatnonzero(mask))

    def shape(self, value: int) -> tuple[int, ...]:
        """The shape that a value must have with the atoms removed."""
        sizes = []
        for dim, size in enumerate(self.flow.graph.values[value].shape):
            kept = self.kept(value, dim)
            sizes.append(size if kept is None else len(kept))
        return tuple(sizes)

    def sliced(self, value: int, tensor: torch.Tensor) -> torch.Tensor:
        """A full tensor without what leaves, always a copy."""
        tensor = double(tensor).clone()
        for dim in range(tensor.dim()):
            kept = self.kept(value, dim)
            if kept is not None:
                tensor = tensor.index_select(dim, kept)
        return tensor

    def _tensor(self, value: int) -> torch.Tensor:
        if value not in self._env and value in self._weights:
            self._env[value] = self._weights[value]()
            self._assert_shape(value, self._env[value], f"the slices of {self.flow.graph.values[value].names[0]}")
        if value not in self._env:
            data = self.flow.graph.values[value].data
            if data is None:
                raise ReplayError(f"value {value} of shape {self.flow.graph.values[value].shape} has no content")
            self._env[value] = self.sliced(value, data)
        return self._env[value]

    def _step(self, node: Node) -> None:
        where = f"{node.op} in {node.module or 'the model'}"
        try:
            if all(self._decided(value) for value in node.outputs):
                self._env.update({value: self._tensor(value) for value in node.outputs})
            elif node.body:
                for inner in node.body:
                    self._store(inner, self._call(inner))
            else:
                self._store(node, self._call(node))
        except (RuntimeError, IndexError) as error:
            raise error if isinstance(error, ReplayError) else ReplayError(f"{where}: {error}") from error
        for value in node.outputs:
            # Kernels differ in what they return besides, such as the saved mean of a batch norm.
            if value in self._read or value in self.flow.graph.outputs:
                self._assert_shape(value, self._env[value], where)

    def _store(self, node: Node, result: Any) -> None:
        results = result if isinstance(result, list | tuple) else (result,)
        tensors = [item for item in results if isinstance(item, torch.Tensor)]
        for value, tensor in zip(node.outputs, tensors, strict=True):
            self._env[value] = self._tensor(value) if self._decided(value) else double(tensor)

    def _decided(self, value: int) -> bool:
        """Whether a result is replayed as it was recorded, since other parameters would decide otherwise."""
        known = self.flow.graph.values[value]
        return known.role == "result" and known.data is not None

    def _call(self, node: Node) -> Any:
        inputs = {name: map_nested(self._resolve, argument) for name, argument in node.inputs.items()}
        rule = REPLAY_RULES.get(node.op)
        if rule is not None:
            return rule(self, node, inputs)
        if node.random:
            return self._noise(node, inputs)
        result = node.call(inputs)
        if node.op in FACTORIES or not any(True for _ in node.refs()):
            return self.sliced(node.outputs[0], result)
        return result

    def _noise(self, node: Node, inputs: dict[str, Any]) -> torch.Tensor:
        """The same noise in every replay, cut where the graph says so."""
        value = node.outputs[0]
        full = {name: torch.empty(self.flow.graph.values[value].shape) for name in inputs if name == "self"}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(value)
            return self.sliced(value, node.call(inputs | full))

    def _resolve(self, item: Any) -> Any:
        if isinstance(item, Ref):
            return self._tensor(item.value)
        if isinstance(item, torch.dtype):
            return torch.float64 if item.is_floating_point else torch.complex128 if item.is_complex else item
        return item

    def _assert_shape(self, value: int, tensor: torch.Tensor, what: str) -> None:
        if tuple(tensor.shape) != self.shape(value):
            raise ReplayError(f"{what}: shape {tuple(tensor.shape)}, where the groups say {self.shape(value)}")


def double(tensor: torch.Tensor) -> torch.Tensor:
    """In double precision when it is a floating-point or complex tensor at all."""
    if tensor.is_complex():
        return tensor.to(torch.complex128)
    return tensor.double() if tensor.is_floating_point() else tensor


def _view(replay: Replay, node: Node, inputs: dict[str, Any]) -> Any:
    return inputs["self"].reshape(replay.shape(node.outputs[0]))


def _expand(replay: Replay, node: Node, inputs: dict[str, Any]) -> Any:
    return inputs["self"].expand(replay.shape(node.outputs[0]))


def _slice(replay: Replay, node: Node, inputs: dict[str, Any]) -> Any:
    source, dim = node.inputs["self"].value, inputs["dim"]
    kept = replay.kept(source, dim)
    if kept is None:
        return node.call(inputs)
    size = replay.flow.graph.values[source].shape[dim]
    chosen = torch.arange(size)[slice(inputs["start"], inputs["end"], inputs["step"])]
    places = torch.nonzero(torch.isin(kept, chosen)).flatten()
    if len(places) and bool((places.diff() == 1).all()):
        return inputs["self"].narrow(dim, int(places[0]), len(places))
    return inputs["self"].index_select(dim, places)


def _select(replay: Replay, node: Node, inputs: dict[str, Any]) -> Any:
    source, dim, index = node.inputs["self"].value, inputs["dim"], inputs["index"]
    kept = replay.kept(source, dim)
    if kept is not None:
        index = int((kept < index % replay.flow.graph.values[source].shape[dim]).sum())
    return inputs["self"].select(dim, index)


def _split(replay: Replay, node: Node, inputs: dict[str, Any]) -> Any:
    dim = inputs["dim"]
    return torch.split(inputs["self"], [replay.shape(value)[dim] for value in node.outputs], dim)


def _index(replay: Replay, node: Node, inputs: dict[str, Any]) -> Any:
    """Places known beforehand are counted anew among what is left."""
    picked = single_pick(replay.flow, node)
    kept = None if picked is None else replay.kept(node.inputs["self"].value, picked[0])
    if picked is None or kept is None:
        return node.call(inputs)
    places = torch.from_numpy(picked[1])
    return inputs["self"].index_select(picked[0], torch.searchsorted(kept, places[torch.isin(places, kept)]))


def _complex(replay: Replay, node: Node, inputs: dict[str, Any]) -> Any:
    """Pairs have to lie side by side, which a cut tensor's rows need not keep."""
    return node.call(inputs | {"self": inputs["self"].contiguous()})


def _convolution(replay: Replay, node: Node, inputs: dict[str, Any]) -> Any:
    if inputs["groups"] > 1:
        transposed = inputs.get("transposed", False)
        wide = replay.shape(node.outputs[0])[1] if transposed else inputs["input"].shape[1]
        inputs = inputs | {"groups": wide // inputs["weight"].shape[1]}
    return node.call(inputs)


def _layer_norm(replay: Replay, node: Node, inputs: dict[str, Any]) -> Any:
    source = inputs["input"]
    over = range(source.dim() - len(inputs["normalized_shape"]), source.dim())
    staying = _staying(replay, node.inputs["input"].value, over)
    narrow = dict(inputs, input=_narrow(source, staying))
    for name in ("weight", "bias"):
        if inputs.get(name) is not None:
            narrow[name] = _narrow(inputs[name], {dim - over.start: kept for dim, kept in staying.items()})
    narrow["normalized_shape"] = list(narrow["input"].shape[over.start :])
    return _widen(node.call(narrow), source.shape, staying)


def _group_norm(replay: Replay, node: Node, inputs: dict[str, Any]) -> Any:
    """Zero groups stay as they are, since each is normalised for itself."""
    source, each = inputs["input"], inputs["C"] // inputs["group"]
    kept = replay.staying(node.inputs["input"].value, 1)
    if kept is None:
        return node.call(inputs)
    groups = len(torch.unique(kept // each))
    if replay.zeroed and len(kept) == groups * each:
        return node.call(inputs)
    staying = _staying(replay, node.inputs["input"].value, [1])
    narrow = dict(inputs, input=_narrow(source, staying).contiguous(), C=len(kept), group=groups)
    for name in ("weight", "bias"):
        if inputs[name] is not None:
            narrow[name] = _narrow(inputs[name], {0: staying[1]} if staying else {})
    return _widen(node.call(narrow), source.shape, staying)


def _batch_norm(replay: Replay, node: Node, inputs: dict[str, Any]) -> Any:
    """With statistics of the batch itself, all dims but the channels count."""
    source = inputs["input"]
    over = [dim for dim in range(source.dim()) if dim != 1] if batch_statistics(node) else []
    staying = _staying(replay, node.inputs["input"].value, over)
    narrow = inputs | {"input": _narrow(source, staying)}
    result = node.call(narrow)
    return _widen(result, source.shape, staying) if staying else result


def _weight_norm(replay: Replay, node: Node, inputs: dict[str, Any]) -> Any:
    """Zero slices of a weight stay zero, where the operator itself would divide zero by zero."""
    staying = _staying(replay, node.inputs["v"].value, [inputs["dim"]])
    narrow = inputs | {name: _narrow(inputs[name], staying) for name in ("v", "g")}
    weight, norm = node.call(narrow)
    return _widen(weight, inputs["v"].shape, staying), _widen(norm, inputs["g"].shape, staying)


def _fake_quantize(replay: Replay, node: Node, inputs: dict[str, Any]) -> Any:
    """Its kernel takes the scale in single precision alone."""
    scale = inputs["scale"]
    return node.call(inputs | {"scale": scale.float() if isinstance(scale, torch.Tensor) else scale})


def _mean(replay: Replay, node: Node, inputs: dict[str, Any]) -> Any:
    source = inputs["self"]
    over, _ = reduced(replay.flow, node)
    staying = _staying(replay, node.inputs["self"].value, over)
    return node.call(inputs | {"self": _narrow(source, staying)})


def _staying(replay: Replay, value: int, dims: Iterable[int]) -> dict[int, torch.Tensor]:
    """For a replay on zeroed tensors: what stays along the dims of which something leaves."""
    found = {dim: replay.staying(value, dim) for dim in dims} if replay.zeroed else {}
    return {dim: kept for dim, kept in found.items() if kept is not None}


def _narrow(tensor: torch.Tensor, staying: dict[int, torch.Tensor]) -> torch.Tensor:
    for dim, kept in staying.items():
        tensor = tensor.index_select(dim, kept)
    return tensor


def _widen(result: Any, shape: torch.Size, staying: dict[int, torch.Tensor]) -> Any:
    """The first result at its full shape again, with zeros where something leaves."""
    results = result if isinstance(result, tuple) else (result,)
    full = results[0]
    for dim, kept in staying.items():
        wide = full.new_zeros([*full.shape[:dim], shape[dim], *full.shape[dim + 1 :]])
        full = wide.index_copy(dim, kept, full)
    return (full, *results[1:]) if isinstance(result, tuple) else full


ReplayRule = Callable[[Replay, Node, dict[str, Any]], Any]

REPLAY_RULES: dict[str, ReplayRule] = {
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias"), _view),
    **dict.fromkeys(("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes"), _split),
    "expand": _expand,
    "slice": _slice,
    "select": _select,
    **dict.fromkeys(("index", "_unsafe_index"), _index),
    "view_as_complex": _complex,
    **dict.fromkeys(("convolution", "_convolution"), _convolution),
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm"), _layer_norm),
    "native_group_norm": _group_norm,
    **dict.fromkeys(FAKE_QUANTIZERS, _fake_quantize),
    "_weight_norm_interface": _weight_norm,
    **dict.fromkeys(("native_batch_norm", "_native_batch_norm_legit"), _batch_norm),
    **dict.fromkeys(("mean", "var", "std", "var_mean", "std_mean"), _mean),
}
"""Operators whose arguments hold sizes or positions, which change when slices leave, or that divide by a count."""
