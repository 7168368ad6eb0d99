"""Both models are timed at the same work, and a failure never ends a run."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from geta_hf.recipes import speed
from geta_hf.recipes.speed import DenseModel, Speed, Work, looking, measure_speeds, reading, writing


def bert() -> BertForSequenceClassification:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    return BertForSequenceClassification(BertConfig(vocab_size=20, max_position_embeddings=32, **sizes))


def test_the_dense_model_is_as_it_was_before_training() -> None:
    model = bert()
    dense = DenseModel.of(model)
    model.config.intermediate_size = 8
    other = dense.build(torch.device("cpu"))
    assert other.bert.encoder.layer[0].intermediate.dense.out_features == 24 and not other.training
    assert sum(parameter.nbytes for parameter in other.parameters()) <= dense.nbytes
    assert dense.build(torch.device("cpu")) is not other


def test_lengths_end_at_the_models_positions() -> None:
    assert reading(384, bert().config).name == "32 tokens" and reading(8, bert().config).name == "8 tokens"
    assert reading(4096, LlamaConfig(max_position_embeddings=8192)).name == "512 tokens"
    assert writing(LlamaConfig(max_position_embeddings=8)).name == "writing 4 tokens"
    assert writing(T5Config()).name == "writing 16 tokens"


def test_models_that_write_write_as_much_as_is_said() -> None:
    """Each end of text is a token like the others."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    causal = LlamaForCausalLM(LlamaConfig(vocab_size=3, max_position_embeddings=64, **sizes, eos_token_id=1))
    tokens = writing(causal.config).run(causal.eval())
    assert isinstance(tokens, torch.Tensor) and tokens.shape == (1, 48)
    small = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    summarizer = T5ForConditionalGeneration(T5Config(vocab_size=3, **small, decoder_start_token_id=0, eos_token_id=1))
    tokens = writing(summarizer.config).run(summarizer.eval())
    assert isinstance(tokens, torch.Tensor) and tokens.shape == (1, 17)


def test_each_work_has_its_speed() -> None:
    model = bert()
    one, other = measure_speeds(
        DenseModel.of(model), model, [reading(8, model.config), Work("nothing", lambda _: None)]
    )
    assert one.work == "8 tokens" and one.dense > 0 and one.compressed > 0 and other.work == "nothing"


def test_a_failure_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = bert()
    assert measure_speeds(DenseModel.of(model), model, [looking((3, 8, 8))]) == []
    assert "the speed was not measured (ValueError" in caplog.text


def test_a_second_model_needs_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = bert()
    dense = DenseModel.of(model)
    monkeypatch.setattr(speed, "free_memory", lambda device: 2 * dense.nbytes - 1)
    assert measure_speeds(dense, model, [reading(8, model.config)]) == []
    monkeypatch.setattr(speed, "free_memory", lambda device: 2 * dense.nbytes)
    assert len(measure_speeds(dense, model, [reading(8, model.config)])) == 1


@pytest.mark.parametrize(
    ("dense", "compressed", "text"),
    [
        (152.0, 79.0, "1.9x faster (128 tokens in 152 → 79 ms)"),
        (9.96, 8.25, "1.2x faster (128 tokens in 10 → 8.2 ms)"),
        (0.5, 0.75, "1.5x slower (128 tokens in 0.5 → 0.75 ms)"),
        (100.0, 97.0, "about as fast (128 tokens in 100 → 97 ms)"),
    ],
)
def test_speeds_in_words(dense: float, compressed: float, text: str) -> None:
    assert str(Speed("128 tokens", dense, compressed)) == text
