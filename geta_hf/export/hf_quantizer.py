"""The whole plug-in of transformers: it loads a compressed model as `loader` does, saves it and makes it plain again.

Importing this module registers it, so `AutoModelForX.from_pretrained(folder)` works.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.accelerate import load_offloaded_parameter
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from geta_hf.export.fixes import Fixes
from geta_hf.export.loader import QUANT_METHOD, GETALoader, GETAQuantizationConfig, apply_fixes, tied_weights
from geta_hf.export.packed import packed_layers
from geta_hf.export.saving import activation_bits, packed_tensors, unpack_layer, weight_bits, weight_holders

__all__ = [
    "QUANT_METHOD",
    "GETAHfQuantizer",
    "GETAQuantizationConfig",
    "apply_fixes",
    "attach_quantizer",
    "has_quantizer",
    "tied_weights",
]


class GETAHfQuantizer(GETALoader):
    """Shrinks and prepares a freshly built model, verifies and decodes what was loaded, and packs what is saved."""

    def is_serializable(self) -> bool:
        return True

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        super()._process_model_after_weight_loading(model, **kwargs)
        if not model.is_custom_code():  # or a folder saved anew would name code that it does not hold
            vars(model.config).pop("auto_map", None)
        for module in model.modules():
            if isinstance(module, PreTrainedModel):  # so that the base model inside can be saved alone
                module.hf_quantizer = self  # type: ignore[assignment]
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Any], dict[str, Any]]:
        """The state dict with packed data in place of the decoded weights, for `save_pretrained`."""
        state = remove_tied_weights_from_state_dict(model.state_dict(), model)
        for name, layer in packed_layers(model).items():
            if (weight := state.pop(f"{name}.weight", None)) is not None:  # else tied to one that is saved
                offloaded = load_offloaded_parameter(model, f"{name}.weight") if weight.is_meta else None
                state.update(packed_tensors(name, layer, offloaded))
        return state, {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        layers = packed_layers(model)
        holders = weight_holders(model, layers)
        for name, layer in layers.items():
            unpack_layer(layer)
            for holder, leaf in holders[name]:
                setattr(holder, leaf, layer.weight)
        return model

    def remove_quantization_config(self, model: PreTrainedModel) -> None:
        """What `dequantize` does last. A model that was cut keeps its fix list, without which no folder of it loads."""
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                vars(module).pop("hf_quantizer", None)
        super().remove_quantization_config(model)
        fixes = self.quantization_config.fixes
        if any(fixes[part] for part in ("shapes", "keep", "attrs")):
            attach_quantizer(model, fixes)


AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = GETAQuantizationConfig
AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = GETAHfQuantizer


def attach_quantizer(model: PreTrainedModel, fixes: Fixes) -> None:
    """Make a model whose layers were packed in memory save itself as a loaded one does."""
    config = GETAQuantizationConfig(bits=weight_bits(model), fixes=fixes, activation_bits=activation_bits(model))
    model.config.quantization_config = config
    model.hf_quantizer = GETAHfQuantizer(config, pre_quantized=True)  # type: ignore[assignment]


def has_quantizer(model: nn.Module) -> bool:
    """Whether a model was loaded through some plug-in of transformers, this one or another."""
    return getattr(model, "hf_quantizer", None) is not None
