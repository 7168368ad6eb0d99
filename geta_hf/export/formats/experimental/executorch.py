"""The ExecuTorch format: one program for phones and other small devices, of one batch size and length."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from geta_hf.export.formats.exported import describe, difference, export_program, load, require, save, traceable


def write_executorch(model: PreTrainedModel, folder: Path, batch: Mapping[str, Tensor]) -> None:
    """Write a compressed model as model.pte for XNNPACK on CPUs, through transformers' exporter.

    Weights are fp32, of exactly the quantized values: XNNPACK has no kernel for integer weights and float inputs, and
    decoding them in every run would cost more than the product. So the program is as small as pruning made it.
    ExecuTorch plans its memory in advance, so the program runs batches of just the shapes of the given one. A
    generating model gives its logits, without a cache.

    Args:
        model: compressed, or plain; left unchanged.
        folder: an existing empty folder.
        batch: what to trace and prove on. It has only what inference takes: no labels.

    Raises:
        GETAError: a package is missing, the exporter cannot write the model, or ExecuTorch gives other outputs.
    """
    require("executorch", "executorch")
    from transformers.exporters import ExecutorchConfig

    case = traceable(model, batch, "float")
    exported = export_program(case, "ExecuTorch", ExecutorchConfig(dynamic=False))
    save(exported, folder)
    found = difference(load(folder), case.samples[0], case.tolerance, "ExecuTorch program")
    describe(case, folder, "executorch", {"difference": {"exact": found}})
