"""Score the seven commonsense tasks by log-likelihood without lm-eval: its prompts, accuracies and rows, zero-shot.

`geta_hf.evaluation.evaluate` needs lm-eval and datasets, which a machine without network may lack. Rows are the JSON
lines that `geta-hf eval --data_dir` reads.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Item:
    """A question: pairs of context and continuation, of which one is right.

    Args:
        pairs: (context, continuation) of each choice; the continuation is scored.
        lengths: characters of each choice, by which `acc_norm` divides.
        gold: index of the right one.
    """

    pairs: tuple[tuple[str, str], ...]
    lengths: tuple[int, ...]
    gold: int


def _choices(context: str, choices: Sequence[str], gold: int) -> Item:
    return Item(tuple((context, f" {choice}") for choice in choices), tuple(map(len, choices)), gold)


def _boolq(row: dict[str, Any]) -> Item:
    return _choices(f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", ("no", "yes"), int(row["label"]))


def _piqa(row: dict[str, Any]) -> Item:
    return _choices(f"Question: {row['goal']}\nAnswer:", (row["sol1"], row["sol2"]), int(row["label"]))


def _arc(row: dict[str, Any]) -> Item:
    choices = row["choices"]
    return _choices(f"Question: {row['question']}\nAnswer:", choices["text"], choices["label"].index(row["answerKey"]))


def _openbookqa(row: dict[str, Any]) -> Item:
    choices = row["choices"]
    return _choices(row["question_stem"], choices["text"], choices["label"].index(row["answerKey"].strip()))


def _clean(text: str) -> str:
    """Return a text of HellaSwag without what is left of WikiHow's markup."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _hellaswag(row: dict[str, Any]) -> Item:
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return _choices(_clean(context), [_clean(ending) for ending in row["endings"]], int(row["label"]))


def _winogrande(row: dict[str, Any]) -> Item:
    before, _, after = row["sentence"].partition("_")
    options = [before + row["option1"], before + row["option2"]]
    pairs = tuple((option, f" {after.strip()}") for option in options)
    return Item(pairs, tuple(map(len, options)), int(row["answer"]) - 1)


TASKS: dict[str, tuple[str, Callable[[dict[str, Any]], Item]]] = {
    "boolq": ("validation", _boolq),
    "piqa": ("validation", _piqa),
    "hellaswag": ("validation", _hellaswag),
    "winogrande": ("validation", _winogrande),
    "arc_easy": ("test", _arc),
    "arc_challenge": ("test", _arc),
    "openbookqa": ("test", _openbookqa),
}
"""Task -> split that is scored, and how a row becomes an item."""


def read_items(folder: Path, task: str, limit: int | None = None) -> list[Item]:
    """Return a task's items from `folder/TASK/SPLIT.jsonl` or `.jsonl.gz`.

    Args:
        folder: with one folder for each task.
        task: a name of `TASKS`.
        limit: number of the first rows; all by default.
    """
    split, make = TASKS[task]
    plain = folder / task / f"{split}.jsonl"
    if plain.exists():
        lines = plain.read_text(encoding="utf-8").splitlines()
    else:
        lines = gzip.decompress(plain.with_suffix(".jsonl.gz").read_bytes()).decode().splitlines()
    return [make(json.loads(line)) for line in lines if line.strip()][:limit]


def score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item], tokens: int = 16384
) -> dict[str, float]:
    """Return `acc` and `acc_norm`, both from 0 to 1.

    Args:
        model: a causal language model in eval mode.
        tokenizer: its own.
        items: at least one.
        tokens: of a batch, padding included.
    """
    requests = [_encode(tokenizer, context, text) for item in items for context, text in item.pairs]
    found = _log_likelihoods(model, requests, tokens)
    right = normed = start = 0
    for item in items:
        values = found[start : start + len(item.pairs)]
        start += len(item.pairs)
        right += _best(values) == item.gold
        normed += _best([value / length for value, length in zip(values, item.lengths, strict=True)]) == item.gold
    return {"acc": right / len(items), "acc_norm": normed / len(items)}


def _best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def _encode(tokenizer: PreTrainedTokenizerBase, context: str, text: str) -> tuple[list[int], int]:
    """Return the tokens of both, and how many belong to the text; a space between them counts to the text."""
    stripped = context.rstrip()
    text = context[len(stripped) :] + text
    whole = tokenizer.encode(stripped + text)
    return whole, len(whole) - len(tokenizer.encode(stripped))


def _batches(requests: Sequence[tuple[list[int], int]], tokens: int) -> Iterator[list[int]]:
    """Yield indices of requests of similar lengths, the longest first, so that a lack of memory shows at once."""
    order = sorted(range(len(requests)), key=lambda place: -len(requests[place][0]))
    start = 0
    while start < len(order):
        size = max(1, tokens // len(requests[order[start]][0]))
        yield order[start : start + size]
        start += size


@torch.no_grad()
def _log_likelihoods(model: PreTrainedModel, requests: Sequence[tuple[list[int], int]], tokens: int) -> list[float]:
    found = [0.0] * len(requests)
    for batch in _batches(requests, tokens):
        longest = len(requests[batch[0]][0])
        # On the right, where no token that is scored sees it.
        ids = torch.tensor([requests[place][0] + [0] * (longest - len(requests[place][0])) for place in batch])
        logits = model(input_ids=ids.to(model.device)).logits
        for row, place in enumerate(batch):
            whole, count = requests[place]
            scores = F.log_softmax(logits[row, len(whole) - count - 1 : len(whole) - 1].float(), dim=-1)
            targets = torch.tensor(whole[-count:], device=scores.device)
            found[place] = float(scores.gather(1, targets[:, None]).sum())
    return found
