"""Time what a run ends with against the model that it started from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from geta_hf.costs.model_costs import Image
from geta_hf.evaluation.causal_lm import positions
from geta_hf.reporting.latency import faster, time_in_turns
from geta_hf.utils.free_memory import free_memory

logger = logging.get_logger(__name__)

_SECONDS = 5.0
"""After which no further turn of a measurement begins."""
_REPEATS = 20
_PROMPT, _WRITTEN = 32, 16
_MOST_TOKENS = 512


@dataclass(frozen=True)
class DenseModel:
    """Remember what a run starts from, since training changes the model in place.

    Attributes:
        kind: class of the model.
        config: a copy.
        dtype: of its weights.
        nbytes: of its parameters and buffers, shared ones once: about what its file takes.
    """

    kind: type[PreTrainedModel]
    config: PreTrainedConfig
    dtype: torch.dtype
    nbytes: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> DenseModel:
        """Return what is remembered of a model."""
        return cls(type(model), copy.deepcopy(model.config), model.dtype, model_bytes(model))

    def build(self, device: torch.device) -> PreTrainedModel:
        """Return the model with random weights, which run as fast as the trained ones."""
        kind: Any = self.kind
        model: PreTrainedModel = kind._from_config(copy.deepcopy(self.config), dtype=self.dtype)
        nn.Module.to(model, device)
        return model.eval()


@dataclass(frozen=True)
class Work:
    """Name what a model is timed at, and do it."""

    name: str
    run: Callable[[PreTrainedModel], object]


@dataclass(frozen=True)
class Speed:
    """Hold how long the model of before and the exported one take for the same work, in milliseconds."""

    work: str
    dense: float
    compressed: float

    def __str__(self) -> str:
        """Return the comparison and the times.

        >>> str(Speed("128 tokens", 152.0, 79.0))
        '1.9x faster (128 tokens in 152 → 79 ms)'
        """
        times = " → ".join(f"{time:,.0f}" if time >= 10 else f"{time:.2g}" for time in (self.dense, self.compressed))
        return f"{faster(self.dense, self.compressed)} ({self.work} in {times} ms)"


def model_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's parameters and buffers, shared ones once: about what its file takes."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


def reading(tokens: int, config: PreTrainedConfig) -> Work:
    """Return one pass over a sequence.

    Args:
        tokens: its length, cut at 512 and at the model's positions.
        config: of the model.
    """
    length = min(tokens, positions(config) or tokens, _MOST_TOKENS)
    return Work(f"{length} tokens", lambda model: model(**_sequence(model, length)))


def looking(image: Image) -> Work:
    """Return one pass over an image of these channels, height and width."""
    name = f"an image of {image[1]}x{image[2]}"
    return Work(name, lambda model: model(pixel_values=torch.zeros(1, *image, dtype=model.dtype, device=model.device)))


def writing(config: PreTrainedConfig) -> Work:
    """Return the writing of 16 tokens after a short prompt, greedily, or after reading it by an encoder-decoder.

    Args:
        config: of the model, whose positions limit both.
    """
    room = positions(config) or _PROMPT + _WRITTEN
    written = max(1, min(_WRITTEN, room // 2))
    prompt = max(1, min(_PROMPT, room - written))
    ends = {"max_new_tokens": written, "min_new_tokens": written, "do_sample": False, "num_beams": 1}

    def generate(model: Any) -> object:
        padding = model.config.get_text_config().pad_token_id
        return model.generate(**_sequence(model, prompt), **ends, pad_token_id=padding or 0)

    return Work(f"writing {written} tokens", generate)


def _sequence(model: PreTrainedModel, length: int) -> dict[str, Tensor]:
    tokens = torch.ones(1, length, dtype=torch.long, device=model.device)
    return {"input_ids": tokens, "attention_mask": tokens}


@torch.no_grad()
def measure_speeds(dense: DenseModel, compressed: PreTrainedModel, works: Sequence[Work]) -> list[Speed]:
    """Time both models at each work, in turns, for a few seconds on the exported model's device.

    A run that got as far as this has its export and its scores, so a failure is a warning.

    Args:
        dense: the model that the run started from.
        compressed: the exported model.
        works: what they are timed at.

    Returns:
        One speed for each work; none where the memory is too small for a second model.
    """
    device = compressed.device
    free = free_memory(device)
    if free is not None and free < 2 * dense.nbytes:
        logger.warning("the speed was not measured, since the memory has no room for the dense model beside this one")
        return []
    try:
        models = {"dense": dense.build(device), "compressed": compressed.eval()}
        return [Speed(work.name, **_times(models, work)) for work in works]
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        logger.warning("the speed was not measured (%s: %s)", type(error).__name__, reason)
        return []


def _times(models: Mapping[str, PreTrainedModel], work: Work) -> dict[str, float]:
    calls = {name: lambda model=model: work.run(model) for name, model in models.items()}
    return time_in_turns(calls, _REPEATS, _SECONDS)
