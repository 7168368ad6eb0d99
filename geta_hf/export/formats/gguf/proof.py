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
from geta_hf.export.formats.gguf.blocks import STEP_ERROR, Values
from geta_hf.export.formats.integers import plain_copy

RUNNER = "xllamacpp"

EXACT = 1e-3
"""The largest difference of a probability allowed where every tensor is F32."""

ROUNDED = 0.1
"""The same where llama.cpp rounds activations to 8 bits, in products with blocks of codes."""

TEXT = "Once upon a time, there was a little girl. She said: \"I've 3 apples, and 12 pears!\"\n\nThat's  fine.\n"
"""A text whose tokens have to be those of the tokenizer."""

_NEW_TOKENS, _LISTED, _PROMPT = 64, 20, 64


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
        float_difference: the same of a file with the same weights in F32.
        tokens: how many tokens were generated, greedily.
    """

    ran: bool
    runner: str
    difference: float | None = None
    float_difference: float | None = None
    tokens: int = 0


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
    prompts = _prompts(batch, tokenizer)
    task = {
        "prompts": prompts,
        "new_tokens": min(_NEW_TOKENS, model.config.max_position_embeddings - max(map(len, prompts))),
        "listed": _LISTED,
        "context": max(map(len, prompts)) + _NEW_TOKENS + 8,
        "threads": torch.get_num_threads(),
        "texts": [TEXT],
    }
    answer = _run(path, task)
    _check_text(answer["texts"][0]["tokens"], tokenizer)
    difference = _difference(reference, prompts, answer, EXACT if write_floats is None else ROUNDED)
    exact = difference
    if write_floats is not None:
        with tempfile.TemporaryDirectory() as folder:
            write_floats(Path(folder) / path.name)
            exact = _difference(reference, prompts, _run(Path(folder) / path.name, task), EXACT)
    runner = f"{RUNNER} {importlib.metadata.version(RUNNER)}"
    return Run(True, runner, difference, exact, sum(len(one["tokens"]) for one in answer["prompts"]))


def _prompts(batch: Mapping[str, Tensor], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    prompts = [tokenizer(TEXT)["input_ids"][:_PROMPT]]
    if "input_ids" in batch:
        row, mask = batch["input_ids"][0].cpu(), batch.get("attention_mask")
        prompts.append((row if mask is None else row[mask[0].cpu() > 0]).tolist()[:_PROMPT])
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


def _difference(
    reference: PreTrainedModel, prompts: list[list[int]], answer: Mapping[str, Any], allowed: float
) -> float:
    """Return the largest difference of a probability, along what llama.cpp generated.

    Raises:
        GETAError: it is larger than allowed, or a token was chosen that the model would not choose.
    """
    largest = 0.0
    for prompt, found in zip(prompts, answer["prompts"], strict=True):
        chosen = found["tokens"]
        logits = reference(input_ids=torch.tensor([prompt + chosen])).logits[0, len(prompt) - 1 : -1]
        for row, token, listed in zip(logits.double().softmax(-1), chosen, found["listed"], strict=True):
            gaps = [abs(float(row[int(number)]) - math.exp(value)) for number, value in listed.items()]
            # Greedy texts are the same but for ties: a token may be chosen that is as likely as the likeliest.
            largest = max(largest, float(row.max() - row[token]), *gaps)
    if not largest <= allowed:
        raise GETAError(
            f"llama.cpp's probabilities of next tokens differ from the model's by {largest:.2g}; allowed is {allowed:g}"
            f"; export in the geta format"
        )
    return largest
