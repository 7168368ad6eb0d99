"""Leave layers float whose quantizer would have no effect, since the model reads their weight itself."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from transformers.utils import logging

from geta_hf.config import CompressionConfig
from geta_hf.errors import GETAError
from geta_hf.qadg.tracing.raw_reads import find_raw_reads
from geta_hf.quantization import quantized_layers
from geta_hf.quantization.layer_types import base_type
from geta_hf.utils.model_io import to_device

logger = logging.get_logger(__name__)


def exclude_raw_reads(
    config: CompressionConfig, model: nn.Module, layers: Mapping[str, nn.Module], batch: Mapping[str, Any]
) -> CompressionConfig:
    """Return the config without the layers that a quantizer could not act on; warn of them.

    These are layers whose weight the model reads past their forward, and, among those chosen by default, layers whose
    class computes something else than a plain layer.

    Args:
        config: of the run; returned as it is where there is no such layer.
        model: before quantizers are attached.
        layers: those that are to be quantized, by name.
        batch: one batch of inputs; all processes call this, each with its own.

    Raises:
        GETAError: no layer remains.
    """
    inputs = to_device(batch, next(model.parameters()).device)
    found: list[str] = find_raw_reads(model, layers, inputs)
    if config.include is None:
        # Routers, for one, are linear layers that do more. Where the user named such a layer, attaching says why not.
        found += [name for name, layer in layers.items() if base_type(layer) is None]
    if torch.distributed.is_initialized():
        # Which expert runs depends on the batch, but every process must quantize the same layers.
        found = gather_object(found)
    if not found:
        return config
    if set(found) >= set(layers):
        example = layers[found[0]]
        raise GETAError(
            f"{type(model).__name__} has no layer to quantize: in each of {len(layers)}, such as {found[0]} "
            f"({type(example).__name__}), the weight is read past the layer's forward, or the forward is one of its "
            f"own; name other layers by `include`"
        )
    excluded = exclude_layers(config, found, layers)
    logger.warning(
        "left in floating point: %s; the model reads the weight itself, past the layer's forward, where a quantizer "
        "would have no effect, or the layer has a forward of its own",
        ", ".join(left_float(config, excluded)),
    )
    return excluded


def exclude_layers(config: CompressionConfig, found: Collection[str], names: Collection[str]) -> CompressionConfig:
    """Return the config with the layers of these names excluded, out of all `names`; itself where there are none."""
    if not found:
        return config
    return dataclasses.replace(config, exclude=[*config.exclude, *name_patterns(found, names)])


def left_float(config: CompressionConfig, excluded: CompressionConfig) -> tuple[str, ...]:
    """Return the layers that `exclude_layers` excluded, with `*` for numbers.

    Args:
        config: what it was given.
        excluded: what it returned.
    """
    patterns = excluded.exclude[len(config.exclude) :]
    return tuple(pattern[1:-1].replace(r"\d+", "*").replace("\\", "") for pattern in patterns)


def name_patterns(found: Collection[str], names: Collection[str]) -> list[str]:
    """Return regular expressions that match the names found and no others; one for alike names in all blocks.

    Example:
        >>> name_patterns(["h.0.out", "h.1.out"], ["h.0.out", "h.1.out", "h.0.up"])
        ['^h\\\\.\\\\d+\\\\.out$']
    """
    found = set(found)
    patterns: dict[str, None] = {}
    for name in names:
        if name not in found:
            continue
        alike = "^" + re.sub(r"(?<=\.)\d+(?=\\\.|$)", r"\\d+", re.escape(name)) + "$"
        wider = {other for other in names if re.search(alike, other)}
        patterns[alike if wider <= found else f"^{re.escape(name)}$"] = None
    return list(patterns)


def check_first_gradients(model: nn.Module) -> None:
    """Check after the first backward pass that no weight was trained past its quantizer.

    A kernel that is no operator of torch is invisible before training; its gradients are not.

    Raises:
        GETAError: a weight has a gradient, but none of its quantizer's parameters has.
    """
    for name, layer in quantized_layers(model).items():
        trained = [parameter for parameter in layer.weight_quantizer.parameters() if parameter.requires_grad]
        if layer.weight.grad is not None and trained and all(parameter.grad is None for parameter in trained):
            raise GETAError(
                f"{name}.weight has a gradient, but its quantizer has none: a kernel reads the weight past the layer's "
                f"forward. Leave the layer in floating point: GETAConfig(exclude=['^{re.escape(name)}$'])"
            )
