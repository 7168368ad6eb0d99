"""Estimate the memory of a training run before it starts, part by part: one step is run on tensors without data.

The model's own code, Trainer's way to the loss, the teacher and the optimizer run on fake tensors, and every storage
counts for as long as something keeps it alive. So whatever changes memory (autocast, activation checkpointing,
attention kernels, the dtype of weights) is followed, not modelled. The method says what it takes itself.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils.operations import convert_to_fp32
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig, PreTrainedModel, Trainer, TrainingArguments

from geta_hf.config import CompressionConfig
from geta_hf.errors import GETAError, MemoryUnknown
from geta_hf.export.serving import limit_config, limit_families, serving_notes
from geta_hf.methods import Method, StepMemory, make_method
from geta_hf.methods.frozen_weights import FrozenWeights
from geta_hf.methods.parameter_groups import quantizer_parameters
from geta_hf.qadg import PruningSpace, build_space
from geta_hf.qadg.propagation.propagate import record_and_propagate
from geta_hf.qadg.tracing.dummy_inputs import empty_model, make_dummy_inputs
from geta_hf.qadg.tracing.raw_reads import recorded_raw_reads
from geta_hf.quantization import detach_quantizers, quantized_layers, select_layers
from geta_hf.quantization.experts import unstack_experts
from geta_hf.quantization.kernels import outlined
from geta_hf.surgery.drop_experts import check_drop_experts
from geta_hf.surgery.drop_layers import check_drop
from geta_hf.training.distillation import Distiller
from geta_hf.training.fake_tensors import OUTLINE, Live, outline_of, outlines, without_data
from geta_hf.training.float_layers import exclude_layers, left_float
from geta_hf.training.lora import attach_lora, find_frozen_weights, plan_lora
from geta_hf.training.loss_terms import LossTerms, Scale
from geta_hf.training.memory_report import PARTS, MemoryPlan, Moment
from geta_hf.training.plan import Plan, embedding_rows, make_ledger, make_plan
from geta_hf.training.preparation import empty_copy, without_untrained
from geta_hf.utils.model_io import loss_of, map_tensors
from geta_hf.utils.module_state import running

if TYPE_CHECKING:
    from peft import LoraConfig

_STATES_8BIT = {"adam": 2, "ademamix": 3, "lion": 1, "rmsprop": 1}
"""States of an element that 8-bit optimizers keep, by a part of Trainer's name for them."""


def plan_memory(
    model: PreTrainedModel,
    batch: Mapping[str, Tensor],
    args: TrainingArguments,
    config: CompressionConfig | None = None,
    space: PruningSpace | None = None,
    plan: Plan | None = None,
    device: str | torch.device | None = None,
) -> MemoryPlan:
    """Estimate the memory that one process needs to train a model, without its weights and in seconds.

    Not counted: evaluation and export, what DDP's buckets and FSDP's gathering add or sharding saves, torch.compile,
    the CUDA context (some 0.5 GB), and what an allocator wastes.

    Args:
        model: on any device, or on meta; with its quantizers attached where it is to be quantized. Left unchanged.
        batch: the largest that training will see, labels included; only shapes and dtypes are read.
        args: Trainer's own: `optim`, `bf16`, `gradient_checkpointing`, `gradient_accumulation_steps` and the device.
        config: of a GETA run, for distillation, stages and rules; None for a plain one.
        space, plan: the pruning space and what the run is to end with; without them nothing is counted for pruning.
        device: that the run will train on, such as "cuda", where this machine lacks it. The optimizer's step is then
            that of the device, where several tensors may be updated at once with temporaries of all of them; forward
            and backward are still those of the device of `args`, which is the default.

    Raises:
        MemoryUnknown: the forward asks for data, or fails, where there is none.

    Example:
        >>> import torch
        >>> from transformers import BertConfig, BertForSequenceClassification, TrainingArguments
        >>> from geta_hf import plan_memory
        >>> sizes = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 32, "num_hidden_layers": 1}
        >>> model = BertForSequenceClassification(BertConfig(vocab_size=30, **sizes))
        >>> batch = {"input_ids": torch.ones(2, 8, dtype=torch.long), "labels": torch.zeros(2, dtype=torch.long)}
        >>> memory = plan_memory(model, batch, TrainingArguments("run", use_cpu=True))
        >>> memory.step.optimizer  # AdamW keeps two values of four bytes a parameter, and its step counts
        90...
    """
    method = None if config is None else make_method(config)
    return _plan_memory(model, batch, args, config, space, plan, method, device)


def _plan_memory(
    model: PreTrainedModel,
    batch: Mapping[str, Any],
    args: TrainingArguments,
    config: CompressionConfig | None,
    space: PruningSpace | None,
    plan: Plan | None,
    method: Method | None,
    device: str | torch.device | None = None,
) -> MemoryPlan:
    """Do what `plan_memory` does, for a method that may have been attached to the model."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    student = without_data(model, mode, args.device).train()
    student.config.use_cache = args.use_cache
    if args.gradient_checkpointing:
        _checkpoint(student, args)
    teacher = _fake_teacher(model, mode, args.device, config)
    inputs = {
        name: map_tensors(partial(outline_of, mode=mode, device=args.device), item) for name, item in batch.items()
    }
    with outlined(OUTLINE), outlines(mode):
        terms = LossTerms(_distiller(student, teacher, config), method, partial(_autocast, args))
        backward = _forward_and_backward(student, terms, inputs, args, _frozen(student, space))
        state, temporary, notes = _optimizer(
            student, args, mode, torch.device(args.device if device is None else device)
        )
    own = _method_memory(model, method, space, plan)
    held = {"optimizer": state, "pruning": own.kept}
    gradients = sum(p.nbytes for p in student.parameters() if p.requires_grad)
    # The base optimizer's step and the method's own work come one after the other.
    temporary = max(temporary, own.temporary)
    if config is not None and config.drop_layers:
        notes = (*notes, "of the full model, though drop_layers will remove layers before training")
    if config is not None and config.drop_experts:
        notes = (*notes, "of the full model, though drop_experts will remove experts before training")
    copies = _trial_cut_memory(model, batch, space)
    before = Moment(backward.weights, teacher=backward.teacher, activations=copies) if copies else Moment()
    return MemoryPlan(
        before,
        dataclasses.replace(backward, **held),
        dataclasses.replace(backward, **held, gradients=gradients, activations=temporary),
        notes,
    )


# --- tensors without data -----------------------------------------------------------------------------------------


def _fake_teacher(
    model: PreTrainedModel, mode: FakeTensorMode, device: torch.device, config: CompressionConfig | None
) -> nn.Module | None:
    if config is None or not (config.distill_logits or config.distill_hidden):
        return None
    return detach_quantizers(without_data(model, mode, device))


def _distiller(
    student: PreTrainedModel, teacher: nn.Module | None, config: CompressionConfig | None
) -> Distiller | None:
    if teacher is None or config is None:
        return None
    return Distiller(student, teacher, logits=config.distill_logits, hidden=config.distill_hidden)


def _checkpoint(model: PreTrainedModel, args: TrainingArguments) -> None:
    """Switch activation checkpointing on as Trainer does; transformers 5.20 renamed the method."""
    kwargs: dict[str, Any] = dict(args.gradient_checkpointing_kwargs or {})  # type: ignore[arg-type]
    options = {name: kwargs.pop(name) for name in ("every_n_layers", "offload") if name in kwargs}
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(kwargs or None, **options)


def _frozen(student: nn.Module, space: PruningSpace | None) -> FrozenWeights:
    """Return the frozen weights of a model with LoRA; each has a gradient only until it is added up."""
    adapted = any(layer.lora is not None for layer in quantized_layers(student).values())
    return find_frozen_weights(student, space) if adapted and space is not None else FrozenWeights()


def _note_gradients(student: nn.Module, live: Live, frozen: FrozenWeights) -> None:
    """Count gradients as their own part; those of frozen tensors are read and dropped at once, as in training."""
    named = dict(student.named_parameters())

    @torch.no_grad()
    def read(name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        # The product is made for the memory that it takes, and not for its value.
        _ = (frozen.merged(name, named) * parameter.grad).float()
        parameter.grad = None

    for name, parameter in named.items():
        if name in frozen.names:
            parameter.requires_grad_()
            parameter.register_post_accumulate_grad_hook(partial(read, name))
        elif parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: live.hold(p.grad, "gradients"))


def _forward_and_backward(
    student: PreTrainedModel,
    terms: LossTerms,
    inputs: dict[str, Any],
    args: TrainingArguments,
    frozen: FrozenWeights,
) -> Moment:
    """Run the micro-batches of one step and return the bytes alive at the highest level."""
    live = Live()
    # By id, since a tied parameter has several names.
    own = {id(parameter) for parameter in quantizer_parameters(student, trained=False).values()}
    for tensor in (*student.parameters(), *student.buffers()):
        live.hold(tensor, "quantizers" if id(tensor) in own else "weights")
    teacher = nn.Module() if terms.distiller is None else terms.distiller.teacher
    for tensor in (*teacher.parameters(), *teacher.buffers()):
        live.hold(tensor, "teacher")
    map_tensors(lambda tensor: live.hold(tensor, "activations"), inputs)
    _note_gradients(student, live, frozen)
    try:
        with live:
            for _ in range(min(2, args.gradient_accumulation_steps)):  # from the second on there are gradients
                _loss(student, terms, inputs, args).backward()
    except Exception as error:  # a model's own code may fail on tensors without data in any way
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MemoryUnknown(f"the memory of {type(student).__name__} can't be foreseen: {text}") from error
    student.zero_grad()
    for name in frozen.names:
        student.get_parameter(name).requires_grad_(False)
    return Moment(**{part: live.highest[part] for part in PARTS})


def _autocast(args: TrainingArguments) -> torch.autocast:
    half = torch.float16 if args.fp16 else torch.bfloat16
    return torch.autocast(args.device.type, half, enabled=args.bf16 or args.fp16)


def _loss(student: PreTrainedModel, terms: LossTerms, inputs: dict[str, Any], args: TrainingArguments) -> Tensor:
    """Return the loss as a trainer computes it under Accelerate, with the terms of distillation and of the method."""
    own = student.forward

    def forward(**asked: Any) -> Any:
        with _autocast(args):
            outputs = own(**asked)
        # Accelerate does this around the forward. For a large vocabulary these logits are the largest tensor of a
        # step.
        return convert_to_fp32(outputs) if args.bf16 or args.fp16 else outputs

    def compute_loss(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        loss = loss_of(model(**inputs))
        if loss is None:
            raise GETAError("the batch holds no labels, so there is no loss; add them")
        return loss

    with running(student, forward):
        return terms.around(compute_loss, lambda: student, lambda _: Scale())(student, inputs)


# --- the optimizer ------------------------------------------------------------------------------------------------


def _optimizer(
    student: PreTrainedModel, args: TrainingArguments, mode: FakeTensorMode, device: torch.device
) -> tuple[int, int, tuple[str, ...]]:
    """Return the bytes of the base optimizer's state, the temporary bytes of its step, and notes on unknowns."""
    try:
        groups = _optimizer_groups(student, args, mode, device)
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args, student)
        return *optimizer_memory(kind, options, groups, args.max_grad_norm), ()
    except Exception as error:  # not installed, or a kernel of its own that wants data
        return _optimizer_by_name([p for p in student.parameters() if p.requires_grad], args, error)


def _optimizer_groups(
    student: PreTrainedModel, args: TrainingArguments, mode: FakeTensorMode, device: torch.device
) -> list[dict[str, Any]]:
    """Return outlines of the trained parameters on a device, in the groups that a trainer gives to its optimizer."""
    own = quantizer_parameters(student)
    # The method reads nothing of a trainer, and its patterns of names are Trainer's to keep.
    decayed = set(Trainer.get_decay_parameter_names(None, student))  # type: ignore[arg-type]
    groups: list[dict[str, Any]] = [{"params": [], "weight_decay": decay} for decay in (args.weight_decay, 0.0, 0.0)]
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            outline = nn.Parameter(outline_of(parameter, mode, device))
            outline.grad = torch.empty_like(outline)
            # Quantizers come last: QASSO gives them a group of their own.
            place = 2 if name in own else int(name not in decayed)
            groups[place]["params"].append(outline)
    return [group for group in groups if group["params"]]


def optimizer_memory(
    kind: Callable[..., torch.optim.Optimizer],
    options: Mapping[str, Any],
    groups: Sequence[dict[str, Any]],
    max_grad_norm: float | None = None,
) -> tuple[int, int]:
    """Count what an optimizer keeps, and what clipping and its step take for a moment.

    The step is run and not modelled, so a foreach implementation shows the temporaries that it makes of all tensors of
    a group at once.

    Args:
        kind: the optimizer's class.
        options: its keyword arguments.
        groups: parameter groups, whose parameters have gradients; real tensors, or tensors without data.
        max_grad_norm: as Trainer's; None or 0 clips nothing.

    Returns:
        The bytes of its state, and the most temporary bytes.
    """
    live = Live()
    parameters = [parameter for group in groups for parameter in group["params"]]
    with live:
        for parameter in parameters:
            live.hold(parameter, "weights")
            live.hold(parameter.grad, "gradients")
        before = live.level
        optimizer = kind(groups, **options)
        if max_grad_norm:
            nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        # The first step makes the state, group by group, so only the second has all of it next to its temporaries.
        optimizer.step()
        optimizer.step()
        state = live.level - before
    return state, live.peak - before - state


def _optimizer_by_name(
    parameters: Iterable[Tensor], args: TrainingArguments, error: Exception
) -> tuple[int, int, tuple[str, ...]]:
    name = str(getattr(args.optim, "value", args.optim))
    states = next((count for part, count in _STATES_8BIT.items() if part in name and "8bit" in name), None)
    if states is None:
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        return 0, 0, (f"not counted: the state of optim={name}, which can't be foreseen here ({text})",)
    # 8-bit optimizers keep small tensors in fp32, and a scale for every 256 elements of the others.
    sizes = [p.numel() for p in parameters]
    return int(sum(states * (4 * n if n < 4096 else n + 4 * math.ceil(n / 256)) for n in sizes)), 0, ()


# --- pruning ------------------------------------------------------------------------------------------------------


def _method_memory(
    model: nn.Module, method: Method | None, space: PruningSpace | None, plan: Plan | None
) -> StepMemory:
    """Return what the method itself takes in a step; nothing where it is not known what will be pruned."""
    if method is None or space is None or plan is None:
        return StepMemory()
    return method.memory(model, space, plan.most_removed_groups)


def _trial_cut_memory(model: PreTrainedModel, batch: Mapping[str, Tensor], space: PruningSpace | None) -> int:
    """Return the bytes of what `geta_hf.surgery.trial_cut` cuts on a copy, and of the logits that it compares."""
    if space is None:
        return 0
    tensors = dict(model.named_parameters())
    cut = {member.tensor for family in space.prunable for member in family.members}
    copies = sum(tensors[name].nbytes for name in cut if name in tensors)
    ids = batch.get(model.main_input_name)
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", None)
    if ids is None or not isinstance(vocabulary, int) or not model.can_generate():
        return copies
    # Two rows of the batch and one more. Each has five logits tensors: for eager and sdpa those of the cut and of the
    # masked model, and a fifth that was found by measuring.
    return copies + (min(2, ids.shape[0]) + 1) * ids.shape[1] * vocabulary * 5 * model.dtype.itemsize


# --- before a run -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DryRun:
    """Hold what a run would do, found without weights: space and plan (both None for a plain run), and the memory.

    Example:
        >>> import torch
        >>> from transformers import BertConfig, TrainingArguments
        >>> from geta_hf import GETAConfig, dry_run
        >>> sizes = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 32, "num_hidden_layers": 1}
        >>> config = BertConfig(vocab_size=30, architectures=["BertForSequenceClassification"], **sizes)
        >>> batch = {"input_ids": torch.ones(2, 8, dtype=torch.long), "labels": torch.zeros(2, dtype=torch.long)}
        >>> found = dry_run(config, batch, TrainingArguments("run", use_cpu=True), GETAConfig())
        >>> found.parameters, found.plan.groups
        (11266, 36)
    """

    parameters: int
    space: PruningSpace | None
    plan: Plan | None
    memory: MemoryPlan

    def __str__(self) -> str:
        parts = [f"parameters: {self.parameters / 1e6:,.1f} M", self.plan, self.memory]
        return "\n\n".join(str(part) for part in parts if part is not None)


def dry_run(
    model: PreTrainedModel | PreTrainedConfig,
    batch: Mapping[str, Tensor],
    args: TrainingArguments,
    config: CompressionConfig | None = None,
    peft_config: LoraConfig | None = None,
    steps: int | None = None,
    device: str | torch.device | None = None,
) -> DryRun:
    """Find the pruning space, solve the targets and estimate the memory of a run, without reading a weight.

    Args:
        model: plain, on any device or on meta, and left unchanged; or a configuration, whose `architectures` and
            `dtype` say what is trained.
        batch: the largest that training will see, labels included; only shapes and dtypes are read.
        args: Trainer's own.
        config: None for a plain run.
        peft_config: as GETATrainer takes it, with `config`.
        steps: of the optimizer in the entire run, where it is known; `args.max_steps` needs no repetition.
        device: as in `plan_memory`.

    Raises:
        GETAError: nothing to quantize or to prune, a target out of reach, layers to drop that can't be, stages that do
            not fit into the steps.
        MemoryUnknown: a forward that asks for data; what was planned comes with it.

    Example:
        >>> import torch
        >>> from transformers import BertConfig, TrainingArguments
        >>> from geta_hf import GETAConfig, dry_run
        >>> sizes = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 32, "num_hidden_layers": 1}
        >>> config = BertConfig(vocab_size=30, architectures=["BertForSequenceClassification"], **sizes)
        >>> batch = {"input_ids": torch.ones(2, 8, dtype=torch.long), "labels": torch.zeros(2, dtype=torch.long)}
        >>> print(dry_run(config, batch, TrainingArguments("run", use_cpu=True), GETAConfig()))
        parameters: 0.0 M
        <BLANKLINE>
        | families | number | groups of each | to remove if even | kept |
        ...
        peak: ... MB
    """
    empty: PreTrainedModel = empty_copy(model) if isinstance(model, PreTrainedModel) else empty_model(model)
    parameters = sum(parameter.numel() for parameter in empty.parameters())
    if config is None:
        return DryRun(parameters, None, None, plan_memory(empty, batch, args, device=device))
    unstack_experts(empty)
    config = limit_config(config, empty)
    _check_stages(make_method(config), args, steps)
    # Recording computes masks and positions from real values, and of `batch` only the shapes count.
    example = make_dummy_inputs(empty)
    if config.drop_layers:
        check_drop(empty, config.drop_layers, example)
    if config.drop_experts:
        check_drop_experts(empty, config.drop_experts)
    flow = record_and_propagate(empty, example, times=2)
    space = build_space(empty, example, prune=config.prune, keep=config.keep, flow=flow)
    space = space if peft_config is not None else without_untrained(space, empty)
    space = limit_families(config, space, empty)
    serving = serving_notes(config, empty, space)
    # In GETATrainer's order: the space without quantizers, the plan with them and before LoRA.
    layers = select_layers(empty, config.include, config.exclude)
    excluded = exclude_layers(config, recorded_raw_reads(flow.graph, empty, layers), layers)
    method = make_method(excluded)
    method.prepare(space)
    method.attach(empty, None)
    ledger = make_ledger(empty, space, embedding=embedding_rows(config))
    plan = replace(make_plan(config, space, ledger, empty, left_float(config, excluded)), serving=serving)
    if peft_config is not None:
        attach_lora(empty, plan_lora(empty, peft_config, quantized_layers(empty)))
    try:
        return DryRun(parameters, space, plan, _plan_memory(empty, batch, args, config, space, plan, method, device))
    except MemoryUnknown as error:
        error.plan = plan
        raise


def _check_stages(method: Method, args: TrainingArguments, steps: int | None) -> None:
    """Raise GETAError for stages that do not fit into the run, as far as its length is known."""
    if args.max_steps > 0:
        # The length of an epoch is not known here, so stages in epochs are checked when training starts.
        method.check_stages(args.max_steps, math.nan)
    elif steps is not None:
        method.check_stages(steps, steps / args.num_train_epochs)
