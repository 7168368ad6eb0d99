"""Pretend that the machine has one CUDA device, so that a machine without a GPU can guard the code for one.

Tensors are ordinary CPU tensors with real values. Which of them "lie on the card" is a mark on their storage, so that
views, parameters, autograd and copies work as they always do. Inside `pretend_cuda()`

- `tensor.device`, `.is_cuda` and `torch.cuda.*` answer as on a machine with one CUDA device;
- an operator that mixes devices raises what CUDA raises. As there, CPU tensors without dimensions may enter pointwise
  operators, CPU indices may enter indexing, and copies cross;
- whatever makes the host wait for the card is logged with the line that asked for it (`Card.reads`);
- the bytes that are alive on the card are counted (`Card.live`, `Card.peak`);
- the card has a random number generator of its own;
- Triton counts as not installed.

    with pretend_cuda() as card:
        model.to("cuda")
        train(model)
    assert not card.reads_in("geta_hf")

Not imitated: kernels (Triton, cuDNN, TF32), temporaries inside one operator, streams, several devices, torch.compile,
and threads, whose operators are neither checked nor counted.
"""

from __future__ import annotations

import functools
import gc
import importlib
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._C import TensorBase
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from geta_hf.inference import layers
from geta_hf.utils import gpu

CARD = torch.device("cuda", 0)
CPU = torch.device("cpu")

aten = torch.ops.aten
_CROSSING = {"copy_", "_foreach_copy_", "lift_fresh", "lift_fresh_copy", "set_", "_local_scalar_dense", "fill_"}
_INDEXING = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"}
# Operators that take a CPU tensor without dimensions although they are not tagged as pointwise.
_SCALARS = {"masked_fill", "masked_fill_", "lerp", "lerp_", "addcmul", "addcdiv", "where", "clamp", "fill"}
# The host waits for what these return: a Python number, or a shape that depends on values.
_READING = {
    "_local_scalar_dense", "is_nonzero", "equal", "allclose", "nonzero", "argwhere", "masked_select", "bincount",
    "_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive", "histogram",
    "linalg_cholesky_ex", "linalg_inv_ex", "linalg_solve_ex", "_linalg_svd", "_linalg_eigh", "linalg_lu_factor_ex",
}  # fmt: skip


@dataclass(frozen=True)
class Read:
    """One moment at which the host waits for the card."""

    what: str
    """The operator, or "upload" for a copy to the card that is not asynchronous."""
    where: str
    """The innermost line outside torch and the standard library, as "folder/file.py:12 function"."""
    stack: tuple[str, ...] = field(repr=False)

    def __str__(self) -> str:
        return f"{self.what} at {self.where}"


class Card:
    """The pretended device: what is alive on it, and when the host waited for it.

    Args:
        capacity: bytes on the card; more of them alive raise `torch.OutOfMemoryError`.
        name, capability: what `torch.cuda` says about the device.
    """

    def __init__(self, capacity: int, name: str, capability: tuple[int, int]) -> None:
        self.capacity = capacity
        self.name = name
        self.capability = capability
        self.live = self.peak = 0
        self.reads: list[Read] = []
        self.generator = torch.Generator().manual_seed(0)

    def reads_in(self, package: str, since: int = 0) -> list[Read]:
        """Return the reads from number `since` on whose innermost line outside torch is in `package`."""
        return [read for read in self.reads[since:] if read.where.startswith(f"{package}{os.sep}")]

    def reset_peak(self) -> None:
        """Start the peak from what is alive now."""
        gc.collect()
        self.peak = self.live

    def holds(self, tensor: Tensor) -> bool:
        """Return whether a tensor lies on the card."""
        return _device(tensor).type == "cuda"

    def wait(self, what: str) -> None:
        """Log that the host waits for the card."""
        stack = list(_frames())
        self.reads.append(Read(what, stack[0] if stack else "?", tuple(stack)))

    def take(self, tensor: Tensor) -> Tensor:
        """Mark a tensor's storage as one on the card, and count it until it is freed."""
        storage = tensor.untyped_storage()
        if "pretended" in storage.__dict__:
            return tensor
        storage.pretended = CARD
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, size)
        if self.live > self.capacity:
            raise torch.OutOfMemoryError(f"CUDA out of memory: {self.live} of {self.capacity} bytes")
        return tensor

    def _free(self, size: int) -> None:
        self.live -= size


_TORCH = str(Path(torch.__file__).parent)
_STANDARD = str(Path(os.__file__).parent)
_PACKAGES = os.path.join(_STANDARD, "site-packages")


def _frames() -> Iterator[str]:
    """Yield the calling lines outside torch, the standard library and this file, innermost first."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        library = name.startswith((_TORCH, "<")) or (name.startswith(_STANDARD) and not name.startswith(_PACKAGES))
        if not library and name != __file__:
            yield f"{_short(name)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]


@functools.cache
def _short(path: str) -> str:
    """Return a path from its outermost package on."""
    folder = Path(path).parent
    while (folder / "__init__.py").exists():
        folder = folder.parent
    return str(Path(path).relative_to(folder))


def _device(tensor: Tensor) -> torch.device:
    """Return the device on which a tensor pretends to lie."""
    if not isinstance(tensor, FakeTensor):
        with torch._C.DisableTorchFunction():
            if TensorBase.is_cpu.__get__(tensor):  # type: ignore[attr-defined]
                return _mark(tensor)
    return TensorBase.device.__get__(tensor)  # type: ignore[attr-defined, no-any-return]


def _mark(tensor: Tensor) -> torch.device:
    try:
        return getattr(tensor.untyped_storage(), "pretended", CPU)
    except (NotImplementedError, RuntimeError):
        # Sparse tensors and the like have no storage.
        return CPU


def _asked(device: Any) -> torch.device:
    """Return the device that an argument names."""
    if isinstance(device, int) and not isinstance(device, bool):
        return torch.device("cuda", device)
    named = torch.device(device)
    return CARD if named.type == "cuda" and named.index is None else named


def _plain(value: Any) -> bool:
    """Return whether a value is a CPU tensor of torch's own, of which this file keeps account."""
    return isinstance(value, Tensor) and not isinstance(value, FakeTensor) and not value.is_meta


def _tensors(values: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested lists, tuples and dicts."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        for value in values.values():
            yield from _tensors(value)


def _is_faking() -> bool:
    """Return whether tensors without data are made at the moment, which have devices of their own."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


@functools.cache
def _takes_device(func: Any) -> bool:
    return any(argument.name == "device" for argument in func._schema.arguments)


class _Operators(TorchDispatchMode):
    """Check the devices of every operator, mark what it returns and log what the host waits for."""

    def __init__(self, card: Card, scope: _Scope) -> None:
        super().__init__()
        self.card = card
        self.scope = scope

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given_tensors = list(_tensors((args, kwargs)))
        tensors = [value for value in given_tensors if _plain(value)]
        faking = _is_faking() or any(isinstance(value, FakeTensor) for value in given_tensors)
        if faking or not isinstance(func, torch._ops.OpOverload):
            return func(*args, **kwargs)
        devices = [_device(tensor) for tensor in tensors]
        name = func._schema.name.split("::")[-1]
        given = kwargs.get("device")
        if given is not None and torch.device(given).type == "meta":
            return func(*args, **kwargs)
        where = self._where(func, name, args, tensors, devices)
        if given is not None and torch.device(given).type == "cuda":
            # From code of torch that no function mode sees.
            kwargs, where = {**kwargs, "device": CPU}, CARD
        if CARD in devices:
            self._log(name, args, kwargs)
        if where != CARD:
            return func(*args, **kwargs)
        with self._random(func, kwargs):
            out = func(*args, **kwargs)
        before = {
            id(tensor.untyped_storage()) for tensor, device in zip(tensors, devices, strict=True) if device == CPU
        }
        for value in _tensors(out):
            # A CPU tensor that an operator wrote to, or returns a view of, remains where it is.
            if _plain(value) and id(value.untyped_storage()) not in before:
                self.card.take(value)
        return out

    def _where(
        self, func: Any, name: str, args: Any, tensors: list[Tensor], devices: list[torch.device]
    ) -> torch.device:
        """Return the device of an operator's outputs, or raise what CUDA raises if its inputs are on several."""
        if _takes_device(func) and self.scope.forced is not None:
            return self.scope.forced
        if not tensors:
            return self.scope.ambient if _takes_device(func) else CPU
        if len(set(devices)) == 1:
            return devices[0]
        if name in _CROSSING:
            first = args[0] if isinstance(args[0], Tensor) else args[0][0]
            return _device(first)
        if name in _INDEXING:
            values = [args[0]] + [value for value in args[2:3] if isinstance(value, Tensor)]
            found = {_device(value) for value in values if value.dim() or value is args[0]}
            if len(found) == 1 and (_device(args[0]) == CARD or not _on_card(args[1])):
                return _device(args[0])
        elif name.startswith(("_foreach_", "_fused_", "_amp_")):
            if _pairwise(args):
                return CARD
        elif torch.Tag.pointwise in func.tags or name in _SCALARS:
            larger = {device for tensor, device in zip(tensors, devices, strict=True) if tensor.dim() or device == CARD}
            written = name.endswith("_") and devices[0] == CPU
            if len(larger) == 1 and not written:
                return CARD
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
            f"(when checking the arguments of {func})"
        )

    def _log(self, name: str, args: Any, kwargs: Any) -> None:
        """Log what makes the host wait, of an operator that has an input on the card."""
        if name in _READING or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            if any(_device(value) == CARD for value in _tensors((args, kwargs)) if _plain(value)):
                self.card.wait(name)
        elif name == "copy_" and not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False)):
            if _device(args[0]) != _device(args[1]):
                self.card.wait("upload" if _device(args[0]) == CARD else "copy_ to the CPU")
        elif name == "fill_" and isinstance(args[1], Tensor) and _device(args[0]) != CARD:
            self.card.wait(name)
        elif name in _INDEXING:
            self._log_indexing(name, args)
        elif name in ("masked_fill", "masked_fill_") and isinstance(args[2], Tensor) and _device(args[2]) == CARD:
            # CUDA's kernel reads the value.
            self.card.wait(name)

    def _log_indexing(self, name: str, args: Any) -> None:
        indices = [index for index in args[1] if isinstance(index, Tensor)]
        masked = any(index.dtype in (torch.bool, torch.uint8) for index in indices)
        # `x[mask] = number` needs no positions.
        one_value = "put" in name and args[2].numel() == 1
        if masked and not (one_value and _device(args[2]) == CPU):
            self.card.wait(f"{name} by a mask")
        if any(_device(index) == CPU for index in indices):
            self.card.wait("upload")

    @contextmanager
    def _random(self, func: Any, kwargs: Any) -> Iterator[None]:
        """Draw from the card's generator."""
        if kwargs.get("generator") is not None or torch.Tag.nondeterministic_seeded not in func.tags:
            yield
            return
        before = torch.default_generator.get_state()
        torch.default_generator.set_state(self.card.generator.get_state())
        try:
            yield
        finally:
            self.card.generator.set_state(torch.default_generator.get_state())
            torch.default_generator.set_state(before)


def _on_card(values: Any) -> bool:
    return any(_device(value) == CARD for value in _tensors(values) if _plain(value))


def _pairwise(args: Any) -> bool:
    """Return whether the tensors at every position of an operator's lists share a device, numbers apart."""
    lists = [value for value in args if isinstance(value, list | tuple) and value and isinstance(value[0], Tensor)]
    for tensors in zip(*lists, strict=False):
        if len({_device(tensor) for tensor in tensors if tensor.dim() or _device(tensor) == CARD}) > 1:
            return False
    singles = [value for value in args if isinstance(value, Tensor)]
    return all(not single.dim() or _device(single) == CARD for single in singles)


class _Scope(threading.local):
    """The device that the innermost call asks for, and the one that its tensors suggest."""

    forced: torch.device | None = None
    ambient = CPU

    @contextmanager
    def entered(self, forced: torch.device | None, ambient: torch.device) -> Iterator[None]:
        before = self.forced, self.ambient
        self.forced, self.ambient = forced, ambient
        try:
            yield
        finally:
            self.forced, self.ambient = before


_FROM_DATA = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor, torch.from_numpy}


class _Calls(TorchFunctionMode):
    """Take the device out of the arguments of every call, and remember it for the operators inside."""

    def __init__(self, card: Card, scope: _Scope) -> None:
        super().__init__()
        self.card = card
        self.scope = scope
        self.methods = _Methods(card).by_function

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if _is_faking():
            return func(*args, **kwargs)
        forced = None
        if kwargs.get("device") is not None:
            forced = _asked(kwargs["device"])
            if forced.type not in ("cpu", "cuda"):
                return func(*args, **kwargs)
            kwargs["device"] = CPU
        if func in self.methods and _plain(args[0]):
            return self.methods[func](*args, **(kwargs if forced is None else kwargs | {"device": forced}))
        ambient = CARD if forced == CARD or _on_card((args, kwargs)) else CPU
        generator = kwargs.get("generator")
        if generator is not None and generator.device.type != (forced or ambient).type:
            raise RuntimeError(
                f"Expected a '{forced or ambient}' device type for generator but found '{generator.device}'"
            )
        if func in _FROM_DATA:
            return self._from_data(func, args, kwargs, forced)
        with self.scope.entered(forced, ambient):
            return func(*args, **kwargs)

    def _from_data(self, func: Any, args: Any, kwargs: Any, forced: torch.device | None) -> Any:
        out = func(*args, **kwargs)
        if not _plain(out):
            return out
        data = args[-1] if args else kwargs.get("data", kwargs.get("obj"))
        like = args[0] if func is Tensor.new_tensor else data
        target = forced or (_device(like) if _plain(like) else CPU)
        if _plain(data):
            return _move(self.card, out, target, False) if _device(out) != target else out
        if _on_card(data):
            self.card.wait(f"{func.__name__} of tensors")
        if target == CARD:
            self.card.wait("upload")
            self.card.take(out)
        return out


class _Move(torch.autograd.Function):
    """Copy a tensor to another device; its gradient is copied back."""

    @staticmethod
    def forward(ctx: Any, card: Card, tensor: Tensor, target: torch.device, non_blocking: bool) -> Tensor:
        ctx.card, ctx.source = card, _device(tensor)
        return _moved(card, tensor.detach(), target, non_blocking)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, _move(ctx.card, grads[0], ctx.source, False), None, None


def _moved(card: Card, tensor: Tensor, target: torch.device, non_blocking: bool) -> Tensor:
    # Below the modes, which would count the copy where the original is.
    with torch._C._DisableTorchDispatch():
        copy = tensor.clone()
    if target == CARD:
        card.take(copy)
    if not non_blocking or target == CPU:
        card.wait("upload" if target == CARD else "to the CPU")
    return copy


def _move(card: Card, tensor: Tensor, target: torch.device, non_blocking: bool) -> Tensor:
    """Return a tensor on `target`, which is itself if it is there."""
    if _device(tensor) == target:
        return tensor
    if tensor.requires_grad and torch.is_grad_enabled():
        return _Move.apply(card, tensor, target, non_blocking)  # type: ignore[no-any-return, no-untyped-call]
    return _moved(card, tensor, target, non_blocking)


class PretendGenerator(torch.Generator):
    """A generator that says it is the card's where it was made for it."""

    def __new__(cls, device: Any = "cpu") -> PretendGenerator:
        made = super().__new__(cls)
        made.place = _asked(device)
        return made

    def __init__(self, device: Any = "cpu") -> None:
        super().__init__()

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.place


class _Methods:
    """The methods of a tensor that depend on where it lies, in place of those of `torch.Tensor`."""

    def __init__(self, card: Card) -> None:
        self.card = card
        self.by_function: dict[Any, Callable[..., Any]] = {
            Tensor.to: self.to,
            Tensor.cuda: self.cuda,
            Tensor.cpu: self.cpu,
            Tensor.tolist: self.tolist,
            Tensor.numpy: self.numpy,
            Tensor.__array__: self.numpy,
            Tensor.__repr__: self.representation,
            Tensor.get_device: self.get_device,
            Tensor.pin_memory: self.pin_memory,
            Tensor.is_pinned: lambda tensor, device=None: False,
            Tensor.record_stream: lambda tensor, stream: None,
        }

    def to(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args and isinstance(args[0], Tensor):
            args = (_device(args[0]), args[0].dtype, *args[1:])
        if isinstance(kwargs.get("other"), Tensor):
            other = kwargs.pop("other")
            kwargs |= {"device": _device(other), "dtype": other.dtype}
        positional = bool(args) and isinstance(args[0], str | int | torch.device)
        named = args[0] if positional else kwargs.get("device")
        if named is None or _asked(named).type not in ("cpu", "cuda"):
            return tensor.to(*args, **kwargs)
        if positional:
            args = (CPU, *args[1:])
        else:
            kwargs["device"] = CPU
        non_blocking = kwargs.get("non_blocking", any(value is True for value in args[:3]))
        moved = _move(self.card, tensor, _asked(named), non_blocking)
        if moved is not tensor:
            kwargs.pop("copy", None)
        return moved.to(*args, **kwargs)

    def cuda(self, tensor: Tensor, device: Any = None, non_blocking: bool = False, **kwargs: Any) -> Tensor:
        return self.to(tensor, CARD if device is None else device, non_blocking=non_blocking, **kwargs)

    def cpu(self, tensor: Tensor, **kwargs: Any) -> Tensor:
        return self.to(tensor, CPU, **kwargs)

    def tolist(self, tensor: Tensor) -> Any:
        if self.card.holds(tensor):
            self.card.wait("tolist")
        return tensor.tolist()

    def numpy(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.card.holds(tensor):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        return Tensor.__array__(tensor, *args, **kwargs) if args else tensor.numpy(**kwargs)

    def representation(self, tensor: Tensor, **kwargs: Any) -> str:
        if self.card.holds(tensor):
            self.card.wait("repr")
        return tensor.__repr__(**kwargs)

    def get_device(self, tensor: Tensor) -> int:
        return 0 if self.card.holds(tensor) else -1

    def pin_memory(self, tensor: Tensor, device: Any = None) -> Tensor:
        if self.card.holds(tensor):
            raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
        return tensor.clone()


def _backward(
    self: Tensor, gradient: Any = None, retain_graph: Any = None, create_graph: bool = False, inputs: Any = None
) -> None:
    """Stand for `Tensor.backward`, which switches the function modes off in all that runs inside."""
    torch.autograd.backward(self, gradient, retain_graph, create_graph, inputs=inputs)


def _engine(calls: _Calls) -> Callable[..., Any]:
    """Return what runs a backward pass with the function mode on, which is off inside `torch.autograd.backward`."""
    original = torch.autograd._engine_run_backward

    def run(*args: Any, **kwargs: Any) -> Any:
        with calls:
            return original(*args, **kwargs)

    return run


class _Stream(SimpleNamespace):
    """A stream on which nothing runs."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *error: object) -> None:
        return None


def _cuda_answers(card: Card) -> dict[str, Any]:
    """Return what `torch.cuda` answers."""

    def synchronize(device: Any = None) -> None:
        card.wait("synchronize")

    def set_state(state: Tensor, device: Any = None) -> None:
        card.generator.set_state(state)

    def manual_seed(seed: int) -> None:
        card.generator.manual_seed(seed)

    properties = SimpleNamespace(
        name=card.name,
        major=card.capability[0],
        minor=card.capability[1],
        total_memory=card.capacity,
        multi_processor_count=108,
        warp_size=32,
        gcnArchName="",
    )
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "device": lambda device=None: nullcontext(),
        "get_device_name": lambda device=None: card.name,
        "get_device_capability": lambda device=None: card.capability,
        "get_device_properties": lambda device=None: properties,
        "get_arch_list": lambda: ["sm_80", "sm_90"],
        "is_bf16_supported": lambda including_emulation=True: card.capability >= (8, 0),
        "mem_get_info": lambda device=None: (card.capacity - card.live, card.capacity),
        "memory_allocated": lambda device=None: card.live,
        "memory_reserved": lambda device=None: card.live,
        "max_memory_allocated": lambda device=None: card.peak,
        "max_memory_reserved": lambda device=None: card.peak,
        "reset_peak_memory_stats": lambda device=None: card.reset_peak(),
        "empty_cache": lambda: None,
        "synchronize": synchronize,
        "manual_seed": manual_seed,
        "manual_seed_all": manual_seed,
        "initial_seed": lambda: card.generator.initial_seed(),
        "get_rng_state": lambda device=None: card.generator.get_state(),
        "get_rng_state_all": lambda: [card.generator.get_state()],
        "set_rng_state": set_state,
        "set_rng_state_all": lambda states: set_state(states[0]),
        "current_stream": lambda device=None: _Stream(),
        "default_stream": lambda device=None: _Stream(),
        "stream": lambda stream: nullcontext(),
        "Stream": lambda *args, **kwargs: _Stream(),
        "Event": lambda *args, **kwargs: _Stream(),
        "is_current_stream_capturing": lambda: False,
        "_is_in_bad_fork": lambda: False,
    }


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that answers for the CPU where it is asked for the card."""

    @functools.wraps(function)
    def asked(device_type: Any = "cpu", *args: Any, **kwargs: Any) -> Any:
        return function("cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    return asked


def _patches(card: Card) -> Iterator[AbstractContextManager[Any]]:
    # On the class, since a function mode is off inside every function of torch that is written in Python.
    yield mock.patch.object(Tensor, "device", property(_device), create=True)
    yield mock.patch.object(Tensor, "is_cuda", property(card.holds), create=True)
    yield mock.patch.object(Tensor, "is_cpu", property(lambda self: _device(self).type == "cpu"), create=True)
    yield mock.patch.object(Tensor, "backward", _backward)
    for name, value in _cuda_answers(card).items():
        for module in (torch.cuda, torch.cuda.random, torch.cuda.memory):
            if hasattr(module, name):
                yield mock.patch.object(module, name, value)
    yield mock.patch.object(torch, "Generator", PretendGenerator)
    yield mock.patch.object(torch.UntypedStorage, "clone", _clone_storage(card, torch.UntypedStorage.clone))
    yield mock.patch.object(torch, "load", _load(card, torch.load))
    for name, value in (
        ("current_accelerator", lambda check_available=False: torch.device("cuda")),
        ("is_available", lambda: True),
        ("device_count", lambda: 1),
        ("current_device_index", lambda: 0),
        ("synchronize", lambda device=None: card.wait("synchronize")),
        ("empty_cache", lambda: None),
        ("current_stream", lambda device=None: _Stream()),
        ("memory_allocated", lambda device=None: card.live),
        ("max_memory_allocated", lambda device=None: card.peak),
        ("reset_peak_memory_stats", lambda device=None: card.reset_peak()),
        ("get_memory_info", lambda device=None: (card.capacity - card.live, card.capacity)),
    ):
        if hasattr(torch.accelerator, name):
            yield mock.patch.object(torch.accelerator, name, value)
    # Where Triton is installed all the same, its kernels would look for a real GPU.
    yield mock.patch.object(gpu, "has_triton", lambda: False)
    yield mock.patch.object(layers, "HAS_TRITON", False)
    # Autocast is a matter of the real device.
    for name in ("is_autocast_enabled", "get_autocast_dtype", "set_autocast_enabled", "set_autocast_dtype"):
        yield mock.patch.object(torch, name, _on_cpu(getattr(torch, name)))
    original = torch.autocast.__init__

    def start(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        original(self, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    yield mock.patch.object(torch.autocast, "__init__", start)


def _clone_storage(card: Card, original: Any) -> Any:
    def clone(self: torch.UntypedStorage) -> torch.UntypedStorage:
        copy = original(self)
        if hasattr(self, "pretended"):
            card.take(torch.empty(0, dtype=torch.uint8).set_(copy))
        return copy

    return clone


def _load(card: Card, original: Any) -> Any:
    def load(file: Any, map_location: Any = None, **kwargs: Any) -> Any:
        if not isinstance(map_location, str | torch.device) or _asked(map_location) != CARD:
            return original(file, map_location=map_location, **kwargs)
        loaded = original(file, map_location="cpu", **kwargs)
        for value in _tensors(loaded):
            if _plain(value):
                card.take(value)
        return loaded

    return load


_REMEMBERING = ("transformers.utils.import_utils", "transformers.utils.generic", "accelerate.utils.imports")


def _forget_answers() -> None:
    """Make transformers and accelerate ask again which devices there are."""
    for name in _REMEMBERING:
        for value in vars(importlib.import_module(name)).values():
            if "cuda" in getattr(value, "__name__", "") and hasattr(value, "cache_clear"):
                value.cache_clear()
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@contextmanager
def pretend_cuda(
    capacity: int = 80 * 10**9, name: str = "NVIDIA A100-SXM4-80GB", capability: tuple[int, int] = (8, 0)
) -> Iterator[Card]:
    """Pretend that there is one CUDA device; see the module's docstring.

    Args:
        capacity: its memory in bytes.
        name, capability: what `torch.cuda` says about it.
    """
    card = Card(capacity, name, capability)
    scope = _Scope()
    with ExitStack() as stack:
        stack.callback(_forget_answers)
        # Models are loaded by threads otherwise, in which no operator is seen.
        stack.enter_context(mock.patch.dict(os.environ, {"HF_DEACTIVATE_ASYNC_LOAD": "1"}))
        for patch in _patches(card):
            stack.enter_context(patch)
        _forget_answers()
        calls = _Calls(card, scope)
        stack.enter_context(mock.patch.object(torch.autograd, "_engine_run_backward", _engine(calls)))
        stack.enter_context(calls)
        stack.enter_context(_Operators(card, scope))
        yield card
