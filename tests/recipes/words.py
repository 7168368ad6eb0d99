"""A tokenizer of whole words and a Phi that knows them, for recipes over text."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PhiConfig, PhiForCausalLM, PreTrainedTokenizerFast

END = "<end>"
WORDS = ["<unk>", END, ":", ".", *(f"w{number}" for number in range(40)), "Ask", "Tell"]


def word_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """Every word of `WORDS` is one token; there is an end of text and no padding, unless `special` says otherwise."""
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{"unk_token": "<unk>", "eos_token": END, **special})


def write_model(folder: Path) -> Path:
    """A small Phi and its tokenizer."""
    torch.manual_seed(0)
    config = PhiConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        resid_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=WORDS.index(END),
    )
    PhiForCausalLM(config).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def stories(count: int) -> list[str]:
    """Sentences in which every word says which one follows."""
    return [" ".join(f"w{(start + place) % 40}" for place in range(11)) + " ." for start in range(count)]
