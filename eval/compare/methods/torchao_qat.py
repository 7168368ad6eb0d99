"""Quantization-aware training by torchao (BSD-3) of a pruned model, at one width, taught by the dense model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from eval.compare.job import Job
from eval.compare.method import Compressed
from eval.compare.shared import best_pair, pruned_model, slices_of, train
from geta_hf.errors import GETAError


@dataclass(frozen=True)
class TorchaoQAT:
    """Prune by Taylor groups with least squares, then train through torchao's own rounding."""

    name: str = "Taylor, then torchao QAT"
    needs: str = "training"
    packages: tuple[str, ...] = ("torchao",)

    def run(self, job: Job) -> Compressed:
        """Compress; the result is scored in memory, with the weights as torchao rounds them."""
        from torchao.quantization import quantize_
        from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

        pair = best_pair(job, "taylor")
        bits = pair.weight_bits[0]
        model = pruned_model(job, pair.removed)
        zero = slices_of(job, model, pair.removed)
        names = {entry.weight.removesuffix(".weight") for entry in job.ledger.layers}
        shared: dict[str, Any] = {"group_size": 32} if job.grid == "block32" else {"granularity": "per_channel"}
        if job.grid == "block32" and any(job.ledger.shapes[f"{name}.weight"][1] % 32 for name in names):
            raise GETAError("torchao's groups of 32 need numbers of inputs that 32 divides; give --grid channel")
        rounding = IntxFakeQuantizeConfig(getattr(torch, f"int{bits}"), is_symmetric=True, **shared)
        quantize_(model, QATConfig(weight_config=rounding, step="prepare"), filter_fn=lambda _, name: name in names)
        trained = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
        train(job, model, trained, teacher=job.load(), after=zero)
        for name in names:
            _round(model.get_submodule(name))
        return Compressed(
            model=model,
            share=pair.share,
            mean_bits=bits,
            bytes=job.ledger.stored_bytes(pair.removed, bits),
            tokens=job.training_tokens(),
            trained=True,
            note="in memory",
        )


@torch.no_grad()
def _round(layer: nn.Module) -> None:
    """Give a layer the weights that it computes with, and take the rounding away."""
    quantizer: Any = layer.weight_fake_quantizer
    layer.weight.copy_(quantizer(layer.weight))  # type: ignore[operator, union-attr]
    layer.weight_fake_quantizer = nn.Identity()


METHODS = (TorchaoQAT(),)
