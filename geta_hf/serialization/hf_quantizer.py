"""Plug geta_hf into transformers completely: load a compressed model as `loader` does, save it, and dequantize it.

Importing this module registers the quantizer, so `AutoModelForX.from_pretrained(folder)` works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, PrefixChange, WeightConverter, revert_weight_conversion
from transformers.integrations.accelerate import load_offloaded_parameter
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils import logging

from geta_hf.errors import GETAError
from geta_hf.serialization.checksums import checksums
from geta_hf.serialization.encode import (
    activation_bits,
    four_level_layers,
    grid_of,
    packed_tensors,
    unpack_layer,
    unsigned_inputs,
    weight_bits,
    weight_holders,
    width_blocks,
)
from geta_hf.serialization.loader import (
    QUANT_METHOD,
    GETALoader,
    GETAQuantizationConfig,
    apply_fixes,
    find_module,
    tied_weights,
)
from geta_hf.serialization.packed_layers import PackedLayer, packed_layers
from geta_hf.serialization.static_cache import fit_static_caches
from geta_hf.surgery.fixes import Fixes

__all__ = [
    "QUANT_METHOD",
    "GETAHfQuantizer",
    "GETAQuantizationConfig",
    "apply_fixes",
    "attach_quantizer",
    "has_quantizer",
    "sharing_weights",
    "tied_weights",
]

logger = logging.get_logger(__name__)

_TWIN: ContextVar[PreTrainedModel | None] = ContextVar("_TWIN", default=None)
"""The model of `sharing_weights`, within it."""


@contextmanager
def sharing_weights(model: PreTrainedModel) -> Iterator[None]:
    """Let a model that is loaded meanwhile take the memory of another one's weights, where both are equal.

    Every weight is read from its file, decoded and compared, and then dropped, so that a folder can be loaded beside
    the model that it was written from without taking that model's memory again.

    Args:
        model: of the same class, on the CPU. Weights that differ are left to each model.
    """
    token = _TWIN.set(model)
    try:
        yield
    finally:
        _TWIN.reset(token)


class _Share(ConversionOps):
    """Return another model's weight in place of an equal one; the last step of a conversion of `transformers`."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights

    def __deepcopy__(self, memo: dict[int, Any]) -> _Share:
        return self  # transformers copies a conversion for every tensor, which would copy the weights

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the tensors by name, as they are or shared."""
        return {name: _shared(self.weights.get(name), tensor) for name, tensor in input_dict.items()}


def _shared(own: Tensor | None, loaded: Tensor) -> Tensor:
    """Return `own` where a tensor equals it, else the tensor."""
    if own is None or own.dtype != loaded.dtype or own.device != loaded.device or not torch.equal(own, loaded):
        return loaded
    return own.detach()


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters(remove_duplicate=False))


class GETAHfQuantizer(GETALoader):
    """Shrink and prepare a freshly built model, verify and decode what was loaded, and pack what is saved."""

    def is_serializable(self) -> bool:
        return True

    def get_weight_conversions(self) -> list[WeightConverter]:
        conversions = super().get_weight_conversions()
        if (twin := _TWIN.get()) is not None:
            weights = _weights(twin)
            for conversion in conversions:
                conversion.operations.append(_Share(weights))
        return conversions

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        super()._process_model_after_weight_loading(model, **kwargs)
        if (twin := _TWIN.get()) is not None:
            # Packed weights have been shared one by one, as they were decoded; these are the others.
            weights = _weights(twin)
            for name, parameter in model.named_parameters():
                parameter.data = _shared(weights.get(name), parameter.data)
        # Saved again by `save_pretrained`, a folder would otherwise name code that it does not hold.
        if not model.is_custom_code():
            vars(model.config).pop("auto_map", None)
        attach_quantizer(model, _renamed(self.quantization_config.fixes, lambda name: find_module(model, name)))
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the state dict for `save_pretrained`, with packed data in place of the decoded weights.

        config.json is written next, so the config is changed to describe the model that is saved: a model may share it
        with the model that contains it.
        """
        if not model.is_custom_code() and "auto_map" not in vars(model.config):
            logger.warning_once(
                "a folder of save_pretrained alone has neither the code to load it without geta_hf nor a model card; "
                "copy the export's own folder, or use `geta-hf export`, to have them"
            )
        for part in _models(model).values():
            vars(part.config).pop("quantization_config", None)
        model.config.quantization_config = self.quantization_config
        state = remove_tied_weights_from_state_dict(model.state_dict(), model)
        # Offloaded weights are on meta, where transformers cannot see that they are tied.
        for target, source in model.all_tied_weights_keys.items():
            if source in state and target in state and state[target].is_meta:
                del state[target]
        for name, layer in packed_layers(model).items():
            # A weight that is missing here is tied to one that is saved.
            if (weight := state.pop(f"{name}.weight", None)) is not None:
                offloaded = load_offloaded_parameter(model, f"{name}.weight") if weight.is_meta else None
                state.update(packed_tensors(name, layer, offloaded))
        vars(model)["_weight_conversions"] = _conversions_of_others(model)
        self.quantization_config.checksums = checksums(_as_stored(model, state))
        return state, {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        layers = packed_layers(model)
        holders = weight_holders(model, layers)
        for name, layer in layers.items():
            # It makes a new parameter, which every module that shares the weight has to hold.
            unpack_layer(layer)
            for holder, leaf in holders[name]:
                setattr(holder, leaf, layer.weight)
        return model

    def remove_quantization_config(self, model: PreTrainedModel) -> None:
        """Remove what makes a model quantized; the last step of `dequantize`.

        A model that was cut keeps its fix list, without which no folder of it could be loaded.
        """
        # All models inside: each got a quantizer of its own, so that it can be saved alone.
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                vars(module).pop("hf_quantizer", None)
            vars(module).pop("resize_token_embeddings", None)
        super().remove_quantization_config(model)
        fixes = self.quantization_config.fixes
        if any(fixes[part] for part in ("shapes", "keep", "attrs")):
            attach_quantizer(model, fixes)


def _as_stored(model: PreTrainedModel, state: dict[str, Any]) -> dict[str, Any]:
    """Return the tensors of a state dict under the names, and in the pieces, in which `save_pretrained` stores them."""
    loaded = {
        name: load_offloaded_parameter(model, name) if tensor.is_meta else tensor for name, tensor in state.items()
    }
    return dict(revert_weight_conversion(model, loaded))


AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = GETAQuantizationConfig
AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = GETAHfQuantizer


def attach_quantizer(model: PreTrainedModel, fixes: Fixes) -> None:
    """Let a model whose layers were packed in memory be saved like a loaded one, and every model inside it too.

    Args:
        model: with packed layers, or none where it was only cut.
        fixes: the fix list, in the model's own names.
    """
    for path, part in _models(model).items():
        config = GETAQuantizationConfig(
            bits=weight_bits(part),
            fixes=_fixes_below(model, fixes, part) if path else fixes,
            activation_bits=activation_bits(part),
            partial=bool(path),
            grid=grid_of(part),
            blocks=width_blocks(part) or None,
            unsigned_inputs=unsigned_inputs(part) or None,
            four_levels=four_level_layers(part) or None,
        )
        part.hf_quantizer = GETAHfQuantizer(config, pre_quantized=True)  # type: ignore[assignment]
        # In the instance, since the class is transformers' own and other models of it are not packed.
        vars(part)["resize_token_embeddings"] = partial(_resize_token_embeddings, part)
    model.config.quantization_config = model.hf_quantizer.quantization_config  # type: ignore[union-attr]
    if fixes["shapes"]:
        fit_static_caches(model)


def _conversions_of_others(model: PreTrainedModel) -> list[Any]:
    """Return how `save_pretrained` is to convert a model's tensors, without what would merge or split packed ones.

    Some models have Q, K and V as three layers and as one tensor in their files. Three bit streams are not a bit stream
    of three layers, so packed ones are stored one by one, which loading accepts as well.
    """
    conversions = vars(model).get("_weight_conversions")
    if conversions is None:  # as `save_pretrained` chooses them for a model that was not loaded
        found = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [step for step in found if not isinstance(step, PrefixChange)]
    packed = [f"{name}.weight" for name in packed_layers(model)]

    def merges(step: Any) -> bool:
        backwards = step.reverse_transform()
        if not isinstance(backwards, WeightConverter):
            return False
        return any(backwards.rename_source_key(name)[1] is not None for name in packed)

    return [step for step in conversions if not merges(step)]


def _fixes_below(model: PreTrainedModel, fixes: Fixes, part: PreTrainedModel) -> Fixes:
    """Return the part of a fix list that concerns a model inside, in the names that modules have there."""
    names = {id(module): name for name, module in part.named_modules()}
    return _renamed(fixes, lambda name: names.get(id(model.get_submodule(name))))


def _models(model: PreTrainedModel) -> dict[str, PreTrainedModel]:
    """Return the model and every model inside it that can be saved alone, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, PreTrainedModel)}


def _renamed(fixes: Fixes, find: Callable[[str], str | None]) -> Fixes:
    """Return a fix list with other names for its modules, without the modules for which `find` returns None."""

    def tensors(entries: dict[str, Any]) -> dict[str, Any]:
        renamed = {}
        for name, entry in entries.items():
            # A tensor of the model itself has no dot in its name, and the path is then empty.
            path, _, leaf = name.rpartition(".")
            if (found := find(path)) is not None:
                renamed[f"{found}.{leaf}".removeprefix(".")] = entry
        return renamed

    attrs = {path: values for name, values in fixes["attrs"].items() if (path := find(name)) is not None}
    return {**fixes, "shapes": tensors(fixes["shapes"]), "keep": tensors(fixes["keep"]), "attrs": attrs}


def _resize_token_embeddings(model: Any, *args: Any, **kwargs: Any) -> nn.Module:
    """Resize by the class's own `resize_token_embeddings`, which does not know packed weights, or refuse."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    wanted = args[0] if args else kwargs.get("new_num_tokens")
    # Called without a size, or with the present one, it only returns the embedding; that works on packed ones too.
    same = wanted in (None, ends[0].weight.shape[0]) and len(args) < 2 and not kwargs.get("pad_to_multiple_of")
    if not same and any(isinstance(end, PackedLayer) for end in ends):
        raise GETAError("a packed embedding cannot be resized; call model.dequantize() first, then resize it")
    resized: nn.Module = type(model).resize_token_embeddings(model, *args, **kwargs)
    return resized


def has_quantizer(model: nn.Module) -> bool:
    """Return whether a model was loaded through a quantizer of transformers, this one or another."""
    return getattr(model, "hf_quantizer", None) is not None
