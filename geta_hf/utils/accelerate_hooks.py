"""Keep accelerate's hooks intact where a module under them changes its class or its weight.

`device_map` and offloading wrap the forward of modules. geta_hf converts layers by switching their class, which such
a wrapper does not notice.
"""

from __future__ import annotations

from types import MethodType

from accelerate.hooks import AlignDevicesHook
from torch import Tensor, nn

from geta_hf.errors import GETAError


def rebind_forward(module: nn.Module) -> None:
    """Let accelerate's hook on a module, if there is one, call the forward of the module's present class.

    A hook stores the bound method that it found when it was added, and would go on to call the forward of the former
    class, without the quantizer. So this has to be called after every change of a class in place.

    Args:
        module: with a hook or without.
    """
    # Anything else was set by another wrapper, which has its own reasons.
    if isinstance(vars(module).get("_old_forward"), MethodType):
        vars(module)["_old_forward"] = MethodType(type(module).forward, module)


def offloaded(module: nn.Module) -> Tensor:
    """Return the weight of a module that accelerate's hook stores outside of it.

    Args:
        module: one whose weight is on meta.

    Raises:
        GETAError: the module has no such hook.
    """
    return _hook(module).weights_map["weight"]


def offload(module: nn.Module, weight: Tensor) -> None:
    """Let the hook of a module store another weight for it, in memory.

    Args:
        module: one whose weight is on meta.
        weight: the new weight, on CPU.

    Raises:
        GETAError: the module has no such hook.
    """
    _hook(module).weights_map = {"weight": weight}


def _hook(module: nn.Module) -> AlignDevicesHook:
    hook = vars(module).get("_hf_hook")
    if not isinstance(hook, AlignDevicesHook) or hook.weights_map is None:
        raise GETAError(f"{module} is offloaded in a way that geta_hf does not know; load the model without device_map")
    return hook
