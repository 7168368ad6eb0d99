"""Let an encoder-decoder write texts, such as summaries, and score them against references."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase


def write_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[str],
    *,
    max_source_length: int = 512,
    max_target_length: int = 64,
    num_beams: int = 1,
    batch_size: int = 8,
    progress: bool = True,
) -> list[str]:
    """Return what a model writes for each source, without special tokens.

    Args:
        model: with `generate`; its mode and device do not change.
        tokenizer: of the model.
        sources: the texts to read, with the prefix that the model expects.
        max_source_length: tokens of a source, which is cut there. Default 512.
        max_target_length: tokens to write at most. Default 64.
        num_beams: 1, the default, is greedy.
        batch_size: sources of a batch. Those of similar length share a batch. Default 8.
        progress: show a progress bar. Default True.
    """
    order = sorted(range(len(sources)), key=lambda place: -len(sources[place]))
    written: dict[int, str] = {}
    training = model.training
    model.eval()
    generator: Any = model
    with torch.no_grad(), tqdm(total=len(order), desc="write", unit="text", disable=not progress) as bar:
        for first in range(0, len(order), batch_size):
            places = order[first : first + batch_size]
            chosen = [sources[place] for place in places]
            inputs = tokenizer(chosen, padding=True, truncation=True, max_length=max_source_length, return_tensors="pt")
            known = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
            # `max_length` would count with a model's own `max_new_tokens`, and warn.
            tokens = generator.generate(**known, max_new_tokens=max_target_length, num_beams=num_beams, do_sample=False)
            written.update(zip(places, tokenizer.batch_decode(tokens, skip_special_tokens=True), strict=True))
            bar.update(len(places))
    model.train(training)
    return [written[place].strip() for place in range(len(order))]
