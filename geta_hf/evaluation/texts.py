"""The perplexity of a text, in units that compare across tokenizers as well."""

from __future__ import annotations

import gzip
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from geta_hf.errors import GETAError
from geta_hf.evaluation.causal_lm import positions
from geta_hf.evaluation.harness import check_fit, prefix_token

_POSITIONS = 2048  # of one batch: logits of a large vocabulary take 0.2 MB each
_LONGEST_DEFAULT = 1024


@dataclass(frozen=True)
class TextScore:
    """How well a model predicts a text.

    Attributes:
        nats_per_token: mean negative log-likelihood of its tokens.
        tokens: how many there are; all are scored, the first one after the tokenizer's bos (else eos) token.
        bytes: of the text in UTF-8.
        block: tokens that a window of it had.
    """

    nats_per_token: float
    tokens: int
    bytes: int
    block: int

    @property
    def perplexity(self) -> float:
        """Per token: e to the nats. Of use between models with the same tokenizer only."""
        return math.exp(min(self.nats_per_token, 700.0))  # above it is no finite number

    @property
    def bits_per_byte(self) -> float:
        """Bits that the model needs for a byte of the text: comparable across tokenizers."""
        return self.nats_per_token * self.tokens / self.bytes / math.log(2)


def read_text(path: str | os.PathLike[str]) -> str:
    """A text file in UTF-8, unpacked when its name ends in .gz. Raises GETAError for one that can't be read."""
    file = Path(path)
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        return content.decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise GETAError(f"{file} can't be read as a text in UTF-8 ({error})") from error


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    block: int | None = None,
    stride: int | None = None,
) -> TextScore:
    """Score every token of a text once, in windows that slide over it.

    Every token but those of the first window has at least `block - stride` tokens before it; a smaller stride is
    slower and closer to what the model can do.

    Args:
        model: a causal language model; it is run in eval mode and left as it was.
        tokenizer: its tokenizer; it adds no special tokens to the text.
        text: not empty.
        block: tokens of a window; by default the model's positions, 1,024 at most.
        stride: tokens by which the window moves on, 1 to `block`; by default half a block.

    Returns:
        Nats per token, and what else follows from it.

    Raises:
        GETAError: no text, a block longer than the model's positions, a stride that would leave tokens out, a model
            that sees the tokens to come, or a tokenizer that is not the model's or has neither bos_token nor eos_token.
    """
    length, step = window(model.config, block, stride)
    check_fit(model, tokenizer)
    encoded = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    if not encoded:
        raise GETAError("the text has no tokens; give one that is not empty")
    tokens = torch.tensor([prefix_token(tokenizer), *encoded])
    training = model.training
    model.eval()
    try:
        total = sum(_nats(model, *batch) for batch in _batches(tokens, min(length, len(encoded)), step))
    finally:
        model.train(training)
    return TextScore(total / len(encoded), len(encoded), len(text.encode()), length)


def window(config: PreTrainedConfig, block: int | None, stride: int | None) -> tuple[int, int]:
    """Tokens of a window and of a step, as `perplexity` says. Raises GETAError for what a model can't do."""
    limit = positions(config)  # some models have none
    length = min(limit or _LONGEST_DEFAULT, _LONGEST_DEFAULT) if block is None else block
    if length < 1 or length > (limit or length):
        raise GETAError(f"block={length}: a window has 1 to {limit or 'any number of'} tokens, the model's positions")
    step = max(length // 2, 1) if stride is None else stride
    if not 1 <= step <= length:
        raise GETAError(f"stride={step}: it is 1 to {length}, the length of a window")
    return length, step


def _batches(tokens: Tensor, length: int, stride: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Windows of `length + 1` tokens, and how many tokens at the end of each are new; the last ends with the text."""
    last = len(tokens) - 1 - length
    starts = torch.tensor([*range(0, last, stride), last])
    fresh = torch.cat([torch.tensor([length]), starts.diff()])
    rows = max(_POSITIONS // length, 1)
    for own, new in zip(starts.split(rows), fresh.split(rows), strict=True):
        yield tokens[own[:, None] + torch.arange(length + 1)], new


def _nats(model: PreTrainedModel, windows: Tensor, fresh: Tensor) -> float:
    """The negative log-likelihood of the last `fresh` tokens of every window, summed."""
    windows = windows.to(model.device)
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    losses = cross_entropy(logits.float().transpose(1, 2), windows[:, 1:], reduction="none").cpu()
    scored = torch.arange(losses.shape[1]) >= losses.shape[1] - fresh[:, None]
    return float(losses[scored].double().sum())
