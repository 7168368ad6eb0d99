"""Recognize tensors that torch computes anew from others: weight and spectral norm, masks, any parametrization."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

# The older functions work by a hook that computes the tensor before each forward.
_BY_HOOK: dict[type, tuple[str, str]] = {
    WeightNorm: ("weight_norm", "torch.nn.utils.remove_weight_norm({path}, {leaf!r})"),
    SpectralNorm: ("spectral_norm", "torch.nn.utils.remove_spectral_norm({path}, {leaf!r})"),
    BasePruningMethod: ("torch.nn.utils.prune", "torch.nn.utils.prune.remove({path}, {leaf!r})"),
}
_REMOVE = "torch.nn.utils.parametrize.remove_parametrizations({path}, {leaf!r})"


def removal_of(module: nn.Module, path: str, leaf: str = "weight") -> tuple[str, str] | None:
    """Return what computes a tensor of a module, and the call that makes a parameter of it; None where nothing does.

    Args:
        module: that has the tensor.
        path: of the module, as the call names it.
        leaf: name of the tensor.
    """
    path = f"model.get_submodule({path!r})"
    if parametrize.is_parametrized(module, leaf):
        steps = module.parametrizations[leaf]  # type: ignore[index]
        names = ", ".join(type(step).__name__ for step in steps)
        return names, _REMOVE.format(path=path, leaf=leaf)
    for hook in module._forward_pre_hooks.values():
        for kind, (name, call) in _BY_HOOK.items():
            own = getattr(hook, "_tensor_name", getattr(hook, "name", None))
            if isinstance(hook, kind) and own == leaf:
                return name, call.format(path=path, leaf=leaf)
    return None
