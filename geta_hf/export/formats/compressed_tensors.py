"""The compressed-tensors format: packed weights that transformers loads with the compressed-tensors package alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from geta_hf.errors import GETAError
from geta_hf.export.formats.vanilla import write_plain
from geta_hf.quantization.maths import BLOCK
from geta_hf.serialization.encode import layer_codes
from geta_hf.serialization.packed_layers import PackedLayer, packed_layers

MAX_BITS = 8
_FORMAT = "pack-quantized"


def write_compressed_tensors(model: PreTrainedModel, folder: Path, batch: Mapping[str, Tensor]) -> None:
    """Write a compressed model with its weights packed at their learned bits, in compressed-tensors' own format.

    Cuts go into config.json as in the vanilla format, so every layer must have kept equally many groups. Linear layers
    of 2 to 8 bits are packed, each row of codes in whole 32-bit words. Wider ones, tied ones, those with blocks of 32
    inputs of which the last is shorter, Conv1D, convolutions and embeddings (which transformers cannot load packed) are
    stored dense, with their quantized values. Scales are stored
    in the model's dtype, as the package computes in: below single precision that rounds every step size once more.

    Args:
        model: compressed; left unchanged.
        folder: an existing empty folder.
        batch: what the proof runs on.

    Raises:
        GETAError: the package is missing, no layer can be packed, layers that differ, a cut that the configuration
            cannot express, activations that are rounded, or outputs that differ once reloaded.
    """
    _check_package()
    layers = _packable(model)
    if not layers:
        raise GETAError(
            f"nothing to pack: {type(model).__name__} has no untied linear layer of 2 to {MAX_BITS} bits; write the "
            f"vanilla format"
        )

    def save(plain: PreTrainedModel) -> None:
        state = plain.state_dict()
        for name, layer in layers.items():
            del state[f"{name}.weight"]
            state |= {f"{name}.{leaf}": tensor for leaf, tensor in _packed(name, layer, plain.dtype).items()}
        plain.config.quantization_config = _quantization_config(layers, plain.base_model_prefix)
        plain.save_pretrained(folder, state_dict=state)

    write_plain(model, folder, batch, save, "compressed-tensors")


def _check_package() -> None:
    try:
        import compressed_tensors  # noqa: F401
    except ImportError as error:
        raise GETAError(
            "the compressed-tensors format needs the package compressed-tensors; pip install "
            "geta_hf[compressed-tensors]"
        ) from error


def _packable(model: PreTrainedModel) -> dict[str, PackedLayer]:
    """Return the layers whose weights the format can hold."""
    # A tied weight must exist under its dense name: the other module reads it from there.
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    return {
        name: layer
        for name, layer in packed_layers(model).items()
        if isinstance(layer, nn.Linear)
        and layer.integer_bits <= MAX_BITS
        and uses[id(layer.weight)] == 1
        and _fills(layer)
    }


def _fills(layer: PackedLayer) -> bool:
    """Return whether a layer has no blocks of inputs, or only such of 32, as the package's groups are."""
    return not layer.in_blocks or layer.dense_shape[1] % BLOCK == 0


def _packed(name: str, layer: PackedLayer, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return what a file holds of a layer's weight, packed by the package itself."""
    from compressed_tensors.compressors import BaseCompressor

    scale = layer.step_size.float()
    if _strategy(layer) == "channel":
        scale = scale.view(-1, 1)
    compressor = BaseCompressor.get_value_from_registry(_FORMAT)
    # Codes come back from the exact weight: in half precision a rounded one may lie nearer to another code.
    exact = {"weight": layer.decoded(layer_codes(name, layer)).cpu(), "weight_scale": scale}
    return {**compressor.compress(exact, _scheme(layer, [])), "weight_scale": scale.to(dtype)}


def _scheme(layer: PackedLayer, targets: list[str]) -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    strategy = _strategy(layer)
    group = {"group_size": BLOCK} if strategy == "group" else {}
    weights = QuantizationArgs(num_bits=layer.integer_bits, type="int", symmetric=True, strategy=strategy, **group)
    return QuantizationScheme(targets=targets, weights=weights, format=_FORMAT)


def _strategy(layer: PackedLayer) -> str:
    """Return what has a scale of its own, in the package's words."""
    if layer.in_blocks:
        return "group"
    return "tensor" if layer.step_size.numel() == 1 else "channel"


def _quantization_config(layers: Mapping[str, PackedLayer], prefix: str) -> dict[str, Any]:
    """Build one group for each bit width and kind of scale, with the layers that have it."""
    import compressed_tensors
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus

    groups: dict[str, list[str]] = {}
    for name, layer in layers.items():
        groups.setdefault(f"{layer.integer_bits}_bits_per_{_strategy(layer)}", []).append(name)
    schemes = {
        group: _scheme(layers[names[0]], [_target(name, prefix) for name in names])
        for group, names in sorted(groups.items())
    }
    # Nothing is ignored by name, since the targets name single layers: what no group names remains dense.
    config = QuantizationConfig(
        config_groups=schemes, format=_FORMAT, quantization_status=QuantizationStatus.COMPRESSED, ignore=[]
    )
    return {**config.model_dump(mode="json"), "version": compressed_tensors.__version__}


def _target(name: str, prefix: str) -> str:
    """Return a pattern for a layer, whether a class with a head or the base class alone is loaded."""
    rest = name.removeprefix(f"{prefix}.")
    head = "" if rest == name else rf"({re.escape(prefix)}\.)?"
    return f"re:{head}{re.escape(rest)}$"
