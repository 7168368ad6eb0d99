"""Fixtures of the export tests."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedModel
from transformers.utils import logging

from geta_hf.export import export
from geta_hf.qadg import PruningSpace
from tests.export.tiny_encoders import some_batch, tiny_model, train_by_hand
from tests.spaces import build_space


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable_progress_bar()
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(level)
    logging.enable_progress_bar()


@pytest.fixture
def trained() -> tuple[PreTrainedModel, PruningSpace]:
    model = tiny_model()
    space = build_space(model, some_batch())
    train_by_hand(model, space)
    return model, space


@pytest.fixture(scope="session")
def _exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model()
    space = build_space(model, some_batch())
    train_by_hand(model, space)
    folder = tmp_path_factory.mktemp("export") / "model"
    export(model, folder, space=space, batch=some_batch())
    return folder


@pytest.fixture
def exported(_exported: Path, tmp_path: Path) -> Path:
    """A fresh copy of one good export, to be read or damaged."""
    return shutil.copytree(_exported, tmp_path / "copy")
