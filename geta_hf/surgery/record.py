"""The forwards that are recorded of a model before surgery: each may read attributes that the others do not."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from geta_hf.errors import GETAError
from geta_hf.surgery.compare_outputs import attentions, evaluating, set_attention
from geta_hf.surgery.size_equations import WANTED
from geta_hf.surgery.size_trace import Trace, trace
from geta_hf.utils.module_state import running

Batch = Mapping[str, Tensor]


def record(model: PreTrainedModel, batch: Batch) -> list[Trace]:
    """Record the forward on the batch with every attention implementation, on another shape, and step by step.

    Only the first has to succeed: whatever the others would have shown, the proof after surgery runs too.

    Args:
        model: left unchanged.
        batch: one batch of real inputs.

    Raises:
        GETAError: the model cannot run the batch.
    """
    with evaluating(model):
        traces = [trace(model, batch, WANTED), *_try(model, other_shape(model, batch))]
        if model.can_generate():
            with stepping(model):
                traces += _try(model, batch)
        own = model.config._attn_implementation
        for attention in set(attentions(model)) - {"own", own}:
            set_attention(model, attention)
            traces += _try(model, batch)
    return traces


def _try(model: PreTrainedModel, batch: Batch) -> list[Trace]:
    try:
        return [trace(model, batch, WANTED)]
    except GETAError:
        return []


def other_shape(model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
    """The batch with one row more and, where its main input is a sequence of tokens, a few tokens fewer."""
    main = batch.get(model.main_input_name)
    tokens = main is not None and main.dim() == 2 and not main.is_floating_point() and main.shape[1] > 4
    rows = next((tensor.shape[0] for tensor in batch.values() if tensor.dim()), 0)

    def change(tensor: Tensor) -> Tensor:
        if not tensor.dim() or tensor.shape[0] != rows:
            return tensor
        if tokens and main is not None and tensor.dim() > 1 and tensor.shape[1] == main.shape[1]:
            tensor = tensor[:, :-2]
        return torch.cat([tensor, tensor[:1]])

    return {name: change(tensor) for name, tensor in batch.items()}


@contextmanager
def stepping(model: PreTrainedModel) -> Iterator[None]:
    """Let the forward of a generating model run all tokens but the last, and then the last alone with the cache."""
    whole = type(model).forward
    accepted = inspect.signature(whole).parameters

    def forward(**inputs: Any) -> Any:
        # An encoder's mask is as long as its own input, and a decoder's grows with the tokens seen.
        tokens = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
        ids = inputs.pop(tokens)
        first = {"attention_mask": inputs["attention_mask"][:, :-1]} if _masks_tokens(inputs, tokens, ids) else {}
        past = whole(model, **{**inputs, **first, tokens: ids[:, :-1]}, use_cache=True)
        # Whatever the forward returns and takes again is its cache, by any name.
        cache = {name: value for name, value in past.items() if name in accepted and name not in inputs}
        return whole(model, **{**inputs, **cache, tokens: ids[:, -1:]}, use_cache=True).logits

    with running(model, forward):
        yield


def _masks_tokens(inputs: Mapping[str, Any], tokens: str, ids: Tensor) -> bool:
    return tokens == "input_ids" and "attention_mask" in inputs and inputs["attention_mask"].shape == ids.shape
