"""`GETATrainer`: Hugging Face's Trainer with quantizers on the model, a pruning space, and QASSO as the optimizer."""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PreTrainedModel, Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from geta_hf.config import CONFIG_NAME, GETAConfig
from geta_hf.cost import FLOAT_BITS, LayerCost, layer_costs, linear_bops, masked_layer_costs, mean_bits
from geta_hf.errors import GETAError
from geta_hf.export import ExportReport, export, rehearse
from geta_hf.qadg import Family, PruningSpace, build_space
from geta_hf.qasso import QASSO, STAGES, Schedule, target_groups
from geta_hf.quantization import attach_quantizers, detach_quantizers, quantized_layers, quantizer_prefixes
from geta_hf.quantization.quantizer import Quantizer

logger = logging.get_logger(__name__)


class GETATrainer(Trainer):
    """Compresses a model while it is fine-tuned.

    Quantizers are put on the model and the pruning space is built from a real batch as soon as the trainer is made,
    so a model or a limit that can't work fails before training.

    Args:
        model: the model to train, changed in place.
        args: Trainer's own arguments, as all other keyword arguments.
        geta_config: limits, stages and rules; the defaults remove half of all groups at 4 to 8 bits.

    Attributes:
        space: the pruning space.

    Raises:
        GETAError: no layer to quantize, no group to prune, an unreachable target, a batch that the model can't run.
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: Any = None,
        *,
        geta_config: GETAConfig | None = None,
        **kwargs: Any,
    ) -> None:
        if model is None:
            raise GETAError("GETATrainer needs `model`; `model_init` would make models that QASSO has never seen")
        self.geta_config = geta_config or GETAConfig()
        self.qasso: QASSO | None = None
        _attach(model, self.geta_config)
        try:
            super().__init__(model=model, args=args, **kwargs)
            self._check_supported(model)
            self.space = self._build_space()
        except BaseException:
            detach_quantizers(model)  # so that the same model can be tried again under another config
            raise
        self._bad_loss = torch.zeros((), dtype=torch.bool, device=self.args.device)
        self._dense_bops = linear_bops(
            [LayerCost(c.name, c.weights, FLOAT_BITS) for c in layer_costs(self._plain_model)]
        )
        logger.info("%d prunable groups in %d families", self.space.num_groups, len(self.space.prunable))

    @property
    def _plain_model(self) -> PreTrainedModel:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _check_supported(self, model: nn.Module) -> None:
        _refuse_shared_quantizers(model)
        if self.lr_scheduler is not None:
            raise GETAError("a ready-made scheduler does not know the quantizers; pass optimizers=(optimizer, None)")
        if self.args.auto_find_batch_size:
            raise GETAError("auto_find_batch_size restarts training half-way; find the batch size without GETATrainer")
        if self.args.load_best_model_at_end:
            raise GETAError(
                "load_best_model_at_end would bring back a checkpoint from before groups and bits were removed; "
                "turn it off, the last checkpoint is the compressed one"
            )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise GETAError("GETATrainer runs in one process or under DDP; FSDP and DeepSpeed are not supported yet")

    # --- the pruning space ----------------------------------------------------------------------------------------

    def _build_space(self) -> PruningSpace:
        model, batch = self._plain_model, self._sample_batch()
        found = build_space(model, batch, prune=self.geta_config.prune, keep=self.geta_config.keep)
        found = _without_untrained(found, model)
        space = rehearse(model, found, batch) if isinstance(model, PreTrainedModel) else found
        target_groups(self.geta_config.target_sparsity, [family.size for family in space.prunable])
        return space

    def _sample_batch(self) -> dict[str, Tensor]:
        """Two rows of a real batch without labels, on the model's device; random states are left as they were."""
        if self.train_dataset is None:
            raise GETAError("GETATrainer needs `train_dataset`: the pruning space is built from a batch of it")
        states = random.getstate(), np.random.get_state()
        with torch.random.fork_rng():
            try:
                batch = next(iter(self.get_train_dataloader()))
            except (StopIteration, ValueError) as error:
                raise GETAError(f"no batch can be made of train_dataset ({error or 'it is empty'})") from error
        random.setstate(states[0])
        np.random.set_state(states[1])
        known = inspect.signature(self._plain_model.forward).parameters
        if "decoder_input_ids" in known and "decoder_input_ids" not in batch and "labels" in batch:
            # Of labels alone the model would make them by itself, but the graph is recorded without a loss.
            batch["decoder_input_ids"] = batch["labels"].clamp(min=0)
        return {
            name: value[:2].to(self.args.device)
            for name, value in batch.items()
            if isinstance(value, Tensor) and name in known and name not in self.label_names
        }

    # --- optimizer ------------------------------------------------------------------------------------------------

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Trainer's choice without the quantizers, whose scale must not shrink."""
        own = _quantizer_parameters(model)
        return [name for name in super().get_decay_parameter_names(model) if name not in own]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Wrap the base optimizer that the arguments name, or that was given, in QASSO."""
        if self.qasso is not None and self.optimizer is not None:
            return self.optimizer  # resumed in the same trainer; `train` has checked that
        opt_model: nn.Module = self._plain_model if model is None else model
        base = super().create_optimizer(opt_model)
        names: dict[Tensor, str] = {parameter: name for name, parameter in opt_model.named_parameters()}
        if any(parameter not in names for group in base.param_groups for parameter in group["params"]):
            raise GETAError(
                "the optimizer holds a parameter that the model lacks; make it from this model's parameters"
            )
        _own_group(base, _quantizer_parameters(opt_model), self.geta_config.quantizer_learning_rate)
        schedule = Schedule.from_config(self.geta_config, self.state.max_steps, self._steps_per_epoch())
        self.qasso = QASSO(base, names, self.space, quantizer_prefixes(self._plain_model), schedule, self.geta_config)
        self.optimizer = self.qasso
        logger.info("%s; K = %d groups", schedule, self.qasso.target)
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
        return _SeededByEpoch(sampler, seed)

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
        loss = super().training_step(*args, **kwargs)
        self._bad_loss = self._bad_loss | ~torch.isfinite(loss.detach())
        return loss

    def _check_finite(self) -> None:
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
        layers = masked_layer_costs(self._plain_model, self.space, self.qasso.removed)
        bits = [layer.bits for layer in layers]
        return {
            "stage": STAGES.index(self.qasso.phase.stage) + 1,
            "sparsity": round(self.qasso.removed_groups / self.space.num_groups, 4),
            "mean_bits": round(mean_bits(layers), 3),
            "min_bits": round(min(bits), 3),
            "max_bits": round(max(bits), 3),
            "relative_bops": round(linear_bops(layers) / self._dense_bops, 5),
            "gamma": self.qasso.mean_gamma(),
        }

    # --- checkpoints and export -----------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        self._check_finite()
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self.geta_config.save(Path(str(output_dir or self.args.output_dir)) / CONFIG_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._check_checkpoint(Path(resume_from_checkpoint))
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _check_checkpoint(self, folder: Path) -> None:
        """Raises GETAError unless the checkpoint is of this config and this model."""
        if not (folder / CONFIG_NAME).is_file():
            raise GETAError(f"{folder} has no {CONFIG_NAME}: it is not a checkpoint of GETATrainer")
        for name in (OPTIMIZER_NAME, SCHEDULER_NAME):
            if not (folder / name).is_file():
                raise GETAError(f"{folder} has no {name}, without which stages can't go on; turn save_only_model off")
        theirs, ours = GETAConfig.load(folder / CONFIG_NAME).to_dict(), self.geta_config.to_dict()
        changed = {name: (theirs[name], ours[name]) for name in ours if theirs[name] != ours[name]}
        if changed:
            text = ", ".join(f"{name}: {old!r} there, {new!r} here" for name, (old, new) in changed.items())
            raise GETAError(f"{folder} was written under another GETAConfig ({text}); resume with the same")
        shapes = {name: tuple(tensor.shape) for name, tensor in self._plain_model.state_dict().items()}
        for name, shape in _stored_shapes(folder).items():
            if shapes.get(name) != shape:
                raise GETAError(
                    f"{folder} holds {name} of shape {shape}, this model has {shapes.get(name, 'no such tensor')}; "
                    f"it is a checkpoint of another model"
                )

    def export_model(self, directory: str | os.PathLike[str], overwrite: bool = False) -> ExportReport | None:
        """Write the small folder: zero groups sliced away, weights packed at their bits, tokenizer and config beside.

        Args:
            directory: must not exist unless `overwrite`.

        Returns:
            What was written; None on processes other than the first.

        Raises:
            GETAError: training has not reached its target, or the reloaded folder disagrees with the model.
        """
        if self.qasso is None or self.qasso.removed_groups < self.qasso.target:
            done = 0 if self.qasso is None else self.qasso.removed_groups
            target = "K" if self.qasso is None else self.qasso.target
            raise GETAError(
                f"{done} of {target} groups are zero; train to the end of the joint stage before exporting "
                f"(steps that an fp16 scaler skipped do not count)"
            )
        if not self.is_world_process_zero():
            return None
        return export(
            self._plain_model,
            directory,
            space=self.space,
            batch=self._sample_batch(),
            config=self.geta_config,
            processing_class=self.processing_class,
            expected_zero_groups=self.qasso.target,
            overwrite=overwrite,
        )


class _SeededByEpoch(Sampler[int]):
    """A sampler whose order depends on seed and epoch alone."""

    def __init__(self, inner: LengthGroupedSampler, seed: int) -> None:
        self.inner, self.seed, self.epoch = inner, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.inner)

    def __iter__(self) -> Iterator[int]:
        self.inner.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(self.inner)


def _attach(model: nn.Module, config: GETAConfig) -> None:
    attach_quantizers(
        model,
        include=config.include,
        exclude=config.exclude,
        initial_bits=config.initial_bits,
        target_bits=config.bits[1],
        clipping=config.clipping,
        learn_t=config.learn_exponent,
    )


def _refuse_shared_quantizers(model: nn.Module) -> None:
    first: dict[int, str] = {}
    for name, layer in quantized_layers(model).items():
        other = first.setdefault(id(layer.weight_quantizer), name)
        if other != name:
            raise GETAError(
                f"{name}.weight is tied to {other}.weight, which can't be saved packed; exclude one of them"
            )


def _without_untrained(space: PruningSpace, model: nn.Module) -> PruningSpace:
    """The space with families that cut a frozen parameter no longer prunable."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}

    def follow(family: Family) -> Family:
        held = [member.tensor for member in family.members if member.tensor in frozen]
        if not family.prunable or not held:
            return family
        logger.warning("not pruned: %s, since %s is not trained", family.name, held[0])
        return dataclasses.replace(family, prunable=False, reason=f"{held[0]} is not trained")

    left = dataclasses.replace(space, families=tuple(follow(family) for family in space.families))
    if not left.prunable:
        raise GETAError("every prunable group has a parameter that is not trained; set requires_grad of some")
    return left


def _quantizer_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable quantizer parameters by name."""
    return {
        f"{name}.{leaf}": parameter
        for name, module in model.named_modules()
        if isinstance(module, Quantizer)
        for leaf, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad
    }


def _own_group(base: torch.optim.Optimizer, quantizers: dict[str, nn.Parameter], learning_rate: float) -> None:
    """Move the quantizers into a parameter group of their own: their learning rate, no weight decay."""
    own = {id(parameter) for parameter in quantizers.values()}
    for group in base.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
        group.pop("param_names", None)  # QASSO names all groups itself
    group = {"params": list(quantizers.values()), "lr": learning_rate, "weight_decay": 0.0}
    base.add_param_group(group)


def _stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  safe_open is not a mapping
                shapes[name] = tuple(tensors.get_slice(name).get_shape())
    if not shapes:
        raise GETAError(f"{folder} holds no .safetensors file to resume from")
    return shapes
