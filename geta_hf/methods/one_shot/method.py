"""Compression without training as a `Method`: what `geta_hf.compress` runs on a model."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from geta_hf.costs.ledger import Ledger
from geta_hf.errors import GETAError
from geta_hf.methods.base import Batches, CompressionResult, Method, Run
from geta_hf.methods.compensation import Kept, find_kept, leave_middles
from geta_hf.methods.one_shot.choice import (
    Candidate,
    Losses,
    bits_per_weight,
    budget_of,
    find_candidates,
    find_single_kinds,
)
from geta_hf.methods.one_shot.config import OneShotConfig
from geta_hf.methods.one_shot.first_weights import FirstWeights
from geta_hf.methods.one_shot.forward_scores import measure_forward, removal_by_inputs
from geta_hf.methods.one_shot.gradients import logits_of, measure_gradients, predictions, sequences
from geta_hf.methods.one_shot.layers import Grid, codes_on, compress_layer, rounding_losses, values_of
from geta_hf.methods.one_shot.memory import check_memory, foresee_memory
from geta_hf.methods.one_shot.score_file import fingerprint, read_scores, write_scores
from geta_hf.methods.parameter_groups import quantizer_parameters
from geta_hf.methods.qasso.slices import build_slices, group_sums, zero_slices
from geta_hf.qadg.group_labels import GroupLabels, consumers, family_of_group, family_starts, find_group_labels
from geta_hf.qadg.space import PruningSpace
from geta_hf.quantization import attach_quantizers, detach_quantizers, quantized_layers, select_layers
from geta_hf.quantization.attach import layer_grid
from geta_hf.quantization.by_block import Batch, Block, BlockRunner, find_blocks, uncached
from geta_hf.quantization.covariances import (
    as_rows,
    collecting,
    has_covariance,
    measure_covariances,
    recording,
)
from geta_hf.quantization.quantizer import freeze_quantizers
from geta_hf.utils.free_memory import give_back
from geta_hf.utils.model_io import float_tensors, loss_of
from geta_hf.utils.module_state import eval_mode

logger = logging.getLogger(__name__)

Progress = Callable[[Iterable[Any], str, int], Iterable[Any]]
"""Wrap an iterable in a progress bar: takes it, what is being done, and how many items there are."""


MOST_CODED_BITS = 8
"""The widest weights whose codes are kept from one trial to the next."""


def no_progress(items: Iterable[Any], what: str, total: int) -> Iterable[Any]:
    """Return the items themselves."""
    return items


@dataclass(frozen=True)
class Calibration:
    """The data that decides everything, on the model's device, in batches of keyword arguments.

    Attributes:
        scores: for gradients, one sequence after the other.
        covariances: for compensation.
        held_back: in no other part; the splits of the budget are compared on it.
    """

    scores: Sequence[Batch]
    covariances: Sequence[Batch]
    held_back: Sequence[Batch]


@dataclass(frozen=True)
class Trial:
    """One split of the budget and what it measured.

    Attributes:
        share: of the prunable parameters that is removed.
        groups: how many groups are removed.
        mean_bits: mean width over the remaining weights.
        loss: on the held-back data; None where nothing was to be compared.
        loss_in_full: the same with the layers compressed one after the other; None where that was not done.
    """

    share: float
    groups: int
    mean_bits: float
    loss: float | None
    loss_in_full: float | None = None


@dataclass(frozen=True)
class Outcome:
    """What a compression did.

    Attributes:
        result: removed groups and widths.
        trials: the splits that were tried, with what they measured.
        chosen: position of the one that was taken.
        dense_loss: on the held-back data, before; in nats for each prediction, or 0 where outputs are compared.
        loss: after.
        has_labels: whether these are losses of labels; otherwise they are distances of outputs from the dense model's.
        bits_per_weight: what the budget leaves for each weight if no group is removed, step sizes counted.
        unreached: layers that no calibration data reached; they are rounded to nearest.
        loss_before_recovery: where training followed, the loss without it; None where none did.
    """

    result: CompressionResult
    trials: tuple[Trial, ...]
    chosen: int
    dense_loss: float
    loss: float
    has_labels: bool
    bits_per_weight: float
    unreached: tuple[str, ...]
    loss_before_recovery: float | None = None


@dataclass
class Measured:
    """What is measured on the dense model, once for all budgets; filled when it is first needed.

    Attributes:
        settings: of the config, those that losses depend on; what was measured under others is measured again.
        losses: what removing and rounding are expected to cost.
        dense_loss: on the held-back data.
        reference: outputs on the held-back data, where there are no labels.
        covariances: of the inputs of all layers, by path.
        path: file in which losses are kept, and from which they are read where they are of the same model, data and
            settings. Default None: they are not kept.
        several: whether other budgets follow, for which covariances are kept too, in memory.
    """

    settings: tuple[Any, ...] | None = None
    losses: Losses | None = None
    dense_loss: float | None = None
    reference: list[dict[str, Tensor]] | None = None
    covariances: dict[str, Tensor | None] | None = None
    path: Path | None = None
    several: bool = False

    def check(self, config: OneShotConfig) -> None:
        """Forget the losses that were measured under other settings."""
        settings = score_settings(config)
        if self.settings is not None and self.settings != settings:
            self.losses = None
        self.settings = settings


def score_settings(config: OneShotConfig) -> tuple[Any, ...]:
    """Return the settings of a config that expected losses depend on, as plain data."""
    return (
        config.saliency,
        list(config.widths),
        config.grid,
        config.four_levels,
        [list(config.include or ()), list(config.exclude or ())],
        [list(config.prune or ()), list(config.keep or ())],
    )


class OneShotMethod(Method):
    """Remove groups, choose widths and round, each with compensation, without training.

    Args:
        config: an OneShotConfig.
    """

    config: OneShotConfig
    stages = ("compression",)
    _result: CompressionResult | None = None
    _work: _Work | None = None
    _grids: Mapping[str, Grid] | None = None
    _removed: Tensor | None = None
    _steps = 0

    def check(self, frozen_weights: bool) -> None:
        """Raise GETAError before `compress`: training decides nothing here, it only continues with a result."""
        if not self.finished:
            raise GETAError("OneShotConfig is for geta_hf.compress, which trains nothing; train with GETAConfig")

    def attach(self, model: nn.Module, batches: Batches | None) -> None:
        """Put quantizers on the layers, in place; their grids are those of `compress`, or read from a checkpoint.

        After `compress` they are frozen, since nothing about them is learned.
        """
        attach_quantizers(
            model,
            include=self.config.include,
            exclude=self.config.exclude,
            initial_bits=self.config.bits[1],
            clipping="max",
            grid=self.config.grid,
        )
        if self._grids is not None and batches is not None:
            _write_grids(model, self._grids)
            freeze_quantizers(model)
            for parameter in quantizer_parameters(model).values():
                parameter.requires_grad_(False)

    def wrap_optimizer(
        self, base: torch.optim.Optimizer, names: Mapping[Tensor, str], model: nn.Module, run: Run
    ) -> torch.optim.Optimizer:
        """Let an optimizer set removed groups to zero after each of its steps, which would bring them back.

        Raises:
            GETAError: before `compress`.
        """
        self.check(frozen_weights=False)
        assert self._removed is not None
        named = dict(model.named_parameters(remove_duplicate=False))
        labels = run.frozen.with_adapters([cut for cut in run.ledger.labels if cut.tensor in named])
        slices = build_slices(labels, self._removed, family_of_group(run.space.trainable), named)

        @torch.no_grad()
        def keep_removed(*_: object) -> None:
            zero_slices(slices, named)
            self._steps += 1

        base.register_step_post_hook(keep_removed)
        return base

    @property
    def step_count(self) -> int:
        """The optimizer steps that followed `compress`."""
        return self._steps

    @property
    def finished(self) -> bool:
        """True once `compress` has run."""
        return self._result is not None

    def result(self) -> CompressionResult:
        """Return removed groups by family and widths by module path. Raise GETAError before `compress`."""
        if self._result is None:
            raise GETAError("nothing is compressed yet; call compress first")
        return self._result

    def compress(
        self,
        model: nn.Module,
        data: Calibration,
        space: PruningSpace,
        ledger: Ledger,
        progress: Progress = no_progress,
        measured: Measured | None = None,
        candidates: Sequence[Candidate] | None = None,
    ) -> Outcome:
        """Compress a model in place and attach its quantizers; on any failure it is as it was.

        A copy of the dense weights is kept for `undo`, until `release`.

        Args:
            model: dense, without quantizers.
            data: calibration data.
            space: its pruning space.
            ledger: sizes of the model, with its quantizers.
            progress: wraps what takes long in a progress bar.
            measured: of the same dense model, data and space, by a run with another budget; filled by this one.
            candidates: splits of the budget to try in place of those that the config's scores propose.

        Raises:
            GETAError: a target out of reach, activations or gradients that overflow.
        """
        measured = Measured() if measured is None else measured
        measured.check(self.config)
        self._work = _Work(model, self.config, data, space, ledger, progress, measured)
        try:
            outcome, grids, self._removed = self._work.run(candidates)
            self.attach(model, None)
            names = {name: grids[id(layer.weight)] for name, layer in quantized_layers(model).items()}
            _write_grids(model, names)
            self._grids = names
        except BaseException:
            self.undo()
            raise
        self._result = outcome.result
        return outcome

    @torch.no_grad()
    def leave_middles(self, first: nn.Module) -> None:
        """Move weights from the middle of what is rounded alike to where they were, as near as it goes, in place.

        What the model computes does not change; training that follows changes it in fewer steps.

        Args:
            first: the dense model, on the same device.

        Raises:
            GETAError: before `compress`, or after `release`.
        """
        if self._work is None or self._removed is None:
            raise GETAError("nothing is compressed, or the method has been released; call compress first")
        leave_middles(self._work.model, first)
        self._work.zero(self._removed)

    def undo(self) -> None:
        """Make the model dense again: without quantizers, with its first weights. Nothing happens after `release`."""
        if self._work is None:
            return
        detach_quantizers(self._work.model)
        self._work.restore()
        self._result = self._grids = self._removed = None
        self.release()

    def release(self) -> None:
        """Forget the dense weights."""
        self._work = None


@torch.no_grad()
def _write_grids(model: nn.Module, grids: Mapping[str, Grid]) -> None:
    """Set (d, q_m) of every quantizer to the grid on which its weight already is, by the path of its layer."""
    for name, layer in quantized_layers(model).items():
        grid = grids[name]
        layer.weight_quantizer.q_m.copy_(grid.q_m)
        layer.weight_quantizer.d.copy_(grid.d)
        if grid.order is not None:
            layer.weight_quantizer.set_order(grid.order)
        layer.weight_quantizer.set_four_levels(grid.four_levels)


_LESS = 0.7
"""A split that removes at most this share of what another removes is worth a comparison with all that is done."""


def _same(one: Candidate, other: Candidate) -> bool:
    return torch.equal(one.removed, other.removed)


def _best(trials: Sequence[Trial]) -> int:
    """Return the position of the trial of least loss."""
    return min(range(len(trials)), key=lambda place: trials[place].loss or 0.0)


def _expected_in_full(trials: Sequence[Trial], place: int) -> float:
    """Return what a split will lose when all is done, if what its trial gets wrong follows a line over shares.

    It spares a comparison, which takes as long as all that comes after the trials.

    Returns:
        Minus infinity where fewer than two other splits are measured both ways, so that nothing is known.
    """
    own = trials[place]
    known = sorted(
        (trial.share, trial.loss_in_full - trial.loss)
        for trial in trials
        if trial.loss is not None and trial.loss_in_full is not None
    )
    if len(known) < 2 or own.loss is None:
        return -math.inf
    # Splits are measured from the largest share down, so the first two are next to this one.
    (near, error), (far, other_error) = known[:2]
    return own.loss + error + (own.share - near) * (other_error - error) / (far - near)


class _Work:
    """One run of `OneShotMethod.compress`: the model, the data, and what can be restored."""

    def __init__(
        self,
        model: nn.Module,
        config: OneShotConfig,
        data: Calibration,
        space: PruningSpace,
        ledger: Ledger,
        progress: Progress,
        measured: Measured,
    ) -> None:
        self.model, self.config, self.data = model, config, data
        self.measured = measured
        self.grid = str(config.grid)
        self.space, self.ledger, self.progress = space, ledger, progress
        self.families = space.trainable
        self.named = dict(model.named_parameters(remove_duplicate=False))
        every = select_layers(model, config.include, config.exclude)
        # Tied layers have one weight, which is rounded once.
        self.layers = {
            entry.weight.removesuffix(".weight"): every[entry.weight.removesuffix(".weight")] for entry in ledger.layers
        }
        self.names = {id(layer.weight): name for name, layer in self.layers.items()}
        self.every = every
        changed = {id(p): p for p in (self.named[cut.tensor] for cut in ledger.labels if cut.tensor in self.named)}
        changed |= {id(layer.weight): layer.weight for layer in self.layers.values()}  # type: ignore[misc]
        self._originals = FirstWeights(changed.values(), on_disk=config.frugal)
        self.unreached: list[str] = []
        # Path and width of a weight -> its codes and grid, a byte for each weight, while trials last.
        self._rounded: dict[tuple[str, int], tuple[Tensor, Grid]] = {}

    @torch.no_grad()
    def restore(self) -> None:
        """Give all weights their first values back."""
        self._originals.restore()

    def run(self, candidates: Sequence[Candidate] | None = None) -> tuple[Outcome, dict[int, Grid], Tensor]:
        """Compress; return what was done, the grid of each weight by its id, and the removed groups."""
        if self.config.frugal:
            give_back()
            check_memory(foresee_memory(self.model, self.layers, self.data.covariances), self._device)
        before, reference = self._dense_loss()
        found = candidates is None
        if candidates is None:
            candidates = find_candidates(self.config, self.families, self.ledger, self._expected_losses())
        trials = self._try(candidates, reference)
        chosen = _best(trials)
        if found and len(trials) > 1:
            single = self._single_kinds(trials[chosen].share)
            candidates, trials = [*candidates, *single], [*trials, *self._measured_trials(single, reference)]
            chosen = _best(trials)
        self._rounded.clear()
        chosen, grids, after = self._compress_best(candidates, trials, chosen, reference)
        removed = candidates[chosen].removed
        bits = dict(zip(self.layers, candidates[chosen].weight_bits, strict=True))
        result = CompressionResult(
            removed=dict(self._by_family(removed)),
            weight_bits={name: bits[self.names[id(layer.weight)]] for name, layer in self.every.items()},
        )
        unit, amount = budget_of(self.config)
        return (
            Outcome(
                result=result,
                trials=tuple(trials),
                chosen=chosen,
                dense_loss=before,
                loss=after,
                has_labels=reference is None,
                bits_per_weight=bits_per_weight(self.ledger, unit, amount),
                unreached=tuple(dict.fromkeys(self.unreached)),
            ),
            grids,
            removed,
        )

    @property
    def _device(self) -> torch.device:
        return next(iter(self.named.values())).device

    def _dense_loss(self) -> tuple[float, list[dict[str, Tensor]] | None]:
        if self.measured.dense_loss is None:
            loss, self.measured.reference = measure(self.model, self.data.held_back)
            outputs = [item for batch in self.measured.reference or () for item in batch.values()]
            if not math.isfinite(loss) or not all(bool(torch.isfinite(item).all()) for item in outputs):
                raise GETAError(
                    f"activations overflow: what {type(self.model).__name__} computes on the calibration data is not "
                    f"finite; check the data, or load the model in float32 or bfloat16"
                )
            self.measured.dense_loss = loss
        return self.measured.dense_loss, self.measured.reference

    def _expected_losses(self) -> Losses:
        measured = self.measured
        if measured.losses is not None:
            return measured.losses
        if measured.path is None:
            measured.losses = self._losses()
            return measured.losses
        key = fingerprint(self.model, self.data.scores, measured.settings, self.layers, self.ledger.groups)
        measured.losses = read_scores(measured.path, key)
        if measured.losses is None:
            measured.losses = self._losses()
            write_scores(measured.path, key, measured.losses)
        return measured.losses

    def _by_family(self, removed: Tensor) -> Iterable[tuple[str, Tensor]]:
        for start, family in zip(family_starts(self.families), self.families, strict=True):
            yield family.name, removed[start : start + family.size].clone()

    # --- what everything is expected to cost --------------------------------------------------------------------------

    def _losses(self) -> Losses:
        """Measure what removing each group and rounding each weight is expected to cost."""
        widths = self.config.widths
        if self.config.saliency == "magnitude":
            removal = group_sums(self.ledger.labels, self.named, self.ledger.groups, lambda x, _: x * x)
            alike = {f"{name}.weight": torch.ones(layer.weight.shape) for name, layer in self.layers.items()}  # type: ignore[arg-type]
            rounding = rounding_losses(self.layers, alike, widths, self.grid, self.config.four_levels)
            return Losses(removal.double().cpu() / 2, rounding, widths)
        read = self._readers()
        if self.config.frugal:
            data, groups = self.data.covariances, self.ledger.groups
            losses = measure_forward(self.model, self.layers, data, read, groups, widths, self.grid, self.progress)
            return Losses(self._keep_unreached(losses.removal), losses.rounding, widths)
        weights = [f"{name}.weight" for name in self.layers]
        count = sum(1 for _ in sequences(self.data.scores))
        bar = self.progress(sequences(self.data.scores), "scores", count)
        found = measure_gradients(self.model, self.data.scores, read, self.ledger.groups, weights, bar)
        rounding = rounding_losses(self.layers, found.squares, widths, self.grid, self.config.four_levels)
        return Losses(self._keep_unreached(found.groups), rounding, widths)

    def _readers(self) -> tuple[GroupLabels, ...]:
        """Return the slices that read each group's output."""
        shapes = {name: tuple(tensor.shape) for name, tensor in self.named.items()}
        return find_group_labels(consumers(self.families), shapes)

    def _keep_unreached(self, removal: Tensor) -> Tensor:
        """Return the losses of groups, very large for families that no gradient reached: nothing is known of them."""
        removal = removal.clone()
        for start, family in zip(family_starts(self.families), self.families, strict=True):
            own = removal[start : start + family.size]
            if not bool(own.any()):
                logger.warning("the calibration data says nothing of the groups of %s, so all are kept", family.name)
                own.fill_(1e30)
        return removal

    # --- splits of the budget -----------------------------------------------------------------------------------------

    def _try(self, candidates: Sequence[Candidate], reference: Any) -> list[Trial]:
        """Measure the candidates on held-back data, each compressed on the covariances of the dense model."""
        sizes = [self._trial(candidate, None) for candidate in candidates]
        return sizes if len(candidates) == 1 else self._measured_trials(candidates, reference)

    def _measured_trials(self, candidates: Sequence[Candidate], reference: Any) -> list[Trial]:
        """Measure candidates, however few; arguments as in `_try`."""
        # All covariances at once may take more than the weights.
        covariances = None if self.config.frugal else self._dense_covariances()
        trials = []
        for candidate in self.progress(candidates, "splits", len(candidates)):
            if covariances is None:
                self._compress_by_block(candidate)
            else:
                self._round_for_trial(candidate, covariances)
            loss, _ = measure(self.model, self.data.held_back, reference)
            self.restore()
            trials.append(self._trial(candidate, loss if math.isfinite(loss) else math.inf))
        return trials

    @torch.no_grad()
    def _round_for_trial(self, candidate: Candidate, covariances: Mapping[str, Tensor | None]) -> None:
        """Compress as `_compress_at_once` does, in place, without doing again what an earlier trial has done.

        Rows of a weight are rounded each by itself. So one that loses none of its inputs is the same in all trials that
        give it the same width, but for the rows that are set to zero.
        """
        bits = dict(zip(self.layers, candidate.weight_bits, strict=True))
        for name, layer in self.layers.items():
            kept = self._kept(layer, candidate.removed)
            key = (name, bits[name])
            if layer_grid(layer, self.grid) == "layer" or not bool(kept.columns.all()) or bits[name] > MOST_CODED_BITS:
                self._compress_layer(name, covariances[name], bits[name], candidate.removed)
                continue
            rows = as_rows(layer, layer.weight)  # type: ignore[arg-type]
            if key not in self._rounded:
                grid = self._compress_layer(name, covariances[name], bits[name], torch.zeros_like(candidate.removed))
                self._rounded[key] = (codes_on(rows.float(), grid), grid)
            else:
                rows.copy_(values_of(*self._rounded[key]))
        self.zero(candidate.removed)

    def _single_kinds(self, share: float) -> list[Candidate]:
        """Return splits that remove groups of one kind, by the scores of the config and by those of their inputs."""
        losses = self._expected_losses()
        found = find_single_kinds(self.config, self.families, self.ledger, losses, share)
        if found and not self.config.frugal:
            removal = removal_by_inputs(self.layers, self._dense_covariances(), self._readers(), self.ledger.groups)
            by_inputs = dataclasses.replace(losses, removal=self._keep_unreached(removal))
            found += find_single_kinds(self.config, self.families, self.ledger, by_inputs, share)
        return [one for place, one in enumerate(found) if not any(_same(one, other) for other in found[:place])]

    def _trial(self, candidate: Candidate, loss: float | None) -> Trial:
        weights = self.ledger.weights(candidate.removed)
        bits = torch.tensor(candidate.weight_bits, dtype=torch.float64)
        mean = float((weights * bits).sum() / weights.sum())
        return Trial(candidate.share, int(candidate.removed.sum()), mean, loss)

    # --- compression --------------------------------------------------------------------------------------------------

    def _compress_best(
        self, candidates: Sequence[Candidate], trials: list[Trial], chosen: int, reference: Any
    ) -> tuple[int, dict[int, Grid], float]:
        """Compress by the best split, and then by those that remove less, as long as that is better.

        Trials round all layers at once. Layers that follow the dense model make up for much of what rounding loses, and
        for less of what removing does, so that trials alone would remove too much.

        Returns:
            The position of the split that was kept, the grid of each weight by its id, and the loss on held-back data.
            `trials` gets all losses.
        """
        grids = self._compress(candidates[chosen])
        least = self._note_in_full(trials, chosen, reference)
        while self._follows and self.config.by_block:
            limit = _LESS * trials[chosen].share
            smaller = [place for place, trial in enumerate(trials) if trial.share <= limit < trials[chosen].share]
            if not smaller:
                break
            other = min(smaller, key=lambda place: trials[place].loss or 0.0)
            if not _expected_in_full(trials, other) < least:
                break
            best = FirstWeights(self._originals.parameters)
            self.restore()
            found = self._compress(candidates[other])
            loss = self._note_in_full(trials, other, reference)
            if not loss < least:
                best.restore()
                break
            chosen, grids, least = other, found, loss
        return chosen, grids, least

    def _note_in_full(self, trials: list[Trial], place: int, reference: Any) -> float:
        """Measure the model as it is now, and return its loss."""
        loss, _ = measure(self.model, self.data.held_back, reference)
        trials[place] = dataclasses.replace(trials[place], loss_in_full=loss)
        return loss

    def _compress(self, candidate: Candidate) -> dict[int, Grid]:
        if self.config.by_block:
            self._forget_covariances()
            return self._compress_by_block(candidate)
        covariances = self._dense_covariances()
        self._forget_covariances()
        return self._compress_at_once(candidate, covariances)

    def _dense_covariances(self) -> dict[str, Tensor | None]:
        """Return the covariance of every layer's input in the dense model, which the model has to be now."""
        if self.measured.covariances is not None:
            return self.measured.covariances
        batches = self.data.covariances
        found: dict[str, Tensor | None] = dict.fromkeys(self.layers)
        bar = lambda items: self.progress(items, "covariances", len(batches))  # noqa: E731
        for part in measure_covariances(self.model, self.layers, batches, progress=bar):
            found |= part
        # The trials of one budget share them; the run of a budget ends with `_forget_covariances`.
        self.measured.covariances = found
        return found

    def _forget_covariances(self) -> None:
        """Free what only further trials, or further budgets, need."""
        if not self.measured.several:
            self.measured.covariances = None

    def _with_covariance(self, stage: Sequence[str]) -> dict[str, nn.Module]:
        """Return the layers of a stage whose outputs all read the same inputs; the first of them owns these."""
        return {name: self.layers[name] for name in stage if has_covariance(self.layers[name])}

    def _compress_at_once(self, candidate: Candidate, covariances: Mapping[str, Tensor | None]) -> dict[int, Grid]:
        bits = dict(zip(self.layers, candidate.weight_bits, strict=True))
        grids = {
            id(layer.weight): self._compress_layer(name, covariances[name], bits[name], candidate.removed)
            for name, layer in self.layers.items()
        }
        self.zero(candidate.removed)
        return grids

    def _compress_by_block(self, candidate: Candidate) -> dict[int, Grid]:
        """Compress stage after stage, each on the outputs of what is compressed already."""
        bits = dict(zip(self.layers, candidate.weight_bits, strict=True))
        grids: dict[int, Grid] = {}
        batches = self.data.covariances
        blocks = find_blocks(self.model, self.layers, batches[0])
        runner = BlockRunner(self.model, batches)
        dense = BlockRunner(self.model, batches) if self._follows else None
        for block in self.progress(blocks, "blocks", len(blocks)):
            inputs = {} if dense is None else self._dense_inputs(dense, block)
            for stage in block.stages:
                layers = self._with_covariance(stage)
                owner = next(iter(layers), "")
                shared = dict.fromkeys(layers, owner)
                mask: list[Tensor | None] = [None]
                with collecting(layers, shared, mask, inputs) as found:
                    if layers:
                        runner.run(block, mask, until=owner)
                for name in stage:
                    own = found[owner] if name in layers else None
                    covariance, drift = (None, None) if own is None else (own.mean(name), own.mean_drift())
                    grid = self._compress_layer(name, covariance, bits[name], candidate.removed, drift)
                    grids[id(self.layers[name].weight)] = grid
                inputs.pop(owner, None)
            # Now that all that reads them is compensated by their values.
            self.zero(candidate.removed, f"{block.name}.")
            runner.finish(block)
            if self.config.frugal:
                runner.forget(block)
        self.zero(candidate.removed)
        return grids

    @property
    def _follows(self) -> bool:
        """Whether the dense model runs beside the compressed one, which takes twice the activations."""
        return self.config.compensation and self.config.follow_dense > 0 and not self.config.frugal

    def _dense_inputs(self, dense: BlockRunner, block: Block) -> dict[str, list[Tensor]]:
        """Return what comes into the first layer of each stage in the dense model, of a block that is still dense.

        Args:
            dense: has finished the blocks before it while these were dense.
            block: that is next.
        """
        if not block.calls:
            return {}
        owners = [next(iter(self._with_covariance(stage)), "") for stage in block.stages]
        mask: list[Tensor | None] = [None]
        with recording({name: self.layers[name] for name in owners if name}, mask) as found:
            dense.finish(block, mask)
        return found

    def _compress_layer(
        self, name: str, covariance: Tensor | None, bits: int, removed: Tensor, drift: Tensor | None = None
    ) -> Grid:
        layer = self.layers[name]
        if covariance is None and has_covariance(layer):
            self.unreached.append(name)
        return compress_layer(
            layer,
            covariance,
            self._kept(layer, removed),
            bits,
            grid=self.grid,
            damping=self.config.damping,
            by_activation=self.config.by_activation,
            compensate=self.config.compensation,
            four_levels=self.config.four_levels,
            drift=drift,
            follow=self.config.follow_dense,
        )

    def _kept(self, layer: nn.Module, removed: Tensor) -> Kept:
        """Return the rows and columns of a layer's weight that no removed group takes."""
        cuts = [cut for cut in self.ledger.labels if self.named.get(cut.tensor) is layer.weight]
        return find_kept(layer, cuts, removed)

    @torch.no_grad()
    def zero(self, removed: Tensor, prefix: str = "") -> None:
        """Set all slices of removed groups to zero, in the tensors whose names start with a prefix."""
        labels = [cut for cut in self.ledger.labels if cut.tensor in self.named and cut.tensor.startswith(prefix)]
        zero_slices(build_slices(labels, removed, family_of_group(self.families), self.named), self.named)


@torch.no_grad()
def measure(
    model: nn.Module, batches: Sequence[Batch], reference: Sequence[Mapping[str, Tensor]] | None = None
) -> tuple[float, list[dict[str, Tensor]] | None]:
    """Return the mean loss on batches with labels; on others how far outputs are from a reference.

    Args:
        model: run in evaluation mode.
        batches: on its device.
        reference: the outputs of the dense model, as the first call returned them; None on that call.

    Returns:
        Nats for each label, and None; without labels the mean KL divergence from the reference's logits, or the squared
        error of other outputs relative to the reference's square, and the outputs that were found.
    """
    total = 0.0
    count = 0
    outputs: list[dict[str, Tensor]] = []
    with eval_mode(model), uncached(model):
        for place, batch in enumerate(batches):
            given = model(**batch)
            loss = loss_of(given)
            if loss is not None:
                number = predictions(batch)
                total += float(loss) * number
                count += number
                continue
            found = logits_of(float_tensors(given))
            if reference is None:
                outputs.append(found)
            else:
                total += _distance(reference[place], found)
            count += 1
    return total / max(count, 1), outputs or (None if reference is None else list(map(dict, reference)))


def _distance(dense: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> float:
    """Return how far outputs are from those of the dense model, added up over the outputs."""
    total = 0.0
    for name, expected in dense.items():
        own = found[name].float()
        expected = expected.float()
        if "logits" in name and expected.shape[-1] > 1:
            p = log_softmax(expected, dim=-1)
            total += float((p.exp() * (p - log_softmax(own, dim=-1))).sum(-1).mean())
        else:
            total += float((own - expected).square().sum() / expected.square().sum().clamp_min(1e-20))
    return total
