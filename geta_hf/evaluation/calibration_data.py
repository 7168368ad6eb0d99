"""Make batches for calibration of texts, of a data set, of a text file, or of batches that are tokenized already."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from geta_hf.errors import GETAError
from geta_hf.evaluation.causal_lm import check_causal, check_vocabulary, embedding_rows, positions
from geta_hf.evaluation.rows import is_table, read_rows
from geta_hf.evaluation.texts import read_text
from geta_hf.utils.model_io import to_device

logger = logging.getLogger(__name__)

LENGTH = 256
"""Tokens of a sequence by default."""

LEAST = 4
"""Sequences that are needed at least: some are held back."""

ROWS = 4
"""Sequences of a batch that is made of text."""

_PIECE = 20_000
"""Characters that are tokenized at once, since tokenizers take long over one text of megabytes."""

_LONGEST_TOKEN = 8
"""Characters of a token in the mean, at most: so many are read for each token of a sequence."""

_LEAST_USED = 0.8
"""Share of the embedding's rows that a tokenizer uses at least: rows are often rounded up, but not by a quarter."""

_TEXT_COLUMNS = ("text", "content", "document", "sentence")

Batch = Mapping[str, Any]


def make_batches(
    data: Any,
    model: PreTrainedModel,
    tokenizer: Any = None,
    *,
    sequences: int = 128,
    length: int | None = None,
    more: int = 0,
) -> list[dict[str, Any]]:
    """Return calibration batches on the model's device.

    Texts are tokenized, packed one after the other and cut into sequences of equal length. They come from everywhere
    in the data: of a long text each sequence is one passage, and rows of a list or a data set are taken evenly.
    Tokenized batches are taken in their order.

    Causal language models get the tokens as labels; encoder-decoders that generate get the first half of each sequence
    as input and the second as labels; other models get no labels.

    Args:
        data: a list of texts; a `datasets.Dataset` with a column of texts or of tokens; the path of a text file (.gz
            too), or the name of a data set on the Hub; or a list of tokenized batches, mappings of tensors.
        model: whose vocabulary has to fit.
        tokenizer: of the model; not needed for tokenized batches.
        sequences: how many at most. Default 128.
        length: tokens of each; by default 256, or what the model's positions allow.
        more: how many further ones to return, as far as the data goes. Default 0.

    Raises:
        GETAError: too little text, no column of text, a tokenizer of another vocabulary, or none.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes))
    >>> batches = make_batches([{"input_ids": torch.arange(8).view(4, 2)}], model)
    >>> sorted(batches[0])
    ['input_ids', 'labels']
    """
    if isinstance(data, Mapping):
        raise GETAError("calibration_data is one mapping; pass a list of batches, or of texts")
    for name, number in (("sequences", sequences), ("sequence_length", length)):
        if number is not None and not isinstance(number, int):
            raise GETAError(f"{name} = {number!r} must be an integer")
    if sequences < LEAST:
        raise GETAError(f"sequences = {sequences}, but at least {LEAST} are needed, since some are held back")
    rows = _rows_of(data)
    first, items = _peek(rows)
    if isinstance(first, Mapping) and any(isinstance(item, Tensor) and item.dim() > 1 for item in first.values()):
        batches = _tokenized(items, model, sequences + more)
    else:
        size = _checked_length(length, model)
        tokens = _token_lists(first, _numbered(rows, items), tokenizer, model, sequences + more, size)
        blocks = _blocks(tokens, model, sequences, size, more)
        batches = [_of_block(part, model) for part in blocks.split(ROWS)]
    device = next(model.parameters()).device
    return [to_device(batch, device) for batch in batches]


def first_sequences(batches: list[dict[str, Any]], count: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the batches that hold the first `count` sequences, and the others."""
    held = 0
    for place, batch in enumerate(batches):
        if held >= count:
            return batches[:place], batches[place:]
        held += _rows(batch)
    return batches, []


def _rows_of(data: Any) -> Iterable[Any]:
    """Return what data consists of: texts, rows or batches."""
    if isinstance(data, str | Path):
        path = Path(data)
        if not path.is_file():
            return _data_set(str(data))
        return read_rows(str(path), None, None, "train") if is_table(path) else [read_text(path)]
    if not isinstance(data, Iterable):
        raise GETAError(
            f"calibration_data is a {type(data).__name__}; pass a list of texts, a data set, the path of a text file, "
            f"or a list of batches"
        )
    return data


def _data_set(name: str) -> Iterable[Any]:
    try:
        rows: Iterable[Any] = read_rows(None, name, None, "train")
    except GETAError as error:
        raise GETAError(f"{name} is neither a text file nor a data set that can be loaded ({error})") from error
    return rows


def _peek(items: Iterable[Any]) -> tuple[Any, Iterator[Any]]:
    iterator = iter(items)
    first = next(iterator, None)
    if first is None:
        raise GETAError("calibration_data is empty; pass texts or batches")
    return first, itertools.chain([first], iterator)


def _numbered(rows: Iterable[Any], items: Iterator[Any]) -> Iterator[tuple[int, Any]]:
    """Yield rows with their places: from everywhere in data that has a length, otherwise as they come."""
    if isinstance(rows, Sized) and hasattr(rows, "__getitem__"):
        return ((place, rows[place]) for place in spread(len(rows)))
    return enumerate(items)


def spread(count: int) -> Iterator[int]:
    """Yield the numbers below `count`, each once, in an order of which any first part lies evenly among them.

    >>> list(spread(8))
    [0, 4, 2, 6, 1, 5, 3, 7]
    """
    digits = max(count - 1, 0).bit_length()
    seen = set()
    for place in range(1 << digits if count else 0):
        # The digits backwards, as a fraction of the way through.
        found = (int(f"{place:0{digits}b}"[::-1], 2) if digits else 0) * count >> digits
        if found not in seen:
            seen.add(found)
            yield found


def _pieces(text: str, sequences: int, length: int) -> Iterator[tuple[str, int | None]]:
    """Yield parts of a text and how many tokens of each to take, None for all of them."""
    size = _LONGEST_TOKEN * length
    if len(text) < sequences * size:
        yield from ((text[start : start + _PIECE], None) for start in range(0, len(text), _PIECE))
        return
    for place in spread(len(text) // size):
        part = text[place * size : (place + 1) * size]
        # From the start of a word, where there are words.
        yield (part if place == 0 else part.partition(" ")[2] or part), length


def _token_lists(
    first: Any,
    items: Iterator[tuple[int, Any]],
    tokenizer: Any,
    model: PreTrainedModel,
    sequences: int,
    length: int,
) -> Iterator[list[int]]:
    """Yield the tokens of each text, or of passages of it where it is long."""
    if isinstance(first, Mapping) and "input_ids" in first:
        for place, row in items:
            if not isinstance(row, Mapping) or row.get("input_ids") is None:
                raise GETAError(f"row {place} of calibration_data has no 'input_ids', as the first has; remove the row")
            yield torch.as_tensor(row["input_ids"]).flatten().tolist()
        return
    column = None
    if isinstance(first, Mapping):
        column = next((name for name in _TEXT_COLUMNS if isinstance(first.get(name), str)), None)
        if column is None:
            raise GETAError(
                f"calibration_data has the columns {sorted(first)}; name the one with texts {_TEXT_COLUMNS[0]!r}, or "
                f"give tokens as 'input_ids'"
            )
    elif not isinstance(first, str):
        raise GETAError(f"calibration_data holds a {type(first).__name__}; pass texts, rows with a text, or batches")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise GETAError("texts need the model's tokenizer; pass tokenizer=AutoTokenizer.from_pretrained(...)")
    check_vocabulary(embedding_rows(model), tokenizer)
    _check_same_vocabulary(model, tokenizer)
    for place, item in items:
        text = item.get(column) if column is not None and isinstance(item, Mapping) else item
        if not isinstance(text, str):
            raise GETAError(
                f"row {place} of calibration_data is a {type(text).__name__}, not a text as the first; remove the row"
            )
        for piece, most in _pieces(text, sequences, length):
            ids: list[int] = tokenizer(piece, verbose=False)["input_ids"]
            yield ids[:most]


def _check_same_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise GETAError for a tokenizer that leaves much of an embedding unused, unless it lies beside the model."""
    rows = embedding_rows(model)
    beside = model.name_or_path and model.name_or_path == getattr(tokenizer, "name_or_path", "")
    if len(tokenizer) < _LEAST_USED * rows and not beside:
        raise GETAError(
            f"the tokenizer has {len(tokenizer):,} tokens, but the model's embedding {rows:,} rows, so it is most "
            f"likely that of another model; give the model's own, or tokenized batches"
        )


def _checked_length(length: int | None, model: PreTrainedModel) -> int:
    """Return the tokens of a sequence. Raise GETAError for more than the model has positions."""
    most = positions(model.config)
    if length is None:
        length = min(LENGTH, most or LENGTH)
    if length < 2 or (most is not None and length > most):
        raise GETAError(f"sequence_length = {length} must be between 2 and the {most or 'any number of'} positions")
    return length


def _blocks(tokens: Iterator[list[int]], model: PreTrainedModel, sequences: int, length: int, more: int) -> Tensor:
    """Pack tokens into sequences, int64, shape (sequences, length), and as many more as there are, up to `more`."""
    packed: list[int] = []
    for ids in tokens:
        packed += ids
        if len(packed) >= (sequences + more) * length:
            break
    count = min(len(packed) // length, sequences + more)
    if count < LEAST:
        raise GETAError(
            f"calibration_data has {len(packed):,} tokens, which give {count} sequences of {length}, and at least "
            f"{LEAST} are needed: give more text, or a smaller sequence_length"
        )
    if count < sequences:
        logger.warning("calibration_data gives %d sequences of %d tokens, not %d", count, length, sequences)
    blocks = torch.tensor(packed[: count * length]).view(count, length)
    _check_tokens(blocks, model)
    return blocks


def _check_tokens(ids: Tensor, model: PreTrainedModel) -> None:
    rows = embedding_rows(model)
    if int(ids.max()) >= rows or int(ids.min()) < 0:
        beyond = int(ids.max()) if int(ids.max()) >= rows else int(ids.min())
        raise GETAError(
            f"calibration_data holds the token {beyond}, but the model's embedding has {rows:,} rows; tokenize it with "
            f"the model's own tokenizer"
        )


def _of_block(block: Tensor, model: PreTrainedModel) -> dict[str, Tensor]:
    if not model.can_generate():
        return {"input_ids": block}
    if model.config.is_encoder_decoder:
        half = block.shape[1] // 2
        return {"input_ids": block[:, :half], "labels": block[:, half:]}
    return {"input_ids": block, "labels": block} if predicts_next(model) else {"input_ids": block}


def predicts_next(model: nn.Module) -> bool:
    """Return whether a model is a causal language model: it generates, and sees no later tokens."""
    if not isinstance(model, PreTrainedModel) or not model.can_generate() or model.config.is_encoder_decoder:
        return False
    try:
        check_causal(model)
    except GETAError:
        return False
    return True


def _tokenized(items: Iterator[Any], model: PreTrainedModel, sequences: int) -> list[dict[str, Any]]:
    """Return as many tokenized batches as hold enough sequences, with labels where tokens are labels."""
    batches: list[dict[str, Any]] = []
    count = 0
    causal = predicts_next(model)
    for item in items:
        if not isinstance(item, Mapping):
            raise GETAError(f"calibration_data holds a {type(item).__name__} among batches; pass mappings alone")
        batch = dict(item)
        ids = batch.get("input_ids")
        if isinstance(ids, Tensor):
            _check_tokens(ids, model)
            if causal and "labels" not in batch:
                mask = batch.get("attention_mask", torch.ones_like(ids))
                batch["labels"] = ids.masked_fill(mask == 0, -100)
        batches.append(batch)
        count += _rows(batch)
        if count >= sequences:
            break
    if count < LEAST:
        raise GETAError(f"calibration_data holds {count} sequences, and at least {LEAST} are needed")
    return batches


def _rows(batch: Batch) -> int:
    return next((len(item) for item in batch.values() if isinstance(item, Tensor) and item.dim()), 0)
