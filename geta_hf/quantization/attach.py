"""Select the layers to quantize, attach quantizers to a model and detach them again."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from geta_hf.errors import GETAError
from geta_hf.quantization.clipping import (
    block_clipping_values,
    channel_clipping_values,
    check_clipping,
    clipping_value,
)
from geta_hf.quantization.fixed import InputQuantizedLayer, output_dim
from geta_hf.quantization.layers import (
    LAYER_TYPES,
    QuantizedLayer,
    check_convertible,
    dequantize_layer,
    quantize_layer,
)
from geta_hf.quantization.maths import block_count
from geta_hf.quantization.quantizer import GRIDS, Quantizer
from geta_hf.utils.accelerate_hooks import rebind_forward

logger = logging.getLogger(__name__)

_OWN = ("weight_quantizer", "input_quantizer", "lora", "mixture", "input_mixture")
"""Attributes of a quantized layer that a plain one lacks."""

Layers = dict[str, nn.Module]
Layer = TypeVar("Layer", bound=nn.Module)


def select_layers(model: nn.Module, include: Sequence[str] | None = None, exclude: Sequence[str] = ()) -> Layers:
    """Return the layers to quantize, by name.

    By default these are every Linear, Conv1D and Conv2d inside the repeated blocks (`nn.ModuleList`) of the base model:
    attention and MLP, but no embedding, pooler or task head, nor a layer whose weight is tied to one of these.

    Args:
        model: any module; a Hugging Face model's base model is searched for repeated blocks.
        include: regular expressions searched in module names, which replace the default selection. Default None.
        exclude: regular expressions for layers that are not selected after all. Default none.

    Raises:
        GETAError: no layer remains, or a pattern matches nothing.
    """
    supported = tuple(LAYER_TYPES)
    layers: Layers = {name: module for name, module in model.named_modules() if isinstance(module, supported)}
    if not layers:
        raise GETAError(
            f"{type(model).__name__} has no layer to quantize: it has no Linear, Conv1D or Conv2d, the only types that "
            f"can be; such a model cannot be compressed"
        )
    chosen = _in_blocks(model, layers) if include is None else matching(layers, include)
    excluded = matching(layers, exclude)
    chosen = {name: module for name, module in chosen.items() if name not in excluded}
    if not chosen:
        raise GETAError(
            f"{type(model).__name__} has no layer to quantize among {len(layers)} linear layers "
            f"(include={include}, exclude={list(exclude)}); name some by `include`"
        )
    return chosen


def _in_blocks(model: nn.Module, layers: Layers) -> Layers:
    # A head may hold its layers in a ModuleList too, and is not meant by default: it makes the output.
    base = getattr(model, "base_model", model)
    in_block: set[int] = set()
    for module in base.modules():
        if isinstance(module, nn.ModuleList):
            in_block.update(id(child) for child in module.modules())
    chosen = {name: layer for name, layer in layers.items() if id(layer) in in_block}
    # A decoder that refines its predictions layer by layer has copies of the task head in its blocks.
    tied = _tied_to_others(model, chosen)
    return {name: layer for name, layer in chosen.items() if id(layer._parameters.get("weight")) not in tied}


def matching(layers: Mapping[str, Layer], patterns: Sequence[str]) -> dict[str, Layer]:
    """Return the layers in whose name any of the regular expressions is found, in the given order of the layers.

    Raises:
        GETAError: a pattern that matches none, or a string in place of the list.
    """
    if isinstance(patterns, str):
        raise GETAError(f"patterns must be a list of regular expressions, not the string {patterns!r}")
    for pattern in patterns:
        try:
            found = any(re.search(pattern, name) for name in layers)
        except re.error as error:
            raise GETAError(f"pattern {pattern!r} is no regular expression ({error}); correct it") from error
        if not found:
            raise GETAError(
                f"pattern {pattern!r} matches no linear layer; layers are named like {next(iter(layers), None)!r}"
            )
    return {name: layer for name, layer in layers.items() if any(re.search(pattern, name) for pattern in patterns)}


@torch.no_grad()
def attach_quantizers(
    model: nn.Module,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    initial_bits: float = 16,
    target_bits: int = 8,
    clipping: str = "mse",
    learn_t: bool = False,
    per_channel: bool = False,
    grid: str | None = None,
    by_input: Collection[str] = (),
) -> Layers:
    """Attach a learnable weight quantizer to the selected layers, in place. Layers whose weights are tied share one.

    Args:
        model: any module; a Hugging Face model's base model is searched for repeated blocks. On the meta device,
            quantizers are made for their shapes only.
        include, exclude: see `select_layers`.
        initial_bits: bit width that sets the first d. Default 16.
        target_bits: bit width for which `clipping="mse"` chooses q_m. Default 8.
        clipping: `mse` (default) or the paper's `max`, see `clipping_value`.
        learn_t: train the exponent t, the paper's nonlinear quantizer (Sec. 3). Default False, which means t = 1.
        per_channel: the former spelling of `grid="channel"`. Default False.
        grid: what has a (d, q_m) of its own: a `layer`, a `channel` (of the outputs), or, with `block32`, every 32
            neighboring inputs of a channel; for convolutions `block32` means `channel`. t remains one for a layer.
            Default None, which is `layer`, or `channel` under `per_channel`.
        by_input: names of layers that have a (d, q_m) for each input, and not for each output, under `grid="channel"`.
            Default none.

    Returns:
        The quantized layers by name.

    Raises:
        GETAError: an unknown grid, nothing to quantize, an unsupported or already quantized layer, a weight that is no
            parameter or not finite, or one tied to a layer that is not quantized (which would change unnoticed).

    Example:
        >>> import torch
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> sizes = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 32, "num_hidden_layers": 1}
        >>> model = BertForSequenceClassification(BertConfig(vocab_size=30, **sizes))
        >>> batch = {"input_ids": torch.arange(1, 9)[None]}
        >>> from geta_hf import attach_quantizers
        >>> _ = attach_quantizers(model, initial_bits=8)
        >>> layer = model.bert.encoder.layer[0].intermediate.dense
        >>> round(float(layer.weight_quantizer.bits()), 4)
        8.0
    """
    grid = grid or ("channel" if per_channel else "layer")
    if grid not in GRIDS:
        raise GETAError(f"unknown grid {grid!r}; choose one of {', '.join(GRIDS)}")
    chosen = select_layers(model, include, exclude)
    for name, layer in chosen.items():
        check_convertible(layer, name)
    _refuse_foreign_ties(model, chosen)
    # Tied weights are one tensor in a folder, with one step size.
    by_weight: dict[int, Quantizer] = {}
    zero: list[str] = []
    for name, layer in chosen.items():
        weight: torch.Tensor = layer.weight  # type: ignore[assignment]
        if id(weight) not in by_weight:
            if not weight.is_meta and not bool(weight.any()):
                zero.append(name)
            own = layer_grid(layer, grid)
            dim = output_dim(layer)
            turned = name in by_input and own == "channel"
            if turned:
                dim = 1 - dim
            q_m = _start(weight, target_bits, clipping, f"{name}.weight", dim, own)
            channel_dim = None if own == "layer" else dim
            inputs = weight.shape[1 - dim] if own == "block32" else None
            by_weight[id(weight)] = Quantizer(q_m, initial_bits, learn_t, weight.device, channel_dim, inputs, turned)
    if zero:
        logger.warning(
            "all weights are zero in %s: their quantizers start from the range that torch initializes such layers "
            "with; load or initialize them if they should not be zero",
            ", ".join(zero),
        )
    # Only now that nothing can fail: a model must not end with half of its layers converted.
    for layer in chosen.values():
        quantizer = by_weight[id(layer.weight)]
        quantize_layer(layer, quantizer)
        quantizer.train(layer.training)
    return chosen


def layer_grid(layer: nn.Module, grid: str) -> str:
    """Return the grid of a layer in a model that has `grid`: a convolution has no inputs in a row, hence no blocks."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return "channel" if grid == "block32" and weight.dim() != 2 else grid


def _start(weight: Tensor, bits: int, clipping: str, name: str, dim: int, grid: str) -> float | Tensor:
    if weight.is_meta:  # there are no values to measure; the layer is converted for its shapes only
        check_clipping(clipping)
        channels = 1 if grid == "layer" else weight.shape[dim]
        blocks = block_count(weight.shape[1 - dim]) if grid == "block32" else 1
        return torch.ones(channels, blocks, device="meta")
    if grid == "layer":
        return clipping_value(weight, bits, clipping, name, dim)
    if grid == "block32":
        return block_clipping_values(weight, bits, clipping, name, dim)
    return channel_clipping_values(weight, bits, clipping, name, dim)


def _refuse_foreign_ties(model: nn.Module, chosen: Layers) -> None:
    others = _tied_to_others(model, chosen)
    for name, layer in chosen.items():
        # An embedding tied to a quantized head would be read unquantized in training and quantized from the folder.
        if id(layer.weight) in others:
            raise GETAError(
                f"{name}.weight is tied to {others[id(layer.weight)]}, which is not quantized; exclude the layer or "
                f"include both"
            )


def _tied_to_others(model: nn.Module, chosen: Layers) -> dict[int, str]:
    """Return id of a chosen layer's weight -> name of a module that has the same weight and is not chosen."""
    # A weight that is computed from others, which is refused elsewhere, is no parameter and not tied.
    weights = {id(layer._parameters["weight"]) for layer in chosen.values() if "weight" in layer._parameters}
    ours = {id(layer) for layer in chosen.values()}
    others: dict[int, str] = {}
    for name, module in model.named_modules():
        if id(module) in ours:
            continue
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) in weights:
                others.setdefault(id(parameter), name or "the model")
    return others


def detach_quantizers(model: nn.Module) -> nn.Module:
    """Remove all quantizers of weights and inputs, in place, and return the model.

    The layers have their original classes again, and their weights the values that training gave them, unquantized.

    Example:
        >>> import torch
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> sizes = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 32, "num_hidden_layers": 1}
        >>> model = BertForSequenceClassification(BertConfig(vocab_size=30, **sizes))
        >>> batch = {"input_ids": torch.arange(1, 9)[None]}
        >>> from geta_hf import attach_quantizers, detach_quantizers
        >>> _ = attach_quantizers(model)
        >>> _ = detach_quantizers(model)
        >>> type(model.bert.encoder.layer[0].intermediate.dense).__name__
        'Linear'
    """
    for layer in quantized_layers(model).values():
        dequantize_layer(layer)
    return model


def quantizer_prefixes(model: nn.Module) -> dict[str, str]:
    """Return weight name -> prefix of its quantizer's parameters; tied weights share the first layer's prefix."""
    first: dict[int, str] = {}
    return {
        f"{name}.weight": first.setdefault(id(layer.weight_quantizer), f"{name}.weight_quantizer")
        for name, layer in quantized_layers(model).items()
    }


def input_quantizer_prefixes(model: nn.Module) -> dict[str, str]:
    """Return layer name -> prefix of the parameters of its input quantizer, for the layers that have one."""
    layers = quantized_layers(model)
    return {name: f"{name}.input_quantizer" for name, layer in layers.items() if layer.input_quantizer is not None}


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Return the quantized layers of a model by name, in module order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}


def cut_quantizers(model: nn.Module, kept: Mapping[str, Mapping[int, Tensor]]) -> None:
    """Cut quantizers of channels and blocks as their weights were cut, in place; those that fit are not changed.

    Args:
        model: with quantizers, its weights cut already.
        kept: tensor name -> dim -> int64 kept indices, as `geta_hf.qadg.space.kept_indices` gives them.

    Raises:
        GETAError: blocks that were not formed over the inputs that remain; names the layer.
    """
    for name, layer in quantized_layers(model).items():
        quantizer = layer.weight_quantizer
        dim = quantizer.channel_dim
        # A quantizer that tied layers share is cut with the first of them and fits already.
        if dim is not None and quantizer.d.shape[0] != layer.weight.shape[dim]:
            quantizer.keep_channels(kept[f"{name}.weight"][dim])
        if dim is not None and quantizer.order is not None and len(quantizer.order) != layer.weight.shape[1 - dim]:
            try:
                quantizer.keep_inputs(kept[f"{name}.weight"][1 - dim])
            except GETAError as error:
                raise GETAError(f"{name}: {error}") from None


@contextmanager
def float_inputs(model: nn.Module) -> Iterator[None]:
    """Switch off all input quantizers of a model, in training or exported, within the context."""
    layers = [module for module in model.modules() if isinstance(module, InputQuantizedLayer)]
    # Plain and packed layers alike, so that trained and exported models can be compared in one way.
    before = [layer.input_quantizer for layer in layers]
    for layer in layers:
        layer.input_quantizer = None
    try:
        yield
    finally:
        for layer, quantizer in zip(layers, before, strict=True):
            layer.input_quantizer = quantizer


@contextmanager
def without_quantizers(model: nn.Module) -> Iterator[None]:
    """Let all quantized layers of a model compute as before they had quantizers, on their own weights, for a while.

    No tensor is copied. What LoRA adds to a weight has no part in it.
    """
    # The objects themselves are put back, so an optimizer that holds the quantizers' parameters notices nothing.
    before = [(layer, type(layer), layer._modules, dict(vars(layer))) for layer in quantized_layers(model).values()]
    try:
        for layer, _, modules, attributes in before:
            layer._modules = {name: module for name, module in modules.items() if name not in _OWN}
            for name in _OWN:
                layer.__dict__.pop(name, None)
            layer.__class__ = attributes["_plain_class"]
            rebind_forward(layer)
        yield
    finally:
        for layer, kind, modules, attributes in before:
            layer.__class__ = kind
            layer._modules = modules
            layer.__dict__.update({name: attributes[name] for name in _OWN if name in attributes})
            rebind_forward(layer)
