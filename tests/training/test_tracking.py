"""Trackers get a run's numbers and, at its end, its picture: TensorBoard's own files, the others' writers imitated."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers.integrations import TrackioCallback, WandbCallback

from geta_hf.reporting.comparison import Structure, read_structure
from geta_hf.reporting.structure_image import structure_image
from geta_hf.reporting.structure_svg import layer_grid
from geta_hf.training.tracking import PICTURE_TAG, StructurePicture, decided_structure
from tests.training.test_trainer import trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = trainer(tmp_path_factory.mktemp("tracked"))
    made.train()
    return made


def test_the_structure_is_that_of_the_export(trained: Any, tmp_path: Path) -> None:
    found = decided_structure(trained.method, trained.space)
    trained.export_model(tmp_path / "small")
    written = read_structure(tmp_path / "small")
    assert found is not None and found.kept == {name: tuple(counts) for name, counts in written.kept.items()}
    assert found.bits == written.bits
    assert decided_structure(SimpleNamespace(finished=False), trained.space) is None


def test_the_picture_has_bars_of_the_kept_share() -> None:
    """Counted in pixels: half of a bar is blue, and more bits are a darker orange."""
    kept = {"layers.0.mlp:channels": (4, 8), "layers.1.mlp:channels": (8, 8)}
    image = structure_image(layer_grid(Structure(kept, {"layers.0.up": 4, "layers.1.up": 8})))
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    top, bottom = (image[first : first + 4].reshape(-1, 3) for first in (35, 59))
    blue = (top == (47, 111, 181)).all(1).sum()
    assert blue == pytest.approx(4 * (17 + 34), abs=60)  # without the pixels of letters
    colors = {tuple(color) for color in bottom.astype(int).tolist() if color[0] > color[2] + 20}
    assert len(colors) >= 2 and min(color[2] for color in colors) < 120


class Writer:
    """What wandb and trackio offer of what is used here."""

    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []
        self.closed = False

    def log(self, values: dict[str, Any]) -> None:
        assert not self.closed
        self.logged.append(values)

    def Image(self, picture: Any) -> tuple[str, tuple[int, ...]]:
        return ("image", picture.shape)


@pytest.mark.parametrize("kind", [WandbCallback, TrackioCallback])
def test_the_others_get_it_before_they_close(kind: Any, trained: Any) -> None:
    tracker, writer = kind.__new__(kind), Writer()
    tracker._wandb = tracker._trackio = writer
    tracker._initialized = True
    state = SimpleNamespace(is_world_process_zero=True, global_step=24)
    callback = StructurePicture([tracker], lambda: decided_structure(trained.method, trained.space))
    callback.on_train_end(None, state, None)
    (line,) = writer.logged
    assert line[PICTURE_TAG][0] == "image" and line["train/global_step"] == 24
    tracker._initialized = False  # nothing was ever logged, so no run is open
    callback.on_train_end(None, state, None)
    state.is_world_process_zero, tracker._initialized = False, True
    callback.on_train_end(None, state, None)
    assert len(writer.logged) == 1


def test_it_comes_first_and_costs_nothing_without_trackers(trained: Any) -> None:
    first = trained.callback_handler.callbacks[0]
    assert isinstance(first, StructurePicture)
    first.structure = lambda: pytest.fail("nobody would see it")
    first.on_train_end(None, SimpleNamespace(is_world_process_zero=True, global_step=1), None)


def test_tensorboard_has_numbers_and_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    made = trainer(tmp_path / "run", report_to=["tensorboard"], logging_steps=500)
    made.train()
    found = EventAccumulator(str(tmp_path / "board"), size_guidance={"images": 0, "scalars": 0})
    found.Reload()
    for name in ("stage", "sparsity", "mean_bits", "relative_bops"):
        assert f"train/{name}" in found.Tags()["scalars"], name
    assert [event.value for event in found.Scalars("train/stage")][:4] == [1, 2, 3, 4]
    assert found.Scalars("train/sparsity")[-1].value == pytest.approx(0.5)
    (picture,) = found.Images(PICTURE_TAG)
    assert picture.step == 24 and picture.encoded_image_string.startswith(b"\x89PNG")
