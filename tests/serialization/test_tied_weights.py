from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
from transformers.utils import logging as hf_logging

from geta_hf import GETAConfig, GETAError, GETATrainer
from geta_hf.serialization.tied_weights import check_ties

ROWS = [{"input_ids": torch.arange(2, 14), "labels": torch.arange(2, 14)}] * 4


def llama(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, tie_word_embeddings=tied, **sizes))


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_that_is_what_its_config_says_passes(tied: bool) -> None:
    check_ties(llama(tied))


def test_a_weight_that_the_config_ties_and_the_model_does_not() -> None:
    model = llama(tied=True)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    message = r"lm_head\.weight .*not tied.* config says so.*tie_weights\(\).*tie_word_embeddings = False"
    with pytest.raises(GETAError, match=message):
        check_ties(model)
    model.config.tie_word_embeddings = False
    check_ties(model)


def test_a_weight_that_the_model_ties_and_the_config_does_not() -> None:
    model = llama(tied=False)
    model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(GETAError, match=r"lm_head\.weight is tied to model\.embed_tokens\.weight.*would not load so"):
        check_ties(model)
    model.config.tie_word_embeddings = True
    check_ties(model)


def test_it_is_said_before_training(tmp_path: Path) -> None:
    model = llama(tied=False)
    model.lm_head.weight = model.model.embed_tokens.weight
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(GETAError, match="is tied to"):
        GETATrainer(model, arguments, geta_config=GETAConfig(), train_dataset=ROWS)
    assert not any("quantizer" in name for name, _ in model.named_parameters())


def test_proving_that_a_language_model_generates_gives_no_warning(tmp_path: Path) -> None:
    said: list[str] = []
    before = hf_logging.get_verbosity()
    hf_logging.set_verbosity_warning()
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("transformers").addHandler(handler)
    try:
        arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", per_device_train_batch_size=2)
        GETATrainer(llama(tied=True), arguments, geta_config=GETAConfig(), train_dataset=ROWS)
    finally:
        hf_logging.set_verbosity(before)
        logging.getLogger("transformers").removeHandler(handler)
    assert said == []
