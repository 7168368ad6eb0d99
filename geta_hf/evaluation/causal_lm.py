"""Check that a model and a tokenizer make a causal language model, where others fail silently or with a bare error."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from geta_hf.errors import GETAError
from geta_hf.utils.module_state import eval_mode

_TOKENS = 8  # in the rows that show whether a model is causal
_NOISE = {torch.float32: 1e-4, torch.float64: 1e-4}  # change by rounding, relative to the largest logit
_NOISE_OF_HALVES = 1e-2


def positions(config: PreTrainedConfig) -> int | None:
    """Return the number of positions of a model; None for one without a limit."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if found and found > 0 else None  # XLNet says -1


def embedding_rows(model: PreTrainedModel) -> int:
    """Return the number of rows of a model's input embedding."""
    embedding: Any = model.get_input_embeddings()
    return embedding.weight.shape[0]


def check_vocabulary(rows: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise GETAError for a tokenizer that gives tokens without a row in the embedding.

    Added tokens that never occur in plain text may be beyond the rows, as they are in many models. If the padding token
    is one of them, the tokenizer's padding token is changed to its eos (otherwise bos) token.

    Args:
        rows: of the model's input embedding, or `vocab_size` of its config.
        tokenizer: the model's; only its padding token may change.

    Raises:
        GETAError: a token of the base vocabulary, or bos or eos, is beyond the rows.
    """
    ends = {"bos_token": tokenizer.bos_token_id, "eos_token": tokenizer.eos_token_id}
    needed = {"token": tokenizer.vocab_size - 1, **ends}  # `vocab_size` does not count added tokens
    if beyond := [f"{name} {token}" for name, token in needed.items() if token is not None and token >= rows]:
        raise GETAError(
            f"the tokenizer's {', '.join(beyond)} has no row in the model's embedding of {rows:,} rows; give the "
            f"model's own tokenizer, or save the model after model.resize_token_embeddings({len(tokenizer)})"
        )
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= rows:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token


def check_causal(model: PreTrainedModel) -> None:
    """Raise GETAError for a model that sees later tokens, such as BERT without `is_decoder`.

    Two rows that differ in their last token run through the model: the logits before it must be the same.

    Args:
        model: with a language model's head; its mode does not change.

    Raises:
        GETAError: a token changes the logits before it.
    """
    rows = embedding_rows(model)
    tokens = torch.arange(min(_TOKENS, positions(model.config) or _TOKENS)).repeat(2, 1) % rows
    tokens[1, -1] = (tokens[1, -1] + rows // 2) % rows
    with eval_mode(model):
        logits = model(input_ids=tokens.to(model.device), use_cache=False).logits[:, :-1]
    # Both rows run in one batch, so the same kernels compute them and only rounding may differ.
    moved = (logits[1] - logits[0]).abs().max()
    scale = logits.abs().max()
    if moved > _NOISE.get(logits.dtype, _NOISE_OF_HALVES) * scale:
        raise GETAError(
            f"{model.name_or_path or type(model).__name__} ({type(model).__name__}) sees later tokens, so it does "
            "not predict them; set is_decoder to true in its config if it was trained that way, or use a causal model"
        )
