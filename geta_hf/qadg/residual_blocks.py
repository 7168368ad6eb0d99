"""Find the blocks of a model that may be dropped entirely: those that do no more than add to the residual stream.

Of a pre-norm block, x + f(norm(x)), nothing but x remains if all that f writes is zero, so the block can be dropped. A
post-norm block, norm(x + f(x)) as in BERT, changes x in any case. The dependency graph tells which tensors write to the
stream: those of the residual family.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from geta_hf.qadg.families.find import find_families
from geta_hf.qadg.propagation.propagate import record_and_propagate
from geta_hf.utils.module_state import eval_mode, running

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of one call."""


@dataclass(frozen=True)
class Block:
    """One entry of a list of modules through which the residual stream runs.

    Attributes:
        name: module path, such as `model.layers.3`.
        reason: why it can't be dropped; empty where it can.
        returns: how many things it returns, the first of them the stream; 0 where it returns the stream itself.
    """

    name: str
    reason: str = ""
    returns: int = 0

    @property
    def series(self) -> str:
        """Return the path of the list of modules that it belongs to."""
        return self.name.rpartition(".")[0]


def find_blocks(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Block, ...]:
    """Find the blocks that the residual stream runs through, and say which of them may be dropped.

    With all tensors of the residual family at zero in a block, what the block is given has to come out of it unchanged,
    bit for bit, in a forward pass on the batch.

    Args:
        model: with its weights, and no quantizers; not changed.
        batch: one batch of real inputs, on the model's device.

    Returns:
        Every entry of a list of at least two modules that holds such a tensor, in model order.

    Raises:
        GETAError: the model can't run the batch.
    """
    residual = _residual_tensors(model, batch)
    names = _holding(model, residual)
    calls = _calls(model, names, batch)
    with eval_mode(model):
        return tuple(_tried(model, name, calls[name], residual) for name in names)


def residual_blocks(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Block, ...]:
    """List the blocks of a model that may be on meta: none is tried, so none has a reason why it can't be dropped."""
    return tuple(Block(name) for name in _holding(model, _residual_tensors(model, batch)))


def _holding(model: nn.Module, residual: set[str]) -> list[str]:
    """Return the entries of lists of modules that hold one of these tensors."""
    return [name for name in _entries(model) if any(_within(tensor, name) for tensor in residual)]


def _residual_tensors(model: nn.Module, batch: Mapping[str, Any]) -> set[str]:
    families = find_families(record_and_propagate(model, batch))
    return {member.tensor for family in families if family.kind == "residual" for member in family.members}


def _entries(model: nn.Module) -> list[str]:
    """Return the paths of the entries of lists of modules; of nested lists those of the outer one."""
    found: list[str] = []
    for path, module in model.named_modules():
        # A list of one can't lose its only entry. Entries of a nested list are parts of a block (experts, say).
        if isinstance(module, nn.ModuleList) and len(module) > 1 and not any(_within(path, name) for name in found):
            found += [f"{path}.{place}" for place in range(len(module))]
    return found


def _within(path: str, outer: str) -> bool:
    return path.startswith(f"{outer}.")


def _calls(model: nn.Module, names: Iterable[str], batch: Mapping[str, Any]) -> dict[str, list[Arguments]]:
    """Return what each of the named modules is called with in one forward pass."""
    calls: dict[str, list[Arguments]] = {name: [] for name in names}
    with ExitStack() as stack:
        stack.enter_context(eval_mode(model))
        for name, found in calls.items():
            note = partial(_note, found)
            handle = model.get_submodule(name).register_forward_pre_hook(note, with_kwargs=True)
            stack.callback(handle.remove)
        model(**batch, **uncached(model))
    return calls


def _note(found: list[Arguments], _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    found.append((args, kwargs))


def uncached(model: nn.Module) -> dict[str, bool]:
    """Return the keyword argument that switches a model's cache off, where it has one."""
    # Blocks are called again with what they were given, and a cache among that would have grown since.
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def _tried(model: nn.Module, name: str, calls: list[Arguments], residual: set[str]) -> Block:
    """Run a block with zeros in all that writes to the residual stream, and say whether it can be dropped."""
    block = model.get_submodule(name)
    if len(calls) != 1:
        return Block(name, f"it runs {len(calls)} times in a forward pass, not once")
    own = {id(parameter) for parameter in block.parameters()}
    # Another module needs the parameter as well, so it could not be removed with the block.
    shared = [n for n, p in model.named_parameters(remove_duplicate=False) if id(p) in own and not _within(n, name)]
    if shared:
        return Block(name, f"it shares a parameter with {shared[0]}")
    args, kwargs = calls[0]
    zeros = {
        tensor: torch.zeros_like(parameter)
        for tensor, parameter in block.named_parameters()
        if f"{name}.{tensor}" in residual
    }
    try:
        # Calling the block by itself, with what the model gave it, tries one block at the cost of one block.
        given = _stream(block, args, kwargs)
        returned = functional_call(block, zeros, args, kwargs)
    except Exception as error:
        # A block that needs more than its own inputs says so in many kinds of errors.
        return Block(name, f"it does not run by itself ({type(error).__name__}: {error})")
    outputs = returned if isinstance(returned, tuple) else (returned,)
    return Block(name, _obstacle(given, *outputs), len(outputs) if isinstance(returned, tuple) else 0)


def _obstacle(given: Any, first: Any, *others: Any) -> str:
    """Return why a block can't be dropped that was given and returned this; empty where it can."""
    if not isinstance(given, Tensor) or not isinstance(first, Tensor):
        return "its first input and its first output are not both tensors"
    if any(other is not None for other in others):
        return "it returns more than the residual stream, which other blocks may need"
    # Bit for bit: x + 0 is x exactly, so any difference is a path that zeros do not close, such as a norm after the
    # sum.
    if given.shape != first.shape or not torch.equal(given, first):
        return "the residual stream does not come through unchanged when all that the block writes to it is zero"
    return ""


def _stream(block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return what a block gets as its first argument, by position or by name."""
    if args:
        return args[0]
    # The first parameter of the class's forward is `self`.
    first = list(inspect.signature(type(block).forward).parameters)[1]
    return kwargs[first]


@contextmanager
def skipping(model: nn.Module, blocks: Iterable[Block]) -> Iterator[None]:
    """Let blocks pass the residual stream on as it is, without computing anything.

    Args:
        model: whose blocks they are; as before afterwards.
        blocks: of those that `find_blocks` gave without a reason.
    """
    with ExitStack() as stack:
        for block in blocks:
            module = model.get_submodule(block.name)
            stack.enter_context(running(module, partial(_hand_on, module, block.returns)))
        yield


def _hand_on(block: nn.Module, returns: int, *args: Any, **kwargs: Any) -> Any:
    stream = _stream(block, args, kwargs)
    return (stream, *[None] * (returns - 1)) if returns else stream
