"""Record one forward in which every size knows where it comes from: the integers of the modules, or other sizes.

Searching for the attribute with the right value would be ambiguous: 4 heads of 8 in a layer of 32 match several
integers of most modules. So integers are tagged instead. Each attribute of each module is replaced, while the forward
runs, by an int that carries its own name; shapes of recorded tensors are tagged too. Arithmetic keeps the history, and
a call such as `view(batch, n, d)` then says itself which attributes its sizes follow from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _get_current_dispatch_mode

from geta_hf.errors import GETAError
from geta_hf.qadg.propagation.element_ids import PINNED
from geta_hf.qadg.propagation.flow import Flow
from geta_hf.qadg.propagation.keep_masks import KeepMasks
from geta_hf.qadg.propagation.propagate import propagate
from geta_hf.qadg.tracing.graph import Graph, Ref
from geta_hf.qadg.tracing.merge import merge_branches
from geta_hf.qadg.tracing.record_forward import record_forward
from geta_hf.qadg.tracing.recorder import Recorder
from geta_hf.surgery.config_view import ConfigView, is_config
from geta_hf.surgery.symbolic_int import Attribute, Log, Size, TaggedInt, location
from geta_hf.utils.process_state import exclusive

UNKNOWN = Ref(-1)
"""Stands for a tensor that no recorded operator made."""

# `tensor.shape` arrives in a TorchFunctionMode as the getter of the attribute, whose name is `__get__` like that of
# every other attribute, so it is compared as an object.
_SHAPE = torch.Tensor.shape.__get__  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Call:
    """One call of a torch function, seen as the model's code made it: `args` with every recorded tensor as a `Ref`."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Ref, ...]
    module: str
    where: str


@dataclass
class SizeTrace:
    """A recorded forward.

    Attributes:
        graph: as it was recorded.
        flow: the propagated graph, its quantizer branches merged.
        calls: in the order of execution.
        log: comparisons and arithmetic uses of tagged integers.
        original: the value of every attribute that was read or may be set.
    """

    graph: Graph
    flow: Flow
    calls: list[Call] = field(default_factory=list)
    log: Log = field(default_factory=Log)
    original: dict[Attribute, int] = field(default_factory=dict)


class _SizeMode(TorchFunctionMode):
    """Tag the sizes that the model's code reads, and record the calls that it makes.

    It sees torch functions, above the operators that the recorder sees: `reshape` becomes a copy and a view below, and
    the tagged numbers of its arguments are plain there.
    """

    def __init__(self, names: frozenset[str], log: Log) -> None:
        super().__init__()
        self.names = names
        self.log = log
        self.calls: list[Call] = []
        self.recorder: Recorder | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        recorder = _get_current_dispatch_mode()
        # Without a recorder there is no graph whose values a tag could name.
        if not isinstance(recorder, Recorder):
            return result
        if recorder is not self.recorder:  # a capture that failed starts again
            self.recorder = recorder
            self.calls.clear()
            self.log.restart()
        name = getattr(func, "__name__", "")
        if func == _SHAPE or name == "size":
            return self._tagged(recorder, args, kwargs or {}, result)
        if name in self.names:
            self._record(recorder, name, args, kwargs or {}, result)
        return result

    def _tagged(self, recorder: Recorder, args: Any, kwargs: Any, result: Any) -> Any:
        value = _position(recorder, args[0])
        if value is None:
            return result
        if isinstance(result, torch.Size):
            return torch.Size(
                [TaggedInt(size, Size(value, dim), self.log, self.log.run) for dim, size in enumerate(result)]
            )
        # size(-1) and size(3) of a tensor with four dims are one number, so dims are counted from the front.
        dim = args[1] if len(args) > 1 else kwargs["dim"]
        return TaggedInt(result, Size(value, int(dim) % args[0].dim()), self.log, self.log.run)

    def _record(self, recorder: Recorder, name: str, args: Any, kwargs: Any, result: Any) -> None:
        def reference(item: Any) -> Any:
            if isinstance(item, Tensor):
                value = _position(recorder, item)
                return UNKNOWN if value is None else Ref(value)
            if isinstance(item, list):
                return [reference(inner) for inner in item]
            return tuple(reference(inner) for inner in item) if isinstance(item, tuple) else history(item)

        def history(item: Any) -> Any:
            """Return a number as it is, or as a plain one where its history is of another run."""
            if isinstance(item, slice):
                return slice(history(item.start), history(item.stop), history(item.step))
            plain = isinstance(item, TaggedInt) and isinstance(self.log.expression_of(item), int)
            return int(item) if plain else item

        outputs = tuple(map(reference, result if isinstance(result, list | tuple) else (result,)))
        # A result that the graph does not know has no size after the cut, so its call can demand nothing.
        if outputs and all(isinstance(output, Ref) and output != UNKNOWN for output in outputs):
            named = {key: reference(item) for key, item in kwargs.items()}
            self.calls.append(Call(name, reference(args), named, outputs, recorder.module[-1], location()))


def _position(recorder: Recorder, tensor: Tensor) -> int | None:
    """Return which recorded value a tensor is; None when it was reshaped in place since."""
    value = recorder.find(tensor)
    known = value is not None and recorder.graph.values[value].shape == tuple(tensor.shape)
    return value if known else None


def trace_sizes(model: nn.Module, batch: Mapping[str, Any], names: frozenset[str]) -> SizeTrace:
    """Record `model(**batch)`, with sizes traced back to the integers that modules hold.

    The model, its attributes included, is as before afterwards.

    Args:
        model: as `geta_hf.qadg.tracing.record_forward.record_forward` takes it.
        batch: the keyword arguments of its forward.
        names: of the torch functions whose calls are wanted.

    Raises:
        GETAError: the model cannot run the batch.
    """
    log, original = Log(), dict[Attribute, int]()
    mode = _SizeMode(names, log)
    with exclusive(), _tagged_attributes(model, log, original), mode:
        graph = record_forward(model, batch)
        log.close()
    # `calls` name values by their place, which merging does not change: only nodes are replaced.
    return SizeTrace(graph, propagate(merge_branches(graph)), mode.calls, log, original)


@contextmanager
def _tagged_attributes(model: nn.Module, log: Log, original: dict[Attribute, int]) -> Iterator[None]:
    """Replace every integer that a module outside torch.nn holds by a tagged one for a while.

    Those of torch.nn follow from their tensors. Configurations are seen through a view that tags what is read, since
    several modules may share one: whose reading it was must stay known.
    """
    before: list[tuple[nn.Module, str, Any]] = []
    for path, module in model.named_modules():
        tag = _tagger(path, log, original)
        for name, value in list(vars(module).items()):
            if name.startswith("_"):
                continue
            # Layers of torch.nn keep their plain integers, but `tag` notes the values of those too: convolutions and
            # group norms look up `groups` and `num_groups` there (`size_equations._own`).
            tagged = tag(name, value)
            if tagged is not value and not of_torch(module):
                before.append((module, name, value))
                # Past `__setattr__`, which a class may override to check or convert what is set.
                module.__dict__[name] = tagged
    try:
        yield
    finally:
        for module, name, value in before:
            module.__dict__[name] = value


def of_torch(module: nn.Module) -> bool:
    """Return whether a module is a layer of torch.nn itself."""
    return type(module).__module__.startswith("torch.nn.")


def _tagger(path: str, log: Log, original: dict[Attribute, int]) -> Callable[[str, Any], Any]:
    """Return a function that tags a value; it gives the value itself back when there is nothing to tag."""

    def integer(name: str, value: int) -> TaggedInt:
        attribute = Attribute(path, name)
        original[attribute] = int(value)
        return TaggedInt(value, attribute, log)

    def tag(name: str, value: Any) -> Any:
        if _is_integer(value):
            return integer(name, value)
        # The exact types: a named tuple, for one, is not built from a single sequence. Each entry of a patch size (16,
        # 16) is an attribute of its own, since a cut may change one of them alone.
        if type(value) in (list, tuple) and value and all(_is_integer(item) for item in value):
            return type(value)(integer(f"{name}[{place}]", item) for place, item in enumerate(value))
        return _TaggedConfig(value, name, tag) if is_config(value) else value

    return tag


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)  # True and False are ints of Python


class _TaggedConfig(ConfigView):
    """A configuration whose integers are tagged as they are read, those that a property computes too."""

    __slots__ = ("_name", "_tag")

    def __init__(self, base: Any, name: str, tag: Callable[[str, Any], Any]) -> None:
        super().__init__(base)
        object.__setattr__(self, "_name", name)
        object.__setattr__(self, "_tag", tag)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._base, name)
        if name.startswith("_"):
            return value
        # GPT-2's `num_attention_heads` is another name for `n_head`: as two attributes, only one of them would be
        # changed.
        name = self._base.attribute_map.get(name, name)
        return self._tag(f"{self._name}.{name}", value)


class InconsistentError(GETAError):
    """What is to be removed cannot be removed together, by the recorded forward."""


class SlicedTrace:
    """What remains of every tensor of a trace, given what remains of the parameters.

    Args:
        trace: a recorded forward.
        kept: tensor name -> dim -> int64 indices that remain, as `geta_hf.qadg.space.kept_indices` gives them.

    Raises:
        InconsistentError: other slices would have to be removed with them.
    """

    def __init__(self, trace: SizeTrace, kept: Mapping[str, Mapping[int, Tensor]]) -> None:
        self.trace = trace
        self.flow = trace.flow
        self._linked: NDArray[np.bool_] | None = None
        self.removed = _removed_atoms(self.flow, kept)
        self._masks = KeepMasks(self.flow, self.removed)
        self._check(kept)

    def _check(self, kept: Mapping[str, Mapping[int, Tensor]]) -> None:
        """Raise unless what the removed atoms take from the parameters is just what is to be removed."""
        for position, value in enumerate(self.flow.graph.values):
            if value.role != "parameter" or not self.flow.known(position):
                continue
            # A tied parameter has several names, and `kept` need not use the first.
            dims = next((kept[name] for name in value.names if name in kept), {})
            for dim, size in enumerate(value.shape):
                mask = self.mask(Ref(position), dim)
                remaining = np.arange(size) if mask is None else np.flatnonzero(mask)
                if not np.array_equal(remaining, dims[dim].numpy() if dim in dims else np.arange(size)):
                    raise InconsistentError(
                        f"dim {dim} of {value.names[0]} cannot be cut to the indices asked for: its slices are "
                        f"tied to others in the dependency graph; build the space for this very model"
                    )

    def mask(self, ref: Ref, dim: int) -> NDArray[np.bool_] | None:
        """Return which elements along a dim remain; None when all do."""
        return self._masks.mask(ref.value, dim)

    def free(self, ref: Ref, dim: int) -> bool:
        """Return whether no parameter has a part in a dim, so that its size may be any: nothing reads it here."""
        ids = self.flow.dims(ref)[dim] if self.flow.known(ref.value) else None
        if self._linked is None:
            self._linked = _parameter_atoms(self.flow)
        return ids is not None and not self._linked[self.flow.ids.atoms(ids)].any()

    def size(self, ref: Ref, dim: int) -> int:
        """Return the size of a dim after the cut."""
        mask = self.mask(ref, dim)
        return self.flow.shape(ref)[dim] if mask is None else int(mask.sum())

    def sizes(self, ref: Ref) -> list[int]:
        """Return the shape of a tensor after the cut."""
        return [self.size(ref, dim) for dim in range(len(self.flow.shape(ref)))]


def _parameter_atoms(flow: Flow) -> NDArray[np.bool_]:
    """Return for every id whether it is an atom that a parameter carries, or the pinned one."""
    found = np.zeros(flow.ids.count, np.bool_)
    found[PINNED] = True  # a pinned dim must keep its size, so it is never free
    for position, value in enumerate(flow.graph.values):
        if value.role == "parameter" and flow.known(position):
            for ids in flow.dims(position):
                if ids is not None:
                    found[flow.ids.atoms(ids)] = True
    return found


def _removed_atoms(flow: Flow, kept: Mapping[str, Mapping[int, Tensor]]) -> NDArray[np.bool_]:
    """Return the atoms that occur in what is removed, and nowhere in what remains of the tensors that are cut.

    An element of a merged dim carries several atoms (its head and its place in the head) and is removed when any of
    them is. The atom of the place occurs in the remaining heads too, which tells it from the atom of the head.
    """
    # Two heads of two: the elements carry {head 0, place 0}, {head 0, place 1}, {head 1, place 0}, {head 1, place 1}.
    # Without head 1 the atoms of the last two are in what is removed, but both places are in what remains as well.
    removed = np.zeros(flow.ids.count, np.bool_)
    remaining = np.zeros(flow.ids.count, np.bool_)
    for position, value in enumerate(flow.graph.values):
        dims = next((kept[name] for name in value.names if name in kept), None)
        if dims is None or value.role == "input" or not flow.known(position):
            continue
        for dim, ids in enumerate(flow.dims(position)):
            if dim in dims and ids is not None:
                table = flow.ids.atoms(ids)
                mask = np.zeros(len(ids), np.bool_)
                mask[dims[dim].numpy()] = True
                remaining[table[mask]] = True
                removed[table[~mask]] = True
    removed &= ~remaining
    removed[PINNED] = False  # it marks many dims that have nothing else in common
    return removed
