"""The tokenizer in a GGUF file: tokens, merges, special tokens and the chat template, as llama.cpp reads them."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from geta_hf.errors import GETAError

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
"""The kinds of tokens, as the file numbers them."""

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_QWEN_2 = _LLAMA_3.replace("{1,3}", "")

_SPLITS = {(_GPT2,): "gpt-2", ("digits", _GPT2): "smollm", (_LLAMA_3,): "llama-bpe", (_QWEN_2,): "qwen2"}
"""How a text is split before merges -> llama.cpp's name for it."""


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as plain data.

    Attributes:
        model: `gpt2` (byte-level BPE) or `llama` (BPE on characters with bytes as a fallback).
        pre: name of the way in which a text is split before merges.
        tokens: by id.
        kinds: of the tokens.
        scores: the higher, the earlier a token is merged; for the model `llama`.
        merges: pairs with a space between them, the first merged first; for the model `gpt2`.
        space_prefix: whether a text starts as after a space; for the model `llama`.
        special: name such as `bos` or `eos` -> id.
        added: name -> whether the tokenizer adds the token to a text.
        chat_template: as transformers has it.
    """

    model: str
    pre: str
    tokens: list[str]
    kinds: list[int]
    scores: list[float] | None
    merges: list[str]
    space_prefix: bool | None
    special: Mapping[str, int]
    added: Mapping[str, bool]
    chat_template: Any

    def write(self, writer: Any) -> None:
        """Add the metadata to a `gguf.GGUFWriter`."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        writer.add_token_types(self.kinds)
        if self.merges:
            writer.add_token_merges(self.merges)
        if self.space_prefix is not None:
            writer.add_add_space_prefix(self.space_prefix)
        for name, token in self.special.items():
            getattr(writer, f"add_{name}_token_id")(token)
        for name, adds in self.added.items():
            getattr(writer, f"add_add_{name}_token")(adds)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def read_vocabulary(tokenizer: PreTrainedTokenizerBase | None, size: int, config: Any) -> Vocabulary:
    """Return a tokenizer as GGUF has it.

    Args:
        tokenizer: a fast one of transformers.
        size: rows of the model's embedding; ids that the tokenizer does not use are padded.
        config: of the model, for special tokens that the tokenizer does not name.

    Raises:
        GETAError: there is no tokenizer, llama.cpp has none of its type, or it has more tokens than the model.
    """
    if tokenizer is None:
        raise GETAError(
            "a GGUF file holds the tokenizer, and there is none: pass it as processing_class, or save it next to the "
            "model with save_pretrained"
        )
    kind = type(tokenizer).__name__
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise GETAError(f"{kind} is no fast tokenizer, so it has no GGUF model; load it with AutoTokenizer")
    stored = json.loads(backend.to_str())
    words: dict[str, int] = tokenizer.get_vocab()
    if max(words.values()) >= size:
        raise GETAError(
            f"{kind} has ids up to {max(words.values())}, the model has {size} rows; is it another model's?"
        )
    special, added, template = _special(tokenizer, config, size)
    byte_level = _byte_level(stored["pre_tokenizer"])
    tokens, kinds = _tokens(tokenizer, stored, words, size, byte_level)
    model = stored["model"]
    if model["type"] == "BPE" and byte_level:
        pre = _split_name(stored["pre_tokenizer"], kind)
        if bool(model.get("ignore_merges")) != (pre == "llama-bpe"):
            raise GETAError(
                f"{kind} splits texts as {pre} does, which llama.cpp merges in another way; use transformers"
            )
        merges = [" ".join(part.replace(" ", "Ġ") for part in _pair(merge)) for merge in model["merges"]]
        return Vocabulary("gpt2", pre, tokens, kinds, None, merges, None, special, added, template)
    if model["type"] == "BPE" and model.get("byte_fallback"):
        scores = _scores(tokens, [_pair(merge) for merge in model["merges"]])
        prefix = _space_prefix(stored)
        return Vocabulary("llama", "default", tokens, kinds, scores, [], prefix, special, added, template)
    raise GETAError(
        f"{kind} is a {model['type']} tokenizer without a GGUF model: llama.cpp reads byte-level BPE and BPE with "
        f"bytes as a fallback; export in another format"
    )


def _pair(merge: str | list[str]) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else merge


def _byte_level(pre_tokenizer: Mapping[str, Any] | None) -> bool:
    return any(step["type"] == "ByteLevel" for step in _steps(pre_tokenizer, "pretokenizers"))


def _steps(stored: Mapping[str, Any] | None, parts: str) -> list[Mapping[str, Any]]:
    if stored is None:
        return []
    return list(stored[parts]) if stored["type"] == "Sequence" else [stored]


def _split_name(pre_tokenizer: Mapping[str, Any], kind: str) -> str:
    """Return llama.cpp's name for the way in which texts are split.

    Raises:
        GETAError: it has none.
    """
    found: list[str] = []
    for step in _steps(pre_tokenizer, "pretokenizers"):
        match step:
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
                found.append(pattern)
            case {"type": "Digits", "individual_digits": True}:
                found.append("digits")
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
                found.append(_GPT2)
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}:
                pass
            case _:
                found.append(json.dumps(step))
    if tuple(found) not in _SPLITS:
        known = ", ".join(_SPLITS.values())
        raise GETAError(
            f"{kind} splits texts by {' then '.join(found)[:200] or 'no rule'}, for which there is no name here; known "
            f"are those of {known}. Export in another format"
        )
    return _SPLITS[tuple(found)]


def _tokens(
    tokenizer: PreTrainedTokenizerBase, stored: Mapping[str, Any], words: Mapping[str, int], size: int, byte_level: bool
) -> tuple[list[str], list[int]]:
    tokens, kinds = [f"[PAD{number}]" for number in range(size)], [_UNUSED] * size
    unknown = stored["model"].get("unk_token")
    for word, number in words.items():
        tokens[number], kinds[number] = word, _NORMAL
        if not byte_level and re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", word):
            kinds[number] = _BYTE
    for token in stored["added_tokens"]:
        number = token["id"]
        kinds[number] = _CONTROL if token["special"] else _USER_DEFINED
        if kinds[number] == _USER_DEFINED:
            tokens[number] = tokens[number].replace("▁", " ")  # llama.cpp looks for these in the plain text
    if not byte_level and unknown in words:
        kinds[words[unknown]] = _UNKNOWN
    return tokens, kinds


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """Return scores by which llama.cpp merges in the order of the merges: it takes the best-scored new token first."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _space_prefix(stored: Mapping[str, Any]) -> bool:
    normalizers = _steps(stored["normalizer"], "normalizers")
    splits = _steps(stored["pre_tokenizer"], "pretokenizers")
    prepends = any(step["type"] == "Prepend" for step in normalizers)
    return prepends or any(step["type"] == "Metaspace" and step.get("prepend_scheme") != "never" for step in splits)


def _special(tokenizer: PreTrainedTokenizerBase, config: Any, size: int) -> tuple[dict[str, int], dict[str, bool], Any]:
    import gguf

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        # The configuration names what the tokenizer does not.
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        ids = {name: getattr(config, name, None) for name in names}
        (Path(folder) / "config.json").write_text(json.dumps(ids))
        found = gguf.SpecialVocab(folder, n_vocab=size)
    # What a tokenizer adds is asked of itself: files say it in several ways, and some say what is no longer true.
    given: Any = tokenizer("a")["input_ids"]
    plain: Any = tokenizer("a", add_special_tokens=False)["input_ids"]
    before = len(given) > len(plain) and given[0] == tokenizer.bos_token_id
    after = len(given) > len(plain) and given[-1] == tokenizer.eos_token_id
    added = {**found.add_special_token, "bos": before}
    if after or "eos" in added:
        added["eos"] = after
    return found.special_token_ids, added, found.chat_template
