"""Refuse options of Trainer that cannot work, before training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel, is_compiled_module
from torch import nn
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames
from transformers.utils import is_peft_available

from geta_hf.errors import GETAError
from geta_hf.export.export import check_never_exported
from geta_hf.methods.base import AVERAGES, Method


@dataclass(frozen=True)
class Launch:
    """How the processes of a run share the model.

    Attributes:
        deepspeed: whether DeepSpeed trains.
        fsdp_version: 1 or 2 under FSDP; None without it.
        tensor_parallel: whether weights are split over processes by tensor parallelism.
    """

    deepspeed: bool = False
    fsdp_version: int | None = None
    tensor_parallel: bool = False

    @classmethod
    def of(cls, accelerator: Accelerator, model: nn.Module | None) -> Launch:
        """Read it from a trainer's accelerator and model."""
        plugin = getattr(accelerator.state, "fsdp_plugin", None)
        parallel = getattr(accelerator, "parallelism_config", None)
        by_config = parallel is not None and parallel.tp_enabled
        # By getattr, since older versions of Accelerate lack some fields. A plugin without a version is FSDP 1.
        return cls(
            deepspeed=getattr(accelerator.state, "deepspeed_plugin", None) is not None,
            fsdp_version=None if plugin is None else getattr(plugin, "fsdp_version", 1),
            tensor_parallel=bool(by_config or getattr(model, "tp_size", None)),
        )


def check_options(
    args: TrainingArguments, launch: Launch, optimizer: Any = None, scheduler: Any = None, lora: bool = False
) -> None:
    """Raise GETAError for an option that would change what was planned, or a launch that hides groups.

    Args:
        args: Trainer's own.
        launch: how the run is launched.
        optimizer: made by the user, if any.
        scheduler: made by the user, if any.
        lora: whether weights are frozen and LoRA's matrices trained.
    """
    if scheduler is not None:
        raise GETAError("a ready-made scheduler does not know the quantizers; pass optimizers=(optimizer, None)")
    if args.auto_find_batch_size:
        raise GETAError("auto_find_batch_size restarts training half-way; find the batch size without GETATrainer")
    _check_optimizer_name(OptimizerNames(args.optim).value)
    _check_devices(args)
    check_launch(launch)
    if lora:
        _check_lora(args, launch, optimizer)


def check_follows(method: Method, launch: Launch) -> None:
    """Raise GETAError where FSDP would split weights that a method cannot follow."""
    if launch.fsdp_version is not None and not method.follows_shards:
        raise GETAError(
            f"FSDP splits weights over processes, which {type(method).__name__} can't follow; train with DDP, or use a "
            f"GETAConfig"
        )


def _check_devices(args: TrainingArguments) -> None:
    # Refused and not reduced to one GPU with a warning: that would divide the batch size by the number of GPUs and
    # multiply the hours, and a refusal costs seconds.
    if args.n_gpu > 1:
        raise GETAError(
            f"this process sees {args.n_gpu} GPUs, over which Trainer would copy the model at every step by "
            f"nn.DataParallel, where a method sees no copy's gradients; start the script with `accelerate launch` or "
            f"`torchrun --nproc_per_node {args.n_gpu}` to train on all of them, or with CUDA_VISIBLE_DEVICES=0 for one"
        )


def _check_optimizer_name(name: str) -> None:
    # By parts of the name, since each comes in several forms (galore_adamw_8bit_layerwise).
    if "lomo" in name or name.endswith("layerwise"):
        raise GETAError(
            f"optim = {name!r} updates weights while gradients are computed, so no step can remove groups; "
            f"use adamw_torch_fused, or adamw_8bit to save memory"
        )
    if name.startswith("schedule_free"):
        raise GETAError(f"optim = {name!r} {AVERAGES}")


def _check_lora(args: TrainingArguments, launch: Launch, optimizer: Any) -> None:
    if optimizer is not None:
        raise GETAError("an optimizer made beforehand lacks LoRA's matrices; pass optimizer_cls_and_kwargs or `optim`")
    if args.fp16:
        raise GETAError("fp16 scales gradients before LoRA's scores are taken of them; use bf16, or fp32")
    if launch.fsdp_version is not None:
        raise GETAError(
            "under FSDP2 frozen weights are split and can't be scored; use DDP, or train without peft_config"
        )
    checkpointing = args.gradient_checkpointing_kwargs
    if isinstance(checkpointing, dict) and checkpointing.get("use_reentrant"):
        raise GETAError(
            "use_reentrant=True gives layers without trained inputs no gradient under LoRA; set it to False"
        )
    if args.torch_compile:
        raise GETAError("torch_compile loses the gradients of frozen weights that LoRA is scored by; turn it off")


def check_launch(launch: Launch) -> None:
    """Raise GETAError for a way of training in which a method cannot see complete groups."""
    if launch.deepspeed:
        raise GETAError(
            "DeepSpeed keeps its own optimizer and flat parameters, where groups can't be found; use DDP or FSDP2"
        )
    if launch.fsdp_version == 1:
        raise GETAError("FSDP 1 flattens parameters, where groups can't be found; set fsdp_version: 2")
    if launch.tensor_parallel:
        raise GETAError("tensor parallelism splits heads over processes; use DDP or FSDP2, or one process")


def check_plain(model: nn.Module) -> None:
    """Raise GETAError for a model that could not be exported: wrapped by peft or for a launch, or compressed before."""
    check_not_wrapped(model)
    if is_peft_available():
        from peft import PeftModel

        if isinstance(model, PeftModel):
            raise GETAError("the model is wrapped by peft already; give the plain model and peft_config")
    check_never_exported(model)


def check_not_wrapped(model: nn.Module) -> None:
    """Raise GETAError for a model that was wrapped for several devices or compiled: the trainer does that itself."""
    inner = extract_model_from_parallel(model, keep_torch_compile=False)
    if inner is model:
        return
    wrapper = type(model).__name__
    if is_compiled_module(model):
        raise GETAError(
            f"the model is compiled already ({wrapper}); pass the {type(inner).__name__} inside, and set torch_compile "
            f"in TrainingArguments"
        )
    raise GETAError(
        f"the model is wrapped in {wrapper}; pass the {type(inner).__name__} inside (model.module) and start the "
        f"script with `accelerate launch` or `torchrun`, so that the trainer wraps it"
    )
