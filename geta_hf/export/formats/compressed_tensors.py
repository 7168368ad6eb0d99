"""The compressed-tensors format: packed weights that transformers loads with the compressed-tensors package alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from geta_hf.errors import GETAError
from geta_hf.export.formats.vanilla import write_plain
from geta_hf.quantization.experts import unstacked_experts
from geta_hf.quantization.maths import BLOCK
from geta_hf.serialization.encode import layer_codes
from geta_hf.serialization.packed_layers import PackedLayer, packed_layers

MAX_BITS = 8
_FORMAT = "pack-quantized"


def write_compressed_tensors(model: PreTrainedModel, folder: Path, batch: Mapping[str, Tensor]) -> None:
    """Write a compressed model with its weights packed at their learned bits, in compressed-tensors' own format.

    Cuts go into config.json as in the vanilla format, so every layer must have kept equally many groups. Linear layers
    of 2 to 8 bits are packed, each row of codes in whole 32-bit words; where rows differ in width, at the widest. Wider
    ones, tied ones, those with blocks of 32 inputs of which the last is shorter, those with a step size for each input,
    Conv1D, convolutions and embeddings (which transformers cannot load packed) are stored dense, with their quantized
    values. Scales are stored
    in the model's dtype, as the package computes in: below single precision that rounds every step size once more.

    Args:
        model: compressed; left unchanged.
        folder: an existing empty folder.
        batch: what the proof runs on.

    Raises:
        GETAError: the package is missing, no layer can be packed, layers that differ, a cut that the configuration
            cannot express, activations that are rounded, or outputs that differ once reloaded.
    """
    check_package()
    layers = packable(model)
    if not layers:
        raise GETAError(
            f"nothing to pack: {type(model).__name__} has no untied linear layer of 2 to {MAX_BITS} bits; write the "
            f"vanilla format"
        )
    packings = {name: own_packing(layer) for name, layer in layers.items()}

    def save(plain: PreTrainedModel) -> None:
        save_packed(plain, folder, layers, packings)

    write_plain(model, folder, batch, save, "compressed-tensors")


@dataclass(frozen=True, order=True)
class Packing:
    """How the weight of a layer is stored.

    Attributes:
        bits: of each code in the file, at least those that it needs.
        strategy: what has a scale of its own, in the package's words: `tensor`, `channel`, or `group` of 32 inputs.
    """

    bits: int
    strategy: str


def own_packing(layer: PackedLayer) -> Packing:
    """Return the packing that is a layer's own: at its learned bits, with the scales that it has."""
    if layer.in_blocks:
        return Packing(layer.integer_bits, "group")
    return Packing(layer.integer_bits, "tensor" if layer.step_size.numel() == 1 else "channel")


def save_packed(
    plain: PreTrainedModel, folder: Path, layers: Mapping[str, PackedLayer], packings: Mapping[str, Packing]
) -> None:
    """Save a model with some of its weights packed.

    Args:
        plain: of an ordinary configuration, with decoded weights.
        folder: where to save it.
        layers: module path -> layer whose weight is packed.
        packings: module path -> how.
    """
    state = plain.state_dict()
    pack_state(state, layers, packings, plain.dtype)
    if packings:
        plain.config.quantization_config = packed_config(packings, plain.base_model_prefix)
    plain.save_pretrained(folder, state_dict=state)


def pack_state(
    state: dict[str, Tensor],
    layers: Mapping[str, PackedLayer],
    packings: Mapping[str, Packing],
    dtype: torch.dtype,
) -> None:
    """Replace dense weights of a state dict by packed ones, in place; scales get the dtype."""
    for name, packing in packings.items():
        del state[f"{name}.weight"]
        packed = _packed(name, layers[name], packing, dtype)
        state |= {f"{name}.{leaf}": tensor for leaf, tensor in packed.items()}


def check_package() -> None:
    """Raise GETAError where the package is not installed."""
    try:
        import compressed_tensors  # noqa: F401
    except ImportError as error:
        raise GETAError(
            "the compressed-tensors format needs the package compressed-tensors; pip install "
            "geta_hf[compressed-tensors]"
        ) from error


def packable(model: PreTrainedModel) -> dict[str, PackedLayer]:
    """Return the layers whose weights the format can hold, by module path."""
    # A tied weight must exist under its dense name: the other module reads it from there.
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    # Experts are stored stacked, without packing.
    experts = tuple(f"{name}." for name in unstacked_experts(model))
    return {
        name: layer
        for name, layer in packed_layers(model).items()
        if isinstance(layer, nn.Linear)
        and not name.startswith(experts)
        and layer.integer_bits <= MAX_BITS
        and uses[id(layer.weight)] == 1
        and _fills(layer)
    }


def _fills(layer: PackedLayer) -> bool:
    """Return whether step sizes are those of rows, or of blocks of 32 inputs, as the package's groups are."""
    if layer.scales_inputs:
        return False
    return not layer.in_blocks or layer.dense_shape[1] % BLOCK == 0


def _packed(name: str, layer: PackedLayer, packing: Packing, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return what a file holds of a layer's weight, packed by the package itself."""
    from compressed_tensors.compressors import BaseCompressor

    scale = layer.step_size.float()
    if packing.strategy == "channel":
        scale = scale.view(-1, 1).expand(layer.dense_shape[0], 1).contiguous()
    compressor = BaseCompressor.get_value_from_registry(_FORMAT)
    # Codes come back from the exact weight: in half precision a rounded one may lie nearer to another code.
    exact = {"weight": layer.decoded(layer_codes(name, layer)).cpu(), "weight_scale": scale}
    return {**compressor.compress(exact, _scheme(packing, [])), "weight_scale": scale.to(dtype)}


def unpacked(packing: Packing, stored: Mapping[str, Tensor]) -> Tensor:
    """Return the weight that the package itself decodes from what a file holds of a layer, by names' last parts."""
    from compressed_tensors.compressors import BaseCompressor

    compressor = BaseCompressor.get_value_from_registry(_FORMAT)
    weight: Tensor = compressor.decompress(dict(stored), _scheme(packing, []))["weight"]
    return weight


def _scheme(packing: Packing, targets: list[str]) -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    strategy = packing.strategy
    group = {"group_size": BLOCK} if strategy == "group" else {}
    weights = QuantizationArgs(num_bits=packing.bits, type="int", symmetric=True, strategy=strategy, **group)
    return QuantizationScheme(targets=targets, weights=weights, format=_FORMAT)


def packed_config(packings: Mapping[str, Packing], prefix: str) -> dict[str, Any]:
    """Return the `quantization_config` of packed layers: one group for each packing, with the layers that have it.

    Args:
        packings: module path -> packing.
        prefix: of the base model's modules in a model with a head.
    """
    import compressed_tensors
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus

    groups: dict[Packing, list[str]] = {}
    for name, packing in packings.items():
        groups.setdefault(packing, []).append(_target(name, prefix))
    schemes = {
        f"{packing.bits}_bits_per_{packing.strategy}": _scheme(packing, groups[packing]) for packing in sorted(groups)
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
