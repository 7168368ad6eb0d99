"""Measure by gradients what removing a group and rounding a weight are expected to cost, in nats per sequence.

Both are ½ E⟨g, change⟩² over sequences, with g the gradient of a sequence's total loss. For a group the change is that
of the slices which read its output, so it is the second derivative for a mask on that output; for a weight, its
elements are taken for independent, ½ Σ E[g²] (x^Q - x)².
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from geta_hf.errors import GETAError
from geta_hf.methods.qasso.slices import group_sums
from geta_hf.qadg.group_labels import GroupLabels
from geta_hf.quantization.by_block import Batch, uncached
from geta_hf.utils.model_io import float_tensors, loss_of
from geta_hf.utils.module_state import eval_mode

logger = logging.getLogger(__name__)

_IGNORED = -100
"""The label of what does not count in a loss of transformers."""


@dataclass(frozen=True)
class Gradients:
    """What gradients say of one model.

    Attributes:
        groups: float64, shape (groups,), on CPU: ½ E⟨g, x⟩² of each group, in nats per sequence.
        squares: name of a weight -> E[g²] of each element, fp32, in its shape.
        sequences: how many sequences were averaged over.
    """

    groups: Tensor
    squares: Mapping[str, Tensor]
    sequences: int


def measure_gradients(
    model: nn.Module,
    batches: Sequence[Batch],
    labels: Sequence[GroupLabels],
    groups: int,
    weights: Sequence[str],
    progress: Iterable[Batch] | None = None,
) -> Gradients:
    """Run a backward pass for every sequence; the model is as before afterwards.

    Args:
        model: dense, or with frozen quantizers.
        batches: on the model's device, with labels where there are any. Without labels they are drawn from what the
            model itself predicts, so that the average is the Fisher information.
        labels: the slices that read each group's output, as `qadg.group_labels.consumers` gives them.
        groups: number of groups.
        weights: names of the weights to round.
        progress: the sequences, one after the other, where a progress bar counts them; those of `batches` when None.

    Raises:
        GETAError: a loss or gradient that is not finite, or no gradient at all.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    device = next(model.parameters()).device
    total = torch.zeros(groups, dtype=torch.float64, device=device)
    squares = {name: torch.zeros_like(named[name], dtype=torch.float32) for name in weights}
    scored = [cut for cut in labels if cut.tensor in named]
    generator = torch.Generator().manual_seed(0)
    count = 0
    with _gradients_of(model, {*weights, *(cut.tensor for cut in scored)}), uncached(model):
        for sequence in sequences(batches) if progress is None else progress:
            model.zero_grad(set_to_none=True)
            loss = total_loss(model, sequence, generator)
            if not bool(torch.isfinite(loss)):
                raise GETAError(
                    f"the loss of {type(model).__name__} on the calibration data is {loss.item()}; check the data, or "
                    f"load the model in float32 or bfloat16"
                )
            loss.backward()
            if scored:
                total += group_sums(scored, named, groups, torch.mul).double() ** 2
            for name, square in squares.items():
                if (grad := named[name].grad) is not None:
                    square += grad.float() ** 2
            count += 1
        model.zero_grad(set_to_none=True)
    for square in squares.values():
        square /= max(count, 1)
    _check(model, total, squares)
    return Gradients((total / (2 * max(count, 1))).cpu(), squares, count)


def _check(model: nn.Module, total: Tensor, squares: Mapping[str, Tensor]) -> None:
    for name, square in squares.items():
        if not bool(torch.isfinite(square).all()):
            raise GETAError(f"gradients of {name} overflow on the calibration data; load the model in float32")
    if not bool(torch.isfinite(total).all()):
        raise GETAError("gradients overflow on the calibration data; load the model in float32")
    if not any(bool(square.any()) for square in squares.values()):
        raise GETAError(
            f"no layer of {type(model).__name__} has a gradient on the calibration data: activations overflow, or the "
            f"loss does not depend on the layers; load the model in float32 or bfloat16, or give other data"
        )


def sequences(batches: Sequence[Batch]) -> Iterator[dict[str, Any]]:
    """Yield each row of batches as a batch of its own; a batch of tensors that do not share their rows as it is."""
    for batch in batches:
        tensors = [item for item in batch.values() if isinstance(item, Tensor)]
        rows = {len(item) if item.dim() else 0 for item in tensors}
        if len(rows) != 1 or len(tensors) < len(batch):
            yield dict(batch)
            continue
        for row in range(rows.pop()):
            yield {name: item[row : row + 1] for name, item in batch.items()}


def total_loss(model: nn.Module, sequence: Batch, generator: torch.Generator) -> Tensor:
    """Return the loss of a sequence summed over all that it predicts, 0-d, differentiable.

    Args:
        model: run in evaluation mode.
        sequence: with labels, or without: they are then drawn from the model's own predictions.
        generator: on CPU, for these draws.
    """
    outputs = model(**sequence)
    loss = loss_of(outputs)  # there is one where labels of any name are given
    if loss is not None:
        return loss.float() * predictions(sequence)
    return _drawn_loss(float_tensors(outputs), generator)


def predictions(batch: Batch) -> int:
    """Return how many labels the mean loss of a batch is taken over, 1 at least."""
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return 1
    return max(int((labels != _IGNORED).sum()), 1)


def logits_of(outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the outputs of a model that are logits; all of them where none is called so."""
    return {name: item for name, item in outputs.items() if "logits" in name} or dict(outputs)


def _drawn_loss(outputs: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
    """Return -log p of labels drawn from p, or of what has no p the product with a random direction."""
    total: Tensor | None = None
    for name, item in logits_of(outputs).items():
        if not bool(torch.isfinite(item).all()):
            return item.float().sum() * torch.nan  # nothing can be drawn; the caller says what is wrong
        if "logits" in name and item.shape[-1] > 1:
            p = log_softmax(item.float().flatten(0, -2), dim=-1)
            drawn = torch.multinomial(p.detach().exp().cpu(), 1, generator=generator).to(p.device)
            term = -p.gather(1, drawn).sum()
        else:
            # The curvature of ½‖y - y'‖² is JᵀJ, the mean over random directions u of (Jᵀu)(Jᵀu)ᵀ.
            direction = torch.randn(item.shape, generator=generator).to(item.device)
            term = (item.float() * direction).sum()
        total = term if total is None else total + term
    if total is None:
        raise GETAError("the model returns no floating-point output on the calibration data; give a model with a head")
    return total


@contextmanager
def _gradients_of(model: nn.Module, names: set[str]) -> Iterator[None]:
    """Let some parameters alone have gradients, in evaluation mode; everything is restored afterwards."""
    flags = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    named = dict(model.named_parameters(remove_duplicate=False))
    wanted = {id(named[name]) for name in names if name in named}
    try:
        for parameter, _, _ in flags:
            parameter.requires_grad_(id(parameter) in wanted)
        with eval_mode(model), torch.enable_grad():
            yield
    finally:
        for parameter, flag, grad in flags:
            parameter.requires_grad_(flag)
            parameter.grad = grad
