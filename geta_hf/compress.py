"""Compress a model without training: one call, a few minutes, a small folder."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import re
import shlex
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, overload

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import find_labels

from geta_hf.costs.ledger import Ledger
from geta_hf.costs.model_costs import forward_uses
from geta_hf.errors import GETAError
from geta_hf.evaluation.calibration_data import ROWS, Batch, first_sequences, make_batches, predicts_next
from geta_hf.export import ExportReport, export
from geta_hf.export.serving import limit_config, limit_families, serving_notes
from geta_hf.export.uniform_counts import choose_counts
from geta_hf.methods import OneShotConfig, OneShotMethod
from geta_hf.methods.one_shot import Calibration, Measured, Outcome, Trial
from geta_hf.methods.one_shot.choice import check_budget
from geta_hf.methods.one_shot.gradients import sequences as rows_of
from geta_hf.methods.one_shot.method import measure
from geta_hf.qadg import PruningSpace
from geta_hf.quantization import quantized_layers, select_layers
from geta_hf.quantization.experts import experts_apart
from geta_hf.reporting.comparison import load_model
from geta_hf.reporting.model_card import write_card
from geta_hf.serialization.atomic_folder import check_apart, check_target
from geta_hf.serialization.embeddings import rounded_embedding
from geta_hf.surgery.build_space import prepare_space
from geta_hf.surgery.drop_experts import DroppedExperts, drop_experts
from geta_hf.training.checkpoints import base_name
from geta_hf.training.distillation import dense_copy
from geta_hf.training.early_checks import check_exports, check_is_model, check_model
from geta_hf.training.example_inputs import find_left_out, inputs_of
from geta_hf.training.float_layers import exclude_raw_reads
from geta_hf.training.plan import embedding_rows, make_ledger
from geta_hf.training.preparation import align_tokens, empty_copy
from geta_hf.training.recovery import RATES, Trained
from geta_hf.training.recovery import recover as train
from geta_hf.utils.model_io import float_tensors, loss_of
from geta_hf.utils.module_state import eval_mode
from geta_hf.utils.process_state import exclusive
from geta_hf.utils.tables import format_table

logger = logging.getLogger(__name__)

_HELD_BACK = 8
"""One of this many sequences is held back, to compare splits of the budget and to measure what the result loses."""

_PROVED = 64
"""Tokens of a sequence that the model is recorded and proved on, at most."""

_SCORED = 2
"""One of this many of the other sequences is used for gradients, which cost three times a forward pass."""


@dataclasses.dataclass(frozen=True)
class CompressReport:
    """What `compress` did; printing it gives the table of before and after.

    Attributes:
        path: the folder.
        export: what was written.
        outcome: groups, widths, and what was measured while they were chosen.
        dense_bytes: size of model.safetensors if the dense model were saved.
        dense_parameters, parameters: elements of all parameters before and after.
        mean_bits: mean width over the remaining quantized weights.
        perplexity: (dense, compressed) on held-back data; None where the model is no causal language model.
        seconds: how long it took.
        next_command: what to run next.
        serving: what the program that `serve` names asked of the result, in sentences.
        dropped_experts: paths of the experts that were removed first; the dense model had them.
    """

    path: Path
    export: ExportReport
    outcome: Outcome
    dense_bytes: int
    dense_parameters: int
    parameters: int
    mean_bits: float
    perplexity: tuple[float, float] | None
    seconds: float
    next_command: str
    serving: tuple[str, ...] = ()
    dropped_experts: tuple[str, ...] = ()

    @property
    def removed_groups(self) -> int:
        """The number of removed groups."""
        return self.outcome.result.removed_groups

    def __str__(self) -> str:
        rows = [self._quality_row(), *self._group_rows()]
        rows.append(("parameters", f"{self.dense_parameters:,}", _share(self.parameters, self.dense_parameters)))
        rows.append(("mean bits", "", f"{self.mean_bits:.2f}"))
        rows.append(("bytes of weights", f"{self.dense_bytes:,}", _share(self.export.file_bytes, self.dense_bytes)))
        lines = [format_table(("", "dense", "compressed"), rows)]
        if self.dropped_experts:
            names = ", ".join(self.dropped_experts)
            lines.append(f"experts removed: {names}")
            if not self.outcome.has_labels:
                lines.append("the distance of outputs is that from the model without these experts")
        if not self.removed_groups:
            lines.append("no group was removed: the budget is met by rounding alone")
        if len(self.outcome.trials) > 1:
            tried = ", ".join(map(_tried, self.outcome.trials))
            lines.append(f"splits of the budget tried, by their loss on held-back data: {tried}")
        if self.outcome.loss_before_recovery is not None:
            before = self.outcome.loss_before_recovery
            lines.append(f"loss on held-back data: {before:.4f} compressed, {self.outcome.loss:.4f} after recovery")
        if self.outcome.unreached:
            names = ", ".join(self.outcome.unreached)
            lines.append(f"no calibration data reached these layers, which are rounded to nearest: {names}")
        lines += self.serving
        lines.append(f"wrote {self.path} in {self.seconds:.0f} s; next: {self.next_command}")
        return "\n".join(lines)

    def _quality_row(self) -> tuple[str, str, str]:
        if self.perplexity is not None:
            return ("perplexity, held back", f"{self.perplexity[0]:.2f}", f"{self.perplexity[1]:.2f}")
        if self.outcome.has_labels:
            return ("loss, held back", f"{self.outcome.dense_loss:.4f}", f"{self.outcome.loss:.4f}")
        return ("distance of outputs, held back", "0", f"{self.outcome.loss:.4g}")

    def _group_rows(self) -> list[tuple[str, str, str]]:
        kinds: dict[str, list[int]] = {}
        for name, (kept, before) in self.export.kept.items():
            counts = kinds.setdefault(name.rpartition(":")[2], [0, 0])
            counts[0] += kept
            counts[1] += before
        return [(kind, f"{before:,}", _share(kept, before)) for kind, (kept, before) in kinds.items()]


def _share(part: int, total: int) -> str:
    return f"{part:,} ({part / max(total, 1):.1%})"


@overload
def compress(
    model: PreTrainedModel | str | os.PathLike[str],
    calibration_data: Any,
    tokenizer: Any = None,
    *,
    out: str | os.PathLike[str],
    targets: Sequence[int | str],
    **options: Any,
) -> list[CompressReport]: ...


@overload
def compress(
    model: PreTrainedModel | str | os.PathLike[str],
    calibration_data: Any,
    tokenizer: Any = None,
    *,
    out: str | os.PathLike[str],
    targets: None = None,
    **options: Any,
) -> CompressReport: ...


# Both forms share all other arguments, which are spelled out here once.
@exclusive()  # type: ignore[misc]
def compress(
    model: PreTrainedModel | str | os.PathLike[str],
    calibration_data: Any,
    tokenizer: Any = None,
    *,
    out: str | os.PathLike[str],
    target_bytes: int | str | None = None,
    target_bops: float | None = None,
    target_parameters: float | None = None,
    mean_bits: float | None = None,
    targets: Sequence[int | str] | None = None,
    config: OneShotConfig | None = None,
    sequences: int = 128,
    sequence_length: int | None = None,
    gradients: bool = True,
    recover_steps: int = 0,
    recover: Trained = "full",
    learning_rate: float | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> CompressReport | list[CompressReport]:
    """Make a model smaller without training, and write it as a folder.

    What removing a group and rounding a weight cost is estimated from gradients on half of the calibration data. Splits
    of the budget between the two are compared on data that is held back. Then layer after layer loses inputs and is
    rounded, its remaining weights making up for both, on the outputs of the layers that are compressed already. Where
    the budget leaves 4 bits or more for each weight, step sizes not counted, no group is removed, since rounding alone
    costs less then.

    What removing and rounding are expected to cost is kept in `OUT.scores.safetensors` beside the folder. A later run
    on the same model, data and settings, with this budget or another, reads it; any other one replaces it.

    Args:
        model: a transformers model, or where it is loaded from. It is changed in place. After any failure, and after
            several `targets`, it is as it was before.
        calibration_data: a list of texts, a `datasets.Dataset` with a column `text`, the path of a text file or the
            name of a data set, or a list of tokenized batches.
        tokenizer: of the model; saved with it. By default that of the folder, where `model` is one.
        out: the folder to write; appears complete or not at all. Under `targets` one for each: `OUT-80`, `OUT-60`.
        target_bytes: size of model.safetensors, in bytes, or as a share of the dense model's such as "60%".
        target_bops: BOPs of the quantized layers, relative to the dense model at 32 · 32 bits.
        target_parameters: share of the parameters in prunable groups to remove.
        mean_bits: mean width of the remaining weights.
        targets: several sizes, each as `target_bytes`, such as `["80%", "60%", "40%"]`. What is measured on the dense
            model serves all of them. They are in place of the four above.
        config: limits and rules, such as `bits`, `exclude` or `keep`; targets above replace its own.
        sequences: how many at most. Default 128.
        sequence_length: tokens of each; by default 256, or what the model's positions allow.
        gradients: score by gradients. False scores by forward passes alone (`saliency="activation"` of the config),
            with one block at a time in memory on top of the weights: for models whose gradients do not fit. The dense
            weights are kept in a temporary folder meanwhile. Default True.
        recover_steps: optimizer steps that follow, towards the outputs of the dense model, on the calibration data and
            further sequences of the same source: as many as give each step a batch of its own, if there are. Groups
            and widths stay as they are. Default 0. The config's `distill_logits` and `distill_hidden` say what
            is compared; by default the logits, or the hidden states of a model without. The data needs labels.
        recover: `full` trains all parameters, `lora` two small matrices for each linear layer (peft). Default `full`.
        learning_rate: of these steps. Default 1e-4, and 1e-3 for LoRA.
        overwrite: replace an existing model folder.
        progress: show progress bars. Default True.

    Returns:
        The report; print it for the table of before and after. A list of them under `targets`, in their order.

    Raises:
        GETAError: no target, or one out of reach (names the one that can be reached); too little text; a tokenizer of
            another vocabulary; activations that overflow; a model that cannot be exported. No folder is written then,
            but for those of `targets` that were complete before.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from geta_hf import compress
        >>> sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes))
        >>> batches = [{"input_ids": torch.randint(0, 16, (2, 8))} for _ in range(4)]
        >>> folder = tempfile.TemporaryDirectory()
        >>> report = compress(model, batches, out=folder.name + "/small", target_bytes="80%", progress=False)
        >>> report.removed_groups
        0
        >>> folder.cleanup()
    """
    place = Path(out).resolve()
    given = {"target_bops": target_bops, "target_parameters": target_parameters, "mean_bits": mean_bits}
    amounts = _check_targets(targets, {**given, "target_bytes": target_bytes})
    config = _with_targets(config, target_bops, target_parameters, mean_bits, amounts[0])
    if not gradients:
        config = dataclasses.replace(config, saliency="activation")
    _check_recovery(recover_steps, recover, learning_rate, config)
    places = [place] if targets is None else [_folder_of(place, target) for target in targets]
    for folder in places:
        check_target(folder, overwrite)
    source = model if isinstance(model, str | os.PathLike) else getattr(model, "name_or_path", None)
    if source and Path(source).exists():
        for folder in places:
            check_apart(Path(source), folder)
    if torch.is_inference_mode_enabled():
        raise GETAError("compress measures gradients, which torch.inference_mode() rules out; call it outside of that")
    loaded, tokenizer = _load(model, tokenizer)
    check_is_model(loaded)
    config = limit_config(config, loaded, tokenizer)
    if quantized_layers(loaded):
        raise GETAError(f"{type(loaded).__name__} has quantizers already, so it was compressed; load the dense model")
    # Experts that share one tensor are no layers that could be rounded.
    with experts_apart(loaded, always=targets is not None):
        check_model(loaded, select_layers(loaded, config.include, config.exclude))
        _check_loaded(loaded)
        with ExitStack() as stack:
            stack.enter_context(_tokens_restored(loaded, always=targets is not None))
            align_tokens(loaded, tokenizer)
            # A batch of its own for each step of recovery, as far as the data goes.
            more = recover_steps * ROWS
            batches, further = first_sequences(
                make_batches(
                    calibration_data, loaded, tokenizer, sequences=sequences, length=sequence_length, more=more
                ),
                sequences,
            )
            dense_loss = measure(loaded, _split(batches).held_back)[0] if config.drop_experts else None
            dropped = stack.enter_context(_without_experts(loaded, config, batches, always=targets is not None))
            if dropped.removed:
                config = dataclasses.replace(config, drop_experts=list(dropped.removed))
            recovery = None
            if recover_steps:
                config = _with_distillation(config, loaded, batches[0])
                recovery = _Recovery(recover_steps, recover, learning_rate, further)
            job = _Job.prepare(loaded, tokenizer, config, batches, progress)
            job.recovery, job.dropped, job.dense_loss = recovery, dropped, dense_loss
            job.measured.path = place.with_name(f"{place.name}.scores.safetensors")
            job.measured.several = targets is not None
            configs = [job.with_bytes(amount) for amount in amounts]
            job.check_reachable(configs)
            reports = [
                job.run(own, folder, overwrite, keep=targets is None)
                for own, folder in zip(configs, places, strict=True)
            ]
    return reports[0] if targets is None else reports


@dataclasses.dataclass(frozen=True)
class _Recovery:
    """The training that follows.

    Attributes:
        steps: of the optimizer.
        kind: what is trained.
        learning_rate: at the start; None for the usual one.
        batches: in addition to those of the calibration.
    """

    steps: int
    kind: Trained
    learning_rate: float | None
    batches: Sequence[Batch] = ()


@dataclasses.dataclass
class _Job:
    """What serves every budget of one call.

    Attributes:
        model: dense between two budgets.
        batch: what it is recorded and proved on.
        measured: shared by the budgets.
        start: when the present budget began, in seconds.
        serving: what the program that `serve` names asks of the result.
        dropped: the experts that were removed first.
        dense_loss: on the held-back data, before that; None where none were.
    """

    model: PreTrainedModel
    tokenizer: Any
    config: OneShotConfig
    batch: Mapping[str, Any]
    data: Calibration
    space: PruningSpace
    ledger: Ledger
    progress: bool
    start: float
    serving: tuple[str, ...] = ()
    measured: Measured = dataclasses.field(default_factory=Measured)
    recovery: _Recovery | None = None
    dropped: DroppedExperts = dataclasses.field(default_factory=DroppedExperts)
    dense_loss: float | None = None

    @classmethod
    def prepare(
        cls, model: PreTrainedModel, tokenizer: Any, config: OneShotConfig, batches: list[dict[str, Any]], shown: bool
    ) -> _Job:
        """Find what can be removed and what everything takes, before any work that takes long."""
        start = time.perf_counter()
        batch = _example(model, batches)
        config = exclude_raw_reads(config, model, select_layers(model, config.include, config.exclude), batch)  # type: ignore[assignment]
        layers = select_layers(model, config.include, config.exclude)
        check_exports(model, batch, layers)
        space, recordings = prepare_space(model, batch, prune=config.prune, keep=config.keep, required=False)
        space, _ = choose_counts(config, space, model, recordings)
        space = limit_families(config, space, model)
        serving = serving_notes(config, model, space)
        ledger = _measure_sizes(model, config, space, batch, layers)
        return cls(model, tokenizer, config, batch, _split(batches), space, ledger, shown, start, serving)

    @property
    def dense_bytes(self) -> int:
        """The size of model.safetensors if the dense model were saved."""
        remaining = dataclasses.replace(self.ledger, layers=(), rounded={}).stored_bytes(self.ledger.nothing, 0)
        return remaining + self.dropped.bytes

    def with_bytes(self, amount: int | str | None) -> OneShotConfig:
        """Return the config with a size in bytes, where one is given."""
        if amount is None:
            return self.config
        return dataclasses.replace(self.config, target_bytes=bytes_of(amount, self.dense_bytes))

    def check_reachable(self, configs: Iterable[OneShotConfig]) -> None:
        """Raise GETAError for a budget out of reach, before anything is measured."""
        for config in configs:
            check_budget(config, self.space.trainable, self.ledger)

    def run(self, config: OneShotConfig, place: Path, overwrite: bool, keep: bool) -> CompressReport:
        """Compress the model, and write it as a folder.

        Args:
            config: with the budget.
            place: the folder.
            overwrite: replace an existing model folder.
            keep: leave the model compressed; otherwise, and on any failure, it is made dense again.
        """
        method = OneShotMethod(config)
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        bar = partial(_bar, shown=self.progress)
        teacher = None if self.recovery is None else dense_copy(self.model)
        outcome = method.compress(self.model, self.data, self.space, self.ledger, bar, self.measured)
        try:
            if config.embedding_bits is not None:
                outcome = dataclasses.replace(outcome, loss=self._loss_of_folder(config))
            if self.recovery is not None and teacher is not None:
                outcome = self._recover(method, config, teacher, outcome, self.recovery)
            written = export(
                self.model,
                place,
                space=self.space,
                batch=self.batch,
                config=config,
                processing_class=self.tokenizer,
                result=method.result(),
                embedding_bits=config.embedding_bits,
                embedding_grid=config.embedding_grid,
                finish=partial(write_card, base_model=base_name(self.model), repo_id=place.name),
                overwrite=overwrite,
            )
        except BaseException:  # KeyboardInterrupt too
            self._give_back(method, teacher)
            raise
        if keep:
            method.release()
        else:
            self._give_back(method, teacher)
        seconds = time.perf_counter() - self.start
        self.start = time.perf_counter()
        causal = predicts_next(self.model)
        if self.dense_loss is not None and outcome.has_labels:
            outcome = dataclasses.replace(outcome, dense_loss=self.dense_loss)
        report = _report(
            place, written, outcome, self.ledger, self.dense_bytes, parameters, causal, seconds, self.serving
        )
        dense = report.dense_parameters + self.dropped.parameters
        return dataclasses.replace(report, dense_parameters=dense, dropped_experts=self.dropped.removed)

    def _recover(
        self, method: OneShotMethod, config: OneShotConfig, teacher: nn.Module, outcome: Outcome, recovery: _Recovery
    ) -> Outcome:
        """Train the compressed model towards the dense one; return the outcome with the loss that it then has."""
        train(
            self.model,
            teacher,
            method,
            config,
            self.space,
            [*self.data.covariances, *recovery.batches],
            recovery.steps,
            kind=recovery.kind,
            learning_rate=recovery.learning_rate,
            progress=self.progress,
        )
        after = self._loss_of_folder(config)
        if not math.isfinite(after):
            raise GETAError(
                f"the loss on held-back data is {after} after {recovery.steps} steps of recovery; lower learning_rate"
            )
        return dataclasses.replace(outcome, loss=after, loss_before_recovery=outcome.loss)

    def _loss_of_folder(self, config: OneShotConfig) -> float:
        """Return the held-back loss that the folder will have: the export alone rounds the embedding."""
        with rounded_embedding(self.model, config.embedding_bits, config.embedding_grid):
            loss, _ = measure(self.model, self.data.held_back, self.measured.reference)
        return loss

    def _give_back(self, method: OneShotMethod, teacher: nn.Module | None) -> None:
        """Make the model dense again, with what recovery has changed, too."""
        method.undo()
        if teacher is None:
            return
        first = dict(teacher.named_parameters())
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(first[name])


def _check_recovery(steps: int, kind: str, learning_rate: float | None, config: OneShotConfig) -> None:
    """Raise GETAError for steps or a kind of recovery that cannot be."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise GETAError(f"recover_steps = {steps!r} must be a number of steps, 0 or more")
    if kind not in RATES:
        raise GETAError(f"recover = {kind!r} must be {' or '.join(map(repr, RATES))}")
    if learning_rate is not None and not (isinstance(learning_rate, int | float) and 0 < learning_rate < math.inf):
        raise GETAError(f"learning_rate = {learning_rate!r} must be a positive number")
    if not steps and (config.distill_logits or config.distill_hidden):
        raise GETAError("distill_logits and distill_hidden are for recovery; give recover_steps, such as 100")


def _with_distillation(config: OneShotConfig, model: PreTrainedModel, batch: Mapping[str, Any]) -> OneShotConfig:
    """Return the config with a weight for what the dense model teaches.

    Raises:
        GETAError: the data has no labels, so that there is no loss.
    """
    with torch.no_grad(), eval_mode(model):
        outputs = model(**batch)
    if loss_of(outputs) is None:
        raise GETAError(
            f"recover_steps needs data with labels, and {type(model).__name__} gives no loss on this; pass batches "
            f"with labels, or recover_steps=0"
        )
    if config.distill_logits or config.distill_hidden:
        return config
    if any("logits" in name for name in float_tensors(outputs)):
        return dataclasses.replace(config, distill_logits=1.0)
    return dataclasses.replace(config, distill_hidden=1.0)


def _check_targets(targets: Sequence[int | str] | None, others: Mapping[str, Any]) -> list[int | str | None]:
    """Return the sizes in bytes that are asked for, None where the target is another one.

    Raises:
        GETAError: several targets beside another one, none, the same one twice, or one that is no size.
    """
    if targets is None:
        return [others["target_bytes"]]
    if isinstance(targets, str) or not isinstance(targets, Sequence) or not targets:
        raise GETAError(f'targets = {targets!r} must be a list of sizes, such as ["80%", "60%"]')
    given = [name for name, value in others.items() if value is not None]
    if given:
        raise GETAError(f"targets and {given[0]} both say how small the model is to be; give only one of them")
    for target in targets:
        bytes_of(target, 1 << 40)
    names = [_folder_of(Path("x"), target) for target in targets]
    if len(set(names)) < len(names):
        raise GETAError(f"targets = {list(targets)} has a size twice; give each once")
    return list(targets)


def _folder_of(place: Path, target: int | str) -> Path:
    """Return the folder of one of several targets: `small-60` for "60%".

    >>> _folder_of(Path("small"), "60%").name, _folder_of(Path("small"), 1000000).name
    ('small-60', 'small-1000000')
    """
    text = target.strip().rstrip("%").strip() if isinstance(target, str) else str(target)
    return place.with_name(f"{place.name}-{text}")


def _check_loaded(model: PreTrainedModel) -> None:
    """Raise GETAError for a parameter without values, such as those that accelerate moves to the disk."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise GETAError(f"{name} is on the meta device, without values; load the model on one device, in full")


@contextmanager
def _without_experts(
    model: PreTrainedModel, config: OneShotConfig, batches: list[dict[str, Any]], always: bool
) -> Iterator[DroppedExperts]:
    """Remove the experts that the config asks for; on a failure, or always, the model has them again at the end."""
    dropped = DroppedExperts()
    if config.drop_experts:
        dropped = drop_experts(model, config.drop_experts, _example(model, batches), batches, config.expert_score)
    try:
        yield dropped
    except BaseException:
        dropped.restore()
        raise
    if always:
        dropped.restore()


@contextmanager
def _tokens_restored(model: PreTrainedModel, always: bool = False) -> Iterator[None]:
    """Give the configs, which `align_tokens` changes, their special tokens back: on a failure, or always."""
    configs = (model.config.get_text_config(), getattr(model, "generation_config", None))
    before = [(config, dict(vars(config))) for config in configs if config is not None]
    done = False
    try:
        yield
        done = not always
    finally:
        for config, values in before if not done else ():
            vars(config).clear()
            vars(config).update(values)


def bytes_of(target: int | str, dense: int) -> int:
    """Return a target in bytes.

    Args:
        target: bytes, or a share of the dense model's size such as "60%".
        dense: bytes of the dense model.

    Raises:
        GETAError: neither a positive number of bytes nor a share below 100 %.

    >>> bytes_of("60%", 1000)
    600
    """
    if not isinstance(target, int | str) or isinstance(target, bool) or (isinstance(target, int) and target <= 0):
        raise GETAError(f'target_bytes = {target!r} must be a positive integer, or a share such as "60%"')
    if isinstance(target, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", target)
        if found is None or not 0 < float(found[1]) < 100:
            raise GETAError(f'target_bytes = {target!r} must be an integer, or a share below 100% such as "60%"')
        return math.floor(float(found[1]) / 100 * dense)
    return target


def _with_targets(
    config: OneShotConfig | None,
    target_bops: float | None,
    target_parameters: float | None,
    mean_bits: float | None,
    target_bytes: int | str | None,
) -> OneShotConfig:
    """Return the config with the targets of the call; a size in bytes is not known yet."""
    given = {"target_bops": target_bops, "target_parameters": target_parameters, "mean_bits": mean_bits}
    targets: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if target_bytes is not None:
        # Checked here, before anything else takes time; what it is a share of is known later.
        targets["target_bytes"] = bytes_of(target_bytes, 1 << 40)
    if config is not None and not isinstance(config, OneShotConfig):
        raise GETAError(f"config is a {type(config).__name__}, and compress trains nothing; pass an OneShotConfig")
    if config is None and not targets:
        raise GETAError('compress needs a target, such as target_bytes="60%" or mean_bits=4')
    if not targets:
        assert config is not None
        own = ("target_bops", "target_bytes", "target_parameters", "target_sparsity", "mean_bits")
        if not any(getattr(config, name) for name in own):
            raise GETAError('compress needs a target, and the config has none; give one such as target_bytes="60%"')
        return config
    if not {"target_bops", "target_bytes", "target_parameters"} & targets.keys():
        targets["target_sparsity"] = 0.0  # a mean width alone removes nothing
    if config is None:
        return OneShotConfig(**targets)
    blank = dict.fromkeys(("target_bops", "target_bytes", "target_parameters", "target_sparsity", "mean_bits"))
    return dataclasses.replace(config, **{**blank, **targets})


def _load(model: Any, tokenizer: Any) -> tuple[Any, Any]:
    """Return a model and its tokenizer, loaded where a name or a folder is given."""
    if not isinstance(model, str | os.PathLike):
        return model, tokenizer
    loaded = load_model(Path(model))
    if tokenizer is None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        except (OSError, ValueError):
            tokenizer = None  # texts will say that they need one
    return loaded, tokenizer


def _example(model: PreTrainedModel, batches: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the model is recorded and proved on: the start of the first two sequences, without labels."""
    first = batches[0]
    if sum(1 for _ in rows_of([first])) > 1:
        first = {name: item[:2] for name, item in first.items()}
    shapes = {tuple(getattr(item, "shape", ())) for item in first.values()}
    if len(shapes) == 1 and len(shape := shapes.pop()) == 2 and shape[1] > _PROVED:
        # Proofs take tens of forwards, and no operator depends on how many tokens there are.
        short = {name: item[:, :_PROVED] for name, item in first.items()}
        mask = short.get("attention_mask")
        if mask is None or bool(mask.any(1).all()):
            first = short
    return inputs_of(model, first, find_left_out(model, first, find_labels(type(model))))


def _measure_sizes(
    model: PreTrainedModel,
    config: OneShotConfig,
    space: PruningSpace,
    batch: Mapping[str, Any],
    layers: Iterable[str],
) -> Ledger:
    """Measure what a folder would store, on a copy without data, so that the model gets its quantizers at the end."""
    counts = forward_uses(model, layers, batch)
    most = max(counts.values(), default=0) or 1
    empty = empty_copy(model)
    OneShotMethod(config).attach(empty, None)
    return make_ledger(
        empty, space, {name: (count or most) / most for name, count in counts.items()}, embedding_rows(config)
    )


def _split(batches: list[dict[str, Any]]) -> Calibration:
    """Split batches into those for scores and covariances and those that are held back, evenly over the data."""
    if len(batches) < 2 * _HELD_BACK:
        # A few large batches are split by rows.
        batches = list(rows_of(batches))
    every = min(_HELD_BACK, len(batches))
    held = batches[every - 1 :: every]
    others = [batch for place, batch in enumerate(batches) if place % every != every - 1]
    return Calibration(scores=others[::_SCORED], covariances=others, held_back=held)


def _bar(items: Iterable[Any], what: str, total: int, shown: bool) -> Iterable[Any]:
    return tqdm(items, desc=what, total=total, disable=not shown)


def _report(
    place: Path,
    written: ExportReport,
    outcome: Outcome,
    ledger: Ledger,
    dense_bytes: int,
    parameters: int,
    causal: bool,
    seconds: float,
    serving: tuple[str, ...],
) -> CompressReport:
    perplexity = None
    if causal and outcome.has_labels:
        perplexity = (_exp(outcome.dense_loss), _exp(outcome.loss))
    removed = torch.cat([*outcome.result.removed.values(), torch.zeros(0, dtype=torch.bool)])
    cut = 0
    for name, shape in ledger.remaining_shapes(removed).items():
        if name not in ledger.buffers:
            cut += math.prod(ledger.shapes[name]) - math.prod(shape)
    quoted = shlex.quote(str(place))
    command = f"geta-hf eval {quoted} --text FILE" if causal else f"geta-hf report {quoted}"
    return CompressReport(
        path=place,
        export=written,
        outcome=outcome,
        dense_bytes=dense_bytes,
        dense_parameters=parameters,
        parameters=parameters - cut,
        mean_bits=outcome.trials[outcome.chosen].mean_bits,
        perplexity=perplexity,
        seconds=seconds,
        next_command=command,
        serving=serving,
    )


def _tried(trial: Trial) -> str:
    in_full = "" if trial.loss_in_full is None else f" (layer after layer {trial.loss_in_full:.4f})"
    return f"{trial.share:.0%} removed: {trial.loss:.4f}{in_full}"


def _exp(loss: float) -> float:
    return math.exp(min(loss, 700.0))
