"""What accelerate puts around modules to place or offload them, where a module becomes another below it."""

from __future__ import annotations

from types import MethodType

from accelerate.hooks import AlignDevicesHook
from torch import Tensor, nn

from geta_hf.errors import GETAError


def rebind_forward(module: nn.Module) -> None:
    """Let accelerate's hook on a module, if there is one, call the forward of the class that the module has now.

    It holds on to the method that it found; to be called after every change of a class in place.
    """
    if isinstance(vars(module).get("_old_forward"), MethodType):
        vars(module)["_old_forward"] = MethodType(type(module).forward, module)


def offloaded(module: nn.Module) -> Tensor:
    """The weight of a module that accelerate's hook keeps elsewhere. Raises GETAError where no such hook is known."""
    return _hook(module).weights_map["weight"]


def offload(module: nn.Module, weight: Tensor) -> None:
    """Let the hook keep another weight for the module, in memory. Raises GETAError as `offloaded` does."""
    _hook(module).weights_map = {"weight": weight}


def _hook(module: nn.Module) -> AlignDevicesHook:
    hook = vars(module).get("_hf_hook")
    if not isinstance(hook, AlignDevicesHook) or hook.weights_map is None:
        raise GETAError(f"{module} is offloaded in a way that geta_hf does not know; load the model without device_map")
    return hook
