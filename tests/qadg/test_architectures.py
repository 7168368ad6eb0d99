"""Every architecture passes every gate or is refused as expected, with the families that the documentation lists."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from itertools import tee
from pathlib import Path

import pytest
from torch import Tensor, nn

from benchmarks.zoo import Result, examine, families_found
from geta_hf.qadg import verify
from geta_hf.qadg.propagation.flow import Flow
from tests.architectures import ARCHITECTURES

DOCUMENT = Path(__file__).parents[2] / "docs" / "architectures.md"

QUICK = frozenset(
    {
        "bert",
        "roberta",
        "distilbert",
        "albert",
        "electra",
        "deberta-v2",
        "deberta",
        "longformer",
        "gpt2",
        "gpt_neox",
        "gptj",
        "opt",
        "bloom",
        "phi",
        "phi3",
        "llama",
        "mistral",
        "qwen2",
        "olmo",
        "qwen3",
        "gemma",
        "gemma2",
        "gemma3",
        "glm",
        "falcon",
        "mixtral",
        "qwen2_moe",
        "mamba",
        "t5",
        "bart",
        "marian",
        "whisper",
        "vit",
        "deit",
        "dinov2",
        "swin",
        "pvt_v2",
        "resnet",
        "convnext",
        "regnet",
        "clip",
        "wav2vec2",
    }
)
"""One of every structure; the others take part in the slow tests."""

_TWO_PATHS = (
    "is not found again, or with other members, when the forward is recorded again: its control flow changes from call "
    "to call, or with the content or shape of the batch. Make the forward take one path"
)
REFUSED = {
    "ibert-quantized": "IBertForSequenceClassification gives NaN on random weights, on which gates 2 and 3 run, so "
    "they can prove nothing of it",
    "switch_transformers": f"residual {_TWO_PATHS}",
    "speech-encoder-decoder": f"residual#2 {_TWO_PATHS}",
}
"""What is refused once every family is switched on, in these words and no others; all else passes every gate."""


def refusals(name: str) -> dict[str, str]:
    """The failures to expect of an architecture, by step."""
    return {"all switched on": f"GETAError: {REFUSED[name]}"} if name in REFUSED else {}


def documented() -> dict[str, list[str]]:
    """The cells of every architecture's row, by its name."""
    rows = [line.strip("| \n").split(" | ") for line in DOCUMENT.read_text().splitlines() if line.startswith("| ")]
    return {row[0]: row for row in rows if row[0] in ARCHITECTURES}


@pytest.fixture
def policies_share_recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Record the batches of a model once for all policies that `verify_space` tries on it, when they are asked for."""
    made: dict[nn.Module, Iterator[Flow]] = {}
    record = verify._flows

    def flows(model: nn.Module, batch: dict[str, Tensor], first: Flow | None) -> Iterator[Flow]:
        assert first is None
        made[model], copy = tee(made.pop(model, None) or record(model, batch, None))
        return copy

    monkeypatch.setattr(verify, "_flows", flows)


@pytest.mark.usefixtures("policies_share_recordings")
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES]
)
def test_architecture_passes_all_gates_but_for_known_refusals_with_the_families_documented(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the models' own code warns of is not ours to judge
        result: Result = examine(name)
    assert result.failures == refusals(name)
    if DOCUMENT.exists():  # made by `make zoo`
        assert documented()[name][2] == families_found(result.space)


@pytest.mark.skipif(not DOCUMENT.exists(), reason="made by `make zoo`")
def test_the_document_is_whole() -> None:
    assert documented().keys() == ARCHITECTURES.keys()
    assert len(QUICK) == 42 and set(QUICK) < set(ARCHITECTURES)
    assert re.search(rf"^{len(ARCHITECTURES)} architectures", DOCUMENT.read_text(), re.MULTILINE)
    listed = re.findall(r"^- \*\*(.+)\*\*, (.+?): (.+)$", DOCUMENT.read_text(), re.MULTILINE)
    assert sorted(listed) == sorted((name, *failure) for name in REFUSED for failure in refusals(name).items())
