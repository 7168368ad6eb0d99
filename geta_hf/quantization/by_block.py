"""Run a model block by block: what finished blocks give is remembered, so that no block runs more often than it has to.

The model's own forward runs each time, whatever it does between its blocks. Blocks that are finished return what they
gave before, and the run ends with the block that is asked for.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from geta_hf.utils.free_memory import give_back
from geta_hf.utils.model_io import config_value, float_tensors
from geta_hf.utils.module_state import eval_mode, running

Batch = Mapping[str, Any]


class _BlockDone(Exception):
    """Raised in the middle of a forward, once the block that is asked for has run."""


@dataclass
class Block:
    """One entry of a list of layers, or a layer outside of such lists.

    Attributes:
        name: its path.
        stages: the layers to compress in it, in the order in which they run; those that read the same tensor together.
        calls: how often it runs in one forward of the model; 0 where the first batch does not reach it.
        once: the layers that ran exactly once, and not on a flat list of tokens, as experts do, of which others may be
            reached more often.
    """

    name: str
    stages: list[list[str]] = field(default_factory=list)
    calls: int = 0
    once: set[str] = field(default_factory=set)


def block_of(model: nn.Module, name: str) -> str:
    """Return the path of the outermost entry of an `nn.ModuleList` that holds a layer; the layer's where none does."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        if isinstance(model.get_submodule(".".join(parts[:depth])), nn.ModuleList):
            return ".".join(parts[: depth + 1])
    return name


@contextmanager
def uncached(model: nn.Module) -> Iterator[None]:
    """Switch off the caches of generating models for a while, by their configs."""
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    inner = [getattr(config, name) for config in configs.values() for name in getattr(config, "sub_configs", {})]
    configs |= {id(config): config for config in inner if config is not None}
    with config_value(configs.values(), "use_cache", False):
        yield


def find_blocks(model: nn.Module, layers: Mapping[str, nn.Module], batch: Batch) -> list[Block]:
    """Return the blocks that hold layers, in the order in which they run on a batch; unreached ones last.

    Args:
        model: any module.
        layers: those to compress, by path.
        batch: keyword arguments of its forward.
    """
    blocks: dict[str, Block] = {}
    for name in layers:
        owner = block_of(model, name)
        blocks.setdefault(owner, Block(owner))
    order: list[str] = []
    # The tensors themselves, since a freed one's address is used again.
    read: dict[str, Tensor] = {}
    uses: Counter[str] = Counter()
    with ExitStack() as stack:
        for name in blocks:
            hook = model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: order.append(name))
            stack.callback(hook.remove)
        for name, layer in layers.items():
            hook = layer.register_forward_pre_hook(_Reader(read, uses, name), with_kwargs=True)
            stack.callback(hook.remove)
        stack.enter_context(uncached(model))
        stack.enter_context(eval_mode(model))
        model(**batch)
    for name in order:
        blocks[name].calls += 1
    for name, tensor in read.items():
        block = blocks[block_of(model, name)]
        _add_to_stage(block, name, read)
        if uses[name] == 1 and tensor.dim() > 2:
            block.once.add(name)
    for name in layers:
        # What this batch does not reach may be reached by others, as experts are.
        if name not in read:
            blocks[block_of(model, name)].stages.append([name])
    reached = list(dict.fromkeys(order))
    return [blocks[name] for name in (*reached, *(name for name in blocks if name not in reached))]


class _Reader:
    """A hook that remembers what a layer reads first, and how often it runs."""

    def __init__(self, read: dict[str, Tensor], uses: Counter[str], name: str) -> None:
        self.read, self.uses, self.name = read, uses, name

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.uses[self.name] += 1
        self.read.setdefault(self.name, args[0] if args else next(iter(kwargs.values())))


def _add_to_stage(block: Block, name: str, read: Mapping[str, Tensor]) -> None:
    if block.stages and _same(read[block.stages[-1][0]], read[name]):
        block.stages[-1].append(name)
    else:
        block.stages.append([name])


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.data_ptr() == other.data_ptr() and one.shape == other.shape)


class BlockRunner:
    """Run calibration batches up to one block after the other.

    Args:
        model: whose blocks are changed in between, by the caller.
        batches: on the model's device.

    Attributes:
        peak: the most bytes that were remembered of blocks at a time.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        self.model = model
        self.batches = batches
        self.peak = 0
        self._last: str | None = None
        # Path of a finished block -> for each batch what each of its calls gave.
        self._outputs: dict[str, list[list[Any]]] = {}

    def run(self, block: Block, mask: list[Tensor | None], until: str | None = None) -> None:
        """Run every batch to the end of a block.

        Args:
            block: not finished yet; one without calls lets every batch run to its end.
            mask: its only entry is set to which tokens of the present batch count.
            until: a layer of it, after whose inputs nothing is of interest: there a batch ends, if it runs only once.
                Hooks on it have to be there already.
        """
        for _ in self._each(block, mask, until if until in block.once else None):
            pass

    def finish(self, block: Block, mask: list[Tensor | None] | None = None) -> None:
        """Run every batch to the end of a block, and remember what it gives.

        Args:
            block: as in `run`.
            mask: as in `run`. None where nothing is measured; a block without calls is not run then.
        """
        if block.calls:
            self._outputs[block.name] = list(self._each(block, [None] if mask is None else mask))
        elif mask is not None:
            self.run(block, mask)
        self.peak = max(self.peak, self.held_bytes())

    def forget(self, block: Block) -> None:
        """Forget what the block before a finished one gave, unless it is still read, at the price of a forward.

        Memory that is free by now goes back to the system.

        Call it after `finish`, once no hook collects anything any more.
        """
        if self._last is not None and not self._is_read(self._last):
            self._outputs[self._last] = [[_filled(given) for given in calls] for calls in self._outputs[self._last]]
        self._last = block.name if block.calls else self._last
        give_back()

    def _is_read(self, name: str) -> bool:
        """Return whether what a finished block gave still has an effect on the model's outputs, by the first batch."""
        kept = self._outputs[name]
        self._outputs[name] = [[_filled(given) for given in calls] for calls in kept[:1]]
        try:
            with ExitStack() as stack:
                stack.enter_context(uncached(self.model))
                stack.enter_context(eval_mode(self.model))
                for other, outputs in self._outputs.items():
                    stack.enter_context(_replaying(self.model.get_submodule(other), outputs, [0]))
                outputs = self.model(**self.batches[0])
            return any(bool(item.isnan().any()) for item in float_tensors(outputs).values())
        finally:
            self._outputs[name] = kept

    def held_bytes(self) -> int:
        """Return the bytes of what finished blocks gave and is remembered."""
        storages = {}
        for calls in self._outputs.values():
            for tensor in tensors_of(calls):
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return sum(storages.values())

    def _each(self, block: Block, mask: list[Tensor | None], until: str | None = None) -> Iterator[list[Any]]:
        """Run batch by batch; yield what each call of the block gave, or nothing before the end of the block."""
        place = [0]
        given: list[Any] = []

        def ended(_: nn.Module, __: Any, output: Any) -> None:
            given.append(output)
            if len(given) == block.calls:
                raise _BlockDone

        def reached(*_: Any) -> None:
            raise _BlockDone

        with ExitStack() as stack:
            stack.enter_context(uncached(self.model))
            stack.enter_context(eval_mode(self.model))
            for name, outputs in self._outputs.items():
                stack.enter_context(_replaying(self.model.get_submodule(name), outputs, place))
            hook = self.model.get_submodule(block.name).register_forward_hook(ended)
            stack.callback(hook.remove)
            if until is not None:
                stack.callback(self.model.get_submodule(until).register_forward_pre_hook(reached).remove)
            for position, batch in enumerate(self.batches):
                place[0] = position
                mask[0] = counted_tokens(self.model, batch)
                given = []
                with suppress(_BlockDone):
                    self.model(**batch)
                yield given


def _filled(given: Any) -> Any:
    """Return what a block gave with NaN in place of every number: of the same shapes, and of next to no memory."""
    if isinstance(given, Tensor):
        return given.new_full((), torch.nan).expand_as(given) if given.is_floating_point() else given
    if isinstance(given, tuple) and hasattr(given, "_fields"):
        return type(given)(*map(_filled, given))
    if isinstance(given, tuple | list):
        return type(given)(map(_filled, given))
    if isinstance(given, dict):
        copied = copy.copy(given)
        for name, item in given.items():
            copied[name] = _filled(item)
        return copied
    return given


def tensors_of(given: Any) -> Iterator[Tensor]:
    """Yield all tensors in nested lists, tuples and dicts."""
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, Mapping):
        yield from tensors_of(list(given.values()))
    elif isinstance(given, tuple | list):
        for item in given:
            yield from tensors_of(item)


@contextmanager
def _replaying(block: nn.Module, outputs: list[list[Any]], place: list[int]) -> Iterator[None]:
    """Let a block return what it gave before, call by call."""
    calls = [-1, 0]  # the batch, and calls in it

    def forward(*_: Any, **__: Any) -> Any:
        if calls[0] != place[0]:
            calls[:] = [place[0], 0]
        calls[1] += 1
        return outputs[place[0]][calls[1] - 1]

    with running(block, forward):
        yield


def counted_tokens(model: nn.Module, batch: Batch) -> Tensor | None:
    """Return which tokens of a batch are no padding, bool, shape (batch, tokens); None where all count."""
    mask = batch.get("attention_mask")
    # The two sides of an encoder-decoder have masks of their own, and a tensor's shape does not tell its side.
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or bool(mask.all()):
        return None
    return mask.bool()
