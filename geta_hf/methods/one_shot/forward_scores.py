"""Measure without gradients what removing a group and rounding a weight are expected to cost, one block at a time.

Both are the share of a layer's output that is lost, E‖ΔW x‖² / E‖W x‖², with the inputs of a layer taken for
uncorrelated: Σ_j E[x_j²] ‖ΔW_j‖² for the columns j. A removed group loses the columns that read it (ΔW_j = W_j), so its
score is that of FLAP (https://arxiv.org/abs/2312.11983) with E[x²] in place of the variance, since no bias makes up for
the mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from geta_hf.methods.one_shot.choice import Losses
from geta_hf.methods.one_shot.layers import rounding_losses
from geta_hf.methods.qasso.slices import sum_others
from geta_hf.qadg.group_labels import GroupLabels
from geta_hf.quantization.by_block import Batch, BlockRunner, find_blocks
from geta_hf.quantization.covariances import as_rows, collecting, has_covariance, like_weight


@torch.no_grad()
def measure_forward(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    labels: Sequence[GroupLabels],
    groups: int,
    widths: Sequence[int],
    grid: str,
    progress: Callable[[Iterable[Any], str, int], Iterable[Any]],
) -> Losses:
    """Run batches block by block; the model is unchanged.

    In memory at a time are the inputs' covariances of one block, and what two blocks give for all batches.

    Args:
        model: dense.
        layers: those to round, by path, in the order of the ledger.
        batches: on the model's device.
        labels: the slices that read each group's output, as `qadg.group_labels.consumers` gives them.
        groups: number of groups.
        widths: integer widths, ascending.
        grid: what has a step size of its own, as in `attach_quantizers`.
        progress: wraps blocks in a progress bar.

    Raises:
        GETAError: activations overflow.
    """
    removal = torch.zeros(groups + 1, dtype=torch.float64)
    rounding = torch.zeros(len(layers), len(widths), dtype=torch.float64)
    places = {name: place for place, name in enumerate(layers)}
    cuts: dict[str, list[GroupLabels]] = {}
    for cut in labels:
        cuts.setdefault(cut.tensor, []).append(cut)
    blocks = find_blocks(model, layers, batches[0])
    runner = BlockRunner(model, batches)
    for block in progress(blocks, "scores", len(blocks)):
        names = [name for stage in block.stages for name in stage]
        shared = {name: stage[0] for stage in block.stages for name in stage}
        own = {name: layers[name] for name in names if has_covariance(layers[name])}
        mask: list[Tensor | None] = [None]
        with collecting(own, {name: _owner(shared[name], name, own) for name in own}, mask) as found:
            runner.finish(block, mask)
        runner.forget(block)
        for name in names:
            layer = layers[name]
            covariance = found[_owner(shared[name], name, own)].mean(name) if name in own else None
            importance = _importance(layer, covariance)
            rounding[places[name]] = rounding_losses({name: layer}, {f"{name}.weight": 2 * importance}, widths, grid)[0]
            if covariance is not None:  # else nothing is known of what it reads, so its groups are kept
                _add_lost(removal, layer, importance, cuts.get(f"{name}.weight", ()))
    return Losses(removal[:groups], rounding, widths)


@torch.no_grad()
def removal_by_inputs(
    layers: Mapping[str, nn.Module],
    covariances: Mapping[str, Tensor | None],
    labels: Sequence[GroupLabels],
    groups: int,
) -> Tensor:
    """Return what removing each group is expected to cost, as `measure_forward` does, from covariances at hand.

    Args:
        layers: those with quantizers, by path.
        covariances: of each layer's inputs, shape (in, in); None where nothing reached it.
        labels, groups: as in `measure_forward`.
    """
    removal = torch.zeros(groups + 1, dtype=torch.float64)
    for name, layer in layers.items():
        covariance = covariances.get(name)
        cuts = [cut for cut in labels if cut.tensor == f"{name}.weight"]
        if covariance is not None and cuts:
            _add_lost(removal, layer, _importance(layer, covariance), cuts)
    return removal[:groups]


def _add_lost(removal: Tensor, layer: nn.Module, importance: Tensor, cuts: Iterable[GroupLabels]) -> None:
    lost = importance * layer.weight.float() ** 2  # type: ignore[operator]
    for cut in cuts:
        cut.sums(lost.device).add_to(removal, sum_others(lost, cut.dim).double().to(removal.device))


def _owner(first: str, name: str, layers: Mapping[str, nn.Module]) -> str:
    """Return the layer whose covariance one of the same stage shares."""
    return first if first in layers else name


def _importance(layer: nn.Module, covariance: Tensor | None) -> Tensor:
    """Return by how much the square of each weight's change counts, in the weight's shape; without a copy if it can be.

    Without a covariance all inputs count alike.
    """
    weight: Tensor = layer.weight  # type: ignore[assignment]
    rows = as_rows(layer, weight)
    squares = torch.ones(rows.shape[1], device=weight.device) if covariance is None else covariance.diagonal()
    total = torch.zeros((), device=weight.device)
    for part in rows.split(1024):
        total += (part.float() ** 2 * squares).sum()
    return like_weight(layer, (squares / total.clamp_min(1e-30)).expand_as(rows))
