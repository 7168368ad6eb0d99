"""lm-eval's tasks in four rows each, a tokenizer of bytes, and a tiny Llama: an evaluation in seconds."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

_LETTERS = ["A", "B", "C"]
_WORDS = ["ink", "a blue pen", "rain"]
_PLACES = range(4)


def _choice(place: int) -> dict[str, Any]:
    return {"choices": {"text": _WORDS, "label": _LETTERS}, "answerKey": _LETTERS[place % 3]}


ROWS: dict[str, list[dict[str, Any]]] = {
    "boolq/validation": [{"passage": f"Ink {n}.", "question": "is it wet", "label": n % 2, "idx": n} for n in _PLACES],
    "piqa/validation": [
        {"goal": f"Write {n} words", "sol1": "Take a pen.", "sol2": f"Eat {'rain ' * n}now.", "label": n % 2}
        for n in _PLACES
    ],
    "hellaswag/validation": [
        {"activity_label": "Ink", "ctx_a": f"{n} pens.", "ctx_b": "they", "endings": [*_WORDS, "x"], "label": str(n)}
        for n in _PLACES
    ],
    "winogrande/validation": [
        {
            "sentence": f"Pen {n} fled the rain as _ was wet.",
            "option1": "it",
            "option2": "rain",
            "answer": "12"[n % 2],
        }
        for n in _PLACES
    ],
    "arc_easy/test": [{"id": str(n), "question": f"What is {n}?", **_choice(n)} for n in _PLACES],
    "arc_challenge/test": [{"id": str(n), "question": f"Why {n}?", **_choice(n + 1)} for n in _PLACES],
    "openbookqa/test": [{"id": str(n), "question_stem": f"{n} likes", **_choice(n + 2)} for n in _PLACES],
    "lambada_openai/test": [{"text": f"the {n} pens write with ink"} for n in _PLACES],
    "blimp/transitive": [{"sentence_good": f"Pens {n} write ink.", "sentence_bad": f"Pens {n} rain."} for n in _PLACES],
    "blimp/passive_1": [{"sentence_good": f"It is {n} wet.", "sentence_bad": f"It rain is {n}."} for n in _PLACES],
}


def write_rows(folder: Path, rows: dict[str, list[dict[str, Any]]] | None = None) -> Path:
    """Rows as a `data_dir`: packed, but BLiMP's in plain files."""
    for name, own in (ROWS if rows is None else rows).items():
        text = "".join(json.dumps(row) + "\n" for row in own)
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.startswith("blimp"):
            path.write_text(text)
        else:
            path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(text.encode()))
    return folder


def byte_tokenizer(**tokens: str) -> PreTrainedTokenizerFast:
    """A token for every byte; `bos_token="<s>"` by default."""
    names = tokens or {"bos_token": "<s>"}
    vocabulary = {letter: place for place, letter in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "<s>"])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def tiny_llama(positions: int = 128, seed: int = 0) -> LlamaForCausalLM:
    """Two layers of four heads, two of them for keys, over the tokens of `byte_tokenizer`; random weights."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=257, num_hidden_layers=2, max_position_embeddings=positions, **sizes)
    return LlamaForCausalLM(config).eval()
