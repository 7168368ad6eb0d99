"""Test the rounding of the vocabulary's embedding by rows and by blocks, up to the folder and its foreseen size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForQuestionAnswering

from geta_hf import GETAConfig, GETAError, export
from geta_hf.costs.ledger import RoundedRows
from geta_hf.quantization import attach_quantizers
from geta_hf.serialization.embeddings import rounded_embedding
from geta_hf.serialization.packed_layers import PackedEmbedding, PackedRows
from geta_hf.training.plan import embedding_rows, make_ledger
from tests.export.test_use import IDS, exported_llama, tiny_llama
from tests.export.tiny_encoders import some_batch, tiny_model, train_by_hand
from tests.spaces import build_space

WORDS = "bert.embeddings.word_embeddings"


def by_brute_force(block: np.ndarray, bits: int) -> float:
    """Return the least squared error of a block on any symmetric grid of this width, over many step sizes."""
    largest = 2 ** (bits - 1) - 1
    steps = np.abs(block).max() / largest * np.linspace(0.3, 1.1, 4000)
    codes = np.clip(np.round(block[None] / steps[:, None]), -largest, largest)
    return float(((codes * steps[:, None] - block[None]) ** 2).sum(1).min())


@pytest.mark.parametrize("bits", [3, 5])
def test_each_block_has_the_step_size_of_least_error(bits: int) -> None:
    model = tiny_model(hidden=64)
    weight = model.get_input_embeddings().weight.detach().clone()
    with rounded_embedding(model, bits, "block32") as found:
        rounded = model.get_input_embeddings().weight.detach().clone()
    assert found is not None and found.step_size.shape == (60, 2)
    assert torch.equal(found.step_size.half().float(), found.step_size)
    for row in range(0, 60, 7):
        for block in range(2):
            part = slice(32 * block, 32 * block + 32)
            error = float((rounded[row, part] - weight[row, part]).square().sum())
            least = by_brute_force(weight[row, part].double().numpy(), bits)
            assert least * 0.999 <= error <= least * 1.2
            codes = rounded[row, part] / found.step_size[row, block]
            assert torch.allclose(codes, codes.round(), atol=1e-4)
            assert codes.abs().max() <= 2 ** (bits - 1) - 1 + 1e-4
    assert torch.equal(model.get_input_embeddings().weight, weight)


def test_blocks_lose_less_than_rows() -> None:
    model = tiny_model(hidden=256)
    weight = model.get_input_embeddings().weight.detach().clone()
    errors = {}
    for grid in ("channel", "block32"):
        with rounded_embedding(model, 4, grid):  # type: ignore[arg-type]
            errors[grid] = float((model.get_input_embeddings().weight.detach() - weight).square().sum())
    assert errors["block32"] < 0.8 * errors["channel"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_holds_blocks_of_an_embedding(tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    exported_llama(tmp_path / "out", tied, embedding_bits=5, embedding_grid="block32")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    scale = tensors["model.embed_tokens.weight_scale"]
    assert scale.dtype == torch.float16 and scale.shape == (60, 1)
    with rounded_embedding(tiny_llama(tied), 5, "block32") as found:
        assert found is not None and torch.equal(scale.float(), found.step_size)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype)
    layer = model.get_input_embeddings()
    assert isinstance(layer, PackedEmbedding if tied else PackedRows)
    expected = tiny_llama(tied)
    with rounded_embedding(expected, 5, "block32"):
        rows = expected.get_input_embeddings().weight.detach()[IDS].to(dtype)
    assert torch.equal(layer(IDS), rows)
    # Saved again, they are the same bytes.
    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    for leaf in ("weight", "weight_scale"):
        assert torch.equal(again[f"model.embed_tokens.{leaf}"], tensors[f"model.embed_tokens.{leaf}"])


def test_rows_of_several_blocks_are_looked_up_as_they_are_decoded(tmp_path: Path) -> None:
    model = tiny_model(hidden=80)  # two blocks and a half
    space = build_space(model, some_batch())
    train_by_hand(model, space)
    export(model, tmp_path / "out", space=space, batch=some_batch(), embedding_bits=4, embedding_grid="block32")
    loaded = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "out")
    layer = loaded.get_submodule(WORDS)
    assert isinstance(layer, PackedRows) and layer.step_size.shape == (60, 3)
    found = layer(torch.arange(60))
    plain = loaded.dequantize().get_submodule(WORDS)
    assert type(plain) is nn.Embedding
    assert torch.equal(found, plain.weight)
    with rounded_embedding(model, 4, "block32"):
        assert torch.equal(found, model.get_submodule(WORDS).weight)


def test_a_rounded_embedding_may_lose_columns(tmp_path: Path) -> None:
    """The recorded graph, which proves such a cut, needs the values and not the codes of what is looked up by row."""
    model = tiny_model(hidden=64)
    space = build_space(model, some_batch(), prune=["residual"])
    train_by_hand(model, space)
    remaining = model.get_submodule(WORDS).weight.detach().abs().sum(0) > 0
    export(model, tmp_path / "out", space=space, batch=some_batch(), embedding_bits=4)
    layer = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "out").get_submodule(WORDS)
    with rounded_embedding(model, 4):
        assert torch.equal(layer(torch.arange(60)), model.get_submodule(WORDS).weight[:, remaining])


def test_blocks_are_those_of_the_columns_that_remain(tmp_path: Path) -> None:
    model = tiny_model(hidden=64)
    space = build_space(model, some_batch(), prune=["residual"])
    train_by_hand(model, space)
    full = model.get_submodule(WORDS).weight.detach().clone()
    remaining = full.abs().sum(0) > 0
    assert 0 < int(remaining.sum()) < 64
    export(model, tmp_path / "out", space=space, batch=some_batch(), embedding_bits=4, embedding_grid="block32")
    layer = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "out").get_submodule(WORDS)
    smaller = tiny_model(hidden=64)
    with torch.no_grad():
        smaller.set_input_embeddings(nn.Embedding.from_pretrained(full[:, remaining].clone()))
    with rounded_embedding(smaller, 4, "block32"):
        expected = smaller.get_input_embeddings().weight
        assert torch.equal(layer(torch.arange(60)), expected)


def test_an_embedding_that_lost_columns_after_it_was_rounded_is_refused() -> None:
    model = tiny_model(hidden=64)
    with rounded_embedding(model, 4, "block32") as found:
        assert found is not None
        with pytest.raises(GETAError, match=r"word_embeddings has lost rows or columns .*export without"):
            found.codes(nn.Embedding(60, 32))


@pytest.mark.parametrize("grid", ["channel", "block32"])
def test_the_size_is_foreseen_to_the_byte(tmp_path: Path, grid: str) -> None:
    config = GETAConfig(bits=(8, 8), embedding_bits=5, grid=grid)
    rows = embedding_rows(config)
    assert rows == RoundedRows(5, grid == "block32")
    model = tiny_model(hidden=80)
    space = build_space(model, some_batch())
    attach_quantizers(model, initial_bits=8, grid="channel")
    ledger = make_ledger(model, space, embedding=rows)
    report = export(
        model,
        tmp_path / "out",
        space=space,
        batch=some_batch(),
        embedding_bits=5,
        embedding_grid=config.embedding_grid,
    )
    assert ledger.stored_bytes(ledger.nothing, 8) == report.file_bytes


def test_a_block_costs_half_a_bit_of_an_element() -> None:
    assert RoundedRows(5, True).element_bytes == pytest.approx(5.5 / 8)
    assert RoundedRows(5).element_bytes == pytest.approx(5 / 8)


def test_blocks_without_a_value_stay_zero() -> None:
    model = tiny_model(hidden=64)
    weight: Tensor = model.get_input_embeddings().weight
    with torch.no_grad():
        weight[0] = 0.0
        weight[1, :32] = 0.0
    with rounded_embedding(model, 3, "block32") as found:
        assert found is not None
        assert not bool(model.get_input_embeddings().weight[0].any())
        assert bool((found.step_size > 0).all())
