from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    RobertaConfig,
    XLNetConfig,
)

from geta_hf import GETAError
from geta_hf.evaluation.causal_lm import check_causal, check_vocabulary, positions
from tests.tiny_tasks import byte_tokenizer, tiny_llama

ROWS = 257  # of `byte_tokenizer`: 256 bytes, and <s>, which transformers holds for added
SIZES: dict[str, Any] = {"vocab_size": ROWS, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 32}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
CAUSAL = {
    "llama": LlamaConfig(**SIZES, **HEADS),
    "few positions": LlamaConfig(**SIZES, **HEADS, max_position_embeddings=4),
    "learned positions": GPT2Config(vocab_size=ROWS, n_embd=32, n_layer=2, n_head=4, n_positions=6),
    "sliding window": MistralConfig(**SIZES, **HEADS, sliding_window=3),
    "experts": MixtralConfig(**SIZES, **HEADS, num_local_experts=4, sliding_window=None),
    "recurrent": MambaConfig(vocab_size=ROWS, hidden_size=32, num_hidden_layers=2),
    "decoder": BertConfig(**SIZES, num_attention_heads=4, is_decoder=True),
}
BOTH_WAYS = {
    "bert": BertConfig(**SIZES, num_attention_heads=4),
    "roberta": RobertaConfig(**SIZES, num_attention_heads=4),
    "xlnet": XLNetConfig(vocab_size=ROWS, d_model=32, n_layer=2, n_head=4, d_inner=32),
}


def made(config: PreTrainedConfig, spread: float = 0.02) -> Any:
    torch.manual_seed(0)
    config.initializer_range = spread
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CAUSAL)
def test_causal_models_pass(name: str, dtype: torch.dtype) -> None:
    check_causal(made(CAUSAL[name], spread=0.2).to(dtype))


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_models_that_see_what_is_to_come_are_refused(name: str) -> None:
    with pytest.raises(GETAError, match=r"sees later tokens.* is_decoder"):
        check_causal(made(BOTH_WAYS[name]))


def test_they_are_refused_in_half_precision() -> None:
    with pytest.raises(GETAError, match="BertLMHeadModel"):
        check_causal(made(BOTH_WAYS["bert"], spread=0.2).to(torch.bfloat16))


def test_the_model_is_left_as_it_was() -> None:
    model, state = tiny_llama().train(), torch.get_rng_state()
    check_causal(model)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_positions() -> None:
    assert (positions(CAUSAL["few positions"]), positions(CAUSAL["recurrent"])) == (4, None)


def test_tokens_beyond_the_embedding_are_refused() -> None:
    tokenizer = byte_tokenizer()
    check_vocabulary(ROWS, tokenizer)
    check_vocabulary(ROWS + 100, tokenizer)
    with pytest.raises(GETAError, match=r"token 256, bos_token 256 .* 256 rows; .*resize_token_embeddings\(257\)"):
        check_vocabulary(256, tokenizer)
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    with pytest.raises(GETAError, match=r"tokenizer's eos_token 257 has no row"):
        check_vocabulary(ROWS, tokenizer)


def test_added_tokens_may_be_beyond_and_padding_is_done_with_what_is_not() -> None:
    tokenizer = byte_tokenizer(eos_token="<s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    check_vocabulary(ROWS, tokenizer)
    assert tokenizer.pad_token_id is None
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    check_vocabulary(ROWS + 2, tokenizer)
    assert tokenizer.pad_token == "<pad>"
    check_vocabulary(ROWS, tokenizer)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 256
