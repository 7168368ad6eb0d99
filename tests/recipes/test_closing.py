"""The last lines of a run say only what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from geta_hf.recipes.closing import closing
from geta_hf.recipes.speed import Speed, model_bytes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file({"w": torch.zeros(250_000)}, tmp_path / "model.safetensors")
    return tmp_path


SECONDS = {"start": 12.0, "exported": 6.0}


def test_everything_was_measured(folder: Path) -> None:
    text = closing(folder, True, 9_000_000, {"f1": 88.0}, {"f1": 87.5, "em": 80.0}, ("f1", "em"), SECONDS)
    first, second, third = text.splitlines()
    assert first == "9.0 → 1.0 MB, scored in 12.0 → 6.0 s (2.0x as fast), F1 88.00 → 87.50, EM 80.00"
    assert second == f"folder: {folder}" and third == f"next:   geta-hf report {folder}"


def test_speeds_replace_the_durations_of_scoring(folder: Path) -> None:
    speeds = (Speed("512 tokens", 152, 79), Speed("writing 16 tokens", 900, 900))
    text = closing(folder, True, 9_000_000, {"f1": 88.0}, {"f1": 87.5}, ("f1",), SECONDS, speeds)
    assert text.splitlines()[0] == (
        "9.0 → 1.0 MB, 1.9x faster (512 tokens in 152 → 79 ms), about as fast (writing 16 tokens in 900 → 900 ms), "
        "F1 88.00 → 87.50"
    )


@pytest.mark.parametrize("seconds", [{}, {"exported": 6.0}, {"start": 0.9, "exported": 6.0}])
def test_durations_are_compared_only_where_both_are_clear(folder: Path, seconds: dict[str, float]) -> None:
    assert "scored in" not in closing(folder, True, 9_000_000, None, {}, (), seconds)


def test_a_dense_run_is_followed_by_a_compressed_one(folder: Path) -> None:
    text = closing(folder, False, 9_000_000, None, {"f1": 88.0}, ("f1",), SECONDS)
    assert text.splitlines()[0] == "1.0 MB, F1 88.00"
    assert f"geta-hf train CONFIG.yaml --model_name_or_path {folder}" in text


def test_shared_weights_are_counted_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    assert model_bytes(model) == 64
