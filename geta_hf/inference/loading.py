"""Load a folder directly into integers, so that the memory of float weights is never needed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from threading import Lock
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from geta_hf.inference.layers import fits_integers, reserve_integers
from geta_hf.inference.prepare import Compute, InferenceReport, check_compute, prepare_for_inference
from geta_hf.serialization.hf_quantizer import QUANT_METHOD, GETAHfQuantizer, tied_weights
from geta_hf.serialization.packed_layers import packed_layers
from geta_hf.serialization.validate import check_readable

_LOADING = Lock()  # transformers looks the quantizer up in one table for all threads


def load_for_inference(
    model_class: Any,
    folder: str | os.PathLike[str],
    compute: Compute = "auto",
    batch: Mapping[str, Tensor] | None = None,
    **kwargs: Any,
) -> tuple[PreTrainedModel, InferenceReport]:
    """Load a folder by `model_class.from_pretrained` and call `prepare_for_inference` on the model.

    With `compute="int8"` and without a `device_map`, weights of up to 8 bits are read into one byte each and are never
    float: the peak memory is then that of the integers.

    Args:
        model_class: `AutoModelForX` or a model's own class.
        folder: one that `geta_hf.export` wrote, or its name on the Hub.
        compute, batch: see `prepare_for_inference`.
        kwargs: for `from_pretrained`.

    Returns:
        The model, in evaluation mode, and the report of what was chosen for it.

    Raises:
        GETAError: as `prepare_for_inference`, or the folder is damaged.
    """
    check_compute(compute)
    check_readable(folder)
    # With `auto` the choice needs a model that runs. With a device_map Accelerate places weights by their float
    # sizes.
    if compute == "int8" and kwargs.get("device_map") is None:
        with _reading_integers():
            model = model_class.from_pretrained(folder, **kwargs)
    else:
        model = model_class.from_pretrained(folder, **kwargs)
    return model, prepare_for_inference(model, compute, batch)


class _IntegerQuantizer(GETAHfQuantizer):
    """The quantizer that loads every layer it can as an integer layer; `prepare_for_inference` may undo some."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        super()._process_model_before_weight_loading(model, **kwargs)
        tied = tied_weights(model)
        for name, layer in packed_layers(model).items():
            # A tied weight has to remain what the other module expects, which computes with floats.
            if fits_integers(layer) and f"{name}.weight" not in tied:
                reserve_integers(layer)
        return model


@contextmanager
def _reading_integers() -> Iterator[None]:
    # `from_pretrained` offers no argument for the quantizer's class, so its entry in the table is exchanged.
    with _LOADING:
        usual = AUTO_QUANTIZER_MAPPING[QUANT_METHOD]
        AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = _IntegerQuantizer
        try:
            yield
        finally:
            AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = usual
