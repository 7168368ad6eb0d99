"""Count what a model costs: parameters, MACs, BOPs, bits and bytes. Two counts of BOPs are never mixed:

`bops_linear` is the paper's definition: the quantized linears alone, MACs · b_w · b_a, 32 for a float side.
`bops_full` counts every matmul of a forward pass, attention's included, and one addition an element looked up in an
embedding table; all that is not quantized at 32 · 32.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from geta_hf.errors import GETAError
from geta_hf.quantization import quantized_layers
from geta_hf.quantization.experts import routed_evenly, unstack_experts
from geta_hf.quantization.functional import FLOAT_BITS
from geta_hf.quantization.layer_types import CONVOLUTIONS
from geta_hf.utils.copies import copy_module
from geta_hf.utils.module_state import eval_mode

Image = tuple[int, int, int]
"""Channels, height and width."""


@dataclass(frozen=True)
class LayerCost:
    """One quantized layer.

    Attributes:
        name: module path.
        weights: remaining elements of its weight: MACs for each token, or for each place of a convolution's output.
        bits: width of the weight; 32 where it is float.
        input_bits: width of the layer's input; 32 where it is float.
    """

    name: str
    weights: int
    bits: float
    input_bits: float = FLOAT_BITS


@dataclass(frozen=True)
class Costs:
    """What one model costs for one sequence of `tokens` tokens, or for one image.

    Attributes:
        tokens: of the sequence; 0 for an image.
        parameters: elements of all parameters, tied ones once.
        macs: multiply-accumulates of all matmuls of one forward pass.
        bops_linear: the paper's BOPs, over the layers in `layers`.
        bops_full: BOPs of every matmul and embedding look-up.
        mean_bits: mean width over the weights of `layers`.
        layers: the layers that are quantized, or would be.
        image: channels, height and width of the image; None for a sequence.

    >>> from transformers import BertConfig, BertModel
    >>> from geta_hf import Costs, measure_costs
    >>> model = BertModel(BertConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2))
    >>> costs: Costs = measure_costs(model, tokens=8)
    >>> costs.tokens, costs.mean_bits, costs.layers
    (8, 32, ())
    """

    tokens: int
    parameters: int
    macs: int
    bops_linear: float
    bops_full: float
    mean_bits: float
    layers: tuple[LayerCost, ...]
    image: Image | None = None

    @property
    def sample(self) -> str:
        """What was counted, in words: `384 tokens`, or `image of 3 · 224 · 224`."""
        return f"{self.tokens} tokens" if self.image is None else f"image of {' · '.join(map(str, self.image))}"


def linear_bops(layers: Sequence[LayerCost], tokens: int = 1) -> float:
    """Return the paper's BOPs: Σ weights · tokens · b_w · b_a."""
    return sum(layer.weights * tokens * layer.bits * layer.input_bits for layer in layers)


def mean_bits(layers: Sequence[LayerCost]) -> float:
    """Return the mean width over all weights. Raise GETAError when there is no layer."""
    # Weighted by elements: a small layer at 8 bits must not count as much as a large one at 2.
    weights = sum(layer.weights for layer in layers)
    if not weights:
        raise GETAError("there is no quantized weight to average bits over")
    return sum(layer.weights * layer.bits for layer in layers) / weights


def layer_costs(model: nn.Module, names: Sequence[str] | None = None) -> tuple[LayerCost, ...]:
    """Return the quantized layers of a model being trained or reloaded, without embeddings, which have no products.

    Args:
        model: with quantizers attached, or loaded from an exported folder, or dense.
        names: the layers to count for a dense model, at 32 bits.
    """
    bits, inputs = _trained_bits(model)
    if not bits:
        stored: Any = getattr(getattr(model, "config", None), "quantization_config", None)
        exported = stored is not None and getattr(stored, "quant_method", None) == "geta"
        bits = _stored_bits(stored) if exported else dict.fromkeys(names or (), FLOAT_BITS)
        inputs = stored.activation_bits if exported else {}
    return tuple(
        LayerCost(name, model.get_parameter(f"{name}.weight").numel(), width, inputs.get(name, FLOAT_BITS))
        for name, width in bits.items()
        if not isinstance(model.get_submodule(name), nn.Embedding)
    )


def _stored_bits(stored: Any) -> dict[str, float]:
    """Return the width of each packed weight; over its rows or columns the mean."""
    # The configuration may be that of a folder's own code, which may know no blocks.
    blocks = getattr(stored, "blocks", {})
    return {name: mean_width(blocks[name]) if name in blocks else bits for name, bits in stored.bits.items()}


def mean_width(block: Mapping[str, Any]) -> float:
    """Return the mean width of a weight whose rows or columns differ, as `blocks` of a folder's configuration has them.

    >>> mean_width({"dim": 0, "widths": [2, 4], "counts": [30, 10]})
    2.5
    """
    counts = block["counts"]
    return float(sum(width * count for width, count in zip(block["widths"], counts, strict=True)) / sum(counts))


def _trained_bits(model: nn.Module) -> tuple[dict[str, float], dict[str, float]]:
    """Return the present widths of weights and of inputs by layer; over output channels their mean."""
    layers = quantized_layers(model)
    bits = {name: float(layer.weight_quantizer.bits().mean()) for name, layer in layers.items()}
    quantizers = {name: layer.input_quantizer for name, layer in layers.items()}
    return bits, {name: float(own.bits()) for name, own in quantizers.items() if own is not None}


@torch.no_grad()
def measure_costs(
    model: PreTrainedModel,
    tokens: int = 384,
    names: Sequence[str] | None = None,
    *,
    image: Image | None = None,
) -> Costs:
    """Count one forward pass of a dense or reloaded model on one sequence, or on one image.

    A convolution multiplies each of its weights once for each place of its output, so kernel sizes, strides, groups and
    the size of the image all count.

    Args:
        model: a text or vision model, on the meta device too; it is not changed.
        tokens: length of the sequence; of both sequences of an encoder-decoder. Default 384.
        names: for a dense model, the layers that the paper's definition counts, such as `select_layers` gives.
        image: channels, height and width of one image, which is counted instead. Default None: `image_of` gives it for
            a model whose main input is `pixel_values`.

    >>> from transformers import BertConfig, BertModel
    >>> from geta_hf import measure_costs
    >>> model = BertModel(BertConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2))
    >>> costs = measure_costs(model, tokens=8, names=["encoder.layer.0.output.dense"])
    >>> costs.bops_linear == 32 * 64 * 8 * 32 * 32
    True
    """
    layers = layer_costs(model, names)
    image = image or image_of(model)
    # Fused attention kernels are not counted by torch, so count the same maths done eagerly.
    eager = copy_module(model).eval()
    eager.set_attn_implementation("eager")
    # Nor are the products of stacked experts.
    unstack_experts(eager)
    uses, _ = count_uses(eager, [layer.name for layer in layers])
    looked_up = _count_look_ups(eager)
    # One sample may reach few of the experts; of all data each token is one for k of them.
    with FlopCounterMode(display=False) as counter, routed_evenly(eager):
        eager(**one_sample(model, tokens, image))
    # torch counts a multiplication and an addition as two; a MAC is both.
    macs = counter.get_total_flops() // 2
    executed = {layer.name: layer.weights * uses[layer.name] for layer in layers}
    linear = sum(executed[layer.name] * layer.bits * layer.input_bits for layer in layers)
    # What no quantizer covers: attention's products, the head, and look-ups, at 32 bits on both sides.
    rest = macs - sum(executed.values()) + sum(looked_up)
    return Costs(
        image=image,
        tokens=0 if image else tokens,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        macs=macs,
        bops_linear=linear,
        bops_full=linear + rest * FLOAT_BITS * FLOAT_BITS,
        mean_bits=mean_bits(layers) if layers else FLOAT_BITS,
        layers=layers,
    )


def image_of(model: nn.Module, size: int | None = None) -> Image | None:
    """Return channels, height and width of the images that a model is made for; None if it takes no single image.

    Args:
        model: any module.
        size: pixels of a side. Default None: the config's `image_size`, or 224 where it has none.
    """
    config = getattr(model, "config", None)
    if getattr(model, "main_input_name", None) != "pixel_values":
        return None
    side = size or getattr(config, "image_size", None) or 224
    height, width = side if isinstance(side, list | tuple) else (side, side)
    return int(getattr(config, "num_channels", 3)), int(height), int(width)


def one_sample(model: PreTrainedModel, tokens: int, image: Image | None) -> dict[str, Tensor]:
    """Return the inputs of one sequence, or of one image where it is given, on the model's device.

    An encoder-decoder reads one sequence and writes another of the same length.
    """
    if image is None:
        ids = torch.zeros(1, tokens, dtype=torch.long, device=model.device)
        sample = {model.main_input_name: ids}
        if getattr(model.config, "is_encoder_decoder", False):
            sample["decoder_input_ids"] = ids
        return sample
    return {"pixel_values": torch.zeros(1, *image, dtype=model.dtype, device=model.device)}


def count_uses(model: nn.Module, names: Iterable[str]) -> tuple[dict[str, int], list[RemovableHandle]]:
    """Count, from now on, how often each named layer's weight is used.

    A linear layer uses it once for each token, a convolution once for each position, a shared layer each time it runs.

    Returns:
        Layer name to count, which grows as the model runs, and the hooks to remove to stop counting.
    """
    uses = dict.fromkeys(names, 0)

    def count(name: str, layer: nn.Module, output: Tensor) -> None:
        # Of outputs (batch, places..., features) every place used each weight once; convolutions have features second.
        uses[name] += output.numel() // output.shape[1 if isinstance(layer, CONVOLUTIONS) else -1]

    return uses, [
        model.get_submodule(name).register_forward_hook(lambda m, _i, output, name=name: count(name, m, output))
        for name in uses
    ]


def forward_uses(model: nn.Module, names: Iterable[str], batch: Mapping[str, Any]) -> dict[str, int]:
    """Return how often each named layer's weight is used in one forward pass on a batch, as `count_uses` counts.

    Experts that are apart share the tokens evenly, k of them for each token.
    """
    uses, hooks = count_uses(model, names)
    try:
        with eval_mode(model), routed_evenly(model):
            model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    return uses


def _count_look_ups(model: nn.Module) -> list[int]:
    """Return a list to which each call of an embedding will add the number of elements that it looks up."""
    looked_up: list[int] = []
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(lambda _m, _i, output: looked_up.append(output.numel()))
    return looked_up


def bytes_on_disk(directory: str | os.PathLike[str]) -> int:
    """Return the bytes of all safetensors files of a folder. Raise GETAError when there is none."""
    files = list(Path(directory).glob("*.safetensors"))
    if not files:
        raise GETAError(f"{directory} holds no .safetensors file")
    # Shards add up, and configs and tokenizers are not counted.
    return sum(file.stat().st_size for file in files)
