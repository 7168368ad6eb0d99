"""Run lm-eval's requests in batches of similar length. This module imports lm-eval, so import it only where needed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from lm_eval.models.huggingface import HFLM
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from geta_hf.errors import GETAError

Request = tuple[Any, list[int], list[int]]  # (texts, tokens of the context, tokens of the continuation)

CPU_POSITIONS = 1024  # in one batch on a CPU: more is not faster, and the logits of a large vocabulary take 0.2 MB each
LARGEST_BATCH = 256  # where lm-eval's search starts on other devices


class BatchedLM(HFLM):
    """Wrap a loaded causal model for lm-eval so that requests of similar length share a batch.

    lm-eval's automatic batch size is what the longest request allows, for all requests, found by running out of memory;
    on a CPU, where that takes too long, it is 64. Here requests are first sorted into classes of length. On a CPU a
    batch has as many rows as fill `CPU_POSITIONS`.

    Attributes:
        truncated: number of requests so far that were longer than the model's positions.
        requests: number of all requests so far.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int | str) -> None:
        options = {"batch_size": batch_size, "max_batch_size": LARGEST_BATCH, "backend": "causal"}
        super().__init__(pretrained=model, tokenizer=tokenizer, **options)
        self.truncated = self.requests = 0

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        self._count(requests)
        if self.batch_size != "auto" or override_bs:
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)
        classes: dict[int, list[int]] = defaultdict(list)
        for place, (_, context, continuation) in enumerate(requests):
            # Lengths within a factor of two share a class, so at most half of a batch is padding.
            classes[(len(context) + len(continuation)).bit_length()].append(place)
        answers: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(requests), desc="requests", disable=disable_tqdm or None) as bar:
            # The longest first: what does not fit into memory fails at once, and the progress bar is never too
            # hopeful.
            for _, places in sorted(classes.items(), reverse=True):
                # lm-eval caches batch sizes here; those of another class of length do not fit.
                self.batch_sizes: dict[int, int] = {}
                chosen = [requests[place] for place in places]
                answers.update(zip(places, super()._loglikelihood_tokens(chosen, disable_tqdm=True), strict=True))
                bar.update(len(places))
        return [answers[place] for place in range(len(requests))]

    def _detect_batch_size(self, requests: Sequence[Request] | None = None, pos: int = 0) -> int:
        if self.device.type != "cpu":
            return super()._detect_batch_size(requests, pos)
        length = len(requests[pos][1]) + len(requests[pos][2]) if requests else self.max_length
        return max(1, CPU_POSITIONS // min(length, self.max_length))

    def _count(self, requests: Sequence[Request]) -> None:
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise GETAError(
                    f"an answer of {len(continuation)} tokens does not fit into the model's {self.max_length} "
                    "positions; remove that task"
                )
            # The last token is only predicted and takes no position, hence the one more.
            self.truncated += len(context) + len(continuation) > self.max_length + 1
        self.requests += len(requests)
