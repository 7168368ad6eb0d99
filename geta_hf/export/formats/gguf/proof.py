"""Prove a GGUF file: decode every tensor of it, and run it in llama.cpp where that is installed."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from geta_hf.errors import GETAError
from geta_hf.export.formats.gguf import run_llama_cpp
from geta_hf.export.formats.gguf.architectures import longest_alike
from geta_hf.export.formats.gguf.blocks import STEP_ERROR, Values
from geta_hf.export.formats.integers import plain_copy

RUNNER = "xllamacpp"

EXACT = 1e-3
"""The largest difference of a probability allowed where every tensor is F32."""

ROUNDED = 0.05
"""The largest allowed, in the mean over steps, where llama.cpp rounds activations to 8 bits.

Single steps may differ by more, where the likeliest tokens are close to each other. The weights themselves are proved
by the other comparison, so this one has to find only blocks that are read in another way.
"""

PERPLEXITY = 0.01
"""The largest share by which the perplexity of a text may differ where every tensor is F32.

Where activations are rounded to 8 bits, a larger share is noted and not refused: the weights are proved already.
"""

TEXT = "Once upon a time, there was a little girl. She said: \"I've 3 apples, and 12 pears!\"\n\nThat's  fine.\n"
"""A text whose tokens have to be those of the tokenizer."""

_NEW_TOKENS, _LISTED, _PROMPT, _SCORED = 64, 20, 64, 256


@dataclass(frozen=True)
class Decoded:
    """What decoding the file found.

    Attributes:
        errors: tensor -> largest difference from the model's, as a share of its largest value; 0 where it is exact.
    """

    errors: dict[str, float]


@dataclass(frozen=True)
class Run:
    """What running the file found.

    Attributes:
        ran: whether it ran.
        runner: package and version, or why it did not run.
        difference: largest difference of a probability of a next token, of the file as it is.
        mean_difference: the same, but the mean over steps of the largest one in each.
        float_difference: the same of a file with the same weights in F32.
        tokens: how many tokens were generated, greedily.
        same_tokens: how many of them transformers generates too, with the weights in F32. The others are ties.
        perplexity: of a text, by transformers, by the file as it is, and by the same weights in F32.
    """

    ran: bool
    runner: str
    difference: float | None = None
    mean_difference: float | None = None
    float_difference: float | None = None
    tokens: int = 0
    same_tokens: int = 0
    perplexity: tuple[float, float, float] | None = None


def prove_decoded(path: Path, expected: Iterable[tuple[str, Callable[[], Values]]]) -> Decoded:
    """Decode a file by the package gguf, and compare all its tensors.

    Args:
        path: the file.
        expected: name in the file -> its values.

    Raises:
        GETAError: a tensor is missing, or differs by more than half precision explains.
    """
    import gguf

    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    errors = {}
    for name, values_of in expected:
        floats = values_of().floats
        if name not in stored:
            raise GETAError(f"{path.name} holds no {name}; is the package gguf of another version?")
        tensor = stored[name]
        found = torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        if found.shape != floats.shape:
            raise GETAError(f"{path.name} holds {name} of shape {tuple(found.shape)}, the model {tuple(floats.shape)}")
        gap = float((found - floats).abs().max())
        errors[name] = gap / float(floats.abs().max()) if gap else 0.0
        if not errors[name] <= STEP_ERROR * (1 + 1e-3):
            raise GETAError(
                f"{name} differs from the model's by {errors[name]:.2g} of its largest value once decoded; allowed is "
                f"{STEP_ERROR:.2g}; export in the geta format"
            )
    return Decoded(errors)


@torch.no_grad()
def prove_run(
    model: PreTrainedModel,
    path: Path,
    batch: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase | None,
    write_floats: Callable[[Path], None] | None,
) -> Run:
    """Run a file in llama.cpp, and compare its probabilities and its tokens of a text.

    Args:
        model: compressed.
        path: the file.
        batch: with `input_ids`, the first row of which is a prompt.
        tokenizer: whose tokens the file holds.
        write_floats: writes the model with all tensors in F32, to be compared more closely; None if the file is that.

    Raises:
        GETAError: llama.cpp cannot run it, or gives other tokens or probabilities.
    """
    if find_spec(RUNNER) is None:
        return Run(False, f"{RUNNER} is not installed")
    assert tokenizer is not None
    reference = plain_copy(model)
    longest = longest_alike(model.config)
    prompts = _prompts(batch, tokenizer, _PROMPT)
    scored = _prompts(batch, tokenizer, min(_SCORED, longest))
    task = {
        "prompts": prompts,
        "new_tokens": min(_NEW_TOKENS, longest - max(map(len, prompts))),
        "listed": _LISTED,
        "scored": scored,
        "context": min(max(*map(len, scored), _PROMPT + _NEW_TOKENS) + 8, longest),
        "threads": torch.get_num_threads(),
        "texts": [TEXT],
    }
    answer = _run(path, task)
    _check_text(answer["texts"][0]["tokens"], tokenizer)
    found = _compare(reference, task, answer)
    floats = found
    if write_floats is not None:
        _check_gap(found.mean, ROUNDED)
        with tempfile.TemporaryDirectory() as folder:
            write_floats(Path(folder) / path.name)
            floats = _compare(reference, task, _run(Path(folder) / path.name, task))
    _check_gap(floats.largest, EXACT)
    _check_perplexity(floats.perplexity, floats.expected)
    return Run(
        ran=True,
        runner=f"{RUNNER} {importlib.metadata.version(RUNNER)}",
        difference=found.largest,
        mean_difference=found.mean,
        float_difference=floats.largest,
        tokens=len(floats.gaps),
        same_tokens=floats.same,
        perplexity=(found.expected, found.perplexity, floats.perplexity),
    )


@dataclass(frozen=True)
class _Comparison:
    """What one run gave beside transformers.

    Attributes:
        gaps: largest difference of a probability in each step of what llama.cpp generated.
        same: in how many steps it chose the token that is the likeliest in transformers.
        perplexity: of the scored texts by llama.cpp.
        expected: the same by transformers.
    """

    gaps: list[float]
    same: int
    perplexity: float
    expected: float

    @property
    def largest(self) -> float:
        return max(self.gaps, default=0.0)

    @property
    def mean(self) -> float:
        return sum(self.gaps) / max(len(self.gaps), 1)


def _compare(reference: PreTrainedModel, task: Mapping[str, Any], answer: Mapping[str, Any]) -> _Comparison:
    gaps, same = _gaps(reference, task["prompts"], answer)
    perplexity, expected = _perplexities(reference, task["scored"], answer["scored"])
    return _Comparison(gaps, same, perplexity, expected)


def _prompts(batch: Mapping[str, Tensor], tokenizer: PreTrainedTokenizerBase, length: int) -> list[list[int]]:
    """Return the tokens of the text and of the first row of the batch, up to a length."""
    prompts = [tokenizer(TEXT)["input_ids"][:length]]
    if "input_ids" in batch:
        row, mask = batch["input_ids"][0].cpu(), batch.get("attention_mask")
        prompts.append((row if mask is None else row[mask[0].cpu() > 0]).tolist()[:length])
    return [prompt for prompt in prompts if prompt]


def _run(path: Path, task: Mapping[str, Any]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder) / "task.json", Path(folder) / "result.json"
        given.write_text(json.dumps({**task, "model": str(path)}))
        # The package may lie in a place that only this process was told of.
        places = os.pathsep.join(place for place in sys.path if place)
        command = [sys.executable, run_llama_cpp.__file__, str(given), str(found)]
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", env={**os.environ, "PYTHONPATH": places}
        )
        if not found.is_file():
            lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
            # The first cause that it names, or else its last words.
            causes = [line for line in lines if "error loading" in line or "ASSERT" in line]
            reason = " ".join([*causes, *lines[-1:], "no message"][0].split())[:300]
            raise GETAError(f"llama.cpp cannot run {path.name}: {reason}; export in another format")
        return json.loads(found.read_text())


def _check_text(found: list[int], tokenizer: PreTrainedTokenizerBase) -> None:
    expected = tokenizer(TEXT)["input_ids"]
    if found != expected:
        at = next((place for place, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), -1)
        raise GETAError(
            f"llama.cpp splits a text into other tokens than {type(tokenizer).__name__}: {found[at : at + 8]} instead "
            f"of {expected[at : at + 8]} from token {at}; export in another format"
        )


def _gaps(reference: PreTrainedModel, prompts: list[list[int]], answer: Mapping[str, Any]) -> tuple[list[float], int]:
    """Return the largest difference of a probability in each step of what llama.cpp generated.

    The second value is the number of steps in which the token is the likeliest in transformers too.
    """
    found, same = [], 0
    for prompt, one in zip(prompts, answer["prompts"], strict=True):
        chosen = one["tokens"]
        logits = reference(input_ids=torch.tensor([prompt + chosen])).logits[0, len(prompt) - 1 : -1]
        for row, token, listed in zip(logits.double().softmax(-1), chosen, one["listed"], strict=True):
            gaps = [abs(float(row[int(number)]) - math.exp(value)) for number, value in listed.items()]
            # Greedy texts are the same but for ties: a token may be chosen that is as likely as the likeliest.
            found.append(max([float(row.max() - row[token]), *gaps]))
            same += int(row.argmax()) == token
    return found, same


def _perplexities(
    reference: PreTrainedModel, texts: list[list[int]], scored: list[list[float | None]]
) -> tuple[float, float]:
    """Return the perplexity of texts by llama.cpp and by transformers, over the tokens that llama.cpp scored."""
    found: list[float] = []
    expected: list[float] = []
    for tokens, values in zip(texts, scored, strict=True):
        logits = reference(input_ids=torch.tensor([tokens])).logits[0, :-1]
        rows = logits.double().log_softmax(-1)
        for row, token, value in zip(rows, tokens[1:], values, strict=True):
            if value is not None:
                found.append(value)
                expected.append(float(row[token]))
    if not found:
        return 1.0, 1.0
    return math.exp(-sum(found) / len(found)), math.exp(-sum(expected) / len(expected))


def perplexity_notes(run: Run) -> list[str]:
    """Return a note where rounded activations move the perplexity by more than the share allowed in F32."""
    if run.perplexity is None:
        return []
    expected, found, _ = run.perplexity
    if abs(found / expected - 1) <= PERPLEXITY:
        return []
    return [
        f"llama.cpp rounds activations to 8 bits in products with blocks, which moves the perplexity of a short text "
        f"by {found / expected - 1:+.1%}"
    ]


def _check_perplexity(found: float, expected: float) -> None:
    if not abs(found / expected - 1) <= PERPLEXITY:
        raise GETAError(
            f"llama.cpp's perplexity of a text is {found:.4g}, the model's {expected:.4g}; allowed is a difference of "
            f"{PERPLEXITY:.0%}; export in the geta format"
        )


def _check_gap(gap: float, allowed: float) -> None:
    if not gap <= allowed:
        raise GETAError(
            f"llama.cpp's probabilities of next tokens differ from the model's by {gap:.2g}; allowed is {allowed:g}; "
            f"export in the geta format"
        )
