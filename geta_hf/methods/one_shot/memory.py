"""Foresee what `saliency="activation"` takes in memory on top of nothing, and refuse what does not fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from geta_hf.errors import GETAError
from geta_hf.quantization.by_block import Batch, Block, find_blocks, tensors_of, uncached
from geta_hf.quantization.covariances import as_rows, covariance_bytes, has_covariance
from geta_hf.utils.free_memory import free_memory
from geta_hf.utils.module_state import eval_mode

OTHER = 800_000_000
"""Bytes for all else: the interpreter, torch, activations within one block for one batch."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a compression with one block at a time takes.

    Attributes:
        weights: parameters and buffers of the dense model.
        covariances: of the inputs of the layers of one block, the largest.
        workspace: what compressing one layer takes, the largest: its weight in fp32 and Σ in double precision, each
            several times.
        activations: what two blocks give for all batches.
        other: everything else.
    """

    weights: int
    covariances: int
    workspace: int
    activations: int
    other: int = OTHER

    @property
    def added(self) -> int:
        """Bytes on top of the weights."""
        return self.covariances + self.workspace + self.activations + self.other

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.weights + self.added


@torch.no_grad()
def foresee_memory(model: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Batch]) -> MemoryPlan:
    """Return what compressing a model block by block takes; runs the first batch once or twice.

    Args:
        model: dense.
        layers: those to round, by path.
        batches: all that covariances are measured on.
    """
    blocks = find_blocks(model, layers, batches[0])
    given = _given(model, blocks, batches[0])
    # Batches differ in their rows and tokens, by which activations grow.
    share = sum(map(_elements, batches)) / max(_elements(batches[0]), 1)
    ordered = [int(given.get(block.name, 0) * share) for block in blocks]
    pairs = [one + other for one, other in zip(ordered, [0, *ordered], strict=False)]
    tensors = {id(item): item.numel() * item.element_size() for item in (*model.parameters(), *model.buffers())}
    return MemoryPlan(
        weights=sum(tensors.values()),
        covariances=max(_covariances(block, layers) for block in blocks),
        workspace=max(_workspace(layer) for layer in layers.values()),
        activations=max(pairs),
    )


def check_memory(plan: MemoryPlan, device: torch.device) -> None:
    """Raise GETAError where a device has less memory left than is needed on top of the weights, which are there.

    Args:
        plan: of `foresee_memory`.
        device: of the model.
    """
    free = free_memory(device)
    if free is not None and plan.added > free:
        raise GETAError(
            f"compression needs {plan.added / 1e9:.1f} GB on top of the weights ({plan.covariances / 1e9:.1f} for the "
            f"covariances of a block, {plan.workspace / 1e9:.1f} for one layer, {plan.activations / 1e9:.1f} for "
            f"activations, {plan.other / 1e9:.1f} for all else), but {free / 1e9:.1f} GB are free; give fewer "
            f"sequences, or exclude the largest layers"
        )


def _given(model: nn.Module, blocks: Sequence[Block], batch: Batch) -> dict[str, int]:
    """Return the bytes of what each block gives for one batch, over all of its calls."""
    found: dict[str, int] = {}

    def note(name: str, output: Any) -> None:
        found[name] = found.get(name, 0) + sum(item.numel() * item.element_size() for item in tensors_of(output))

    with ExitStack() as stack:
        stack.enter_context(uncached(model))
        stack.enter_context(eval_mode(model))
        for block in blocks:
            module = model.get_submodule(block.name)
            hook = module.register_forward_hook(lambda _, __, output, name=block.name: note(name, output))
            stack.callback(hook.remove)
        model(**batch)
    return found


def _elements(batch: Batch) -> int:
    return max((item.numel() for item in batch.values() if isinstance(item, Tensor)), default=1)


def _covariances(block: Block, layers: Mapping[str, nn.Module]) -> int:
    """Return the bytes of the covariances of a block; the layers of a stage share one."""
    firsts = [next((name for name in stage if has_covariance(layers[name])), None) for stage in block.stages]
    return sum(covariance_bytes(layers[name]) for name in firsts if name is not None)


def _workspace(layer: nn.Module) -> int:
    weight: Tensor = layer.weight  # type: ignore[assignment]
    rows = as_rows(layer, weight)
    # The weight, its copy in order, what is rounded, two rounded ones, the result; Σ with damping, its factor, inverse
    # and inverse's factor in double precision, and Σ itself in order and in fp32.
    return 6 * 4 * rows.numel() + (4 * 8 + 2 * 4) * rows.shape[1] ** 2
