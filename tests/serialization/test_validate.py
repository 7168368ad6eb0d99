"""A config or an index that is none is refused by everything of geta_hf that opens a folder."""

from __future__ import annotations

import hashlib
import json
import os
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
from geta_hf.serialization.validate import INDEX, check_links, check_readable, weight_files

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


def in_cache(folder: Path) -> Path:
    """The folder as the Hub's client stores it: a snapshot of links to blobs."""
    home = folder.parent / "models--someone--small"
    snapshot = home / "snapshots" / "0123"
    for path in folder.rglob("*"):
        if path.is_file():
            blob = home / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
            blob.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(path.read_bytes())
            link = snapshot / path.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


LINKS: dict[str, tuple[str, str]] = {
    "a secret next to the folder": ("notes.txt", "../secret"),
    "a secret by its full path": ("notes.txt", "{home}/secret"),
    "a secret below": ("code/notes.py", "../../secret"),
    "a config": ("config.json", "../secret"),
    "a folder": ("code", "{home}/private"),
    "a link to a link": ("notes.txt", "private/out"),
    "a link that is broken": ("notes.txt", "../nothing"),
    "a place that only begins with the folder's name": ("notes.txt", "../outer/secret"),
}


@pytest.mark.parametrize("case", LINKS)
@pytest.mark.parametrize("opener", ["files_to_push", "convert"])
def test_links_out_of_the_folder_are_refused(exported: Path, case: str, opener: str) -> None:
    name, leads_to = LINKS[case]
    home = exported.parent
    (home / "secret").write_text((exported / "config.json").read_text())
    for folder in ("private", f"{exported.name}er", "outer"):
        (home / folder).mkdir()
        (home / folder / "secret").write_text("secret")
    (exported / "private").mkdir()
    (exported / "private" / "out").symlink_to(home / "secret")
    link = exported / name
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(leads_to.format(home=home))
    with pytest.raises(GETAError, match=r"is a link to .*, outside of the folder"):
        OPENERS[opener](exported)
    assert not (home / "new").exists()


def test_links_within_the_folder_and_of_the_hubs_cache_work(exported: Path) -> None:
    snapshot = in_cache(exported)
    assert files_to_push(snapshot) == files_to_push(exported)
    convert(snapshot, exported.with_name("new"))
    (exported / "again.json").symlink_to("config.json")
    (exported.parent / "alias").symlink_to(exported)
    check_links(exported.parent / "alias")
    (snapshot / "notes.txt").symlink_to("../../../secret")
    with pytest.raises(GETAError, match=r"notes\.txt in .* is a link"):
        files_to_push(snapshot)
    (snapshot / "notes.txt").unlink()
    (snapshot.parent.parent / "blobs" / "secret").write_text("no blob of the Hub's client")
    (snapshot / "notes.txt").symlink_to("../../blobs/secret")
    with pytest.raises(GETAError, match=r"notes\.txt in .* is a link"):
        files_to_push(snapshot)
