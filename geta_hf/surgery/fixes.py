"""Describe what surgery changed, as plain data that makes a freshly built model as small before its weights are loaded.

A fix list is JSON and names only what changed:

    {"version": 2,
     "shapes": {tensor: shape},
     "keep": {buffer that is not saved: {dim: indices that remain}},
     "attrs": {module path: {attribute: value}}}

An attribute may be dotted (`config.num_heads`: in this module's own view of the configuration) and indexed
(`split[1]`). A list may come from a stranger's folder, so it is checked before it is used, and applying it can only
shrink what the model's own constructor built.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any, TypedDict

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from geta_hf.errors import GETAError
from geta_hf.surgery.config_view import ConfigView, is_config, view_of

FIXES_VERSION = 2

_BATCH_NORM = (nn.modules.batchnorm._BatchNorm,)


class Fixes(TypedDict):
    """A fix list: see the module's description."""

    version: int
    shapes: dict[str, list[int]]
    keep: dict[str, dict[str, list[int]]]
    attrs: dict[str, dict[str, Any]]


def no_fixes() -> Fixes:
    """Return the fix list of a model from which nothing was cut."""
    return {"version": FIXES_VERSION, "shapes": {}, "keep": {}, "attrs": {}}


def read_fixes(fixes: Any, where: str) -> Fixes:
    """Check a fix list from a source that is not trusted, before any of it is used, and return it.

    Lists of version 1, which knew no `keep`, are read too.

    Args:
        fixes: parsed JSON.
        where: how to call it in errors.

    Raises:
        GETAError: naming the key and the value.
    """
    # Folders outlive releases: those of version 1 lack `keep`, and mean an empty one.
    if isinstance(fixes, dict) and set(fixes) == {"version", "shapes", "attrs"} and fixes["version"] == 1:
        fixes = {**fixes, "version": FIXES_VERSION, "keep": {}}
    if not isinstance(fixes, dict) or set(fixes) != set(no_fixes()):
        raise GETAError(f"{where} must hold exactly version, shapes, keep and attrs, not {_shorten(fixes)}")
    if fixes["version"] != FIXES_VERSION:
        raise GETAError(f"{where}.version is {_shorten(fixes['version'])}; this release reads up to {FIXES_VERSION}")
    for part in ("shapes", "keep", "attrs"):
        if not isinstance(fixes[part], dict):
            raise GETAError(f"{where}.{part} must be an object, not {_shorten(fixes[part])}")
    for name, shape in fixes["shapes"].items():
        if not _is_size_list(shape):
            raise GETAError(f"{where}.shapes[{name!r}] is {_shorten(shape)}, not a list of positive integers")
    for part, what in (("keep", "ascending indices of a dim"), ("attrs", "a positive integer")):
        for path, entries in fixes[part].items():
            if not isinstance(entries, dict):
                raise GETAError(f"{where}.{part}[{path!r}] must be an object, not {_shorten(entries)}")
            for key, value in entries.items():
                fits = _is_index_list(key, value) if part == "keep" else _is_size(value) or _is_size_list(value)
                if not fits:
                    raise GETAError(f"{where}.{part}[{path!r}][{key!r}] is {_shorten(value)}, not {what}")
    return {"version": FIXES_VERSION, "shapes": fixes["shapes"], "keep": fixes["keep"], "attrs": fixes["attrs"]}


def _is_index_list(dim: str, value: Any) -> bool:
    if not dim.isdecimal() or not isinstance(value, list) or not value:
        return False
    positions = all(isinstance(index, int) and not isinstance(index, bool) and index >= 0 for index in value)
    # Indices out of order would shuffle the buffer, and repeated ones would make it larger.
    return positions and all(low < high for low, high in pairwise(value))


def _is_size(value: Any) -> bool:
    # JSON's true is an int in Python, and would pass as a size of 1.
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_size_list(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(_is_size(size) for size in value)


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def shrink_tensor(model: nn.Module, name: str, shape: list[int]) -> None:
    """Give one tensor of a freshly built model, still without weights, a smaller shape.

    Raises:
        GETAError: no such tensor, other dims, or a size above the one the model was built with.
    """
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    store: dict[str, Any] = module._parameters if leaf in module._parameters else module._buffers
    tensor = store.get(leaf)
    if tensor is None:
        raise GETAError(f"the fix list cuts {name}, which {type(model).__name__} does not have")
    full = tuple(tensor.shape)
    if len(shape) != len(full) or any(new > old for new, old in zip(shape, full, strict=True)):
        raise GETAError(f"the fix list gives {name} the shape {shape}, which is no cut of {full}")
    # Never larger than what the constructor built: a stranger's list cannot make this allocate memory at will.
    empty = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
    is_parameter = isinstance(tensor, nn.Parameter)
    store[leaf] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty


def shrink_buffer(model: nn.Module, name: str, dims: dict[str, list[int]]) -> None:
    """Cut a buffer that folders do not hold, once the model has made its whole content.

    Raises:
        GETAError: no such buffer, one that is saved with the model, or indices that it does not have.
    """
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    buffer = module._buffers.get(leaf)
    if buffer is None or leaf not in module._non_persistent_buffers_set:
        raise GETAError(f"the fix list cuts {name}, which is no unsaved buffer of {type(model).__name__}")
    # JSON has strings as keys, so dims come as "0" and "1".
    for dim, indices in dims.items():
        if int(dim) >= buffer.dim() or indices[-1] >= buffer.shape[int(dim)]:
            raise GETAError(f"the fix list keeps indices of dim {dim} of {name} beyond its shape {tuple(buffer.shape)}")
        buffer = buffer.index_select(int(dim), torch.tensor(indices, device=buffer.device))
    module._buffers[leaf] = buffer


def shrink_attribute(path: str, module: nn.Module, attribute: str, value: int | list[int]) -> None:
    """Set one size attribute of a module to a smaller value of the same form.

    Raises:
        GETAError: the module has no such size of its own, or the value does not shrink it.
    """
    old = read_attribute(module, attribute)
    new = tuple(value) if isinstance(value, list) else (value,)
    # A bool or a string here would mean a list that was written for another class.
    sizes = old if isinstance(old, tuple) else (old,)
    if not all(_is_size(size) for size in sizes) or isinstance(old, tuple) != isinstance(value, list):
        raise GETAError(f"the fix list sets {path}.{attribute}, which is not such a size in this model")
    if len(new) != len(sizes) or any(n > o for n, o in zip(new, sizes, strict=True)):
        raise GETAError(f"the fix list sets {path}.{attribute} to {value}, which does not shrink {old}")
    write_attribute(module, attribute, tuple(value) if isinstance(value, list) else value)


def _parts(attribute: str) -> tuple[list[str], str, int | None]:
    """Split `config.text.split[1]` into the configurations on the way, the attribute and the place within it."""
    *configs, leaf = attribute.split(".")
    name, bracket, place = leaf.removesuffix("]").partition("[")
    return configs, name, int(place) if bracket and place.isdecimal() else None


def read_attribute(module: nn.Module, attribute: str) -> Any:
    """Return what a module holds under a dotted and indexed name; None for whatever is not plain data of its own."""
    configs, name, place = _parts(attribute)
    # Private names reach what Python and torch keep for themselves, such as `__class__` or `_modules`.
    if any(part.startswith("_") for part in (*configs, name)):
        return None
    holder: Any = module
    for part in configs:
        # By vars() and not getattr, so that no name from a list runs a property of the module.
        holder = vars(holder).get(part) if holder is module else getattr(holder, part, None)
        if not is_config(holder):
            return None
    value = getattr(holder, name, None) if configs else vars(module).get(name)
    if place is None:
        return value
    return value[place] if isinstance(value, list | tuple) and place < len(value) else None


def write_attribute(module: nn.Module, attribute: str, value: Any) -> None:
    """Set what `read_attribute` reads; a configuration is changed in the eyes of this module alone."""
    configs, name, place = _parts(attribute)
    if place is not None:
        # A tuple cannot be changed in place, and a list may be shared with other modules.
        sequence = read_attribute(module, attribute.removesuffix(f"[{place}]"))
        value = type(sequence)(value if position == place else item for position, item in enumerate(sequence))
    holder: Any = module
    for part in configs:
        # Layers share one configuration. With a view of its own this module reads its size, and the others theirs.
        view = view_of(getattr(holder, part))
        _put(holder, part, view)
        holder = view
    _put(holder, name, value)


def _put(holder: Any, name: str, value: Any) -> None:
    # setattr on a view writes to the configuration behind it, which all modules read.
    if type(holder) is ConfigView:
        holder.override(name, value)
    else:
        setattr(holder, name, value)


def set_expert_counts(model: PreTrainedModel, fixes: Fixes) -> None:
    """Choose a kernel for the experts of a mixture that runs on what remains of their weights.

    The grouped one wants rows of a multiple of 16 bytes, which cut weights may not have; any model has the eager one.
    """
    tensors = model.state_dict()
    # Experts of a mixture are stacked in one tensor of three dims, (experts, out, in) or (experts, in, out).
    stacked = [tensors[name] for name in fixes["shapes"] if name in tensors and tensors[name].dim() == 3]
    unaligned = any(size * tensor.element_size() % 16 for tensor in stacked for size in tensor.shape[1:])
    if unaligned and model._can_set_experts_implementation():
        model.set_experts_implementation("eager")


def check_attributes(model: nn.Module, tensors: Iterable[str]) -> None:
    """Refuse a list that cuts a tensor but does not change the attributes of its module.

    Args:
        model: after the list was applied, before any layer is packed.
        tensors: names of the tensors that were cut.
    """
    for path in dict.fromkeys(owner(name.rpartition(".")[0]) for name in tensors):
        module = model.get_submodule(path)
        for attribute, value in shape_attributes(path, module).items():
            found = getattr(module, attribute)
            if found != value:
                raise GETAError(f"the fix list leaves {path}.{attribute} at {found}, but the weight needs {value}")


def owner(path: str) -> str:
    """Return the module that a tensor's own module serves: a parametrization holds that of the layer around it."""
    return path.partition(".parametrizations.")[0]


def shape_attributes(path: str, module: nn.Module) -> dict[str, Any]:
    """Return the size attributes that a module of torch.nn, or Conv1D, must have given its tensors; of others none.

    Raises:
        GETAError: a module of torch.nn whose attributes do not follow from its weight alone.
    """
    weight: Any = getattr(module, "running_mean" if isinstance(module, _BATCH_NORM) else "weight", None)
    # A norm without weight or statistics has no tensor that a cut could have changed.
    if weight is None and isinstance(module, (*_BATCH_NORM, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)):
        return {}
    if isinstance(module, nn.Linear):
        return {"out_features": weight.shape[0], "in_features": weight.shape[1]}
    # GPT-2's layer has its weight the other way round, (in, out), and calls these sizes nx and nf.
    if isinstance(module, Conv1D):
        return {"nx": weight.shape[0], "nf": weight.shape[1]}
    # A convolution's weight is (out, in / groups, ...), that of a transposed one (in, out / groups, ...).
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return {"in_channels": weight.shape[0], "out_channels": weight.shape[1] * module.groups}
    if isinstance(module, nn.modules.conv._ConvNd):
        return {"out_channels": weight.shape[0], "in_channels": weight.shape[1] * module.groups}
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return {"normalized_shape": tuple(weight.shape)}
    if isinstance(module, nn.GroupNorm):
        return {"num_channels": weight.shape[0]}
    if isinstance(module, _BATCH_NORM):
        return {"num_features": weight.shape[0]}
    if isinstance(module, nn.Embedding):
        return {"num_embeddings": weight.shape[0], "embedding_dim": weight.shape[1]}
    if type(module).__module__.startswith("torch.nn."):
        raise GETAError(f"{path} is a {type(module).__name__}, whose attributes cannot follow a cut; freeze its family")
    return {}
