"""Let one process do or decide something while the others wait for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from geta_hf.errors import GETAError

Result = TypeVar("Result")


def averages_gradients(wrapped: nn.Module) -> bool:
    """Return whether DDP averages a model's gradients over processes.

    It listens to each parameter's place in autograd, which torch makes anew, without telling DDP, as soon as the
    parameter's data is replaced by data on another device or of another dtype.

    Args:
        wrapped: what runs in training; torch.compile may wrap DDP.
    """
    return any(isinstance(module, DistributedDataParallel) for module in wrapped.modules())


def by_first_process(accelerator: Accelerator, work: Callable[[], Result]) -> Result | None:
    """Run `work` in the first process; return when it is done, its result there and None in the others.

    All processes have to call this. They wait for the first one as long as the launch allows (`ddp_timeout`).

    Raises:
        GETAError: in the other processes, where the first one failed. There the error is raised as it is.
    """
    return _shared(accelerator, work, lambda result: None)[0]


def decided_by_first_process(accelerator: Accelerator, decide: Callable[[], str]) -> str:
    """Return in all processes what the first one decides; all of them have to call this.

    Raises:
        GETAError: as `by_first_process`.
    """
    return str(_shared(accelerator, decide, lambda decision: decision)[1])


def _shared(
    accelerator: Accelerator, work: Callable[[], Result], share: Callable[[Result], object]
) -> tuple[Result | None, object]:
    """Return the result, in the first process alone, and what is shared of it, in all."""
    result: Result | None = None
    error: Exception | None = None
    message: list[object] = [None, None]  # what went wrong, and what is shared
    if accelerator.is_main_process:
        try:
            result = work()
            message[1] = share(result)
        except Exception as failure:
            error = failure
            message[0] = f"the first process failed ({type(failure).__name__}: {failure})"
    broadcast_object_list(message)  # does nothing where there is one process
    if error is not None:
        raise error
    if message[0] is not None:
        raise GETAError(str(message[0]))
    return result, message[1]
