"""`GETATrainer`: Hugging Face's Trainer with quantizers on the model, a pruning space, and QASSO as the optimizer."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from geta_hf.config import CONFIG_NAME, GETAConfig
from geta_hf.errors import GETAError
from geta_hf.export import ExportReport, export
from geta_hf.methods.frozen_weights import FrozenWeights
from geta_hf.methods.qasso.frozen import check_rules
from geta_hf.methods.qasso.metrics import compression_state
from geta_hf.methods.qasso.optimizer import QASSO
from geta_hf.methods.qasso.schedule import COOLDOWN, Schedule
from geta_hf.qadg import PruningSpace
from geta_hf.quantization import (
    attach_input_quantizers,
    detach_quantizers,
    freeze_quantizers,
    quantizer_prefixes,
    select_layers,
)
from geta_hf.reporting.model_card import write_card
from geta_hf.serialization.tied_weights import check_ties
from geta_hf.surgery.build_space import prepare_space
from geta_hf.surgery.drop_layers import DroppedLayers, drop_layers, mean_loss
from geta_hf.training.checkpoints import base_name, check_checkpoint, write_notes
from geta_hf.training.distillation import Distiller, dense_copy
from geta_hf.training.lora import attach_lora, find_frozen_weights, merged, plan_lora
from geta_hf.training.plan import Plan, channel_dims, layer_uses, make_ledger, make_plan, quantized_inputs
from geta_hf.training.preparation import (
    SeededByEpoch,
    attach,
    empty_copy,
    first_batches,
    hold_frozen,
    own_group,
    quantizer_parameters,
    without_untrained,
)
from geta_hf.training.support import check_plain, check_supported

if TYPE_CHECKING:
    from peft import LoraConfig

logger = logging.get_logger(__name__)


class GETATrainer(Trainer):
    """Compresses a model while it is fine-tuned.

    Quantizers are put on the model, the pruning space is built from a real batch and the targets are solved as soon as
    the trainer is made, so a model or a limit that can't work fails before training.

    Args:
        model: the model to train, changed in place.
        args: Trainer's own arguments, as all other keyword arguments.
        geta_config: limits, stages and rules; the defaults remove half of all groups at 6 bits on average.
        teacher: whose outputs the model is trained towards, where the config gives distillation a weight. By default
            a copy of `model` as it is now, which takes its weights' memory once more.
        peft_config: peft's LoraConfig. The model's weights are then frozen, without gradients or optimizer state of
            their size, and LoRA's matrices are trained; quantizers, scores and the export are of the merged weights.

    Attributes:
        depth: which layers the model lost, under `drop_layers`.
        space: the pruning space.
        plan: what the run is to end with; printed when the trainer is made.

    Raises:
        GETAError: no layer to quantize, no group to prune, an unreachable target, a batch that the model can't run, a
            teacher that does not fit, an option of Trainer that can't be kept.
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: Any = None,
        *,
        geta_config: GETAConfig | None = None,
        teacher: nn.Module | None = None,
        peft_config: LoraConfig | None = None,
        **kwargs: Any,
    ) -> None:
        if model is None:
            raise GETAError("GETATrainer needs `model`; `model_init` would make models that QASSO has never seen")
        self.geta_config = config = geta_config or GETAConfig()
        self.qasso: QASSO | None = None
        check_plain(model)
        chosen = select_layers(model, config.include, config.exclude)  # nothing to quantize fails first
        self.lora = None if peft_config is None else plan_lora(model, peft_config, chosen)
        if self.lora is not None:
            check_rules(config)
        super().__init__(model=model, args=args, **kwargs)
        check_supported(self, self.lora is not None)
        # Kept, since later on not every process may draw from the loader, which all of them share.
        self._batch = {name: value[:2] for name, value in self._sample_batches(1)[0].items()}
        if teacher is None and (config.distill_logits or config.distill_hidden):
            teacher = dense_copy(model)  # as it is before layers go and quantizers come
        self.depth = self._drop_layers(model, chosen)
        try:
            if peft_config is not None and self.depth.removed:
                self.lora = plan_lora(model, peft_config, select_layers(model, config.include, config.exclude))
            self.space = self._build_space()
            self.distiller = self._make_distiller(model, teacher)
            attach(model, config)
            check_ties(model)
            if config.activation_bits is not None:
                self._calibrate(config.activation_bits[1])
            uses = layer_uses(model, self._batch)
            self._ledger = make_ledger(model, self.space, uses, config.embedding_bits, self.depth.work)
            self.plan: Plan = make_plan(config, self.space, self._ledger, model)
            if self.lora is not None:
                attach_lora(model, self.lora)
        except BaseException:
            detach_quantizers(model)  # so that the same model can be tried again under another config
            self.depth.restore()
            raise
        self.depth.release()
        self._skeleton = empty_copy(model) if self.is_fsdp_enabled else None
        self._bad_loss = torch.zeros((), dtype=torch.bool, device=self.args.device)
        self._frozen = False
        if self.is_world_process_zero():
            print(self.plan if not self.depth.removed else f"{self.depth}\n{self.plan}")

    @property
    def _plain_model(self) -> PreTrainedModel:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    @property
    def _lora_config(self) -> LoraConfig | None:
        return None if self.lora is None else self.lora.config

    def _make_distiller(self, model: nn.Module, teacher: nn.Module | None) -> Distiller | None:
        config = self.geta_config
        if teacher is None:
            return None
        if not (config.distill_logits or config.distill_hidden):
            raise GETAError("a teacher is given, but distill_logits and distill_hidden are 0; give one a weight")
        return Distiller(
            model,
            teacher,
            logits=config.distill_logits,
            hidden=config.distill_hidden,
            temperature=config.distill_temperature,
            device=self.args.device,
            kept=self.depth.kept,
        )

    def _drop_layers(self, model: Any, chosen: Iterable[str]) -> DroppedLayers:
        """Remove the blocks that the config asks for; from then on it names them, in checkpoints and exports too."""
        config = self.geta_config
        if not config.drop_layers:
            return DroppedLayers()
        by_loss = isinstance(config.drop_layers, int)
        batches = first_batches(self.get_train_dataloader, config.calibration_batches) if by_loss else []

        def loss() -> float:
            with self.accelerator.autocast():
                own = mean_loss(model, batches).to(self.args.device)
            return float(self.accelerator.reduce(own, "mean"))  # every process has batches of its own

        dropped = drop_layers(model, config.drop_layers, self._batch, loss, chosen)
        self.geta_config = replace(config, drop_layers=list(dropped.removed))
        return dropped

    # --- the pruning space ----------------------------------------------------------------------------------------

    def _build_space(self) -> PruningSpace:
        model, config = self._plain_model, self.geta_config
        narrow = None if self.lora is not None else partial(without_untrained, model=model)
        return prepare_space(model, self._batch, prune=config.prune, keep=config.keep, narrow=narrow)[0]

    def _calibrate(self, target_bits: int) -> None:
        """Put quantizers on the inputs of the quantized layers, their ranges found on real batches."""
        attach_input_quantizers(
            self._plain_model,
            self._sample_batches(self.geta_config.calibration_batches),
            initial_bits=self.geta_config.initial_bits,
            target_bits=target_bits,
            clipping=self.geta_config.clipping,
            learn_t=self.geta_config.learn_activation_exponent,
        )

    def _sample_batches(self, count: int) -> list[dict[str, Tensor]]:
        """The first batches without labels, on the model's device; random states are left as they were."""
        if self.train_dataset is None:
            raise GETAError("GETATrainer needs `train_dataset`: the pruning space is built from a batch of it")
        return [self._inputs_of(batch) for batch in first_batches(self.get_train_dataloader, count)]

    def _inputs_of(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        known = inspect.signature(self._plain_model.forward).parameters
        if "decoder_input_ids" in known and "decoder_input_ids" not in batch and "labels" in batch:
            # Of labels alone the model would make them by itself, but the graph is recorded without a loss.
            batch["decoder_input_ids"] = batch["labels"].clamp(min=0)
        return {
            name: value.to(self.args.device)
            for name, value in batch.items()
            if isinstance(value, Tensor) and name in known and name not in self.label_names
        }

    # --- optimizer ------------------------------------------------------------------------------------------------

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Trainer's choice without the quantizers, whose scale must not shrink."""
        own = quantizer_parameters(model)
        return [name for name in super().get_decay_parameter_names(model) if name not in own]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Wrap the base optimizer that the arguments name, or that was given, in QASSO."""
        if self.qasso is not None and self.optimizer is not None:
            return self.optimizer  # resumed in the same trainer; `train` has checked that
        opt_model: nn.Module = self._plain_model if model is None else model
        base = super().create_optimizer(opt_model)
        frozen = FrozenWeights() if self.lora is None else find_frozen_weights(opt_model, self.space)
        hold_frozen(base, [p for name, p in opt_model.named_parameters() if name in frozen.names])
        names: dict[Tensor, str] = {parameter: name for name, parameter in opt_model.named_parameters()}
        if any(parameter not in names for group in base.param_groups for parameter in group["params"]):
            raise GETAError(
                "the optimizer holds a parameter that the model lacks; make it from this model's parameters"
            )
        own_group(base, quantizer_parameters(opt_model), self.geta_config.quantizer_learning_rate)
        schedule = Schedule.from_config(self.geta_config, self.state.max_steps, self._steps_per_epoch())
        model = self._plain_model
        self.qasso = QASSO(
            base,
            names,
            self.space,
            quantizer_prefixes(model),
            schedule,
            self.geta_config,
            input_quantizers=quantized_inputs(model),
            ledger=self._ledger,
            channel_dims=channel_dims(model),
            frozen=frozen,
            goal=self.plan.target,
        )
        self.optimizer = self.qasso
        logger.info("%s", schedule)
        return self.optimizer

    def _steps_per_epoch(self) -> float:
        if self.args.max_steps <= 0:
            return self.state.max_steps / self.args.num_train_epochs
        try:
            batches = len(self.get_train_dataloader())
        except TypeError:  # an iterable data set has no length; only durations in epochs ask for one
            return math.nan
        return math.ceil(batches / self.args.gradient_accumulation_steps)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Trainer's sampler; batches grouped by length come in an order that a resumed run draws again."""
        sampler = super()._get_train_sampler(train_dataset)
        if not isinstance(sampler, LengthGroupedSampler):
            return sampler
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return SeededByEpoch(sampler, seed)

    # --- training and logging -------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Trainer's `train`, once a trainer: a second run would go on in the stage where the first one ended.

        Raises:
            GETAError: the trainer has trained before and does not resume from a checkpoint.
        """
        if self.qasso is not None and self.qasso.step_count > 0 and not resume_from_checkpoint:
            raise GETAError(
                f"this trainer has done {self.qasso.step_count} steps already; resume from a checkpoint, "
                f"or make a new trainer on a plain model"
            )
        self._bad_loss = torch.zeros((), dtype=torch.bool, device=self.args.device)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Trainer's step; remembers, without waiting for the device, whether a loss was not finite."""
        self._freeze_quantizers()
        if self.qasso is not None:
            self.qasso.watch_frozen()
        loss = super().training_step(*args, **kwargs)
        self._bad_loss = self._bad_loss | ~torch.isfinite(loss.detach())
        return loss

    def _freeze_quantizers(self) -> None:
        """In cool-down (d, q_m, t) stand still, so their gradients are not computed any more."""
        cooling = self.qasso is not None and self.qasso.phase.stage == COOLDOWN
        if cooling != self._frozen:
            freeze_quantizers(self._plain_model, cooling)
            self._frozen = cooling

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Trainer's loss, with the distillation term added in training."""
        if self.distiller is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        asked = self.distiller.student_inputs(inputs)
        loss, outputs = super().compute_loss(model, asked, True, num_items_in_batch)
        items = num_items_in_batch
        if items is not None and self.args.average_tokens_across_devices:
            items = items / self.accelerator.num_processes  # Trainer's count is the sum over processes
        with self.accelerator.autocast():  # Accelerate puts autocast around the student's forward alone
            term = self.distiller.loss(inputs, outputs, items)
        if items is None and self.compute_loss_func is not None:
            term = term / self.current_gradient_accumulation_steps  # else Trainer divides the sum
        loss = loss + term
        return (loss, outputs) if return_outputs else loss

    def _check_finite(self) -> None:
        if self.qasso is not None:
            self.qasso.check_finite()
        if bool(self._bad_loss):
            raise GETAError(
                f"the loss was NaN or infinite by step {self.state.global_step}; the last checkpoint is intact. "
                f"Lower the learning rate or check the data"
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's log with the compression's state beside the loss."""
        self._check_finite()
        if self.qasso is not None and "loss" in logs:
            logs.update(self.compression_state())
        super().log(logs, start_time)

    def compression_state(self) -> dict[str, float]:
        """Where the run stands: stage (1 warm-up, 2 projection, 3 joint, 4 cool-down), sparsity as a share of the
        prunable groups, bits, BOPs of the quantized layers relative to dense, and the mean γ."""
        if self.qasso is None:
            raise GETAError("training has not started, so there is no compression state")
        return compression_state(self.qasso)

    # --- checkpoints and export -----------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        self._check_finite()
        super()._save(output_dir, state_dict)
        folder = Path(str(output_dir or self.args.output_dir))
        if self.args.should_save:
            self.geta_config.save(folder / CONFIG_NAME)
            launch, base = (self.args.world_size, self.is_fsdp_enabled), base_name(self._plain_model)
            write_notes(folder, *launch, self.qasso, self._lora_config, base)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        check_checkpoint(
            Path(resume_from_checkpoint),
            self.geta_config,
            self._plain_model,
            self.args.world_size,
            self.is_fsdp_enabled,
            self._lora_config,
        )
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def export_model(self, directory: str | os.PathLike[str], overwrite: bool = False) -> ExportReport | None:
        """Write the small folder: zero groups sliced away, weights packed at their bits; tokenizer and card beside.

        Args:
            directory: must not exist unless `overwrite`.

        Returns:
            What was written; None on processes other than the first. All processes have to call it.

        Raises:
            GETAError: training has not reached its target, or the reloaded folder disagrees with the model.
        """
        if self.qasso is None or not self.qasso.finished:
            step = 0 if self.qasso is None else self.qasso.step_count
            raise GETAError(
                f"training is at step {step}, before the end of the joint stage, where the last groups become zero; "
                f"train on before exporting (steps that an fp16 scaler skipped do not count)"
            )
        model = self._whole_model()
        if not self.is_world_process_zero():
            return None
        card = partial(write_card, base_model=base_name(model), repo_id=Path(directory).resolve().name)
        with merged(model):
            return export(
                model,
                directory,
                space=self.space,
                batch={name: value.to(model.device) for name, value in self._batch.items()},
                config=self.geta_config,
                processing_class=self.processing_class,
                expected_zero_groups=self.qasso.removed_groups,
                embedding_bits=self.geta_config.embedding_bits,
                finish=card,
                overwrite=overwrite,
            )

    def _whole_model(self) -> PreTrainedModel:
        """The trained model as one process has it; under FSDP2 gathered on the CPU, which takes all processes."""
        if self._skeleton is None:
            return self._plain_model
        state = self.accelerator.get_state_dict(self.model)
        if self.is_world_process_zero():
            self._skeleton.load_state_dict(state, assign=True)
        return self._skeleton
