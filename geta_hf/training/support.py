"""Refuse options of Trainer that cannot work, before training."""

from __future__ import annotations

from torch import nn
from transformers import Trainer
from transformers.training_args import OptimizerNames
from transformers.utils import is_peft_available

from geta_hf.errors import GETAError
from geta_hf.export.export import check_never_exported
from geta_hf.methods.qasso.checks import AVERAGES


def check_supported(trainer: Trainer, lora: bool = False) -> None:
    """Raise GETAError for an option that would change what was planned, or a launch that hides groups.

    Args:
        trainer: made, not yet trained.
        lora: whether weights are frozen and LoRA's matrices trained.
    """
    if trainer.lr_scheduler is not None:
        raise GETAError("a ready-made scheduler does not know the quantizers; pass optimizers=(optimizer, None)")
    if trainer.args.auto_find_batch_size:
        raise GETAError("auto_find_batch_size restarts training half-way; find the batch size without GETATrainer")
    if trainer.args.load_best_model_at_end:
        raise GETAError(
            "load_best_model_at_end would bring back a checkpoint from before groups and bits were removed; "
            "turn it off, the last checkpoint is the compressed one"
        )
    _check_optimizer(OptimizerNames(trainer.args.optim).value)
    check_launch(trainer)
    if lora:
        _check_lora(trainer)


def _check_optimizer(name: str) -> None:
    if "lomo" in name or name.endswith("layerwise"):
        raise GETAError(
            f"optim = {name!r} updates weights while gradients are computed, where groups can't be forgotten; "
            f"use adamw_torch_fused, or adamw_8bit to save memory"
        )
    if name.startswith("schedule_free"):
        raise GETAError(f"optim = {name!r} {AVERAGES}")


def _check_lora(trainer: Trainer) -> None:
    if trainer.optimizer is not None:
        raise GETAError("an optimizer made beforehand lacks LoRA's matrices; pass optimizer_cls_and_kwargs or `optim`")
    if trainer.args.fp16:
        raise GETAError("fp16 scales gradients before LoRA's scores are taken of them; use bf16, or fp32")
    if trainer.is_fsdp_enabled:
        raise GETAError(
            "under FSDP2 frozen weights are split and can't be scored; use DDP, or train without peft_config"
        )
    checkpointing = trainer.args.gradient_checkpointing_kwargs
    if isinstance(checkpointing, dict) and checkpointing.get("use_reentrant"):
        raise GETAError(
            "use_reentrant=True gives layers without trained inputs no gradient under LoRA; set it to False"
        )
    if trainer.args.torch_compile:
        raise GETAError("torch_compile loses the gradients of frozen weights that LoRA is scored by; turn it off")


def check_launch(trainer: Trainer) -> None:
    """Raise GETAError for a way of training in which a method cannot see complete groups."""
    if trainer.is_deepspeed_enabled:
        raise GETAError(
            "DeepSpeed keeps its own optimizer and flat parameters, where groups can't be found; use DDP or FSDP2"
        )
    if trainer.is_fsdp_enabled and getattr(trainer.accelerator.state.fsdp_plugin, "fsdp_version", 1) != 2:
        raise GETAError("FSDP 1 flattens parameters, where groups can't be found; set fsdp_version: 2")
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    if (parallel is not None and parallel.tp_enabled) or getattr(trainer.model, "tp_size", None):
        raise GETAError("tensor parallelism splits heads over processes; use DDP or FSDP2, or one process")


def check_plain(model: nn.Module) -> None:
    """Raise GETAError for a model that could not be exported: wrapped by peft, or compressed before."""
    if is_peft_available():
        from peft import PeftModel

        if isinstance(model, PeftModel):
            raise GETAError("the model is wrapped by peft already; give the plain model and peft_config")
    check_never_exported(model)
