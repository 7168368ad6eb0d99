"""Train a compressed model for a few steps towards the dense one: QASSO's cool-down for what other methods decided.

Groups stay removed and widths stay as they are; the remaining weights move, under their quantizers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel, PrinterCallback, TrainingArguments
from transformers.pytorch_utils import Conv1D

from geta_hf.config import CompressionConfig
from geta_hf.errors import GETAError
from geta_hf.export.serving import serving_notes
from geta_hf.methods import OneShotMethod
from geta_hf.qadg import PruningSpace
from geta_hf.quantization import detach_quantizers, quantized_layers, select_layers
from geta_hf.quantization.layers import absorb
from geta_hf.training.trainer import GETATrainer

if TYPE_CHECKING:
    from peft import LoraConfig

Trained = Literal["full", "lora"]
RATES: dict[Trained, float] = {"full": 1e-4, "lora": 1e-3}
"""What may be trained, and the learning rate at which it starts."""

RANK = 16
"""Rank of the matrices that LoRA trains."""


class _CoolDown(GETATrainer):
    """A trainer whose method is done: nothing is left to plan."""

    def __init__(self, *args: Any, space: PruningSpace, **kwargs: Any) -> None:
        self._known = space
        super().__init__(*args, **kwargs)

    def _find_space(self, model: nn.Module) -> PruningSpace:
        self._not_vanilla = None
        self._serving = serving_notes(self.geta_config, model, self._known)
        return self._known

    def _print_plan(self) -> None:
        """Print nothing: the plan of the targets is not what was decided."""


def recover(
    model: PreTrainedModel,
    teacher: nn.Module,
    method: OneShotMethod,
    config: CompressionConfig,
    space: PruningSpace,
    batches: Sequence[Mapping[str, Any]],
    steps: int,
    *,
    kind: Trained = "full",
    learning_rate: float | None = None,
    progress: bool = True,
) -> None:
    """Train a compressed model in place; it has its quantizers again afterwards.

    Args:
        model: with its quantizers, compressed by `method`.
        teacher: the dense model, which is frozen.
        method: finished; it attaches its quantizers again, and keeps removed groups at zero.
        config: its config, with a weight for distillation.
        space: the pruning space.
        batches: with labels; each is the batch of one step, and they come again as often as it takes.
        steps: optimizer steps.
        kind: `full` trains all parameters, `lora` two small matrices for each linear layer.
        learning_rate: at the start, from where it falls to 0 by a cosine. Default: 1e-4, and 1e-3 for LoRA.
        progress: show Trainer's progress bar. Default True.

    Raises:
        GETAError: as `GETATrainer` does.
    """
    method.leave_middles(teacher)
    detach_quantizers(model)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    lora = _lora(model, config) if kind == "lora" else None
    if lora is None:
        model.requires_grad_(True)
    modes = [(module, module.training) for module in model.modules()]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=1,  # of batches
            learning_rate=RATES[kind] if learning_rate is None else learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, steps // 20),
            weight_decay=0.0,
            use_cpu=next(model.parameters()).device.type == "cpu",
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=not progress,
        )
        trainer = _CoolDown(
            model,
            arguments,
            geta_config=config,
            teacher=teacher,
            method=method,
            peft_config=lora,
            space=space,
            train_dataset=list(batches),
            data_collator=lambda rows: dict(rows[0]),
        )
        trainer.remove_callback(PrinterCallback)  # which prints where there is no bar
        trainer.train()
    for module, training in modes:
        module.training = training
    with torch.no_grad():
        for layer in quantized_layers(model).values():
            absorb(layer)
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
        parameter.grad = None


def _lora(model: nn.Module, config: CompressionConfig) -> LoraConfig:
    """Return a config for all linear layers that have a weight of their own."""
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise GETAError("recover='lora' needs peft; install geta_hf[peft], or use recover='full'") from error
    layers = select_layers(model, config.include, config.exclude)
    holders: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    names = [
        name
        for name, layer in layers.items()
        if isinstance(layer, nn.Linear | Conv1D) and holders[id(layer.weight)] == 1
    ]
    if not names:
        raise GETAError("recover='lora' found no linear layer with a weight of its own; use recover='full'")
    return LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=names)
