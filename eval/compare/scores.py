"""Score groups by the rules of other methods, written from their formulas.

Each function returns one number for each group of a pruning space, in the order of its families; the lowest are to be
removed. `CHOICES` says how each method then takes them: over all layers together, or the same share of every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from geta_hf.methods.qasso.slices import group_sums
from geta_hf.qadg.group_labels import GroupLabels, consumers, family_starts, find_group_labels
from geta_hf.qadg.group_types import Family
from geta_hf.quantization.fixed import output_dim
from geta_hf.utils.module_state import eval_mode

Batches = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Choice:
    """How a method takes groups by its scores.

    Attributes:
        score: from a model, its prunable families and calibration batches to a score for each group.
        alike: whether every family loses the same share; otherwise scores compete over all families.
        kinds: kinds of families that the method prunes.
        spared: blocks at the start and at the end that keep everything.
    """

    score: Callable[[nn.Module, Sequence[Family], Batches], Tensor]
    alike: bool
    kinds: tuple[str, ...] = ("heads", "channels")
    spared: tuple[int, int] = (0, 0)


def taylor(model: nn.Module, families: Sequence[Family], batches: Batches) -> Tensor:
    """Score by Σ |w · g| over all slices of a group, with g the gradient of the mean loss over all batches.

    This is the element-wise first-order score of LLM-Pruner (arXiv 2305.11627, Eq. 5 without its second-order term).

    Args:
        model: dense; its gradients are empty afterwards.
        families: those that may lose groups.
        batches: with labels, on the model's device.

    Returns:
        float64, shape (groups,), on CPU.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    model.zero_grad(set_to_none=True)
    with eval_mode(model), torch.enable_grad():
        for batch in batches:
            (model(**batch).loss / len(batches)).backward()
    labels = [cut for cut in _labels(families, named) if cut.tensor in named]
    found = group_sums(labels, named, _count(families), lambda x, g: (x * g).abs())
    model.zero_grad(set_to_none=True)
    return found.double().cpu()


def wanda(model: nn.Module, families: Sequence[Family], batches: Batches) -> Tensor:
    """Score by Σ |W_ij| · ‖x_j‖ over the weights that read a group's output; x_j is an input over all tokens.

    This is Wanda's score (arXiv 2306.11695) summed over groups, called Wanda-sp in FLAP's paper (arXiv 2312.11983).

    Args:
        model: dense.
        families: those that may lose groups.
        batches: on the model's device.

    Returns:
        float64, shape (groups,), on CPU.
    """
    inputs = _measure_inputs(model, families, batches)

    def score(weight: Tensor, read: InputMoments) -> Tensor:
        return weight.abs().sum(0) * read.square.sqrt()

    return _sum_over_inputs(model, families, inputs, score)


def flap(model: nn.Module, families: Sequence[Family], batches: Batches) -> Tensor:
    """Score by Var(x_j) · ‖W_j‖² of the inputs that read a group's output, standardized within each family.

    This is the fluctuation metric of FLAP (arXiv 2312.11983, Eqs. 5 and 6), averaged over the inputs of a group.

    Args:
        model: dense.
        families: those that may lose groups.
        batches: on the model's device.

    Returns:
        float64, shape (groups,), on CPU.
    """
    inputs = _measure_inputs(model, families, batches)

    def score(weight: Tensor, read: InputMoments) -> Tensor:
        return weight.square().sum(0) * (read.square - read.mean**2).clamp_min(0)

    found = _sum_over_inputs(model, families, inputs, score)
    for start, family in zip(family_starts(families), families, strict=True):
        own = found[start : start + family.size]
        deviation = own.std() if family.size > 1 else torch.tensor(1.0)
        found[start : start + family.size] = (own - own.mean()) / deviation.clamp_min(1e-30)
    return found


def activation(model: nn.Module, families: Sequence[Family], batches: Batches) -> Tensor:
    """Score by the norm over tokens of what a group gives to its readers.

    This is the activation-based importance of Minitron (arXiv 2407.14679, Sec. 2.2), L2 over tokens and sequences.

    Args:
        model: dense.
        families: those that may lose groups.
        batches: on the model's device.

    Returns:
        float64, shape (groups,), on CPU.
    """
    inputs = _measure_inputs(model, families, batches)

    def score(weight: Tensor, read: InputMoments) -> Tensor:
        return read.square

    return _sum_over_inputs(model, families, inputs, score).sqrt()


def magnitude(model: nn.Module, families: Sequence[Family], batches: Batches) -> Tensor:
    """Score by Σ w² over all slices of a group; batches are not used.

    Returns:
        float64, shape (groups,), on CPU.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    labels = [cut for cut in _labels(families, named) if cut.tensor in named]
    return group_sums(labels, named, _count(families), lambda x, _: x * x).double().cpu()


CHOICES: Mapping[str, Choice] = {
    "magnitude": Choice(magnitude, alike=True),
    # Its paper prunes the middle layers alone; the same share of blocks is spared here as of the 32 there.
    "taylor": Choice(taylor, alike=True, spared=(4, 2)),
    "flap": Choice(flap, alike=False, kinds=("channels",)),
    "wanda": Choice(wanda, alike=True, kinds=("channels",)),
    "activation": Choice(activation, alike=True),
}
"""The name of a method -> how it chooses what to remove."""


# --- parts ------------------------------------------------------------------------------------------------------------


@dataclass
class InputMoments:
    """Sums over all tokens of what comes into one layer, which `_measure_inputs` turns into means.

    Attributes:
        mean: E[x], float64, shape (inputs,).
        square: E[x²], in the same shape.
        count: tokens.
    """

    mean: Tensor
    square: Tensor
    count: int = 0


def _labels(families: Sequence[Family], named: Mapping[str, Tensor]) -> tuple[GroupLabels, ...]:
    return find_group_labels(families, {name: tuple(tensor.shape) for name, tensor in named.items()})


def _count(families: Sequence[Family]) -> int:
    return sum(family.size for family in families)


def _readers(model: nn.Module, families: Sequence[Family]) -> list[tuple[GroupLabels, nn.Module]]:
    """Return what groups cut of the inputs of linear layers, and those layers."""
    named = dict(model.named_parameters(remove_duplicate=False))
    found = []
    for cut in _labels(consumers(families), named):
        layer = model.get_submodule(cut.tensor.rpartition(".")[0])
        if cut.tensor.endswith(".weight") and named[cut.tensor].dim() == 2 and cut.dim != output_dim(layer):
            found.append((cut, layer))
    return found


@torch.no_grad()
def _measure_inputs(model: nn.Module, families: Sequence[Family], batches: Batches) -> dict[str, InputMoments]:
    """Return the moments of what comes into each layer that reads groups, by the name of its weight."""
    found: dict[str, InputMoments] = {}
    with ExitStack() as stack:
        for cut, layer in _readers(model, families):
            zeros = torch.zeros(len(cut.label), dtype=torch.float64)
            found[cut.tensor] = InputMoments(zeros, zeros.clone())

            def watch(_: nn.Module, args: tuple[Any, ...], moments: InputMoments = found[cut.tensor]) -> None:
                rows = args[0].detach().reshape(-1, args[0].shape[-1]).double().cpu()
                moments.mean += rows.sum(0)
                moments.square += rows.square().sum(0)
                moments.count += len(rows)

            stack.callback(layer.register_forward_pre_hook(watch).remove)
        stack.enter_context(eval_mode(model))
        for batch in batches:
            model(**batch)
    for moments in found.values():
        moments.mean /= max(moments.count, 1)
        moments.square /= max(moments.count, 1)
    return found


@torch.no_grad()
def _sum_over_inputs(
    model: nn.Module,
    families: Sequence[Family],
    inputs: Mapping[str, InputMoments],
    score: Callable[[Tensor, InputMoments], Tensor],
) -> Tensor:
    """Return the mean of a score over the inputs through which each group is read; float64, shape (groups,).

    Args:
        model: whose layers read the groups.
        families: those that may lose groups.
        inputs: of each of these layers.
        score: from a weight as (outputs, inputs) and the moments of its inputs to a number for each input.
    """
    groups = _count(families)
    total = torch.zeros(groups + 1, dtype=torch.float64)
    number = torch.zeros(groups + 1, dtype=torch.float64)
    for cut, layer in _readers(model, families):
        weight: Tensor = layer.weight.detach().double().cpu()  # type: ignore[assignment, operator, union-attr]
        rows = weight if cut.dim == 1 else weight.t()
        values = score(rows, inputs[cut.tensor])
        total.index_add_(0, cut.label, values)
        number.index_add_(0, cut.label, torch.ones_like(values))
    return total[:groups] / number[:groups].clamp_min(1)
