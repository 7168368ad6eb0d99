"""Costs counted by hand on a tiny BERT: parameters, MACs, both definitions of BOPs, mean bits."""

from __future__ import annotations

import pytest
from transformers import AlbertConfig, AlbertForQuestionAnswering, T5Config, T5ForConditionalGeneration

from geta_hf import attach_quantizers, measure_costs
from geta_hf.costs.model_costs import LayerCost, bytes_on_disk, layer_costs, linear_bops, mean_bits
from geta_hf.errors import GETAError
from geta_hf.quantization import attach_input_quantizers, select_layers

HIDDEN, MLP, LAYERS, TOKENS = 32, 48, 2, 20
LINEAR = LAYERS * (4 * HIDDEN * HIDDEN + 2 * HIDDEN * MLP)


def test_dense_costs_by_hand(bert) -> None:
    costs = measure_costs(bert, TOKENS, list(select_layers(bert)))
    attention = LAYERS * 2 * TOKENS * TOKENS * HIDDEN
    assert costs.macs == TOKENS * LINEAR + attention + TOKENS * HIDDEN * 2
    assert costs.bops_linear == LINEAR * TOKENS * 32 * 32
    assert costs.bops_full == (costs.macs + 3 * TOKENS * HIDDEN) * 32 * 32
    assert costs.parameters == sum(parameter.numel() for parameter in bert.parameters())
    assert costs.mean_bits == 32


def test_the_papers_baseline_of_bert_base() -> None:
    """84,934,656 encoder weights on 156 tokens at 32 x 32 bits are the paper's 13.57 T BOPs."""
    weights = 12 * (4 * 768 * 768 + 2 * 768 * 3072)
    assert weights == 84_934_656
    assert linear_bops([LayerCost("encoder", weights, 32)], 156) == pytest.approx(13.57e12, rel=1e-3)


def test_bits_of_a_model_in_training_are_averaged_by_weights(bert) -> None:
    attach_quantizers(bert, initial_bits=8, clipping="max")
    layers = layer_costs(bert)
    assert [layer.bits for layer in layers] == pytest.approx([8.0] * 12, abs=1e-4)
    mixed = [LayerCost("a", 100, 4), LayerCost("b", 300, 8)]
    assert mean_bits(mixed) == 7 and linear_bops(mixed, 2) == (100 * 4 + 300 * 8) * 2 * 32
    with pytest.raises(GETAError, match="no quantized weight"):
        mean_bits([])


def test_inputs_of_few_bits_count(bert, batch) -> None:
    attach_quantizers(bert, initial_bits=8, clipping="max", per_channel=True)
    attach_input_quantizers(bert, [batch], initial_bits=6, exclude=["layer.0"])
    layers = layer_costs(bert)
    assert [layer.bits for layer in layers] == pytest.approx([8.0] * 12, abs=1e-4)
    assert [round(layer.input_bits) for layer in layers] == [32] * 6 + [6] * 6
    assert linear_bops(layers) == pytest.approx(LINEAR / 2 * 8 * (32 + 6), rel=1e-4)


def test_an_encoder_decoder_reads_and_writes_as_many_tokens() -> None:
    """T5 derives no inputs of its decoder by itself, as BART does."""
    config = T5Config(d_model=16, d_ff=24, d_kv=4, num_heads=2, num_layers=1, vocab_size=30)
    costs = measure_costs(T5ForConditionalGeneration(config), TOKENS)
    attentions = 3 * (4 * 16 * 8 * TOKENS + 2 * TOKENS * TOKENS * 8)
    assert costs.macs == attentions + 2 * TOKENS * 2 * 16 * 24 + TOKENS * 16 * 30


def test_a_shared_layer_counts_each_time_it_runs() -> None:
    config = AlbertConfig(
        vocab_size=60,
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
    )
    model = AlbertForQuestionAnswering(config)
    names = list(select_layers(model))
    costs = measure_costs(model, TOKENS, names)
    once = 4 * 32 * 32 + 2 * 32 * 64
    assert sum(layer.weights for layer in costs.layers) == once
    assert costs.bops_linear == 4 * once * TOKENS * 32 * 32
    assert costs.bops_full == (costs.macs + TOKENS * 3 * 16) * 32 * 32


def test_bytes_on_disk_needs_a_model(tmp_path) -> None:
    with pytest.raises(GETAError, match=r"no \.safetensors"):
        bytes_on_disk(tmp_path)
