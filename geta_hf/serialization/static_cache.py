"""Let static caches of a cut model fit its layers, of which each may have kept another number of heads.

transformers takes the heads of a cache from config.json, which keeps the original numbers. Most caches wait for the
first keys and take their shape. Only one that is allocated early, as a chunked prefill does, needs to know it before.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from geta_hf.errors import GETAError

_SHAPE_OF = "_get_static_cache_init_shape"
_KNOWN = "_geta_cache_shapes"

Shapes = list[tuple[int, int] | None]


def fit_static_caches(model: PreTrainedModel) -> None:
    """Let `generate` allocate static caches by what every layer kept, and check those that a caller allocated.

    Args:
        model: cut, in memory or just loaded; a model that does not generate is left alone.
    """
    if not hasattr(type(model), _SHAPE_OF) or model.config.is_encoder_decoder or not model.can_generate():
        return
    vars(model)[_SHAPE_OF] = partial(_init_shape, model)
    if not any(hook is _check_cache for hook in model._forward_pre_hooks.values()):
        model.register_forward_pre_hook(_check_cache, with_kwargs=True)


def _init_shape(model: Any) -> tuple[list[int], list[int]] | None:
    """Return heads and head size of every layer's keys; None where the cache has to wait for its first keys."""
    if getattr(type(model), _SHAPE_OF)(model) is None:  # several devices, or keys and values of different sizes
        return None
    shapes = _shapes(model)
    if any(shape is None for shape in shapes):
        return None
    return [heads for heads, _ in shapes], [size for _, size in shapes]  # type: ignore[misc]


def _shapes(model: Any) -> Shapes:
    """Return heads and head size of every layer's keys, as one token shows them; empty where no cache can be made."""
    if _KNOWN not in vars(model):
        token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        try:
            with torch.no_grad():
                cache = model(input_ids=token, use_cache=True).past_key_values
            found: Shapes = [_shape(layer) for layer in cache.layers]
        except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError):
            found = [None]  # the model needs other inputs than tokens
        vars(model)[_KNOWN] = found
    return vars(model)[_KNOWN]


def _shape(layer: Any) -> tuple[int, int] | None:
    if not getattr(layer, "supports_early_init", True):
        return (0, 0)  # no layer of keys: transformers skips it
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if keys is None or values is None or keys.dim() != 4 or keys.shape[-1] != values.shape[-1]:
        return None
    return keys.shape[1], keys.shape[-1]


def _check_cache(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise GETAError for a cache that was allocated early with the heads of config.json."""
    cache = kwargs.get("past_key_values")
    early = [
        (place, layer)
        for place, layer in enumerate(getattr(cache, "layers", None) or ())
        if getattr(layer, "is_initialized", False) and hasattr(layer, "max_cache_len")
    ]
    if not early or torch.compiler.is_compiling():
        return
    shapes = _shapes(model)
    for place, layer in early:
        expected = shapes[place] if place < len(shapes) else None
        keys = getattr(layer, "keys", None)
        if not expected or not expected[0] or keys is None:
            continue
        if (keys.shape[1], keys.shape[-1]) != expected:
            raise GETAError(
                f"layer {place} of the static cache has {keys.shape[1]} heads of size {keys.shape[-1]}, but the "
                f"compressed model kept {expected[0]} of size {expected[1]} there; give early_initialization lists of "
                f"what the layers kept, or leave it out: the cache then takes the shape of its first keys"
            )
