"""Loading a folder straight into integers, so that no moment needs the memory of float weights."""

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
from geta_hf.inference.prepare import InferenceReport, check_compute, prepare_for_inference
from geta_hf.serialization.hf_quantizer import QUANT_METHOD, GETAHfQuantizer, tied_weights
from geta_hf.serialization.packed_layers import packed_layers
from geta_hf.serialization.validate import check_readable

_LOADING = Lock()  # transformers looks the plug-in up in one table for all threads


def load_for_inference(
    model_class: Any,
    folder: str | os.PathLike[str],
    compute: str = "auto",
    batch: Mapping[str, Tensor] | None = None,
    **kwargs: Any,
) -> tuple[PreTrainedModel, InferenceReport]:
    """`model_class.from_pretrained(folder)` and `prepare_for_inference` in one.

    With `compute="int8"` and without a `device_map`, weights of up to 8 bits are read into a byte each, without ever
    being float: the highest memory is then that of the integers.

    Args:
        model_class: `AutoModelForX` or a model's own class.
        folder: what `geta_hf.export` wrote.
        compute, batch: see `prepare_for_inference`.
        kwargs: for `from_pretrained`.

    Returns:
        The model, in evaluation mode, and what was chosen for it.

    Raises:
        GETAError: as `prepare_for_inference`, or a folder that is damaged.
    """
    check_compute(compute)
    check_readable(folder)
    if compute == "int8" and kwargs.get("device_map") is None:
        with _reading_integers():
            model = model_class.from_pretrained(folder, **kwargs)
    else:
        model = model_class.from_pretrained(folder, **kwargs)
    return model, prepare_for_inference(model, compute, batch)


class _IntegerQuantizer(GETAHfQuantizer):
    """The plug-in that reads whatever can be into integer layers; `prepare_for_inference` then takes back some."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        super()._process_model_before_weight_loading(model, **kwargs)
        tied = tied_weights(model)
        for name, layer in packed_layers(model).items():
            if fits_integers(layer) and f"{name}.weight" not in tied:
                reserve_integers(layer)
        return model


@contextmanager
def _reading_integers() -> Iterator[None]:
    with _LOADING:
        usual = AUTO_QUANTIZER_MAPPING[QUANT_METHOD]
        AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = _IntegerQuantizer
        try:
            yield
        finally:
            AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = usual
