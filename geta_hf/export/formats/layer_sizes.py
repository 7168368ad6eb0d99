"""The sizes that every layer of a Llama kept, and how config.json says them to other readers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from geta_hf.errors import GETAError
from geta_hf.serialization.packed_layers import PackedLayer

TYPES = ("llama", "mistral", "qwen2", "qwen3")
"""The `model_type`s whose modules have the names of a Llama's, and whose configurations its numbers."""


@dataclass(frozen=True)
class LayerSizes:
    """The sizes of a Llama, read from its tensors.

    Attributes:
        head_dim: width of a head.
        heads, kv_heads, channels: of each layer.
    """

    head_dim: int
    heads: list[int]
    kv_heads: list[int]
    channels: list[int]

    @property
    def uniform(self) -> bool:
        """Whether all layers are alike."""
        return all(len(set(counts)) == 1 for counts in (self.heads, self.kv_heads, self.channels))


def sizes_of_llama(model: PreTrainedModel) -> LayerSizes:
    """Return the sizes of a model whose modules have the names of a Llama's.

    Raises:
        GETAError: heads of several widths, or of another than before the cut.
    """
    config: Any = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers = list(_layers(model, head_dim))
    for number, (own, _, _, _) in enumerate(layers):
        if own != head_dim:
            raise GETAError(
                f"layer {number} has heads of {own} dims, of {head_dim} before the cut, and there is one number for "
                f"all; remove heads instead, or export in the geta format"
            )
    heads, kv_heads, channels = ([layer[place] for layer in layers] for place in (1, 2, 3))
    return LayerSizes(head_dim, heads, kv_heads, channels)


def _layers(model: PreTrainedModel, head_dim: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield width of a head, heads, heads of keys and values, and channels of every layer."""
    base: Any = model.base_model
    for layer in base.layers:
        shapes = {name: _shape(module) for name, module in layer.named_modules() if hasattr(module, "weight")}
        own = getattr(layer.self_attn, "head_dim", head_dim)
        heads, shared = shapes["self_attn.o_proj"][1] // own, shapes["self_attn.k_proj"][0] // own
        yield own, heads, shared, shapes["mlp.down_proj"][1]


def _shape(module: Any) -> tuple[int, ...]:
    return tuple(module.dense_shape if isinstance(module, PackedLayer) else module.weight.shape)


def write_layer_sizes(model: PreTrainedModel, folder: Path) -> None:
    """Add what every layer kept to config.json, as transformers' `per_layer_config` has it.

    The other numbers of config.json remain those before the cut, from which a folder is loaded. By these transformers
    sizes caches, and other readers see the real shapes. Models of other types are left alone.

    Args:
        model: cut, or not.
        folder: with its config.json.
    """
    config: Any = model.config
    if config.model_type not in TYPES or not hasattr(type(config), "per_layer_config"):
        return  # an earlier transformers has no such key
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    whole = (head_dim, config.num_attention_heads, config.num_key_value_heads, config.intermediate_size)
    sizes = list(_layers(model, head_dim))
    if all(one == whole for one in sizes):
        return
    names = ("head_dim", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    layers = {str(number): dict(zip(names, one, strict=True)) for number, one in enumerate(sizes)}
    path = folder / "config.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    # The class builds its layers from the other numbers, which transformers would not let it read otherwise.
    stored |= {"per_layer_config": layers, "allow_global_per_layer_attribute_access": True}
    path.write_text(json.dumps(stored, indent=2, sort_keys=True) + "\n", encoding="utf-8")
