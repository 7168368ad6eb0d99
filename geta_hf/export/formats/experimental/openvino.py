"""The OpenVINO format: one graph for Intel's runtime, weights as the learned integers, any batch size and length."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from geta_hf.export.formats.exported import (
    ROUNDED,
    describe,
    difference,
    export_program,
    load,
    require,
    save,
    traceable,
)

_EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}


def write_openvino(model: PreTrainedModel, folder: Path, batch: Mapping[str, Tensor]) -> None:
    """Write a compressed model as openvino_model.xml and .bin, through transformers' exporter.

    Weights of at most 8 bits are int8 constants times the learned step size: they are exact. Inputs that the model
    rounds are rounded by fp32 arithmetic. Batch size and length are free; a generating model gives its logits, without
    a cache.

    OpenVINO computes in bf16 where the CPU can, and rounds the inputs of integer weights to 8 bits block by block. It
    does neither with `config={"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}` at load.
    config.json says how much each differs from the model (`exported_as`).

    Args:
        model: compressed, or plain; left unchanged.
        folder: an existing empty folder.
        batch: what to trace and prove on. It has only what inference takes: no labels.

    Raises:
        GETAError: a package is missing, the exporter cannot write the model, or OpenVINO gives other outputs than the
            model, on the batch or on another batch size and length.
    """
    require("openvino", "openvino")
    from transformers.exporters import OpenVINOConfig

    case = traceable(model, batch, "arithmetic")
    exported = export_program(case, "OpenVINO", OpenVINOConfig(dynamic=True))
    save(exported, folder)
    # Both settings are proved, since a user who sets nothing gets the second one.
    runs = {"exact": (load(folder, config=_EXACT), case.tolerance), "default": (load(folder), ROUNDED)}
    differences = {
        name: max(difference(loaded, sample, allowed, "OpenVINO model") for sample in case.samples)
        for name, (loaded, allowed) in runs.items()
    }
    describe(case, folder, "openvino", {"difference": differences})
