"""Run a recorded graph again in double precision, in full or with atoms removed, asserting every shape on the way.

Replays are how gates 2 and 3 prove a pruning space (`verify.py`), without surgery on the model:

- *sliced*: parameters without the removed elements. Each operator has to accept them and to give the shape that the ids
  say (gate 2). A group that lacks a member fails here, as its tensors no longer fit.
- *zeroed*: parameters of full shape with zeros there. The outputs have to be the same as when sliced (gate 3).

Most operators run as they were recorded. `REPLAY_RULES` has those that do not, for one of three reasons: an argument is
a size (view, expand, split), an argument is a position (slice, select, index), or the operator divides by a count. The
last need a correction when zeroed: a layer norm over 4 remaining and 2 zero elements divides by 6, and has to divide
by 4 to be the same as the sliced one. So it runs over the remaining elements alone, and zeros are filled in afterwards.

Double precision separates what is wrong (differences near 1) from rounding (near 1e-16), with a tolerance of 1e-9.
"""

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
from geta_hf.utils.process_state import exclusive, random_state_kept

Weights = Mapping[int, Callable[[], torch.Tensor]]
"""Makes a parameter or buffer when the replay comes to it; it is dropped after its last use."""


class ReplayError(RuntimeError):
    """An operator failed, or gave another shape than the ids say; the message names it and its module."""


class Replay:
    """One forward of the graph on sliced tensors, or on full ones of which the slices are zero.

    Args:
        flow: the propagated graph.
        removed: for every id, whether it is an atom that is removed; bool, shape (ids,). None removes nothing.
        zeroed: keep every shape; means and norms run over what remains, with its count as their divisor.
    """

    def __init__(self, flow: Flow, removed: NDArray[np.bool_] | None = None, zeroed: bool = False) -> None:
        self.flow = flow
        self.zeroed = zeroed
        self._keep_masks = KeepMasks(flow, removed)
        self._env: dict[int, torch.Tensor] = {}
        self._weights: Weights = {}
        self._read = {ref for node in flow.graph.nodes for ref in node.refs_with_body()}

    def run(self, weights: Weights) -> list[torch.Tensor]:
        """Run the graph once; inputs and constants are as recorded.

        Args:
            weights: makes each parameter and buffer, by its position in `Graph.values`; sliced or zeroed already.

        Returns:
            The model's outputs, in double precision.

        Raises:
            ReplayError: the slices do not fit together.
        """
        graph = self.flow.graph
        # Later positions overwrite earlier ones, so this ends with the last.
        last_use = {ref: position for position, node in enumerate(graph.nodes) for ref in node.refs_with_body()}
        self._env = {}
        self._weights = weights
        with torch.no_grad():
            for position, node in enumerate(graph.nodes):
                self._step(node)
                # One layer's tensors at a time: a large model's would not fit into memory in double precision.
                for ref in [*node.refs_with_body(), *node.outputs]:
                    if last_use.get(ref, -1) <= position and ref not in graph.outputs:
                        self._env.pop(ref, None)
            return [self._tensor(value) for value in graph.outputs]

    def kept(self, value: int, dim: int) -> torch.Tensor | None:
        """Return the indices that a tensor of this replay has along a dim, int64, shape (kept,); None for all."""
        return None if self.zeroed else self.remaining(value, dim)

    def remaining(self, value: int, dim: int) -> torch.Tensor | None:
        """Return the indices that are not removed along a dim, int64, shape (remaining,); None when none is.

        Other than `kept`, it says so in a zeroed replay as well.
        """
        mask = self._keep_masks.mask(value, dim)
        return None if mask is None else torch.from_numpy(np.flatnonzero(mask))

    def shape(self, value: int) -> tuple[int, ...]:
        """Return the shape that a value must have in this replay."""
        sizes = []
        for dim, size in enumerate(self.flow.graph.values[value].shape):
            kept = self.kept(value, dim)
            sizes.append(size if kept is None else len(kept))
        return tuple(sizes)

    def sliced(self, value: int, tensor: torch.Tensor) -> torch.Tensor:
        """Return a full tensor without what is removed, always a copy."""
        tensor = double(tensor).clone()
        for dim in range(tensor.dim()):
            kept = self.kept(value, dim)
            if kept is not None:
                tensor = tensor.index_select(dim, kept)
        return tensor

    def _tensor(self, value: int) -> torch.Tensor:
        """Return a value's tensor: computed before, a weight made when it is first needed, or recorded content."""
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
                # A merged quantizer branch runs as the operators that it was made of.
                for inner in node.body:
                    self._store(inner, self._call(inner))
            else:
                self._store(node, self._call(node))
        except (RuntimeError, IndexError) as error:
            if isinstance(error, ReplayError):
                raise
            raise ReplayError(f"{where}: {error}") from error
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
        """Return whether a result is replayed as it was recorded, since other parameters would decide otherwise."""
        known = self.flow.graph.values[value]
        return known.role == "result" and known.data is not None

    def _call(self, node: Node) -> Any:
        inputs = {name: map_nested(self._resolve, argument) for name, argument in node.inputs.items()}
        rule = REPLAY_RULES.get(node.op)
        if rule is not None:
            return rule(self, node, inputs)
        # Dropout and the like: other noise in the two replays would look like a failure of gate 3.
        if node.random:
            return self._noise(node, inputs)
        result = node.call(inputs)
        if node.op in FACTORIES or not any(True for _ in node.refs()):
            # Made at the recorded size, as its arguments say.
            return self.sliced(node.outputs[0], result)
        return result

    def _noise(self, node: Node, inputs: dict[str, Any]) -> torch.Tensor:
        """Return the same noise in every replay, cut where the graph says so.

        It is drawn at full size with the value's position as its seed, so sliced and zeroed replays see the same.
        """
        value = node.outputs[0]
        full = {name: torch.empty(self.flow.graph.values[value].shape) for name in inputs if name == "self"}
        with exclusive(), random_state_kept(seed=value):
            return self.sliced(value, node.call(inputs | full))

    def _resolve(self, item: Any) -> Any:
        if isinstance(item, Ref):
            return self._tensor(item.value)
        if isinstance(item, torch.dtype):
            # A cast to a lower precision would hide differences, or make some.
            if item.is_floating_point:
                return torch.float64
            return torch.complex128 if item.is_complex else item
        return item

    def _assert_shape(self, value: int, tensor: torch.Tensor, what: str) -> None:
        # This assertion is gate 2.
        if tuple(tensor.shape) != self.shape(value):
            raise ReplayError(f"{what}: shape {tuple(tensor.shape)}, where the groups say {self.shape(value)}")


def double(tensor: torch.Tensor) -> torch.Tensor:
    """Convert a floating-point or complex tensor to double precision; return any other as it is."""
    if tensor.is_complex():
        return tensor.to(torch.complex128)
    return tensor.double() if tensor.is_floating_point() else tensor


def _view(replay: Replay, node: Node, inputs: dict[str, Any]) -> Any:
    return inputs["self"].reshape(replay.shape(node.outputs[0]))


def _expand(replay: Replay, node: Node, inputs: dict[str, Any]) -> Any:
    return inputs["self"].expand(replay.shape(node.outputs[0]))


def _slice(replay: Replay, node: Node, inputs: dict[str, Any]) -> Any:
    """Slice at the same elements as recorded, wherever these are after the removal."""
    source = node.inputs["self"].value
    dim = inputs["dim"]
    kept = replay.kept(source, dim)
    if kept is None:
        return node.call(inputs)
    size = replay.flow.graph.values[source].shape[dim]
    chosen = torch.arange(size)[slice(inputs["start"], inputs["end"], inputs["step"])]
    places = torch.nonzero(torch.isin(kept, chosen)).flatten()
    if len(places) and bool((places.diff() == 1).all()):
        # A view, like the slice that was recorded: an operator in place may write through it.
        return inputs["self"].narrow(dim, int(places[0]), len(places))
    return inputs["self"].index_select(dim, places)


def _select(replay: Replay, node: Node, inputs: dict[str, Any]) -> Any:
    source = node.inputs["self"].value
    dim = inputs["dim"]
    index = inputs["index"]
    kept = replay.kept(source, dim)
    if kept is not None:
        size = replay.flow.graph.values[source].shape[dim]
        # As many remain before it.
        index = int((kept < index % size).sum())
    return inputs["self"].select(dim, index)


def _split(replay: Replay, node: Node, inputs: dict[str, Any]) -> Any:
    dim = inputs["dim"]
    return torch.split(inputs["self"], [replay.shape(value)[dim] for value in node.outputs], dim)


def _index(replay: Replay, node: Node, inputs: dict[str, Any]) -> Any:
    """Count places that are known beforehand again among the remaining ones."""
    picked = single_pick(replay.flow, node)
    if picked is None:
        return node.call(inputs)
    # Known places [2, 0, 3] without element 1 are [1, 0, 2] among the remaining ones.
    dim = picked[0]
    places = torch.from_numpy(picked[1])
    kept = replay.kept(node.inputs["self"].value, dim)
    if kept is None:
        return node.call(inputs)
    remaining_places = places[torch.isin(places, kept)]
    return inputs["self"].index_select(dim, torch.searchsorted(kept, remaining_places))


def _complex(replay: Replay, node: Node, inputs: dict[str, Any]) -> Any:
    """Make pairs lie side by side in memory, which cutting need not preserve."""
    return node.call(inputs | {"self": inputs["self"].contiguous()})


def _convolution(replay: Replay, node: Node, inputs: dict[str, Any]) -> Any:
    """Derive the number of groups from the cut tensors, since entire groups may be removed."""
    if inputs["groups"] > 1:
        # The kernel's second dim holds the channels within a group: of the input, or transposed of the output.
        transposed = inputs.get("transposed", False)
        channels = replay.shape(node.outputs[0])[1] if transposed else inputs["input"].shape[1]
        inputs = inputs | {"groups": channels // inputs["weight"].shape[1]}
    return node.call(inputs)


def _layer_norm(replay: Replay, node: Node, inputs: dict[str, Any]) -> Any:
    source = inputs["input"]
    over = range(source.dim() - len(inputs["normalized_shape"]), source.dim())
    remaining = _remaining_if_zeroed(replay, node.inputs["input"].value, over)
    narrow = dict(inputs, input=_narrow(source, remaining))
    for name in ("weight", "bias"):
        if inputs.get(name) is not None:
            # These have the normalised dims alone, so they are counted from the first of those.
            narrow[name] = _narrow(inputs[name], {dim - over.start: kept for dim, kept in remaining.items()})
    narrow["normalized_shape"] = list(narrow["input"].shape[over.start :])
    return _widen(node.call(narrow), source.shape, remaining)


def _group_norm(replay: Replay, node: Node, inputs: dict[str, Any]) -> Any:
    """Normalise the remaining channels, in as many groups as still have any.

    When zeroed, entire groups that are zero need no correction, since each is normalised for itself; only channels
    within a group do.
    """
    source = inputs["input"]
    channels_per_group = inputs["C"] // inputs["group"]
    kept = replay.remaining(node.inputs["input"].value, 1)
    if kept is None:
        return node.call(inputs)
    groups = len(torch.unique(kept // channels_per_group))
    if replay.zeroed and len(kept) == groups * channels_per_group:
        return node.call(inputs)
    # Empty when sliced: the input is narrow already, and only the counts have to follow.
    remaining = _remaining_if_zeroed(replay, node.inputs["input"].value, [1])
    narrow = dict(inputs, input=_narrow(source, remaining).contiguous(), C=len(kept), group=groups)
    for name in ("weight", "bias"):
        if inputs[name] is not None:
            narrow[name] = _narrow(inputs[name], {0: remaining[1]} if remaining else {})
    return _widen(node.call(narrow), source.shape, remaining)


def _batch_norm(replay: Replay, node: Node, inputs: dict[str, Any]) -> Any:
    """Take statistics over the remaining elements; with those of buffers, nothing is divided by a count."""
    source = inputs["input"]
    over = [dim for dim in range(source.dim()) if dim != 1] if batch_statistics(node) else []
    remaining = _remaining_if_zeroed(replay, node.inputs["input"].value, over)
    narrow = inputs | {"input": _narrow(source, remaining)}
    result = node.call(narrow)
    return _widen(result, source.shape, remaining) if remaining else result


def _weight_norm(replay: Replay, node: Node, inputs: dict[str, Any]) -> Any:
    """Keep zero slices of a weight zero, where the operator itself would divide zero by zero."""
    remaining = _remaining_if_zeroed(replay, node.inputs["v"].value, [inputs["dim"]])
    narrow = inputs | {name: _narrow(inputs[name], remaining) for name in ("v", "g")}
    weight, norm = node.call(narrow)
    return _widen(weight, inputs["v"].shape, remaining), _widen(norm, inputs["g"].shape, remaining)


def _fake_quantize(replay: Replay, node: Node, inputs: dict[str, Any]) -> Any:
    """Pass the scale in single precision, as the kernel takes no other."""
    scale = inputs["scale"]
    return node.call(inputs | {"scale": scale.float() if isinstance(scale, torch.Tensor) else scale})


def _mean(replay: Replay, node: Node, inputs: dict[str, Any]) -> Any:
    source = inputs["self"]
    over, _ = reduced(replay.flow, node)
    remaining = _remaining_if_zeroed(replay, node.inputs["self"].value, over)
    return node.call(inputs | {"self": _narrow(source, remaining)})


def _remaining_if_zeroed(replay: Replay, value: int, dims: Iterable[int]) -> dict[int, torch.Tensor]:
    """Return the remaining indices along those of `dims` that lose some; empty when sliced, with nothing to correct."""
    # Sliced tensors have no zeros in them that could be counted.
    if not replay.zeroed:
        return {}
    found = {dim: replay.remaining(value, dim) for dim in dims}
    return {dim: kept for dim, kept in found.items() if kept is not None}


def _narrow(tensor: torch.Tensor, remaining: dict[int, torch.Tensor]) -> torch.Tensor:
    """Drop what is removed."""
    for dim, kept in remaining.items():
        tensor = tensor.index_select(dim, kept)
    return tensor


def _widen(result: Any, shape: torch.Size, remaining: dict[int, torch.Tensor]) -> Any:
    """Return the result, or the first of several, at its full shape, with zeros where something is removed."""
    several = isinstance(result, tuple)
    full = result[0] if several else result
    for dim, kept in remaining.items():
        wide = full.new_zeros([*full.shape[:dim], shape[dim], *full.shape[dim + 1 :]])
        full = wide.index_copy(dim, kept, full)
    return (full, *result[1:]) if several else full


ReplayRule = Callable[[Replay, Node, dict[str, Any]], Any]
"""Runs a node on inputs that are sliced or zeroed already, and returns what the operator returns."""

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
"""Operators with sizes or positions among their arguments, which change when slices are removed, or with a divisor."""
