"""Prune depth: remove entire blocks from a model before anything else happens to it.

What remains is an ordinary, shorter model of the same class: its configuration says so, and every step after this one
(quantizers, pruning space, plan, training, export) sees no other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from geta_hf.costs.model_costs import forward_uses
from geta_hf.errors import GETAError
from geta_hf.qadg.residual_blocks import Block, find_blocks, residual_blocks, skipping, uncached
from geta_hf.surgery.compare_outputs import TOLERANCE, Outputs, attention_outputs, comparison_mode, prove_equal
from geta_hf.surgery.record import stepping
from geta_hf.surgery.shorter_config import shorter_changes
from geta_hf.surgery.undo import Undoable
from geta_hf.utils.model_io import Batch, loss_of, named_outputs, to_device


@dataclass
class DroppedLayers(Undoable):
    """Which blocks a model lost.

    Attributes:
        removed: their module paths in the dense model, in the order in which they were chosen.
        kept: path of every list that lost some -> the dense places of those that remain.
        losses: mean loss on the calibration batches: of the dense model, and after each choice; empty where the blocks
            were named.
        work: elements times uses of their quantized weights, as a ledger counts them.
    """

    removed: tuple[str, ...] = ()
    kept: dict[str, tuple[int, ...]] = field(default_factory=dict)
    losses: tuple[float, ...] = ()
    work: float = 0.0

    def __str__(self) -> str:
        count = sum(len(places) for places in self.kept.values()) + len(self.removed)
        text = f"layers removed: {', '.join(self.removed)} ({len(self.removed)} of {count})"
        if self.losses:
            text += f"; calibration loss {self.losses[0]:.4g}, without them {self.losses[-1]:.4g}"
        return text


def drop_layers(
    model: nn.Module, wanted: int | Sequence[str], inputs: Batch, loss: Callable[[], float], layers: Iterable[str] = ()
) -> DroppedLayers:
    """Remove entire blocks from a model, in place.

    Only blocks that QADG's residual stream runs through, and that only add to it, can be removed (`find_blocks`). A
    number of them is chosen one by one: the one without which the loss is lowest, computed without it and without those
    chosen before. The shorter model must be what its shorter configuration builds, give the logits of the dense one
    with those blocks skipped, and the same logits with a cache as without.

    Args:
        model: dense, with its weights; without quantizers.
        wanted: how many blocks, or their module paths.
        inputs: one batch without labels, for the proofs.
        loss: computes the model's current loss, such as by `mean_loss`; the same number on every process.
        layers: paths of the layers that would be quantized, to count the work of those that are removed.

    Raises:
        GETAError: a model that is not Hugging Face's, too few blocks that can be removed, a path that is none of them,
            or a configuration that can't say which blocks remain. The model is then as before.
    """
    if not isinstance(model, PreTrainedModel):
        raise GETAError(
            f"drop_layers shortens a Hugging Face model by its configuration, which {type(model).__name__} lacks; set "
            f"it to 0"
        )
    inputs = to_device(inputs, model.device)
    blocks = find_blocks(model, inputs)
    removed: list[Block]
    losses: list[float]
    if isinstance(wanted, int):
        removed, losses = _choose(model, blocks, wanted, loss)
    else:
        removed, losses = _named(blocks, wanted), []
    names = tuple(block.name for block in removed)
    dropped = DroppedLayers(names, _kept(model, removed), tuple(losses), _work(model, layers, inputs, names))
    # Before the cut, which changes this very model: afterwards there is no dense one to compare with.
    expected = _reference(model, removed, inputs)
    try:
        _shorten(model, dropped)
        _prove(model, expected, inputs)
    # An interrupt too must not leave a model whose layers and configuration disagree.
    except BaseException:
        dropped.restore()
        raise
    return dropped


def check_drop(model: PreTrainedModel, wanted: int | Sequence[str], inputs: Batch) -> None:
    """Check what prevents the removal of layers before there are weights; the rest shows only with them.

    Args:
        model: on any device or meta; left unchanged.
        wanted, inputs: as in `drop_layers`.

    Raises:
        GETAError: too few layers, a path that is none, or a configuration that can't say which layers remain.
    """
    blocks = residual_blocks(model, inputs)
    if isinstance(wanted, int):
        # On meta every block is as good as any other; only whether enough of them can be removed is of interest.
        _choose(model, blocks, wanted, lambda: 0.0)
    else:
        shorter_changes(model, _kept(model, _named(blocks, wanted)))


def mean_loss(model: Any, batches: Sequence[Mapping[str, Any]]) -> Tensor:
    """Return the model's own loss, 0-d: the mean over batches with labels, which are moved to its device.

    Raises:
        GETAError: there is no batch, or the model computes no loss of it.
    """
    losses = []
    for batch in batches:
        losses.append(loss_of(model(**to_device(batch, model.device), **uncached(model))))
    known = [loss for loss in losses if loss is not None]
    if not losses or len(known) < len(losses):
        raise GETAError(
            "drop_layers chooses layers by the model's own loss, but the batches of train_dataset hold no labels; add "
            "them, or name the layers to remove"
        )
    return torch.stack([loss.detach().float() for loss in known]).mean()


# --- which blocks -------------------------------------------------------------------------------------------------


def _choose(
    model: PreTrainedModel, blocks: Sequence[Block], count: int, loss: Callable[[], float]
) -> tuple[list[Block], list[float]]:
    """Choose the blocks that are missed least, one by one; return the loss before and after each choice too.

    One by one, since blocks stand in for each other: the two that are missed least alone may be missed most together.
    """
    removed: list[Block] = []
    with comparison_mode(model):
        losses = [loss()]
        for _ in range(count):
            found: list[tuple[float, Block]] = []
            for block in _removable(model, blocks, removed):
                with skipping(model, [*removed, block]):
                    found.append((loss(), block))
            found.sort(key=lambda pair: (pair[0] != pair[0], pair[0]))  # NaN last
            # Asked lazily, best block first: each answer takes several builds of the model on meta.
            best = next((pair for pair in found if _can_be_said(model, [*removed, pair[1]])), None)
            if best is None:
                raise GETAError(_too_many(model, blocks, count, len(removed)))
            losses.append(best[0])
            removed.append(best[1])
    return removed, losses


def _can_be_said(model: PreTrainedModel, removed: Sequence[Block]) -> bool:
    """Return whether a shorter configuration builds what remains."""
    try:
        shorter_changes(model, _kept(model, removed))
    except GETAError:
        return False
    return True


def _removable(model: nn.Module, blocks: Sequence[Block], removed: Sequence[Block]) -> Iterator[Block]:
    """Yield the blocks that may still be removed; a list never loses its last one."""
    for block in blocks:
        length = len(model.get_submodule(block.series)._modules)
        remaining = length - sum(other.series == block.series for other in removed)
        if not block.reason and block not in removed and remaining > 1:
            yield block


def _too_many(model: nn.Module, blocks: Sequence[Block], count: int, possible: int) -> str:
    reasons = "; ".join(dict.fromkeys(f"{block.name}: {block.reason}" for block in blocks if block.reason))
    return (
        f"drop_layers = {count}, but at most {possible} layers of {type(model).__name__} can be removed; lower it. One "
        f"layer remains in every list, as do those that no shorter configuration builds, and these: {reasons or 'none'}"
    )


def _named(blocks: Sequence[Block], names: Sequence[str]) -> list[Block]:
    known = {block.name: block for block in blocks}
    for name in names:
        if name not in known:
            raise GETAError(
                f"drop_layers names {name!r}, which is no layer of the residual stream; there are "
                f"{', '.join(known) or 'none'}. A model that was shortened before takes drop_layers = 0"
            )
        if known[name].reason:
            raise GETAError(f"drop_layers names {name}, which can't be removed: {known[name].reason}; don't name it")
    return [known[name] for name in dict.fromkeys(names)]


def _kept(model: nn.Module, removed: Sequence[Block]) -> dict[str, tuple[int, ...]]:
    kept = {}
    for series in dict.fromkeys(block.series for block in removed):
        places = {int(block.name.rpartition(".")[2]) for block in removed if block.series == series}
        length = len(model.get_submodule(series)._modules)
        kept[series] = tuple(place for place in range(length) if place not in places)
        if not kept[series]:
            raise GETAError(f"drop_layers names all of {series}; keep at least one of them")
    return kept


def _work(model: PreTrainedModel, layers: Iterable[str], inputs: Batch, removed: Iterable[str]) -> float:
    """Return Σ elements · uses of the layers within removed blocks, relative to the layer outside that is used most."""
    within = tuple(f"{name}." for name in removed)
    uses = forward_uses(model, layers, inputs)
    most = max((count for name, count in uses.items() if not name.startswith(within)), default=0) or 1
    total = 0.0
    for name, count in uses.items():
        if name.startswith(within):
            # A layer that the batch did not reach, such as an expert's, counts as used as often as the others.
            total += model.get_parameter(f"{name}.weight").numel() * (count or most) / most
    return total


# --- the shorter model ---------------------------------------------------------------------------------------------


def _shorten(model: PreTrainedModel, dropped: DroppedLayers) -> None:
    """Remove the blocks; attributes and configurations become what the shorter configuration builds."""
    changes = shorter_changes(model, dropped.kept)
    for series, kept in dropped.kept.items():
        dropped.cut_list(model.get_submodule(series), kept)
    dropped.apply(changes, model)


# --- the proof ----------------------------------------------------------------------------------------------------


def _reference(model: PreTrainedModel, removed: Sequence[Block], inputs: Batch) -> tuple[Outputs, bool]:
    """Return the dense model's outputs without the blocks, and whether its cache changes nothing."""
    with skipping(model, removed):
        outputs = attention_outputs(model, inputs)
    return outputs, _cache_agrees(model, inputs)


def _prove(model: PreTrainedModel, expected: tuple[Outputs, bool], inputs: Batch) -> None:
    outputs, cached = expected
    prove_equal(outputs, attention_outputs(model, inputs), model.dtype, "shortened")
    # A dense model whose own cache gives other logits proves nothing about the shorter one's.
    if cached and not _cache_agrees(model, inputs):
        raise GETAError(
            f"without these layers {type(model).__name__} gives other logits with a cache than without; drop other "
            f"layers, or set drop_layers to 0"
        )


def _cache_agrees(model: PreTrainedModel, inputs: Batch) -> bool:
    """Return whether the last token's logits are the same step by step; False for a model that can't do that.

    A cache holds keys and values by the place of a layer: places that are not counted again after blocks were removed
    show here and nowhere else.
    """
    if not model.can_generate() or "input_ids" not in inputs or model.config.is_encoder_decoder:
        return False
    unpadded = {"input_ids": inputs["input_ids"]}
    with comparison_mode(model):
        full = named_outputs(model(**unpadded, **uncached(model)))["logits"][:, -1:]
        try:
            with stepping(model):
                stepped = model(**unpadded)
        except Exception:  # a model without a cache says so in many kinds of errors
            return False
    difference = float((full - stepped).abs().max())
    return difference <= TOLERANCE[model.dtype] * max(1.0, float(full.abs().max()))
