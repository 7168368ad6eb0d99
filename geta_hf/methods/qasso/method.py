"""QASSO as a `Method`, with its functions in the order in which a trainer calls them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from geta_hf.config import CompressionConfig, GETAConfig
from geta_hf.errors import GETAError
from geta_hf.methods.base import Batches, CompressionResult, Method, Run, StepMemory
from geta_hf.methods.compensation import Compensation, compensation_bytes
from geta_hf.methods.parameter_groups import (
    add_frozen_group,
    add_quantizer_group,
    check_names,
    quantizer_parameters,
    weight_quantizers,
)
from geta_hf.methods.qasso.frozen import check_rules
from geta_hf.methods.qasso.joint_step import needs_gradients
from geta_hf.methods.qasso.metrics import compression_metrics
from geta_hf.methods.qasso.optimizer import QASSO
from geta_hf.methods.qasso.schedule import STAGES, Schedule
from geta_hf.qadg import PruningSpace
from geta_hf.qadg.group_labels import find_group_labels
from geta_hf.quantization import (
    attach_input_quantizers,
    attach_quantizers,
    freeze_quantizers,
    input_quantizer_prefixes,
    quantized_layers,
    quantizer_prefixes,
)
from geta_hf.quantization.clipping import Histogram
from geta_hf.quantization.quantizer import Quantizer


class QASSOMethod(Method):
    """Prune groups and learn bit widths in four stages (Algorithm 2 of arXiv 2502.16638).

    Args:
        config: a GETAConfig.

    Attributes:
        optimizer: None before `wrap_optimizer`.

    >>> from geta_hf import GETAConfig
    >>> QASSOMethod(GETAConfig()).stage
    'warm-up'
    """

    stages = STAGES

    def __init__(self, config: CompressionConfig) -> None:
        super().__init__(config)
        if not isinstance(config, GETAConfig):
            raise GETAError(f"QASSO is set by a GETAConfig, not by a {type(config).__name__}")
        self.config: GETAConfig = config
        self.optimizer: QASSO | None = None
        self._quantizers_frozen = False
        self._compensation: Compensation | None = None

    # --- before training ----------------------------------------------------------------------------------------------

    def check(self, frozen_weights: bool) -> None:
        """Raise GETAError for a rule that needs full gradients of weights that are frozen, as under LoRA."""
        if frozen_weights:
            check_rules(self.config)

    def check_stages(self, total_steps: int, steps_per_epoch: float) -> None:
        """Raise GETAError where the stages do not fit into a run of this length."""
        stages = (self.config.warmup, self.config.projection, self.config.joint)
        # A plan made before the data is loaded knows no epochs; the check is made again when training starts.
        if math.isnan(steps_per_epoch) and any("epoch" in str(stage) for stage in stages):
            return
        Schedule.from_config(self.config, total_steps, steps_per_epoch)

    def attach(self, model: nn.Module, batches: Batches | None) -> None:
        """Put quantizers on weights, and on layers' inputs where the config gives activations a width, in place.

        Args:
            model: dense.
            batches: where ranges of inputs are measured; without, they start at 1, for the shapes alone.
        """
        config = self._training_config
        attach_quantizers(
            model,
            include=config.include,
            exclude=config.exclude,
            initial_bits=config.initial_bits,
            target_bits=config.bits[1],
            clipping=config.clipping,
            learn_t=config.learn_exponent,
            grid=config.grid,
        )
        self._compensation = None
        if batches is not None and self.config.compensates:
            self._compensation = Compensation(model, batches(config.calibration_batches))
        if config.activation_bits is None:
            return
        if batches is None:
            self._attach_input_shapes(model)
            return
        attach_input_quantizers(
            model,
            batches(config.calibration_batches),
            initial_bits=config.initial_bits,
            target_bits=config.activation_bits[1],
            clipping=config.clipping,
            learn_t=config.learn_activation_exponent,
        )

    def _attach_input_shapes(self, model: nn.Module) -> None:
        """Put input quantizers on a model without data: calibration would run the model."""
        for layer in quantized_layers(model).values():
            # Any value will do, since the shapes are all that is asked for.
            start = torch.ones(1, device=layer.weight.device)
            layer.input_quantizer = Quantizer(
                start, self.config.initial_bits, self.config.learn_activation_exponent, start.device
            )

    def memory(self, model: nn.Module, space: PruningSpace, removed_groups: int) -> StepMemory:
        """Count what QASSO keeps of the slices of one period, and the most that its own work takes in a step.

        Args:
            model: with its quantizers, on any device or on meta.
            space: its pruning space.
            removed_groups: how many groups the plan removes.
        """
        descent = needs_gradients(self.config)
        groups = sum(family.size for family in space.trainable)
        share = removed_groups / max(groups, 1) / max(self.config.pruning_periods, 1)
        tensors = dict(model.named_parameters())
        labels = find_group_labels(space.trainable, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
        kept = work = largest = 0
        for cut in labels:
            tensor = tensors[cut.tensor]
            # A frozen weight under LoRA is multiplied by 1 - γ, with no copy of what it was before the step.
            if not tensor.requires_grad:  # shrinks in place
                continue
            item = tensor.element_size()
            # A label equal to the number of groups marks an index that belongs to none.
            in_groups = float((cut.label < groups).sum()) / len(cut.label)
            elements = int(tensor.numel() * in_groups * share)
            kept += elements * item * (2 if descent else 1)  # x, and g
            # x after the base step and clipped, both fp32; fp32 copies of others; residue, gradient and step.
            copies = 0 if item == 4 else 4
            work += elements * (8 + copies + (12 if descent else 0))
            largest = max(largest, 12 * elements)
        # ⟨g, x⟩ of one tensor at a time, and the histogram of one weight at a time where widths are allocated.
        saliency = (tensor.numel() * (4 if tensor.element_size() == 4 else 6) for tensor in tensors.values())
        allocation = (layer.weight.numel() * 16 for layer in quantized_layers(model).values())
        covariances = compensation_bytes(quantized_layers(model).values()) if self.config.compensates else 0
        return StepMemory(kept, max(work + largest, covariances, *saliency, *allocation))

    # --- in training --------------------------------------------------------------------------------------------------

    def wrap_optimizer(
        self, base: torch.optim.Optimizer, names: Mapping[Tensor, str], model: nn.Module, run: Run
    ) -> torch.optim.Optimizer:
        """Return a QASSO around `base`, with quantizers in a parameter group of their own.

        Raises:
            GETAError: stages that do not fit into the run, an optimizer that can't be wrapped, or one of another model;
                compensation of weights that are split over processes.
        """
        if self._compensation is not None:
            check_complete(names)
        # QASSO finds all that groups cut by the base optimizer's names, so frozen weights have to be among them.
        add_frozen_group(base, [parameter for parameter, name in names.items() if name in run.frozen.names])
        check_names(base, names)
        add_quantizer_group(base, quantizer_parameters(model), self.config.quantizer_learning_rate)
        self.optimizer = QASSO(
            base,
            names,
            run.space,
            quantizer_prefixes(model),
            Schedule.from_config(self.config, run.total_steps, run.steps_per_epoch),
            self._training_config,
            input_quantizers=list(input_quantizer_prefixes(model).values()),
            histograms=_histograms(model),
            ledger=run.ledger,
            channel_dims=_channel_dims(model),
            blocks=_blocks(model),
            modules=weight_quantizers(model),
            frozen=run.frozen,
            target=run.target,
            compensation=self._compensation,
        )
        return self.optimizer

    @property
    def _training_config(self) -> GETAConfig:
        """The config by which the optimizer trains; methods that train otherwise than they end override it."""
        return self.config

    def before_backward(self, model: nn.Module) -> None:
        """Freeze quantizers in cool-down, so that their gradients cost nothing, and follow gradients of frozen weights.

        Args:
            model: the plain one, not a wrapper.
        """
        # Not by the stage: in a run of cool-down alone the first step still learns.
        cooling = self.optimizer is not None and self.optimizer.finished
        # At the change alone and not in every step, as it walks all modules.
        if cooling != self._quantizers_frozen:
            freeze_quantizers(model, cooling)
            self._quantizers_frozen = cooling
        if self.optimizer is not None:
            # Before the backward pass, which is where gradients of frozen weights are added up.
            self.optimizer.watch_frozen()

    def check_finite(self) -> None:
        """Raise GETAError where a quantizer or a gradient became NaN or infinite; waits for the device."""
        if self.optimizer is not None:
            self.optimizer.check_finite()

    @property
    def step_count(self) -> int:
        """The number of optimizer steps done so far."""
        return 0 if self.optimizer is None else self.optimizer.step_count

    @property
    def finished(self) -> bool:
        """True once the joint stage is over: groups are zero and widths are integers."""
        return self.optimizer is not None and self.optimizer.finished

    @property
    def removed_groups(self) -> int:
        """The number of groups that are zero for good by now."""
        return 0 if self.optimizer is None else self.optimizer.removed_groups

    @property
    def stage(self) -> str:
        """The stage of the next step: `warm-up`, `projection`, `joint` or `cool-down`."""
        return STAGES[0] if self.optimizer is None else self.optimizer.phase.stage

    def metrics(self) -> dict[str, float]:
        """Return the numbers of `compression_metrics`; waits for the device.

        Raises:
            GETAError: training has not started.
        """
        optimizer = self.optimizer
        if optimizer is None:
            raise GETAError("training has not started, so there is no compression state")
        widths = list(optimizer.bits().values())  # weights first
        layers = optimizer.quantizers.weight_layers
        return compression_metrics(
            self.stage,
            optimizer.ledger,
            optimizer.removed_mask,
            widths[:layers],
            widths[layers:],
            optimizer.mean_gamma(),
        )

    # --- after training -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        """Set removed groups to zero and quantizers to their final values again, in place.

        Args:
            model: the plain one, not a wrapper.

        Raises:
            GETAError: the joint stage is not over.
        """
        optimizer = self._finished_optimizer()
        optimizer.restore()
        trained = {name for group in optimizer.param_groups for name in group["param_names"]}
        for name, parameter in quantizer_parameters(model, trained=False).items():
            if name.endswith(".t") and name not in trained:
                parameter.fill_(1.0)  # an exponent that is not learned

    def result(self) -> CompressionResult:
        """Return removed groups by family and integer widths by module path.

        Raises:
            GETAError: the joint stage is not over, or something changed the quantizers to values without a width.
        """
        optimizer = self._finished_optimizer()
        # Widths are integers by now, but come back from log2(q_m^t / d + 1) + 1 in fp32, as 3.9999998.
        bits = {}
        for prefix, width in optimizer.bits().items():
            if not math.isfinite(width):
                raise GETAError(
                    f"{prefix} has a width of {width} bits: something changed its step size, clipping value or "
                    f"exponent after training; call trainer.restore_compression() before the export"
                )
            bits[prefix] = round(width)
        weights = optimizer.quantizers.weights
        inputs = optimizer.quantizers.input_prefixes
        return CompressionResult(
            removed=optimizer.removed,
            weight_bits={name.removesuffix(".weight"): bits[prefix] for name, prefix in weights.items()},
            input_bits={prefix.removesuffix(".input_quantizer"): bits[prefix] for prefix in inputs},
        )

    def _finished_optimizer(self) -> QASSO:
        """Return the optimizer once the joint stage is over; raise GETAError before that."""
        optimizer = self.optimizer
        if optimizer is None or not optimizer.finished:
            raise GETAError(
                f"QASSO is at step {self.step_count}, before the end of the joint stage, where the last groups become "
                f"zero and widths become integers; train on (steps that an fp16 scaler skipped do not count). A "
                f"callback that stops early has to wait until trainer.method.finished is true"
            )
        return optimizer


def check_complete(names: Mapping[Tensor, str]) -> None:
    """Raise GETAError for a weight of which this process has a part only."""
    for parameter, name in names.items():
        if isinstance(parameter, DTensor):
            raise GETAError(
                f"{name} is split over processes, but compensate=True and rounding='compensated' need complete "
                f"weights; train under DDP or on one device, or leave them out"
            )


def _histograms(model: nn.Module) -> dict[str, Histogram]:
    """Return prefix -> magnitudes of every quantized input on which calibration was run."""
    found = {}
    for name, layer in quantized_layers(model).items():
        if layer.input_quantizer is not None and layer.input_quantizer.histogram is not None:
            found[f"{name}.input_quantizer"] = layer.input_quantizer.histogram
    return found


def _channel_dims(model: nn.Module) -> dict[str, int]:
    """Return prefix -> the weight's dimension, of each quantizer with a step size for each output channel."""
    dims = {}
    for name, layer in quantized_layers(model).items():
        dim = layer.weight_quantizer.channel_dim
        if dim is not None:
            dims[f"{name}.weight_quantizer"] = dim
    return dims


def _blocks(model: nn.Module) -> dict[str, Quantizer]:
    """Return prefix -> the quantizer, of each with a step size for each block of inputs."""
    quantizers = weight_quantizers(model)
    return {prefix: quantizer for prefix, quantizer in quantizers.items() if quantizer.order is not None}
