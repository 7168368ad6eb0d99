"""The plug-in through which transformers loads a compressed model: `quant_method: "geta"`.

config.json keeps the original architecture; `quantization_config` holds the bit width of every packed layer, that of
its input where it rounds it, and the fix list (`geta_hf.export.fixes`). Everything in a folder is verified, and a
tensor that a folder lacks is an error: transformers would draw it at random. Saving is a matter of geta_hf itself.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import WeightConverter
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from .geta_errors import GETAError
from .geta_fixes import (
    Fixes,
    check_attributes,
    no_fixes,
    read_fixes,
    settle_experts,
    shrink_attribute,
    shrink_buffer,
    shrink_tensor,
)
from .geta_packed import INPUT_SCALE, LEAVES, PackedLayer, become_packed, packed_layers
from .geta_packing import MAX_BITS, MIN_BITS
from .geta_stored import Decode, Header, check_packed, check_plain, check_scale, read_headers
from .geta_fixed import FixedQuantizer

logger = logging.get_logger(__name__)

QUANT_METHOD = "geta"
FORMAT_VERSION = 1

_WHERE = "quantization_config in config.json:"
_MANY_LAYERS = 1000
"""So many are built within seconds; a model of more has names for them."""


class GETAQuantizationConfig(QuantizationConfigMixin):
    """What config.json says of a compressed model; plain data.

    Args:
        bits: module path -> bits of its packed weight, 2 to 16.
        fixes: the fix list, None for a model from which nothing was cut.
        format_version: of the folder's layout.
        activation_bits: module path -> bits of its input, 2 to 16, for the packed layers that round it. Left out of
            config.json when there are none.
        partial: whether it was saved from within another model, which may lack modules that this class has when it
            stands alone, such as a pooler. Left out of config.json when it was not.

    Raises:
        GETAError: an unknown version or key, or a value that no export writes.
    """

    def __init__(
        self,
        bits: dict[str, int] | None = None,
        fixes: Fixes | None = None,
        format_version: int = FORMAT_VERSION,
        quant_method: str = QUANT_METHOD,
        activation_bits: dict[str, int] | None = None,
        partial: bool = False,
        **unknown: Any,
    ) -> None:
        self.quant_method = quant_method  # type: ignore[assignment]
        self.format_version = format_version
        self.bits = {} if bits is None else bits
        self.activation_bits = {} if activation_bits is None else activation_bits
        self.partial = partial
        if format_version != FORMAT_VERSION:
            raise GETAError(
                f"{_WHERE} format_version is {format_version!r}, but this release of geta_hf reads {FORMAT_VERSION}; "
                f"install the release that wrote the folder"
            )
        if unknown:
            raise GETAError(f"{_WHERE} unknown keys {sorted(unknown)}")
        if not isinstance(partial, bool):
            raise GETAError(f"{_WHERE} partial is {partial!r}, not true or false")
        _check_widths("bits", self.bits)
        _check_widths("activation_bits", self.activation_bits)
        if lacking := sorted(set(self.activation_bits) - set(self.bits)):
            raise GETAError(f"{_WHERE} activation_bits names {lacking[0]!r}, which is not in bits; add it there too")
        self.fixes = no_fixes() if fixes is None else read_fixes(fixes, f"{_WHERE} fixes")

    def to_dict(self) -> dict[str, Any]:
        """As in config.json; a whole model on float activations reads as it did before there were others."""
        return {k: v for k, v in super().to_dict().items() if v or k not in ("activation_bits", "partial")}


def _check_widths(key: str, widths: Any) -> None:
    if not isinstance(widths, dict):
        raise GETAError(f"{_WHERE} {key} must be an object of module names, not {widths!r}")
    for name, bits in widths.items():
        if not isinstance(bits, int) or isinstance(bits, bool) or not MIN_BITS <= bits <= MAX_BITS:
            raise GETAError(f"{_WHERE} {key}[{name!r}] is {bits!r}, not a whole number of {MIN_BITS} to {MAX_BITS}")


class GETALoader(HfQuantizer):
    """Shrinks and prepares a freshly built model, then verifies and decodes what was loaded."""

    requires_calibration = True  # a dense model cannot be loaded into this format, only exported
    quantization_config: GETAQuantizationConfig

    def is_serializable(self) -> bool:
        logger.warning("to save this model again, `import geta_hf` before it is loaded; or copy its folder")
        return False

    @property
    def is_trainable(self) -> bool:
        """True, of adapters on top: transformers refuses to train a quantized model without them."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Refuses a hostile number of layers, here where the config is seen before its model is built."""
        bits, fixes = self.quantization_config.bits, self.quantization_config.fixes
        _check_layers(config.to_dict(), len(bits) + len(fixes["shapes"]) + len(fixes["attrs"]))
        return config

    update_tp_plan = update_attn_implementation  # older releases show the config here

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        raise GETAError("the code in a folder only reads it; to dequantize a model, import geta_hf before loading it")

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """True for the scale of a layer's input, whose size is verified after loading."""
        path, _, leaf = param_name.rpartition(".")
        return leaf == INPUT_SCALE and isinstance(model.get_submodule(path), PackedLayer)

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """None (no cast) for packed data; the type that its weight is to have is left with what decodes it."""
        decoders = [step for step in getattr(converter, "operations", ()) if isinstance(step, Decode)]
        for step in decoders:
            step.dtype = dtype or step.dtype
        return None if decoders else super().get_new_dtype(converter, param, dtype)

    def get_weight_conversions(self) -> list[WeightConverter]:
        """One for every packed layer: its stream and scale become the weight as it is used."""
        return [decoder.converter() for decoder in self._decoders]

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        config = self.quantization_config
        headers = read_headers(kwargs.get("checkpoint_files") or (), model.config.name_or_path or "")
        apply_fixes(model, config.fixes)
        self._decoders: list[Decode] = []
        tied = tied_weights(model)
        for name, bits in config.bits.items():
            if (path := find_module(model, name)) is None:
                continue
            layer = become_packed(path, model.get_submodule(path), bits, f"{path}.weight" in tied)
            self._reserve(name, _places(model, name), layer)
            for place in _places(model, name):
                check_packed(place, layer, headers)
        _check_inputs(model, headers)
        self._check_plain(model, headers)
        self._names = set(headers)
        self._shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        return model

    def _check_plain(self, model: PreTrainedModel, headers: Mapping[str, Header]) -> None:
        """Verify that the folder is of such a model at all, and what it has of plain tensors, before any is read.

        What was not cut of a head may have another shape: transformers raises then, or draws it anew if it is told to.
        """
        tensors, layers = model.state_dict(), packed_layers(model)
        found = {name: place for name in tensors for place in _places(model, name) if place in headers}
        base = "" if model.base_model is model else f"{model.base_model_prefix}."
        if headers and not _is_own_folder(model) and not any(name.startswith(base) for name in (*found, *layers)):
            saved = ", ".join(model.config.architectures or ())
            raise GETAError(f"the folder holds nothing of a {type(model).__name__}; load it as what it was, {saved}")
        cut = {find_tensor(model, name) for name in self.quantization_config.fixes["shapes"]}
        packed = {f"{path}.{leaf}" for path in layers for leaf in LEAVES}
        self._fresh = {
            name
            for name, place in found.items()
            if name not in packed
            and check_plain(place, tensors[name], headers[place], name in cut or name.startswith(base))
        }

    def _reserve(self, name: str, places: Iterable[str], layer: PackedLayer) -> None:
        """Make a layer ready to be loaded into. The type its weight is declared in is the one it will be decoded to."""
        decoder = Decode(self, name, places, layer)
        self._decoders.append(decoder)
        if name in self.quantization_config.activation_bits:
            layer.register_buffer(INPUT_SCALE, torch.empty(1, dtype=torch.float32, device=layer.weight.device))
        # Or transformers would draw weights at random where the file has none, before the gap can be reported.
        layer.__dict__["_is_hf_initialized"] = True

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for problem in (decoder.problem for decoder in self._decoders):
            if problem is not None:
                raise GETAError(problem)
        _check_complete(model, self._names, self._fresh, _is_own_folder(model) and not self.quantization_config.partial)
        _check_shapes(model, self._shapes)
        for name, dims in self.quantization_config.fixes["keep"].items():
            if (buffer := find_tensor(model, name)) is not None:
                shrink_buffer(model, buffer, dims)
        for name, layer in packed_layers(model).items():
            layer.weight.requires_grad_(False)
            layer.settle()
            if INPUT_SCALE in layer._buffers:
                self._take_input_scale(model, name, layer)
        _share_step_sizes(model)
        _share_offloaded(model)
        self._decoders = []  # nor is there any way to run them backwards
        kept = [step for step in getattr(model, "_weight_conversions", None) or () if not _decodes(step)]
        vars(model)["_weight_conversions"] = kept
        return model

    def _take_input_scale(self, model: PreTrainedModel, path: str, layer: PackedLayer) -> None:
        """Make the quantizer of a layer's input from what was loaded into its buffer."""
        scale, widths = layer.get_buffer(INPUT_SCALE).detach(), self.quantization_config.activation_bits
        check_scale(f"{path}.{INPUT_SCALE}", scale, "d and one for t", 2)
        del layer._buffers[INPUT_SCALE]
        layer.input_quantizer = FixedQuantizer(scale, next(widths[p] for p in _places(model, path) if p in widths))


def _decodes(conversion: Any) -> bool:
    return any(isinstance(step, Decode) for step in getattr(conversion, "operations", ()))


def tied_weights(model: PreTrainedModel) -> set[str]:
    """The names of all parameters that share their tensor with another one."""
    ties = model.all_tied_weights_keys
    return set(ties) | set(ties.values())


def _share_step_sizes(model: PreTrainedModel) -> None:
    """Let packed layers whose weights are tied have the step size of the one that was loaded."""
    loaded = {id(layer.weight): layer for layer in packed_layers(model).values() if "step_size" in vars(layer)}
    for layer in packed_layers(model).values():
        if "step_size" not in vars(layer):
            if (source := loaded.get(id(layer.weight))) is None:
                raise GETAError("a packed layer is tied to a weight that the folder lacks; copy or export it again")
            layer.step_size, layer.stream = source.step_size, source.stream


def _share_offloaded(model: PreTrainedModel) -> None:
    """Let tied weights that lie on the disk be the decoded one: the list of them was made before there was such."""
    hooks = [module._hf_hook for module in model.modules() if hasattr(module, "_hf_hook")]
    if hooks:
        from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset  # whoever offloads has it

        for store in (getattr(hook, "weights_map", None) for hook in hooks):
            while isinstance(store, PrefixedDataset):
                store = store.dataset
            index = store.index if isinstance(store, OffloadedWeightsLoader) else {}
            for target, source in model.all_tied_weights_keys.items():
                if target in index and source in index:
                    index[target] = index[source]


def _check_layers(config: Mapping[str, Any], named: int) -> None:
    """Raise if a config has more layers than are built in a while, and than the folder has names for."""
    for key, value in config.items():
        if isinstance(value, dict) and key != "quantization_config":
            _check_layers(value, named)
        elif str(key).endswith(("layer", "layers")) and isinstance(value, int) and value > max(_MANY_LAYERS, named):
            raise GETAError(
                f"config.json: {key} is {value}, but quantization_config names {named} modules and tensors; copy or "
                f"export the folder again"
            )


def _check_inputs(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Raise if the folder has the scale of a packed layer's input that config.json says nothing of: it stayed float."""
    layers = packed_layers(model)
    for name in names:
        path, _, leaf = name.rpartition(".")
        found = next((layers[place] for place in _places(model, path) if place in layers), None)
        if leaf == INPUT_SCALE and found is not None and INPUT_SCALE not in found._buffers:
            raise GETAError(f"{_WHERE} activation_bits lacks {path}, but the folder has {name}; export it again")


def apply_fixes(model: PreTrainedModel, fixes: Fixes) -> None:
    """Make a freshly built model, still without weights, as small as a fix list says."""
    cut = []
    for name, shape in fixes["shapes"].items():
        if (tensor := find_tensor(model, name)) is not None:
            shrink_tensor(model, tensor, shape)
            cut.append(tensor)
    for name, attributes in fixes["attrs"].items():
        if (path := find_module(model, name)) is not None:
            for attribute, value in attributes.items():
                shrink_attribute(path, model.get_submodule(path), attribute, value)
    check_attributes(model, cut)
    _skip_initialization(model, cut)
    settle_experts(model, fixes)


def _skip_initialization(model: PreTrainedModel, cut: Iterable[str]) -> None:
    """Keep transformers from initializing what was cut: some modules would do so in their full size.

    Whatever is not loaded after all is found by `_check_complete`.
    """
    for path in dict.fromkeys(name.rpartition(".")[0] for name in cut):
        module = model.get_submodule(path)
        if not module._non_persistent_buffers_set:  # which nothing else would fill
            module.__dict__["_is_hf_initialized"] = True


def find_module(model: PreTrainedModel, name: str) -> str | None:
    """The path in `model` of what the folder calls `name`; None when it belongs to another class's head.

    A folder saved with a head names its modules below the base model's prefix, one saved without does not, and either
    may be loaded into the other.
    """
    if not name and not _is_own_folder(model):
        kinds = model.config.architectures or ()
        return model.base_model_prefix if type(model.base_model).__name__ in kinds else None
    modules = dict(model.named_modules())
    for path in _places(model, name):
        if path in modules:
            return path
    if not name.startswith(f"{model.base_model_prefix}.") and not _is_own_folder(model):
        return None
    raise GETAError(f"quantization_config in config.json names the module {name!r}, absent in {type(model).__name__}")


def _places(model: PreTrainedModel, name: str) -> tuple[str, str, str]:
    prefix = f"{model.base_model_prefix}."
    return name, name.removeprefix(prefix), prefix + name


def find_tensor(model: PreTrainedModel, name: str) -> str | None:
    """As `find_module`, of a tensor."""
    path, _, leaf = name.rpartition(".")
    found = find_module(model, path)
    return None if found is None else f"{found}.{leaf}".removeprefix(".")


def _is_own_folder(model: PreTrainedModel) -> bool:
    """Whether the folder was saved from this very class, so that the two must agree to the last tensor."""
    architectures = model.config.architectures
    return not architectures or type(model).__name__ in architectures


def _check_complete(model: PreTrainedModel, stored: Collection[str], fresh: Collection[str], own: bool) -> None:
    """Raise if a tensor was not in the folder: transformers marks what it loads, and draws the rest at random.

    Another class than the folder's may have modules that the folder knows nothing of, such as a new head: transformers
    initializes and reports those, as for any model. A module of which a part was loaded is not such, nor is what the
    caller asked for in another shape, `fresh`.
    """
    for path, module in model.named_modules():
        tensors = {leaf: t for leaf, t in module.state_dict(keep_vars=True).items() if "." not in leaf}
        present = {leaf: _was_loaded(model, path, leaf, tensor, stored) for leaf, tensor in tensors.items()}
        missing = [leaf for leaf, loaded in present.items() if not loaded and f"{path}.{leaf}" not in fresh]
        if missing and (own or any(present.values()) or isinstance(module, PackedLayer)):
            name = f"{path}.{missing[0]}".removeprefix(".")
            raise GETAError(f"the folder has no tensor {name}, or one of another shape; copy or export it again")


def _was_loaded(model: PreTrainedModel, path: str, leaf: str, tensor: Any, stored: Collection[str]) -> bool:
    if f"{path}.{leaf}" in (model._keys_to_ignore_on_save or ()):
        return True  # made anew by the model's own initialization, as the proof of every export has seen
    if not tensor.is_meta:
        return getattr(tensor, "_is_hf_initialized", False)
    # Offloading lost the mark. Where transformers renamed what it read, the folder's names say nothing.
    names = {f"{place}.{leaf}" for place in _places(model, path)}
    renamed = any(not _decodes(step) for step in getattr(model, "_weight_conversions", None) or ())
    return renamed or bool(names & set(stored)) or f"{path}.{leaf}" in tied_weights(model)


def _check_shapes(model: PreTrainedModel, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise if a plain tensor has another shape or type than the model: some releases load it all the same."""
    packed = {f"{path}.{leaf}" for path in packed_layers(model) for leaf in LEAVES}
    for name, tensor in model.state_dict().items():
        if name in packed:
            continue  # verified as they were decoded
        if tuple(tensor.shape) != shapes[name] or tensor.dtype == torch.uint8:
            raise GETAError(
                f"the folder's {name} is {tensor.dtype} of shape {tuple(tensor.shape)}, but config.json, or arguments "
                f"of from_pretrained, make it {shapes[name]}; leave such arguments out, update transformers, which "
                f"draws it anew with ignore_mismatched_sizes=True, or copy or export the folder again"
            )


if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:  # geta_hf, or the code of another folder, may have come first
    AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = GETAQuantizationConfig
    AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = GETALoader
