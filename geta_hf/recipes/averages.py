"""Keep a moving average of a model's weights over a run (EMA), and end with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from geta_hf import GETATrainer
from geta_hf.quantization.quantizer import Quantizer


class Averages(TrainerCallback):
    """Average the weights and the batch norm statistics after every step, and copy them to the model at the end.

    Quantizers keep their own values. In a compressed run removed groups are set to zero and widths to their final
    values again afterwards.

    Args:
        decay: share of the average that a step keeps; below it at first, so that the first weights fade: step n keeps
            at most (1 + n) / (10 + n).
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self.values: dict[str, Tensor] = {}
        self.trainer: Trainer | None = None

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Take the weights of one step into the average."""
        kept = min(self.decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        for name, tensor in averaged(model).items():
            if name in self.values:
                self.values[name].lerp_(tensor, 1 - kept)
            else:
                self.values[name] = tensor.detach().clone()

    @torch.no_grad()
    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Copy the averages to the model."""
        for name, tensor in averaged(model).items():
            if name in self.values:
                tensor.copy_(self.values[name])
        if isinstance(self.trainer, GETATrainer):
            self.trainer.restore_compression()


def averaged(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that are averaged: trained weights and floating point buffers, without quantizers."""
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, Quantizer):
            continue
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            trained = tensor is not None and (tensor.requires_grad or not isinstance(tensor, nn.Parameter))
            if tensor is not None and trained and tensor.is_floating_point():
                found[f"{path}.{name}"] = tensor
    return found
