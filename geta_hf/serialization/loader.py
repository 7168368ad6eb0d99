"""Plug into transformers so that it loads a compressed model: `quant_method: "geta"`.

config.json keeps the original architecture; `quantization_config` holds the bit width of every packed layer, that of
its input where it rounds it, and the fix list (`geta_hf.surgery.fixes`). transformers builds the model as config.json
says, without memory for its weights; before they are loaded, the model is shrunk to what the fix list says and its
packed layers switch their classes.

Everything in a folder is verified. A tensor that a folder lacks is an error, since transformers would initialize it at
random and go on. Every folder carries a copy of this module, which only reads; saving is in `hf_quantizer`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import WeightConverter
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from geta_hf.errors import GETAError
from geta_hf.quantization.experts import is_unstacked, unstack_experts
from geta_hf.quantization.fixed import FixedQuantizer
from geta_hf.quantization.maths import FOUR_LEVEL_BITS
from geta_hf.serialization.bitpack import MAX_BITS, MIN_BITS
from geta_hf.serialization.checksums import DIGITS, Verification
from geta_hf.serialization.decode import Decode, Header, check_packed, check_plain, check_scale, read_headers
from geta_hf.serialization.packed_layers import (
    BLOCKS,
    INPUT_SCALE,
    LEAVES,
    ChannelWidths,
    PackedLayer,
    become_packed,
    packed_layers,
)
from geta_hf.serialization.static_cache import fit_static_caches
from geta_hf.surgery.fixes import (
    Fixes,
    check_attributes,
    no_fixes,
    read_fixes,
    set_expert_counts,
    shrink_attribute,
    shrink_buffer,
    shrink_tensor,
)
from geta_hf.utils.config_limits import MANY_LAYERS, check_counts

logger = logging.get_logger(__name__)

QUANT_METHOD = "geta"
FORMAT_VERSION = 2
"""Of folders with layers of several widths; all others are written as version 1, which earlier releases read."""

_VERSIONS = (1, FORMAT_VERSION)

_WHERE = "quantization_config in config.json:"
_LATER_KEYS = ("activation_bits", "partial", "checksums", "grid", "blocks", "unsigned_inputs", "four_levels")
_BLOCK_KEYS = {"dim", "widths", "counts"}

_BUFFER_BYTES = 2**27
"""Up to so many bytes of buffers that no folder holds are always allowed; beyond, four times the folder's tensors."""


class GETAQuantizationConfig(QuantizationConfigMixin):
    """The `quantization_config` of config.json as plain data, checked when it is made.

    Args:
        bits: module path -> bit width of its packed weight, 2 to 16. Default None: no layer is packed.
        fixes: the fix list. Default None: nothing was cut.
        format_version: of the folder's layout. Default None: 2 where there are `blocks`, else 1.
        quant_method: always `geta`; transformers passes it.
        activation_bits: module path -> bit width of its input, 2 to 16, for the packed layers that round it. Default
            None: no layer does, and config.json has no such key.
        partial: whether the model was saved from within another one. It may then lack modules that its class has on its
            own, such as a pooler. Default False, and config.json has no such key.
        checksums: tensor name -> checksum of its bytes in the file, 16 hexadecimal digits, or 8 in folders that
            were written before there were longer ones. Default None: none is known, and config.json has no such key.
        grid: `block32` where packed layers may have a step size for every 32 inputs of an output channel. Default None:
            none has, and config.json has no such key.
        blocks: module path -> `dim`, `widths` and `counts`: how many indices along a dim of its weight have each width,
            where they differ, or where that dim is its inputs'. `bits` has the widest. Default None: no module does,
            and config.json has no such key.
        unsigned_inputs: modules whose rounded inputs have no negative codes. Default None: no module does, and
            config.json has no such key.
        four_levels: paths of the packed layers in which what has 2 bits, the weight or some of its rows or columns, has
            four levels. Default None: none has, and config.json has no such key.

    Raises:
        GETAError: an unknown version or key, or a value that no export writes.
    """

    def __init__(
        self,
        bits: dict[str, int] | None = None,
        fixes: Fixes | None = None,
        format_version: int | None = None,
        quant_method: str = QUANT_METHOD,
        activation_bits: dict[str, int] | None = None,
        partial: bool = False,
        checksums: dict[str, str] | None = None,
        grid: str | None = None,
        blocks: dict[str, dict[str, Any]] | None = None,
        unsigned_inputs: list[str] | None = None,
        four_levels: list[str] | None = None,
        **unknown: Any,
    ) -> None:
        self.quant_method = quant_method  # type: ignore[assignment]
        self.blocks = {} if blocks is None else blocks
        self.unsigned_inputs = [] if unsigned_inputs is None else unsigned_inputs
        self.four_levels = [] if four_levels is None else four_levels
        if format_version is None:
            format_version = FORMAT_VERSION if blocks or unsigned_inputs else 1
        self.format_version = format_version
        self.bits = {} if bits is None else bits
        self.activation_bits = {} if activation_bits is None else activation_bits
        self.partial = partial
        self.checksums = {} if checksums is None else checksums
        self.grid = grid
        if type(self.format_version) is not int or self.format_version not in _VERSIONS:
            raise GETAError(
                f"{_WHERE} format_version is {format_version!r}, but this release of geta_hf reads 1 and "
                f"{FORMAT_VERSION}; install the release that wrote the folder"
            )
        if (self.blocks or self.unsigned_inputs) and self.format_version == 1:
            later = "blocks" if self.blocks else "unsigned_inputs"
            raise GETAError(f"{_WHERE} {later} came with format_version 2, but this is 1; export the folder again")
        if unknown:
            raise GETAError(f"{_WHERE} unknown keys {sorted(unknown)}; install the release that wrote the folder")
        if not isinstance(partial, bool):
            raise GETAError(f"{_WHERE} partial is {partial!r}, not true or false")
        if grid not in (None, BLOCKS):
            raise GETAError(
                f"{_WHERE} grid is {str(grid)[:80]!r}, not {BLOCKS!r}; install the release that wrote the folder"
            )
        _check_checksums(self.checksums)
        check_widths("bits", self.bits)
        check_widths("activation_bits", self.activation_bits)
        _check_unsigned(self.unsigned_inputs, self.activation_bits)
        check_blocks(self.blocks, self.bits)
        _check_four_levels(self.four_levels, self.bits, self.blocks)
        if lacking := sorted(set(self.activation_bits) - set(self.bits)):
            raise GETAError(f"{_WHERE} activation_bits names {lacking[0]!r}, which is not in bits; add it there too")
        self.fixes = no_fixes() if fixes is None else read_fixes(fixes, f"{_WHERE} fixes")

    def to_dict(self) -> dict[str, Any]:
        """Return the values as config.json has them.

        Keys that came later are missing where they say nothing, so that a folder without rounded inputs is written as
        it was before there were any.
        """
        return {k: v for k, v in super().to_dict().items() if v or k not in _LATER_KEYS}


def _check_unsigned(names: Any, activation_bits: Mapping[str, int]) -> None:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise GETAError(f"{_WHERE} unsigned_inputs must be a list of module names, not {str(names)[:80]!r}")
    if lacking := sorted(set(names) - set(activation_bits)):
        raise GETAError(f"{_WHERE} unsigned_inputs names {lacking[0]!r}, which is not in activation_bits")


def _check_four_levels(layers: Any, bits: Mapping[str, int], blocks: Mapping[str, Any]) -> None:
    if not isinstance(layers, list) or not all(isinstance(name, str) for name in layers):
        raise GETAError(f"{_WHERE} four_levels must be a list of module names, not {str(layers)[:80]!r}")
    for name in layers:
        widths = blocks[name]["widths"] if name in blocks else [bits.get(name)]
        if FOUR_LEVEL_BITS not in widths:
            raise GETAError(
                f"{_WHERE} four_levels names {name[:80]!r}, whose width in bits is {', '.join(map(str, widths))}; only "
                f"what has {FOUR_LEVEL_BITS} bits has four levels, so copy or export the folder again"
            )


def check_blocks(blocks: Any, bits: Mapping[str, int], where: str = _WHERE) -> None:
    """Check that a value maps names of modules to the widths of their rows or columns.

    Raises:
        GETAError: `where` says in which file it is.
    """
    if not isinstance(blocks, dict):
        raise GETAError(f"{where} blocks must be an object of module names, not {str(blocks)[:80]!r}")
    for name, entry in blocks.items():
        if not isinstance(entry, dict) or set(entry) != _BLOCK_KEYS or not _is_block(entry):
            raise GETAError(
                f"{where} blocks[{name!r}] is {str(entry)[:80]!r}, not a dim, ascending widths from {MIN_BITS} to "
                f"{MAX_BITS}, and a positive count of each"
            )
        if bits.get(name) != entry["widths"][-1]:
            raise GETAError(
                f"{where} bits[{name!r}] is {bits.get(name)!r}, not the widest of blocks, {entry['widths'][-1]}; "
                f"export the folder again"
            )


def _is_block(entry: Mapping[str, Any]) -> bool:
    widths = entry["widths"]
    counts = entry["counts"]
    if not isinstance(widths, list) or not isinstance(counts, list) or not widths or len(widths) != len(counts):
        return False
    if any(type(value) is not int for value in (entry["dim"], *widths, *counts)):
        return False
    fits = entry["dim"] in (0, 1) and widths[0] >= MIN_BITS and widths[-1] <= MAX_BITS and min(counts) > 0
    return fits and sorted(set(widths)) == widths


def _check_checksums(checksums: Any) -> None:
    if not isinstance(checksums, dict):
        raise GETAError(f"{_WHERE} checksums must be an object of tensor names, not {str(checksums)[:80]!r}")
    for name, value in checksums.items():
        if not isinstance(value, str) or len(value) not in DIGITS:
            raise GETAError(f"{_WHERE} checksums[{name!r}] is {str(value)[:80]!r}, not 8 or 16 hexadecimal digits")


def check_widths(key: str, widths: Any, where: str = _WHERE) -> None:
    """Check that a value maps names of modules to bit widths.

    Raises:
        GETAError: `where` says in which file it is.
    """
    if not isinstance(widths, dict):
        raise GETAError(f"{where} {key} must be an object of module names, not {str(widths)[:80]!r}")
    for name, bits in widths.items():
        if not isinstance(bits, int) or isinstance(bits, bool) or not MIN_BITS <= bits <= MAX_BITS:
            raise GETAError(f"{where} {key}[{name!r}] is {bits!r}, not an integer from {MIN_BITS} to {MAX_BITS}")


class GETALoader(HfQuantizer):
    """Shrink and prepare a freshly built model, then verify and decode what was loaded."""

    requires_calibration = True  # a dense model cannot be loaded into this format, only exported
    revision = 8
    """Rises when folders get what earlier code refuses: 2 since they have checksums, 3 since these have 16 digits, 4
    since there may be step sizes for blocks of inputs, 5 since a layer may have several widths,
    6 since there may be four levels at 2 bits, 7 since each expert of a mixture may have layers of its own, 8 since
    some rows or columns of a layer may have four levels."""

    quantization_config: GETAQuantizationConfig

    def is_serializable(self) -> bool:
        logger.warning("to save this model again, `import geta_hf` before loading it, or copy its folder")
        return False

    @property
    def is_trainable(self) -> bool:
        """Return True: adapters on top are trained, and what is not packed."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Return True, without which Trainer refuses the model, even if it is only to be evaluated."""
        logger.warning_once(
            "this model is compressed: Trainer evaluates it as it is, but trains no packed weight. To train further, "
            "put an adapter of peft on top, or call model.dequantize() first"
        )
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Refuse a hostile number of layers.

        This hook has another purpose, but it is the only one that sees the config before the model is built, and
        building millions of layers takes hours even without memory for their weights.
        """
        bits = self.quantization_config.bits
        fixes = self.quantization_config.fixes
        named = len(bits) + len(fixes["shapes"]) + len(fixes["attrs"])
        _check_layers(config.to_dict(), named, _count_tensors(config.name_or_path or ""))
        return config

    update_tp_plan = update_attn_implementation  # the hook that sees the config in older releases

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        raise GETAError("the code in a folder only reads it; to dequantize a model, import geta_hf before loading it")

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Return True for the scale of a layer's input: its size, one or two numbers, is verified after loading."""
        path, _, leaf = param_name.rpartition(".")
        return leaf == INPUT_SCALE and isinstance(model.get_submodule(path), PackedLayer)

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Return the type that a loaded tensor is cast to: None, no cast, for packed data.

        The type that the decoded weight is to have is passed on to its decoder.
        """
        decoders = [step for step in getattr(converter, "operations", ()) if isinstance(step, Decode)]
        for step in decoders:
            step.dtype = dtype or step.dtype
        return None if decoders else super().get_new_dtype(converter, param, dtype)

    def get_weight_conversions(self) -> list[WeightConverter]:
        """Return one conversion for every packed layer, from its stream and scale to its decoded weight."""
        return [decoder.converter() for decoder in self._decoders]

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        files = list(kwargs.get("checkpoint_files") or ())
        self.prepare(model, files)
        self._verification = Verification(files, self.quantization_config.checksums)
        return model

    def prepare(self, model: PreTrainedModel, files: Sequence[str]) -> None:
        """Shrink a freshly built model, prepare its packed layers, and compare it with the headers of the files.

        Args:
            model: without weights; changed in place.
            files: of weights.

        Raises:
            GETAError: the files do not hold such a model.
        """
        config = self.quantization_config
        # Before anything else: every later step may then rely on a header that is true to its file.
        headers = read_headers(files, model.config.name_or_path or "")
        if is_unstacked(model.config):
            unstack_experts(model)
        apply_fixes(model, config.fixes)
        self._decoders: list[Decode] = []
        tied = tied_weights(model)
        four_levels = set(config.four_levels)
        for name, bits in config.bits.items():
            if (path := find_module(model, name)) is None:
                continue
            module = model.get_submodule(path)
            widths = _widths_of(name, module, config.blocks.get(name))
            layer = become_packed(path, module, bits, f"{path}.weight" in tied, widths, name in four_levels)
            self._reserve(name, _places(model, name), layer)
            for place in _places(model, name):
                check_packed(place, layer, headers, config.grid == BLOCKS)
        _check_inputs(model, headers)
        self._check_plain(model, headers)
        _check_buffers(model, headers)
        self._names = set(headers)
        # As they have to be after loading; see `_check_shapes`.
        self._shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}

    def _check_plain(self, model: PreTrainedModel, headers: Mapping[str, Header]) -> None:
        """Check that the folder is of such a model at all, and its plain tensors, before any is read.

        A tensor of a head that was not cut may have another shape: transformers then raises, or initializes it at
        random where `ignore_mismatched_sizes` asks for that.
        """
        tensors = model.state_dict()
        layers = packed_layers(model)
        found = {name: place for name in tensors for place in _places(model, name) if place in headers}
        base = "" if model.base_model is model else f"{model.base_model_prefix}."
        if headers and not _is_own_folder(model) and not any(name.startswith(base) for name in (*found, *layers)):
            saved = ", ".join(model.config.architectures or ())
            raise GETAError(f"the folder holds nothing of a {type(model).__name__}; load it by its own class, {saved}")
        cut = {find_tensor(model, name) for name in self.quantization_config.fixes["shapes"]}
        packed = {f"{path}.{leaf}" for path in layers for leaf in LEAVES}
        self._fresh = {
            name
            for name, place in found.items()
            if name not in packed
            and check_plain(place, tensors[name], headers[place], name in cut or name.startswith(base))
        }

    def _reserve(self, name: str, places: Iterable[str], layer: PackedLayer) -> None:
        """Prepare a layer for loading: a decoder for its weight and a buffer for the scale of a rounded input."""
        decoder = Decode(self, name, places, layer, self.quantization_config.grid == BLOCKS)
        self._decoders.append(decoder)
        if name in self.quantization_config.activation_bits:
            layer.register_buffer(INPUT_SCALE, torch.empty(1, dtype=torch.float32, device=layer.weight.device))
        # Otherwise transformers would initialize a weight that the file lacks, before the gap can be reported.
        layer.__dict__["_is_hf_initialized"] = True

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for problem in (decoder.problem for decoder in self._decoders):
            if problem is not None:
                raise GETAError(problem)
        self._verification.finish()
        _check_complete(model, self._names, self._fresh, _is_own_folder(model) and not self.quantization_config.partial)
        _check_shapes(model, self._shapes)
        for name, dims in self.quantization_config.fixes["keep"].items():
            if (buffer := find_tensor(model, name)) is not None:
                shrink_buffer(model, buffer, dims)
        for name, layer in packed_layers(model).items():
            # A step of an optimizer would make it something else than d * n. Adapters on top can be trained.
            layer.weight.requires_grad_(False)
            layer.finish_loading()
            if INPUT_SCALE in layer._buffers:
                self._make_input_quantizer(model, name, layer)
        _share_step_sizes(model)
        _share_offloaded(model)
        # Saving would run the conversions backwards, which ours cannot: `hf_quantizer` packs the weights by itself.
        self._decoders = []
        kept = [step for step in getattr(model, "_weight_conversions", None) or () if not _decodes(step)]
        vars(model)["_weight_conversions"] = kept
        if self.quantization_config.fixes["shapes"]:
            fit_static_caches(model)
        return model

    def _make_input_quantizer(self, model: PreTrainedModel, path: str, layer: PackedLayer) -> None:
        """Make the quantizer of a layer's input from the scale that was loaded into its buffer."""
        scale = layer.get_buffer(INPUT_SCALE).detach()
        bit_widths = self.quantization_config.activation_bits
        check_scale(f"{path}.{INPUT_SCALE}", scale, "d and one for t", 2)
        # The quantizer holds the scale from here on.
        del layer._buffers[INPUT_SCALE]
        place = next(place for place in _places(model, path) if place in bit_widths)
        unsigned = place in self.quantization_config.unsigned_inputs
        layer.input_quantizer = FixedQuantizer(scale, bit_widths[place], unsigned)


def _widths_of(name: str, layer: nn.Module, entry: Mapping[str, Any] | None) -> ChannelWidths | None:
    """Return the widths of a layer's rows or columns, as if they ascended; a tensor may say otherwise later."""
    if entry is None:
        return None
    weight = layer._parameters.get("weight")
    dim = entry["dim"]
    # Compared before anything of that size is made, since the counts may be a stranger's.
    if (
        weight is None
        or weight.dim() < 2
        or isinstance(layer, nn.Embedding)
        or sum(entry["counts"]) != weight.shape[dim]
    ):
        shape = None if weight is None else tuple(weight.shape)
        raise GETAError(
            f"{_WHERE} blocks[{name!r}] has {sum(entry['counts'])} indices along dim {dim}, but the "
            f"{type(layer).__name__} has a weight of shape {shape}; export the folder again"
        )
    return ChannelWidths.contiguous(dim, entry["widths"], entry["counts"])


def _decodes(conversion: Any) -> bool:
    return any(isinstance(step, Decode) for step in getattr(conversion, "operations", ()))


def tied_weights(model: PreTrainedModel) -> set[str]:
    """Return the names of all parameters that share their tensor with another one."""
    ties = model.all_tied_weights_keys
    return set(ties) | set(ties.values())


def _share_step_sizes(model: PreTrainedModel) -> None:
    """Give packed layers whose weights are tied the step size of the one that was loaded."""
    loaded = {id(layer.weight): layer for layer in packed_layers(model).values() if "step_size" in vars(layer)}
    for layer in packed_layers(model).values():
        if "step_size" not in vars(layer):
            if (source := loaded.get(id(layer.weight))) is None:
                raise GETAError("a packed layer is tied to a weight that the folder lacks; copy or export it again")
            layer.step_size, layer.stream, layer.widths = source.step_size, source.stream, source.widths


def _share_offloaded(model: PreTrainedModel) -> None:
    """Let tied weights that are offloaded to disk be the decoded one.

    accelerate lists what is on disk before a weight is decoded, so the list has only one name of each.
    """
    hooks = [module._hf_hook for module in model.modules() if hasattr(module, "_hf_hook")]
    if hooks:
        from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset  # not installed unless something offloads

        for store in (getattr(hook, "weights_map", None) for hook in hooks):
            while isinstance(store, PrefixedDataset):
                store = store.dataset
            index = store.index if isinstance(store, OffloadedWeightsLoader) else {}
            for target, source in model.all_tied_weights_keys.items():
                if target in index and source in index:
                    index[target] = index[source]


def _check_layers(config: Mapping[str, Any], named: int, tensors: int | None = None) -> None:
    """Check that a config has no more layers than are built within seconds, or than the folder names or holds."""
    why = f"but quantization_config names {named} modules and tensors"
    check_counts(config, max(named, MANY_LAYERS if tensors is None else tensors), why=why)


def _count_tensors(folder: str) -> int | None:
    """Return how many tensors a local folder holds; None for a name on the Hub."""
    if not (Path(folder) / "config.json").is_file():
        return None
    files = sorted(Path(folder).glob("*.safetensors"))
    return sum(len(read_headers([str(file)], folder)) for file in files) or None


def _check_buffers(model: PreTrainedModel, headers: Mapping[str, Header]) -> None:
    """Check the size of what no folder holds and the model makes by itself, such as a table of positions."""
    saved = model.state_dict().keys()
    sizes = {name: buffer.nbytes for name, buffer in model.named_buffers() if name not in saved}
    allowed = max(_BUFFER_BYTES, 4 * sum(math.prod(header.shape) for header in headers.values()))
    if sum(sizes.values()) > allowed:
        largest = max(sizes, key=lambda name: sizes[name])
        raise GETAError(
            f"config.json makes {largest} {sizes[largest]} bytes, more than a model of this folder's size has; copy or "
            f"export the folder again"
        )


def _check_inputs(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Check that config.json has a bit width for every input scale in the folder: it would be ignored otherwise."""
    layers = packed_layers(model)
    for name in names:
        path, _, leaf = name.rpartition(".")
        found = next((layers[place] for place in _places(model, path) if place in layers), None)
        if leaf == INPUT_SCALE and found is not None and INPUT_SCALE not in found._buffers:
            raise GETAError(f"{_WHERE} activation_bits lacks {path}, but the folder has {name}; export it again")


def apply_fixes(model: PreTrainedModel, fixes: Fixes) -> None:
    """Shrink a freshly built model, still without weights, to what a fix list says.

    Args:
        model: of the original sizes, as config.json says.
        fixes: the fix list, in the folder's names; entries of another class's head are ignored.

    Raises:
        GETAError: an entry does not fit the model, or would not shrink it.
    """
    cut = []
    for name, shape in fixes["shapes"].items():
        if (tensor := find_tensor(model, name)) is not None:
            shrink_tensor(model, tensor, shape)
            cut.append(tensor)
    for name, attributes in fixes["attrs"].items():
        if (path := find_module(model, name)) is not None:
            for attribute, value in attributes.items():
                shrink_attribute(path, model.get_submodule(path), attribute, value)
    # Only now, since a module's tensors and its attributes are entries of two lists.
    check_attributes(model, cut)
    _skip_initialization(model, cut)
    set_expert_counts(model, fixes)


def _skip_initialization(model: PreTrainedModel, cut: Iterable[str]) -> None:
    """Keep transformers from initializing what was cut: some modules would do so in their original size.

    A tensor that is not loaded after all is found by `_check_complete`.
    """
    for path in dict.fromkeys(name.rpartition(".")[0] for name in cut):
        module = model.get_submodule(path)
        if not module._non_persistent_buffers_set:  # only the initialization fills those
            module.__dict__["_is_hf_initialized"] = True


def find_module(model: PreTrainedModel, name: str) -> str | None:
    """Return the path in `model` of the module that the folder calls `name`; None if another class's head has it.

    A folder that was saved with a head names its modules below the base model's prefix, one that was saved without does
    not, and either may be loaded into the other.

    Raises:
        GETAError: the model should have the module and does not.
    """
    if not name and not _is_own_folder(model):
        saved = model.config.architectures or ()
        return model.base_model_prefix if type(model.base_model).__name__ in saved else None
    modules = dict(model.named_modules())
    # The folder's own name first: a model may have a module of the other name too.
    for path in _places(model, name):
        if path in modules:
            return path
    if not name.startswith(f"{model.base_model_prefix}.") and not _is_own_folder(model):
        return None
    raise GETAError(
        f"quantization_config in config.json names the module {name!r}, absent in {type(model).__name__}; load the "
        f"folder by its own class, or export it again"
    )


def _places(model: PreTrainedModel, name: str) -> tuple[str, str, str]:
    """Return the names that a module may have in another class: as it is, without and with the base model's prefix."""
    prefix = f"{model.base_model_prefix}."
    return name, name.removeprefix(prefix), prefix + name


def find_tensor(model: PreTrainedModel, name: str) -> str | None:
    """Return the name in `model` of a tensor of the folder, as `find_module` does for a module."""
    path, _, leaf = name.rpartition(".")
    found = find_module(model, path)
    return None if found is None else f"{found}.{leaf}".removeprefix(".")


def _is_own_folder(model: PreTrainedModel) -> bool:
    """Return whether the folder was saved from this very class, so that both must have the same tensors."""
    architectures = model.config.architectures
    return not architectures or type(model).__name__ in architectures


def _check_complete(model: PreTrainedModel, stored: Collection[str], fresh: Collection[str], own: bool) -> None:
    """Check that every tensor was in the folder: transformers marks what it loads, and initializes the rest at random.

    Another class than the folder's may have modules that the folder does not have, such as a new head: transformers
    initializes and reports those, as for any model. A module that was loaded in part is no such module.

    Args:
        model: after loading.
        stored: names of the tensors in the folder.
        fresh: names of the tensors that the caller asked for in another shape, which are initialized on purpose.
        own: whether the folder is of this very class, so that nothing may be missing.
    """
    for path, module in model.named_modules():
        tensors = {leaf: t for leaf, t in module.state_dict(keep_vars=True).items() if "." not in leaf}
        present = {leaf: _was_loaded(model, path, leaf, tensor, stored) for leaf, tensor in tensors.items()}
        missing = [leaf for leaf, loaded in present.items() if not loaded and f"{path}.{leaf}" not in fresh]
        # A new head on a base model lacks all its tensors; a damaged folder lacks some.
        if missing and (own or any(present.values()) or isinstance(module, PackedLayer)):
            name = f"{path}.{missing[0]}".removeprefix(".")
            raise GETAError(f"the folder has no tensor {name}, or one of another shape; copy or export it again")


def _was_loaded(model: PreTrainedModel, path: str, leaf: str, tensor: Any, stored: Collection[str]) -> bool:
    if f"{path}.{leaf}" in (model._keys_to_ignore_on_save or ()):
        return True  # the model's own initialization makes it, which the proof of every export has compared
    if not tensor.is_meta:
        return getattr(tensor, "_is_hf_initialized", False)
    # Offloading has lost the mark, so the folder's names decide. Where transformers renamed them, they say nothing.
    names = {f"{place}.{leaf}" for place in _places(model, path)}
    renamed = any(not _decodes(step) for step in getattr(model, "_weight_conversions", None) or ())
    return renamed or bool(names & set(stored)) or f"{path}.{leaf}" in tied_weights(model)


def _check_shapes(model: PreTrainedModel, shapes: dict[str, tuple[int, ...]]) -> None:
    """Check the shapes and types of plain tensors after loading: some releases of transformers load wrong ones too."""
    packed = {f"{path}.{leaf}" for path in packed_layers(model) for leaf in LEAVES}
    for name, tensor in model.state_dict().items():
        if name in packed:
            continue  # verified as they were decoded
        if tuple(tensor.shape) != shapes[name] or tensor.dtype == torch.uint8:
            raise GETAError(
                f"the folder's {name} is {tensor.dtype} of shape {tuple(tensor.shape)}, but config.json, or arguments "
                f"of from_pretrained, make it {shapes[name]}; remove such arguments, update transformers, which "
                f"initializes it with ignore_mismatched_sizes=True, or copy or export the folder again"
            )


# geta_hf itself, which can save too, or the code of another folder may have registered first. Later code reads folders
# of before too, but not the other way around, so the latest is registered.
if getattr(AUTO_QUANTIZER_MAPPING.get(QUANT_METHOD), "revision", -1) < GETALoader.revision:
    AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = GETAQuantizationConfig
    AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = GETALoader
