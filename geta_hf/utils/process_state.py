"""Let one thread at a time change what holds for the entire process: switches of torch, global hooks, random states.

Recording a forward pass turns fused kernels off, and torch has one switch for all threads. Two threads that each save
the switch, change it and restore it end with the changed value for good where they overlap. A lock rules that out for
everything that this package does. Other threads run on meanwhile, at most with slower kernels.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch

_LOCK = threading.RLock()


@contextmanager
def exclusive() -> Iterator[None]:
    """Keep all other threads out of such contexts; the same thread may enter several. Also a decorator of functions."""
    with _LOCK:
        yield


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Turn off what would run as one fused operator: the fast path of transformer layers, and oneDNN's kernels.

    Must be entered under `exclusive`.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    fused = torch.backends.mkldnn.set_flags(_fp32_precision=None)[0]
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        # Not to be reset in passing: the precision that the user chose for oneDNN.
        torch.backends.mkldnn.set_flags(_enabled=False, _fp32_precision=None)
        yield
    finally:
        torch.backends.mkldnn.set_flags(_enabled=fused, _fp32_precision=None)
        torch.backends.mha.set_fastpath_enabled(fast)


# Where torch keeps how precise fp32 products are: what holds for more before what it holds for.
_PRODUCTS = (
    ("generic", "all"),
    ("cuda", "all"),
    ("mkldnn", "all"),
    ("cuda", "matmul"),
    ("mkldnn", "matmul"),
    ("mkldnn", "conv"),
    ("mkldnn", "rnn"),
)
_SHORTCUTS = (
    "allow_fp16_accumulation",
    "allow_fp16_reduced_precision_reduction",
    "allow_bf16_reduced_precision_reduction",
)


@contextmanager
def full_precision() -> Iterator[None]:
    """Let products be as precise as their dtype: no TF32, no bf16 within fp32, no autocast, no sums in half precision.

    What is compared to a tolerance of its dtype has to be computed so. All settings come back afterwards as they were,
    whichever of torch's interfaces they were made by; of other processors than NVIDIA's, AMD's and CPUs nothing is set.
    """
    with ExitStack() as stack:
        stack.enter_context(exclusive())
        stack.enter_context(_exact_fp32_products())
        stack.enter_context(_exact_half_sums())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def _exact_fp32_products() -> Iterator[None]:
    get, put = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
    own: dict[tuple[str, str], str] = {}
    cudnn = torch.backends.cudnn.enabled
    try:
        for place in _PRODUCTS:
            # torch answers with what holds in the end. A place's own value shows once all that it inherits is gone.
            own[place] = get(*place)
            put(*place, "none")
        # The former interface keeps a second copy, and reading it raises where the two differ: now they can't.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some versions of torch call this interface deprecated
            former = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")
        # Of convolutions and recurrent layers cuDNN's own setting is left alone: its start value can't be set again.
        # Without cuDNN they are products, and none takes another algorithm because some channels are cut.
        torch.backends.cudnn.enabled = False
        try:
            for place in _PRODUCTS[3:]:
                put(*place, "ieee")
            yield
        finally:
            torch.set_float32_matmul_precision(former)
    finally:
        torch.backends.cudnn.enabled = cudnn
        for place, value in own.items():
            put(*place, value)


@contextmanager
def _exact_half_sums() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before = {name: getattr(matmul, name) for name in _SHORTCUTS}
    # These two hold a second value, for sums that are split.
    split = {name: getattr(matmul, f"{name}_split_k") for name in _SHORTCUTS[1:]}
    attention = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    try:
        for name in _SHORTCUTS:
            setattr(matmul, name, False)
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(False)
        yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(attention)
        for name, value in before.items():
            setattr(matmul, name, (value, split[name]) if name in split else value)


@contextmanager
def random_state_kept(devices: Iterable[torch.device] = (), seed: int | None = None) -> Iterator[None]:
    """Restore torch's generators of the CPU and of some devices afterwards; no other generator is touched.

    Not `torch.manual_seed`, which seeds those of every device, also of GPUs that are initialized later.

    Args:
        devices: any number of them, repeated or not. Default none, so that only the CPU's is.
        seed: for all of these generators within the context. Default None, which lets them go on.
    """
    generators = [torch.default_generator, *_generators(devices)]
    states = [generator.get_state() for generator in generators]
    try:
        if seed is not None:
            for generator in generators:
                generator.manual_seed(seed)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _generators(devices: Iterable[torch.device]) -> Iterator[torch.Generator]:
    for device in dict.fromkeys(devices):
        if device.type == "mps":
            yield torch.mps._get_default_mps_generator()
        of_type = getattr(getattr(torch, device.type, None), "default_generators", ())
        # Empty until the devices of a type are initialized, and then nothing can be drawn from them yet.
        if of_type:
            current = torch.get_device_module(device.type).current_device()
            yield of_type[current if device.index is None else device.index]
