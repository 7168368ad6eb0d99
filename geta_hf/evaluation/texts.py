"""Measure the perplexity of texts and of labelled rows, in units that compare across tokenizers as well."""

from __future__ import annotations

import gzip
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from geta_hf.errors import GETAError
from geta_hf.evaluation.causal_lm import positions
from geta_hf.evaluation.harness import check_fit, prefix_token
from geta_hf.training.distillation import IGNORED

_POSITIONS = 2048  # in one batch: the logits of a large vocabulary take 0.2 MB for each position
_LONGEST_DEFAULT = 1024
_LARGEST_EXPONENT = 700.0  # e to a larger one is not finite


@dataclass(frozen=True)
class TextScore:
    """Hold how well a model predicts a text.

    Attributes:
        nats_per_token: mean negative log-likelihood of its tokens.
        tokens: number of tokens. All are scored; the first follows the tokenizer's bos (otherwise eos) token.
        bytes: size of the text in UTF-8.
        block: tokens of a window.
    """

    nats_per_token: float
    tokens: int
    bytes: int
    block: int

    @property
    def perplexity(self) -> float:
        """Return e to the nats per token, which compares only models with the same tokenizer."""
        return math.exp(min(self.nats_per_token, _LARGEST_EXPONENT))

    @property
    def bits_per_byte(self) -> float:
        """Return the bits that the model needs for one byte of the text, which compare across tokenizers."""
        return self.nats_per_token * self.tokens / self.bytes / math.log(2)


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a text file in UTF-8, decompressed if its name ends in .gz. Raise GETAError if it can't be read."""
    file = Path(path)
    try:
        content = file.read_bytes()
        if file.suffix == ".gz":
            content = gzip.decompress(content)
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

    Every token outside the first window is predicted from at least `block - stride` tokens. A smaller stride is slower
    and closer to what the model can do.

    Args:
        model: a causal language model. It runs in eval mode; its own mode is restored.
        tokenizer: its tokenizer; it adds no special tokens to the text.
        text: not empty.
        block: tokens of a window; by default the model's positions, at most 1,024.
        stride: tokens by which the window advances, 1 to `block`; by default half a block.

    Returns:
        Nats per token, with perplexity and bits per byte.

    Raises:
        GETAError: an empty text, a block longer than the model's positions, a stride that would skip tokens, a model
            that sees later tokens, or a tokenizer that is not the model's or has neither bos_token nor eos_token.

    Example:
        >>> import torch
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
        >>> from geta_hf import perplexity
        >>> vocabulary = {"<s>": 0, "one": 1, "two": 2, "three": 3}
        >>> words = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>")
        >>> _ = torch.manual_seed(0)
        >>> sizes = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=4, max_position_embeddings=16, **sizes))
        >>> found = perplexity(model, tokenizer, "one two three one two")
        >>> found.tokens, found.bytes, round(found.perplexity)  # untrained, so close to the 4 words of the vocabulary
        (5, 21, 4)
    """
    # Numbers first, since the check of the model runs it.
    length, step = window(model.config, block, stride)
    check_fit(model, tokenizer)
    encoded = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    if not encoded:
        raise GETAError("the text has no tokens; give one that is not empty")
    tokens = torch.tensor([prefix_token(tokenizer), *encoded])
    training = model.training
    model.eval()
    total = 0.0
    try:
        # A text shorter than a window is one window of its own length.
        for windows, fresh in _batches(tokens, min(length, len(encoded)), step):
            total += _nats(model, windows, fresh)
    finally:
        model.train(training)
    return TextScore(total / len(encoded), len(encoded), len(text.encode()), length)


def window(config: PreTrainedConfig, block: int | None, stride: int | None) -> tuple[int, int]:
    """Return the tokens of a window and of a step, with the defaults of `perplexity`.

    Args:
        config: of the model.
        block: tokens of a window, or None.
        stride: tokens of a step, or None.

    Raises:
        GETAError: a window longer than the model's positions, or a step longer than a window.
    """
    limit = positions(config)  # None for models without a limit
    length = block
    if length is None:
        length = min(limit or _LONGEST_DEFAULT, _LONGEST_DEFAULT)
    if length < 1 or length > (limit or length):
        raise GETAError(f"block={length}: a window has 1 to {limit or 'any number of'} tokens, the model's positions")
    step = stride
    if step is None:
        step = max(length // 2, 1)
    if not 1 <= step <= length:
        raise GETAError(f"stride={step}: must be from 1 to {length}, the length of a window")
    return length, step


def _batches(tokens: Tensor, length: int, stride: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of windows.

    Args:
        tokens: int64, shape (n + 1,): the first token is only read, the others are scored.
        length: tokens that a window predicts.
        stride: tokens between the starts of two windows.

    Yields:
        Windows, shape (rows, length + 1), and the number of tokens at the end of each that no earlier window scored,
        shape (rows,). The last window ends with the text.
    """
    last = len(tokens) - 1 - length
    # The last window ends with the text and overlaps the one before by more than usual, so that every window is full.
    starts = torch.tensor([*range(0, last, stride), last])
    fresh = torch.cat([torch.tensor([length]), starts.diff()])
    rows = max(_POSITIONS // length, 1)
    for own, new in zip(starts.split(rows), fresh.split(rows), strict=True):
        yield tokens[own[:, None] + torch.arange(length + 1)], new


def _nats(model: PreTrainedModel, windows: Tensor, fresh: Tensor) -> float:
    """Return the sum of the negative log-likelihoods of the last `fresh` tokens of every window."""
    windows = windows.to(model.device)
    # Labels would give a mean over all tokens of a window, of which some were scored in an earlier one.
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    # In fp32, and summed in fp64: a text may have millions of tokens.
    losses = cross_entropy(logits.float().transpose(1, 2), windows[:, 1:], reduction="none").cpu()
    scored = torch.arange(losses.shape[1]) >= losses.shape[1] - fresh[:, None]
    return float(losses[scored].double().sum())


@torch.no_grad()
def perplexity_of_rows(
    model: PreTrainedModel, rows: Any, collate: Callable[[list[Any]], Any], batch_size: int, bf16: bool = False
) -> dict[str, Any]:
    """Return the perplexity over every label of some rows, each label counted once whatever the batches.

    Args:
        model: a causal language model. It runs in eval mode; its own mode is restored.
        rows: a data set of `input_ids` and `labels`; a label of -100 is not scored, nor is the first of a row.
        collate: makes a batch of a list of rows.
        batch_size: rows of a batch.
        bf16: run under bfloat16 autocast.

    Returns:
        `perplexity`, `nats_per_token` and `tokens`, the number of labels that were scored.
    """
    training = model.training
    model.eval()
    total = 0.0
    tokens = 0
    for batch in DataLoader(rows, batch_size=batch_size, collate_fn=collate):
        inputs = {name: value.to(model.device) for name, value in batch.items()}
        # The model shifts the labels by one, so the first of a row is never predicted.
        count = int((inputs["labels"][:, 1:] != IGNORED).sum())
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            loss = model(**inputs, use_cache=False).loss
        total += float(loss) * count  # the loss is a mean over the labels of the batch
        tokens += count
    model.train(training)
    mean = total / tokens
    return {"perplexity": math.exp(min(mean, _LARGEST_EXPONENT)), "nats_per_token": mean, "tokens": tokens}
