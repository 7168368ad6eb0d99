"""Scores are read again on what they were measured on, and on nothing else; a file is complete or counts as none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from geta_hf.methods import OneShotConfig
from geta_hf.methods.one_shot.choice import Losses
from geta_hf.methods.one_shot.method import score_settings
from geta_hf.methods.one_shot.score_file import fingerprint, read_scores, write_scores

LOSSES = Losses(torch.rand(5, dtype=torch.float64), torch.rand(2, 3, dtype=torch.float64), [2, 4, 8])


def key_of(model: nn.Module, ids: Tensor, config: OneShotConfig | None = None, groups: int = 5) -> str:
    settings = score_settings(config or OneShotConfig(target_bytes=1))
    return fingerprint(model, [{"input_ids": ids, "nested": {"a": ids}, "flag": True}], settings, ["0"], groups)


def test_what_is_written_is_read(tmp_path: Path):
    write_scores(tmp_path / "new" / "a", "key", LOSSES)
    found = read_scores(tmp_path / "new" / "a", "key")
    assert found is not None and found.widths == LOSSES.widths
    assert torch.equal(found.removal, LOSSES.removal) and torch.equal(found.rounding, LOSSES.rounding)
    assert read_scores(tmp_path / "new" / "a", "other") is None
    assert read_scores(tmp_path / "b", "key") is None
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a"]


@pytest.mark.parametrize("content", [b"", b"no file of tensors", b"\x08\0\0\0\0\0\0\0{}      "])
def test_a_file_that_cannot_be_read_counts_as_none(content: bytes, tmp_path: Path):
    (tmp_path / "a").write_bytes(content)
    assert read_scores(tmp_path / "a", "key") is None


def test_scores_that_are_not_finite_count_as_none(tmp_path: Path):
    write_scores(tmp_path / "a", "key", Losses(torch.full((5,), torch.nan).double(), LOSSES.rounding, [2, 4, 8]))
    assert read_scores(tmp_path / "a", "key") is None


def test_a_key_tells_models_data_and_settings_apart():
    torch.manual_seed(0)
    model, ids = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), torch.arange(8).view(2, 4)
    first = key_of(model, ids)
    # Another budget is served by the same scores.
    assert key_of(model, ids.clone(), OneShotConfig(target_parameters=0.5, mean_bits=3)) == first
    others = [
        key_of(model, ids + 1),
        key_of(model, ids.view(1, 8)),
        key_of(model, ids.int()),
        key_of(model, ids, groups=6),
        key_of(model, ids, OneShotConfig(target_bytes=1, saliency="magnitude")),
        key_of(model, ids, OneShotConfig(target_bytes=1, grid="block32")),
        key_of(model, ids, OneShotConfig(target_bytes=1, bits=(3, 8))),
        key_of(model, ids, OneShotConfig(target_bytes=1, keep=["heads"])),
        key_of(model, ids, OneShotConfig(target_bytes=1, exclude=["0"])),
    ]
    with torch.no_grad():
        model[0].weight[3, 3] += 1e-6
    others.append(key_of(model, ids))
    model[1].running_mean += 1
    others.append(key_of(model, ids))
    others.append(key_of(model.bfloat16(), ids))
    assert len({first, *others}) == len(others) + 1
