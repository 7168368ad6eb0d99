"""`GETATrainer`: Hugging Face's Trainer with a compression method on the model and around the optimizer."""

from __future__ import annotations

import dataclasses
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, TrainOutput, rotate_checkpoints
from transformers.utils import logging

from geta_hf.config import CONFIG_NAME, CompressionConfig, GETAConfig
from geta_hf.costs.ledger import Ledger
from geta_hf.errors import GETAError
from geta_hf.export import ExportReport, export
from geta_hf.export.serving import limit_config, limit_families, serving_notes
from geta_hf.export.uniform_counts import choose_counts
from geta_hf.methods import Method, Run, make_method
from geta_hf.methods.frozen_weights import FrozenWeights
from geta_hf.methods.parameter_groups import quantizer_parameters
from geta_hf.qadg import PruningSpace
from geta_hf.quantization import detach_quantizers, select_layers
from geta_hf.quantization.experts import experts_apart
from geta_hf.reporting.comparison import Structure
from geta_hf.reporting.model_card import write_card
from geta_hf.serialization.tied_weights import check_ties
from geta_hf.surgery.build_space import prepare_space
from geta_hf.surgery.drop_experts import DroppedExperts, drop_experts
from geta_hf.surgery.drop_layers import DroppedLayers, drop_layers, mean_loss
from geta_hf.training.checkpoints import Progress, base_name, check_checkpoint, own_names, write_notes
from geta_hf.training.complete import mark_complete, mark_unfinished, newest_to_resume
from geta_hf.training.console import name_stages
from geta_hf.training.distillation import Distiller, dense_copy
from geta_hf.training.dtypes import DTypes, dtypes_of, unrounded, warn_of_other_dtypes
from geta_hf.training.early_checks import (
    check_batch_norm,
    check_exports,
    check_is_model,
    check_length,
    check_model,
)
from geta_hf.training.example_inputs import divides_by_count, find_left_out, inputs_of, labels_of
from geta_hf.training.float_layers import check_first_gradients, exclude_raw_reads, left_float
from geta_hf.training.held_out import held_out_batches, split_rows
from geta_hf.training.looked_at import keep_looked_at, looking_at
from geta_hf.training.lora import LoraPlan, attach_lora, find_frozen_weights, merged, plan_lora
from geta_hf.training.loss_terms import LossTerms, Scale
from geta_hf.training.plan import Plan, embedding_rows, layer_uses, make_ledger, make_plan
from geta_hf.training.preparation import (
    SeededByEpoch,
    align_tokens,
    empty_copy,
    first_batches,
    planned_steps,
    without_untrained,
)
from geta_hf.training.processes import averages_gradients, by_first_process, decided_by_first_process
from geta_hf.training.publishing import PublishingTrainer, is_own_export
from geta_hf.training.support import Launch, check_follows, check_options, check_plain
from geta_hf.training.tracking import StructurePicture, decided_structure
from geta_hf.utils.copies import copy_module
from geta_hf.utils.model_io import to_device

if TYPE_CHECKING:
    from peft import LoraConfig

logger = logging.get_logger(__name__)


class GETATrainer(PublishingTrainer):
    """Compress a model while it is fine-tuned.

    The type of the config chooses the method: `GETAConfig` is QASSO. As soon as the trainer is made, quantizers are
    attached to the model, the pruning space is built from a real batch and the targets are solved. So a model or a
    limit that cannot work fails before training.

    Args:
        model: the model to train, changed in place.
        args: Trainer's own arguments, as all other keyword arguments.
        geta_config: targets, limits and the method's rules. By default `GETAConfig()`, which removes half of all
            groups and ends at 6 bits on average. It is never changed; see `run_config`.
        teacher: whose outputs the model is trained towards, where the config gives distillation a weight. By default
            a copy of `model` as it is now, which takes the memory of its weights once more.
        peft_config: peft's LoraConfig. The model's weights are then frozen, without gradients or optimizer state of
            their size, and LoRA's matrices are trained; quantizers, scores and the export are of the merged weights.
        method: one that has compressed this very model already, without its quantizers now, under `geta_config`; what
            it decided is kept. By default a new one, as the config says.

    Attributes:
        method: the compression method.
        dropped: the layers that the model lost under `drop_layers`.
        dropped_experts: the experts that it lost under `drop_experts`.
        run_config: `geta_config` with the paths of the dropped layers and experts in place of their number, and with
            the layers excluded whose weight the model reads itself; checkpoints and the export hold this one.
        space: the pruning space.
        plan: what the run is to end with; printed when the trainer is made.

    Raises:
        GETAError: no layer to quantize, no group to prune, an unreachable target, a batch that the model cannot run, a
            teacher that does not fit, an option of Trainer that cannot be kept.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from transformers import BertConfig, BertForSequenceClassification, TrainingArguments
        >>> from geta_hf import GETAConfig, GETATrainer
        >>> sizes = dict(hidden_size=16, num_attention_heads=4, intermediate_size=32, num_hidden_layers=1)
        >>> model = BertForSequenceClassification(BertConfig(vocab_size=30, **sizes))
        >>> rows = [{"input_ids": torch.arange(1, 9), "labels": i % 2} for i in range(32)]
        >>> folder = tempfile.TemporaryDirectory()
        >>> args = TrainingArguments(folder.name, max_steps=40, use_cpu=True, report_to=[], disable_tqdm=True)
        >>> trainer = GETATrainer(model, args, geta_config=GETAConfig(target_sparsity=0.5), train_dataset=rows)
        | families ...
        >>> _ = trainer.train()
        {...
        >>> report = trainer.export_model(folder.name + "/small")
        >>> report.kept
        {...
        >>> folder.cleanup()
    """

    dropped: DroppedLayers
    dropped_experts: DroppedExperts

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: Any = None,
        *,
        geta_config: CompressionConfig | None = None,
        teacher: nn.Module | None = None,
        peft_config: LoraConfig | None = None,
        method: Method | None = None,
        **kwargs: Any,
    ) -> None:
        if model is None:
            raise GETAError("GETATrainer needs `model`; `model_init` would make models that no method has seen")
        check_is_model(model)
        given = geta_config or GETAConfig()
        self.geta_config = self.run_config = limit_config(given, model, kwargs.get("processing_class"))
        self.method: Method = make_method(self.geta_config) if method is None else method
        # Experts that share one tensor are no layers that could be quantized.
        with experts_apart(model):
            self.lora = self._check_model(model, peft_config)
            super().__init__(model=model, args=args, **kwargs)
            callbacks = self.callback_handler.callbacks
            name_stages(callbacks, lambda: self.method)
            callbacks.insert(0, StructurePicture(callbacks, self._decided_structure))
            share = self.method.held_out_share
            self.train_dataset, self._held_out = split_rows(self.train_dataset, share, self.args.seed)
            align_tokens(model, self.processing_class)
            launch = Launch.of(self.accelerator, self.model)
            _settle_arguments(self.args)
            check_follows(self.method, launch)
            check_options(self.args, launch, self.optimizer, self.lr_scheduler, lora=self.lora is not None)
            # Kept, since later on not every process may draw from the loader, which all of them share.
            self._batch = self._choose_batch(model)
            check_batch_norm(model, self.args, self._batch)
            self.method.check_stages(*planned_steps(self.args, self.get_train_dataloader))
            check_exports(model, self._batch, self._layers_to_quantize(model))
            teacher = self._choose_teacher(model, teacher)
            self._drop(model)
            try:
                self._leave_float(model)
                self.lora = self._replan_lora(model)
                self.space = self._find_space(model)
                self.distiller = self._make_distiller(model, teacher)
                self.method.prepare(self.space)
                self.method.attach(model, self._sample_batches)
                check_ties(model)
                self._ledger = self._measure_sizes(model)
                self.plan: Plan = make_plan(
                    self.geta_config, self.space, self._ledger, model, left_float(self.geta_config, self.run_config)
                )
                self.plan = dataclasses.replace(self.plan, not_vanilla=self._not_vanilla, serving=self._serving)
                if self.lora is not None:
                    # Last, since the matrices are merged before an export: no size and no bit width counts them.
                    attach_lora(model, self.lora)
                self._terms = LossTerms(self.distiller, self.method, self.accelerator.autocast)
                self.compute_loss = self._terms.around(self.compute_loss, lambda: self._plain_model, self._loss_scale)  # type: ignore[method-assign]
            except BaseException:
                self._restore(model)
                raise
            # Until here a failure gives the layers back; from here on they only take memory.
            self.dropped.release()
            self.dropped_experts.release()
            # Training will turn the model's parameters into shards; an export fills this copy, whose shapes are whole.
            self._skeleton = empty_copy(model) if self.is_fsdp_enabled else None
            self._bad_loss = torch.zeros((), dtype=torch.bool, device=self.args.device)
            self._wrapped = self._gradients_checked = False
            self._dtypes: DTypes = {}
            self._print_plan()

    @property
    def qasso(self) -> Any:
        """The optimizer that the method made; None before training. Use `method` in new code."""
        return getattr(self.method, "optimizer", None)

    @property
    def depth(self) -> DroppedLayers:
        """The former name of `dropped`."""
        return self.dropped

    @property
    def _plain_model(self) -> PreTrainedModel:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    @property
    def _lora_config(self) -> LoraConfig | None:
        return None if self.lora is None else self.lora.config

    # --- before training ----------------------------------------------------------------------------------------------

    def _check_model(self, model: nn.Module, peft_config: LoraConfig | None) -> LoraPlan | None:
        """Check what can be known before Trainer is set up; return what LoRA will train."""
        check_plain(model)
        chosen = self._layers_to_quantize(model)  # nothing to quantize fails first
        check_model(model, chosen)
        lora = None if peft_config is None else plan_lora(model, peft_config, chosen)
        self.method.check(frozen_weights=lora is not None)
        return lora

    def _layers_to_quantize(self, model: nn.Module) -> dict[str, nn.Module]:
        return select_layers(model, self.run_config.include, self.run_config.exclude)

    def _choose_teacher(self, model: nn.Module, teacher: nn.Module | None) -> nn.Module | None:
        """Return the given teacher, or a copy of the model before layers are dropped and quantizers attached."""
        distils = bool(self.geta_config.distill_logits or self.geta_config.distill_hidden)
        if teacher is not None and not distils:
            raise GETAError("a teacher is given, but distill_logits and distill_hidden are 0; give one a weight")
        if teacher is None and distils:
            return dense_copy(model)
        return teacher

    def _make_distiller(self, model: nn.Module, teacher: nn.Module | None) -> Distiller | None:
        if teacher is None:
            return None
        return Distiller(
            model,
            teacher,
            logits=self.geta_config.distill_logits,
            hidden=self.geta_config.distill_hidden,
            temperature=self.geta_config.distill_temperature,
            device=self.args.device,
            kept=self.dropped.kept,
        )

    def _drop(self, model: nn.Module) -> None:
        """Remove the layers and experts that the config asks for, and note which."""
        self.dropped = self._drop_layers(model)
        try:
            self.dropped_experts = self._drop_experts(model)
        except BaseException:
            self.dropped.restore()
            raise
        self.run_config = self._resolve_config()

    def _restore(self, model: nn.Module) -> None:
        """Make a model what it was, so that it can be tried again under another config."""
        detach_quantizers(model)
        self.dropped_experts.restore()
        self.dropped.restore()

    def _drop_layers(self, model: nn.Module) -> DroppedLayers:
        """Remove the layers that the config asks for: those it names, or those that the loss misses least."""
        wanted = self.geta_config.drop_layers
        if not wanted:
            return DroppedLayers()
        named = not isinstance(wanted, int)
        batches = [] if named else self._first_batches(self.geta_config.calibration_batches)

        def loss() -> float:
            with self.accelerator.autocast():
                own = mean_loss(model, batches).to(self.args.device)
            return float(self.accelerator.reduce(own, "mean"))  # every process has batches of its own

        return drop_layers(model, wanted, self._batch, loss, self._layers_to_quantize(model))

    def _drop_experts(self, model: nn.Module) -> DroppedExperts:
        """Remove the experts that the config asks for: those it names, or those that add least."""
        wanted = self.geta_config.drop_experts
        # A method that has finished had the model without them.
        if not wanted or self.method.finished:
            return DroppedExperts()
        named = not isinstance(wanted, int)
        batches = [] if named else self._first_batches(self.geta_config.calibration_batches)
        return drop_experts(
            model,
            wanted,
            self._batch,
            batches,
            self.geta_config.expert_score,
            lambda total: self.accelerator.reduce(total, "sum"),  # every process has batches of its own
        )

    def _resolve_config(self) -> CompressionConfig:
        """Return the config with the paths of dropped layers and experts, by which a resumed run drops the same."""
        named = {"drop_layers": self.dropped.removed, "drop_experts": self.dropped_experts.removed}
        changes: dict[str, Any] = {name: list(paths) for name, paths in named.items() if paths}
        return dataclasses.replace(self.geta_config, **changes) if changes else self.geta_config

    def _leave_float(self, model: nn.Module) -> None:
        """Exclude layers whose weight the model reads itself, past the layer's forward and any quantizer."""
        known = self.run_config
        self.run_config = exclude_raw_reads(known, model, self._layers_to_quantize(model), self._batch)
        if self.run_config is not known and not self.method.finished:
            self.method = make_method(self.run_config)

    def _find_space(self, model: nn.Module) -> PruningSpace:
        """Build the pruning space; families that the model's code cannot follow are no longer prunable."""
        # Under LoRA every weight is frozen, and groups are removed through the merged weight.
        narrow = None if self.lora is not None else partial(without_untrained, model=model)
        space, recordings = prepare_space(
            model,
            self._batch,
            prune=self.geta_config.prune,
            keep=self.geta_config.keep,
            narrow=narrow,
            labels=self._labels,
        )
        space, self._not_vanilla = choose_counts(self.geta_config, space, model, recordings)
        space = limit_families(self.geta_config, space, model)
        self._serving = serving_notes(self.geta_config, model, space)
        return space

    def _replan_lora(self, model: nn.Module) -> LoraPlan | None:
        """Plan LoRA again where layers were dropped, which changes the paths of others, or left float."""
        if self.lora is None or self.run_config is self.geta_config:
            return self.lora
        return plan_lora(model, self.lora.config, self._layers_to_quantize(model))

    def _measure_sizes(self, model: nn.Module) -> Ledger:
        """Measure everything that an export would store, by which targets are solved."""
        uses = layer_uses(model, self._batch)
        return make_ledger(model, self.space, uses, embedding_rows(self.geta_config), self.dropped.work)

    def _sample_batches(self, count: int) -> list[dict[str, Any]]:
        """Return the first batches without labels, on the model's device; random states are left as they were."""
        inputs = [inputs_of(self._plain_model, batch, self._left_out) for batch in self._first_batches(count)]
        return [to_device(batch, self.args.device) for batch in inputs]

    def _choose_batch(self, model: nn.Module) -> dict[str, Any]:
        """Return a batch of two rows for recordings and proofs, collated as in training, without its labels."""
        if self.train_dataset is None:
            raise GETAError("GETATrainer needs `train_dataset`: the pruning space is built from a batch of it")
        if self.args.dataloader_num_workers == 0:  # workers read copies of a stream
            self.train_dataset = keep_looked_at(self.train_dataset)
        full = self._first_batches(1)[0]  # which training needs in any case
        try:
            # Rows are not cut out of a batch, since tensors need not be indexed by row along their first dimension.
            batch = self._first_batches(1, rows=2)[0]
        except Exception:  # a collator or a sampler of the user's needs more rows
            batch = full
        self._left_out = find_left_out(model, batch, self.label_names)
        self._labels = to_device(labels_of(model, batch, self._left_out), self.args.device)
        self._check_count(model, batch)
        return to_device(inputs_of(model, batch, self._left_out), self.args.device)

    def _check_count(self, model: nn.Module, batch: dict[str, Any]) -> None:
        """Let Trainer average losses over processes and micro-batches, where the model ignores the count of labels."""
        several = self.args.world_size > 1 or self.args.gradient_accumulation_steps > 1
        if not (several and self.model_accepts_loss_kwargs and self.compute_loss_func is None and "labels" in batch):
            return
        if not divides_by_count(model, batch):
            logger.warning("the loss of %s is a mean over rows: micro-batches are averaged", type(model).__name__)
            self.model_accepts_loss_kwargs = False

    def _first_batches(self, count: int, rows: int | None = None) -> list[dict[str, Any]]:
        """Return the first batches as training will see them; random states and streams are left as they were.

        Args:
            count: how many.
            rows: of a batch, at most; those of training by default.
        """
        full = self._train_batch_size
        self._train_batch_size = full if rows is None else min(rows, full)
        try:
            with looking_at(self.train_dataset):
                return first_batches(self.get_train_dataloader, count)
        finally:
            self._train_batch_size = full

    def _print_plan(self) -> None:
        if not self.is_world_process_zero():
            return
        for dropped in (self.dropped, self.dropped_experts):
            if dropped.removed:
                print(dropped)
        print(self.plan)

    # --- optimizer ----------------------------------------------------------------------------------------------------

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return Trainer's choice without the quantizers, whose scale must not shrink."""
        own = quantizer_parameters(model)
        return [name for name in super().get_decay_parameter_names(model) if name not in own]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Let the method wrap the base optimizer that the arguments name, or that was given."""
        if self._wrapped and self.optimizer is not None:
            return self.optimizer  # resumed in the same trainer; `train` has checked that
        opt_model: nn.Module = self._plain_model if model is None else model
        # Under FSDP2 Trainer calls this after it has sharded the model, which replaces the parameters: names are
        # those of `model` as it is given here.
        base = super().create_optimizer(opt_model)
        names: dict[Tensor, str] = {parameter: name for name, parameter in opt_model.named_parameters()}
        self.optimizer = self.method.wrap_optimizer(base, names, opt_model, self._describe_run(opt_model))
        self.optimizer.register_step_pre_hook(self._check_terms)
        self._wrapped = True
        return self.optimizer

    def _describe_run(self, model: nn.Module) -> Run:
        return Run(
            space=self.space,
            ledger=self._ledger,
            target=self.plan.target,
            total_steps=self.state.max_steps,
            steps_per_epoch=self._steps_per_epoch(),
            frozen=FrozenWeights() if self.lora is None else find_frozen_weights(model, self.space),
        )

    def _steps_per_epoch(self) -> float:
        if self.args.max_steps <= 0:
            return self.state.max_steps / self.args.num_train_epochs
        return planned_steps(self.args, self.get_train_dataloader)[1]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Return Trainer's sampler; batches grouped by length come in an order that a resumed run draws again."""
        sampler = super()._get_train_sampler(train_dataset)
        if not isinstance(sampler, LengthGroupedSampler):
            return sampler
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return SeededByEpoch(sampler, seed)

    # --- training and logging -----------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Run Trainer's `train`, once a trainer: a second run would go on in the stage where the first one ended.

        Raises:
            GETAError: the trainer has trained before and does not resume from a checkpoint.
        """
        if self._wrapped and self.method.step_count > 0 and not resume_from_checkpoint:
            raise GETAError(
                f"this trainer has done {self.method.step_count} steps already; resume from a checkpoint, "
                f"or make a new trainer on a plain model"
            )
        if resume_from_checkpoint:
            resume_from_checkpoint = self._checkpoint_to_resume(resume_from_checkpoint)
        self._bad_loss = torch.zeros((), dtype=torch.bool, device=self.args.device)
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        self.method.finish()
        self._dtypes = dtypes_of(self._plain_model)
        self._say_what_is_missing()
        if self.args.push_to_hub:
            self._push_if_finished("End of training")
        return output

    def _say_what_is_missing(self) -> None:
        """Warn after training where there is no result yet, or no best model among the finished ones."""
        if not self.method.finished:
            logger.warning(
                "training ended at step %d of %d, before the compression was finished, so the model can't be exported "
                "yet: resume from a checkpoint. A callback that stops early has to wait until trainer.method.finished "
                "is true",
                self.state.global_step,
                self.state.max_steps,
            )
        elif self.args.load_best_model_at_end and self.state.best_model_checkpoint is None:
            logger.warning(
                "load_best_model_at_end found no checkpoint that was evaluated and saved after the compression was "
                "finished, so the model is that of the last step; evaluate and save more often"
            )

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Compare finished models alone; before, neither the best model nor early stopping counts an evaluation."""
        if self._wrapped and self.method.finished:
            return super()._determine_best_metric(metrics, trial)
        # Early stopping counts nothing as long as there is no best metric.
        self.state.best_metric = self.state.best_global_step = self.state.best_model_checkpoint = None
        return False

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Run Trainer's loop; a model that it converts to 16 bits is afterwards as it was trained."""
        with unrounded(self._plain_model, self.args):
            return super().evaluation_loop(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run Trainer's step; remember, without waiting for the device, whether a loss was not finite."""
        self.method.before_backward(self._plain_model)
        loss = super().training_step(*args, **kwargs)
        if not self._gradients_checked:
            check_first_gradients(self._plain_model)
            self._gradients_checked = True
        self._bad_loss = self._bad_loss | ~torch.isfinite(loss.detach())
        return loss

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Return the batches of one step, of held-out rows where the method asks for them.

        Training goes on behind the batches that these replace, as it does in a resumed run.
        """
        found = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._held_out is None or not self.method.on_held_out_rows:
            return found
        count = len(found[0])
        first = (self.method.step_count * self.args.world_size + self.args.process_index) * num_batches
        collate = self._get_collator_with_removed_columns(self.data_collator, description="held-out")
        numbers = range(first, first + count)
        batches = held_out_batches(self._held_out, self._train_batch_size, collate, self.args.seed, numbers)
        return super().get_batch_samples(batches, count, device)

    def _loss_scale(self, items: Tensor | int | None) -> Scale:
        """Return how Trainer adds up the losses of micro-batches."""
        scaled = getattr(self, "loss_is_scaled_for_ga", None)  # what a subclass says of its own loss
        if scaled is None:
            # Trainer counts labels only where the model, or the user's function, divides by their number.
            scaled = items is not None or self.compute_loss_func is not None
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return Scale(self.current_gradient_accumulation_steps, not scaled, processes)

    def _check_terms(self, *_: object) -> None:
        """Raise GETAError at an optimizer's step without a loss that holds the terms of distillation and the method."""
        if self._terms.any and not self._terms.used:
            raise GETAError(
                f"the loss was computed without self.compute_loss, so what distillation or the method adds to it is "
                f"missing; call self.compute_loss in {type(self).__name__}.training_step, and do not replace it on the "
                f"trainer"
            )

    def _check_finite(self) -> None:
        if self._wrapped:
            self.method.check_finite()
        if bool(self._bad_loss):
            raise GETAError(
                f"the loss was NaN or infinite by step {self.state.global_step}. Lower the learning rate or check the "
                f"data, and {self._way_back()}"
            )

    def _way_back(self) -> str:
        """Return where a run that failed can go on from, as the end of a sentence."""
        try:
            return f"resume from {newest_to_resume(Path(str(self.args.output_dir)))}, which is intact"
        except GETAError:
            return "start again, as no checkpoint was saved"

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as Trainer does, with the metrics of the method next to the loss."""
        # Trainer has just waited for the device to read the loss, so reading these values costs no further wait.
        self._check_finite()
        # The summary at the end too: a run shorter than `logging_steps` has no other line.
        if self._wrapped and ("loss" in logs or "train_loss" in logs):
            logs.update(self.compression_state())
        super().log(logs, start_time)

    def compression_state(self) -> dict[str, float]:
        """Return how far the run is. QASSO's: stage (1 warm-up, 2 projection, 3 joint, 4 cool-down), sparsity as a
        share of the prunable groups, bits, BOPs of the quantized layers relative to dense, and the mean γ.

        Raises:
            GETAError: training has not started.
        """
        if not self._wrapped:
            raise GETAError("training has not started, so there is no compression state")
        return self.method.metrics()

    def _decided_structure(self) -> Structure | None:
        return decided_structure(self.method, self.space, self.dropped.removed)

    # --- checkpoints and export ---------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # Before anything is written: a bad checkpoint could push the last good one out (save_total_limit).
        self._check_finite()
        with own_names(self._plain_model):
            super()._save(output_dir, state_dict)
        progress = self._describe_progress()
        if not self.args.should_save:
            return
        folder = Path(str(output_dir or self.args.output_dir))
        self.run_config.save(folder / CONFIG_NAME)
        write_notes(
            folder,
            self.args.world_size,
            self.is_fsdp_enabled,
            progress,
            self._lora_config,
        )

    def _describe_progress(self) -> Progress | None:
        """Return how far the run is, for a checkpoint; None before training."""
        if not self._wrapped:
            return None
        return Progress(
            self.method.step_count,
            self.method.finished,
            self.method.removed_groups,
            base_name(self._plain_model),
        )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save as Trainer does; the checkpoint is marked as complete last, and only then are older ones deleted."""
        run = self._get_output_dir(trial=trial)
        folder = Path(run) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            mark_unfinished(folder)
        limit = self.args.save_total_limit
        self.args.save_total_limit = None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()  # each process writes its random states, or its shards
        if self.args.should_save:
            mark_complete(folder)
            rotate_checkpoints(run, limit, self.state.best_model_checkpoint, use_mtime=True)

    def _checkpoint_to_resume(self, asked: str | bool) -> str:
        """Return the checkpoint that is named, or the newest complete one, as the first process finds it."""

        def find() -> str:
            folder = newest_to_resume(Path(str(self.args.output_dir))) if asked is True else Path(str(asked))
            check_checkpoint(
                folder,
                self.run_config,
                self._plain_model,
                self.args.world_size,
                self.is_fsdp_enabled,
                self._lora_config,
            )
            return str(folder)

        return decided_by_first_process(self.accelerator, find)

    def export_model(self, directory: str | os.PathLike[str], overwrite: bool = False) -> ExportReport | None:
        """Write the small folder: zero groups sliced away, weights packed at their bits; tokenizer and card included.

        Args:
            directory: must not exist unless `overwrite`, or unless it is an earlier export within the `output_dir` of
                this run, which is replaced.
            overwrite: replace any existing model folder. Default: False.

        Returns:
            What was written; None on processes other than the first. All processes have to call it, and return once
            the folder is there.

        Raises:
            GETAError: the method has not finished, or the reloaded folder disagrees with the model.
        """
        # Both exchange shards under FSDP2, so every process takes part.
        result = self.method.result()
        trained = self._gather_model()
        overwrite = overwrite or is_own_export(Path(directory), Path(str(self.args.output_dir)))

        def write() -> ExportReport:
            # A callback may export while training goes on. DDP loses sight of parameters that are moved for a while.
            model = copy_module(trained) if self.is_in_train and averages_gradients(self.model_wrapped) else trained
            warn_of_other_dtypes(model, self._dtypes)
            card = partial(write_card, base_model=base_name(model), repo_id=Path(directory).resolve().name)
            with merged(model):
                return export(
                    model,
                    directory,
                    space=self.space,
                    batch=to_device(self._batch, model.device),
                    config=self.run_config,
                    processing_class=self.processing_class,
                    result=result,
                    embedding_bits=self.geta_config.embedding_bits,
                    embedding_grid=self.geta_config.embedding_grid,
                    finish=card,
                    overwrite=overwrite,
                )

        return by_first_process(self.accelerator, write)

    def restore_compression(self) -> None:
        """Set removed groups to zero and bit widths to their final values again, after something changed the model.

        Averages of weights over the run (EMA, SWA), noise, or the weights of an earlier state are not compressed: what
        was removed is not zero in them. All processes have to call this.

        Raises:
            GETAError: the method has not finished.

        Example:
            Average the weights in a callback, copy the averages to the model in `on_train_end`, then call
            `trainer.restore_compression()` and `trainer.export_model("small")`.
        """
        self.method.restore(self._plain_model)

    def _gather_model(self) -> PreTrainedModel:
        """Return the full trained model; under FSDP2 it is gathered on the CPU, which takes all processes."""
        if self._skeleton is None:
            return self._plain_model
        state = self.accelerator.get_state_dict(self.model)
        if self.is_world_process_zero():
            self._skeleton.load_state_dict(state, assign=True)
        return self._skeleton


def _settle_arguments(args: TrainingArguments) -> None:
    """Check the length of the run, and leave out what its device has no use for."""
    check_length(args)
    if args.device.type == "cpu":
        # Pinned memory is for copies to an accelerator; without one torch warns at every loader.
        args.dataloader_pin_memory = False
