"""A config or an index that is none is refused by everything of geta_hf that opens a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForQuestionAnswering

from geta_hf import GETAError
from geta_hf.convert import convert
from geta_hf.inference import load_for_inference
from geta_hf.reporting.comparison import load_model
from geta_hf.reporting.hub import files_to_push
from geta_hf.serialization.validate import INDEX, check_readable, weight_files

NORM = "bert.embeddings.LayerNorm.weight"
Openers = dict[str, Callable[[Path], Any]]
OPENERS: Openers = {
    "the check": check_readable,
    "load_model": load_model,
    "convert": lambda folder: convert(folder, folder.with_name("new")),
    "load_for_inference": lambda folder: load_for_inference(AutoModelForQuestionAnswering, folder),
    "files_to_push": files_to_push,
}
BAD: dict[str, tuple[str, str]] = {
    "no metadata": ('{"weight_map": {"x": "y"}}', "metadata is 'None'"),
    "no weight_map": ('{"metadata": {}}', "weight_map is 'None'"),
    "a list": ("[]", "holds list"),
    "cut off": ('{"metad', "can't be read"),
    "a number for a file": ('{"metadata": {}, "weight_map": {"x": 7}}', "weight_map is"),
    "an empty map": ('{"metadata": {}, "weight_map": {}}', "weight_map is '{}'"),
    "too deep": ("[" * 100_000, "can't be read"),
}


@pytest.fixture
def sharded(exported: Path) -> Path:
    AutoModelForQuestionAnswering.from_pretrained(exported).save_pretrained(exported, max_shard_size="8KB")
    (exported / "model.safetensors").unlink()
    return exported


@pytest.mark.parametrize("opener", OPENERS)
@pytest.mark.parametrize("bad", BAD)
def test_an_index_that_is_none(sharded: Path, opener: str, bad: str) -> None:
    text, message = BAD[bad]
    (sharded / INDEX).write_text(text)
    with pytest.raises(GETAError, match=f"{INDEX}.*{message}"):
        OPENERS[opener](sharded)


@pytest.mark.parametrize("value", [[1], "geta", 3])
@pytest.mark.parametrize("opener", ["the check", "load_model", "load_for_inference"])
def test_a_quantization_config_that_is_none(exported: Path, opener: str, value: Any) -> None:
    file = exported / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": value}))
    with pytest.raises(GETAError, match=r"config\.json: quantization_config is"):
        OPENERS[opener](exported)


@pytest.mark.parametrize("text", ["", "[]", '{"a":'])
def test_a_config_that_is_none(exported: Path, text: str) -> None:
    (exported / "config.json").write_text(text)
    with pytest.raises(GETAError, match=r"config\.json"):
        check_readable(exported)


def test_what_is_right_passes(exported: Path, sharded: Path, tmp_path: Path) -> None:
    assert weight_files(tmp_path) == {"model.safetensors"}
    assert weight_files(sharded) == {path.name for path in sharded.glob("*.safetensors")}
    check_readable(sharded)
    check_readable("somebody/some-name")
