"""Static caches fit layers that kept different numbers of heads, whichever way they are allocated."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, StaticCache

from geta_hf.errors import GETAError
from geta_hf.qadg import build_space
from geta_hf.serialization.remote_code import save_compressed
from tests.architectures import build
from tests.export.formats.uniform import compressed

IDS = torch.arange(5, 13)[None]
MEMBERS = ["llama", "phi", "gemma2"]
"""Key-value heads, plain heads, and layers with a sliding window between others."""


@cache
def uneven(name: str) -> PreTrainedModel:
    """Return a model whose first layer lost a head of keys and whose second did not."""
    model, batch = build(name)
    space = build_space(model, batch)
    first = next(family for family in space.prunable if family.kind == "heads")
    return compressed(model, batch, space, {first.name: torch.arange(first.size) < 1}).eval()


def generated(model: Any, **options: Any) -> list[int]:
    found = model.generate(IDS, max_new_tokens=3, do_sample=False, use_cache=True, eos_token_id=None, **options)
    return found[0].tolist()


@pytest.mark.parametrize("name", MEMBERS)
def test_a_chunked_prefill_gives_the_same_tokens(name: str) -> None:
    model = uneven(name)
    expected = generated(model)
    assert generated(model, cache_implementation="hybrid", prefill_chunk_size=4) == expected
    assert generated(copy.deepcopy(model), cache_implementation="static", prefill_chunk_size=4) == expected


@pytest.mark.parametrize("name", MEMBERS)
def test_the_sizes_are_those_of_the_keys(name: str) -> None:
    model: Any = uneven(name)
    before = build(name)[0].config.get_text_config()
    heads = getattr(before, "num_key_value_heads", None) or before.num_attention_heads
    assert model._get_static_cache_init_shape() == ([heads - 1, heads], [8, 8])
    early = StaticCache(config=model.config, max_cache_len=16)
    early.early_initialization(1, [heads - 1, heads], 8, model.dtype, model.device)
    with torch.no_grad():
        assert torch.allclose(model(IDS, past_key_values=early).logits, model(IDS).logits, atol=1e-5)


def test_a_cache_allocated_by_the_config_is_refused_with_the_layer() -> None:
    model = uneven("llama")
    early = StaticCache(config=model.config, max_cache_len=16)
    early.early_initialization(1, 2, 8, model.dtype, model.device)
    with pytest.raises(GETAError, match=r"layer 0 of the static cache has 2 heads .* kept 1 .* leave it out"):
        model(IDS, past_key_values=early)


def test_a_reloaded_model_knows_its_sizes(tmp_path: Path) -> None:
    model = uneven("llama")
    save_compressed(model, tmp_path)
    reloaded = type(model).from_pretrained(tmp_path).eval()
    expected = generated(reloaded)
    assert generated(reloaded, cache_implementation="static", prefill_chunk_size=4) == expected
    reloaded.dequantize()  # which leaves it cut
    assert generated(reloaded, cache_implementation="static", prefill_chunk_size=4) == expected
