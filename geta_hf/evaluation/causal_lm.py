"""Whether a model and a tokenizer make a causal language model: what nothing else would tell, or only a bare error."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from geta_hf.errors import GETAError
from geta_hf.utils.module_state import evaluating

_TOKENS = 8  # of the rows that tell a causal model
_NOISE = {torch.float32: 1e-4, torch.float64: 1e-4}  # of the largest logit: what rounding may move
_NOISE_OF_HALVES = 1e-2


def positions(config: PreTrainedConfig) -> int | None:
    """How many positions a model has; None for one without a limit."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if found and found > 0 else None  # XLNet says -1


def embedding_rows(model: PreTrainedModel) -> int:
    """How many tokens a model's input embedding has rows for."""
    embedding: Any = model.get_input_embeddings()
    return embedding.weight.shape[0]


def check_vocabulary(rows: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise GETAError for a tokenizer that gives tokens without a row in the embedding.

    Tokens that were added to the vocabulary and never stand in a text of their own may lie beyond the rows, as they do
    in many models. Where the padding token is such a one, the tokenizer pads with its eos (else bos) token from now on.

    Args:
        rows: of the model's input embedding, or `vocab_size` of its config.
        tokenizer: that of the model; only its padding token may change.

    Raises:
        GETAError: a token of the base vocabulary, or bos or eos, is beyond the rows.
    """
    ends = {"bos_token": tokenizer.bos_token_id, "eos_token": tokenizer.eos_token_id}
    needed = {"token": tokenizer.vocab_size - 1, **ends}  # without those that were added
    if beyond := [f"{name} {token}" for name, token in needed.items() if token is not None and token >= rows]:
        raise GETAError(
            f"the tokenizer's {', '.join(beyond)} has no row in the model's embedding of {rows:,} rows; give the "
            f"model's own tokenizer, or save the model after model.resize_token_embeddings({len(tokenizer)})"
        )
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= rows:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token


def check_causal(model: PreTrainedModel) -> None:
    """Raise GETAError for a model that sees the tokens to come, such as BERT without `is_decoder`.

    Two rows that differ in their last token run through the model: the logits before it must be the same.

    Args:
        model: with a language model's head; it is left as it was.

    Raises:
        GETAError: a token changes the logits before it.
    """
    rows = embedding_rows(model)
    tokens = torch.arange(min(_TOKENS, positions(model.config) or _TOKENS)).repeat(2, 1) % rows
    tokens[1, -1] = (tokens[1, -1] + rows // 2) % rows
    with evaluating(model):
        logits = model(input_ids=tokens.to(model.device), use_cache=False).logits[:, :-1]
    moved, scale = (logits[1] - logits[0]).abs().max(), logits.abs().max()
    if moved > _NOISE.get(logits.dtype, _NOISE_OF_HALVES) * scale:
        raise GETAError(
            f"{model.name_or_path or type(model).__name__} ({type(model).__name__}) sees the tokens to come, so it "
            "predicts none of them; set is_decoder to true in its config if it was trained so, or take a causal model"
        )
