"""Cut a model's tensors down to the groups that remain, and keep the modules around them consistent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from geta_hf.errors import GETAError
from geta_hf.surgery.fixes import Fixes, no_fixes, owner, set_expert_counts, shape_attributes, write_attribute
from geta_hf.surgery.symbolic_int import Attribute

Kept = Mapping[str, Mapping[int, Tensor]]


def slice_model(model: nn.Module, kept: Kept, values: Mapping[Attribute, int] | None = None) -> Fixes:
    """Cut parameters and buffers down to the kept indices, in place, with the modules' attributes in step.

    A tied tensor is cut once, stays tied, and is listed under each of its names. What a module outside torch.nn had
    derived from its tensors and cached is dropped.

    Args:
        model: a model with real tensors.
        kept: tensor name -> dim -> int64 indices that remain, in order.
        values: attributes of other modules to change, as `geta_hf.surgery.solve_attributes.solve` finds them.

    Returns:
        The fix list.

    Raises:
        GETAError: a name the model lacks, indices out of range or none at all, two names of one tied tensor that
            disagree, or a module whose attributes cannot follow its tensors.
    """
    fixes = no_fixes()
    names = _tensor_names(model)
    cut = _cut_tensors(model, names, kept)
    saved = model.state_dict(keep_vars=True)
    for name, tensor in names.items():
        if id(tensor) in cut:
            # A saved tensor is loaded with its content, so its shape is all that a new model needs. Another buffer is
            # made by the model's constructor, at full size: to cut that, the indices themselves are needed.
            if name in saved:
                fixes["shapes"][name] = list(cut[id(tensor)].shape)
            else:
                fixes["keep"][name] = {str(dim): index.tolist() for dim, index in kept[name].items()}
    for attribute, value in (values or {}).items():
        write_attribute(model.get_submodule(attribute.module), attribute.name, value)
        fixes["attrs"].setdefault(attribute.module, {})[attribute.name] = value
    replaced: list[str] = []
    for path, module in model.named_modules():
        if _replace(module, cut):
            replaced.append(owner(path))
    # After the attributes above: a convolution has weight.shape[1] * groups input channels, with its new `groups`.
    for path in dict.fromkeys(replaced):
        changed = _follow_shapes(path, model.get_submodule(path))
        if changed:
            fixes["attrs"].setdefault(path, {}).update(changed)
    _drop_derived(model)
    if isinstance(model, PreTrainedModel):
        set_expert_counts(model, fixes)
    return fixes


def reorder_model(model: nn.Module, order: Kept) -> None:
    """Give indices of parameters and buffers another order, in place; no size changes.

    Args:
        model: a model with real tensors.
        order: tensor name -> dim -> int64, all of its indices in their new order.

    Raises:
        GETAError: a name the model lacks, or two names of one tied tensor that disagree.
    """
    names = _tensor_names(model)
    new = _cut_tensors(model, names, order, reordered=True)
    for module in model.modules():
        _replace(module, new)
    _drop_derived(model)


def _tensor_names(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer by each of its names, tied ones included."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def _drop_derived(model: nn.Module) -> None:
    """Empty the caches of tensors that modules keep as plain dicts: they were computed from the tensors before."""
    for module in model.modules():
        for name, value in vars(module).items():
            # Names with an underscore include torch's own registries: emptying `_parameters` would take the weights.
            if not name.startswith("_") and type(value) is dict and any(isinstance(v, Tensor) for v in value.values()):
                value.clear()


def _cut_tensors(
    model: nn.Module, names: Mapping[str, Tensor], kept: Kept, reordered: bool = False
) -> dict[int, Tensor]:
    """Return the smaller tensor, or where `reordered` one of the same size, for the id of each one that changes.

    By id and not by name: a tied tensor is cut once, and its holders get the same new one, so that it stays tied.
    """
    cut: dict[int, Tensor] = {}
    for name, dims in kept.items():
        if name not in names:
            raise GETAError(f"the pruning space names {name}, which {type(model).__name__} does not have")
        tensor = names[name]
        smaller = _select(name, tensor, dims)
        if id(tensor) in cut and not torch.equal(cut[id(tensor)], smaller):
            raise GETAError(f"{name} is tied to a tensor that is cut at other indices")
        # With nothing removed, the tensor itself stays in place and takes no second copy's memory.
        if reordered or smaller.shape != tensor.shape:
            cut.setdefault(id(tensor), smaller)
    return cut


def _select(name: str, tensor: Tensor, dims: Mapping[int, Tensor]) -> Tensor:
    value = tensor.detach()
    for dim, index in dims.items():
        if not 0 <= dim < value.dim():
            raise GETAError(f"{name} has {value.dim()} dims, so dim {dim} cannot be cut")
        if not index.numel() or int(index.min()) < 0 or int(index.max()) >= value.shape[dim]:
            raise GETAError(f"the indices kept of dim {dim} of {name} are none, or not within {tuple(value.shape)}")
        value = value.index_select(dim, index.to(value.device))
    # index_select gives a plain tensor; a module takes that for a buffer, but not for a parameter.
    if not isinstance(tensor, nn.Parameter):
        return value
    return nn.Parameter(value, requires_grad=tensor.requires_grad)


def _replace(module: nn.Module, cut: Mapping[int, Tensor]) -> bool:
    """Replace the cut tensors of one module; return whether there was any."""
    found = False
    for store in (module._parameters, module._buffers):
        for leaf, tensor in store.items():
            if tensor is not None and id(tensor) in cut:
                store[leaf] = cut[id(tensor)]  # type: ignore[assignment]
                found = True
    return found


def _follow_shapes(path: str, module: nn.Module) -> dict[str, Any]:
    """Set the size attributes of a torch.nn module from its tensors; return those that changed, as JSON values."""
    changed = {}
    for attribute, value in shape_attributes(path, module).items():
        # Only differences are listed: an entry for every layer would make the list as long as the model.
        if getattr(module, attribute) != value:
            setattr(module, attribute, value)
            changed[attribute] = list(value) if isinstance(value, tuple) else value
    return changed
