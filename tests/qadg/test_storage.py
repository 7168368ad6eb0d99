"""A saved space is the same space, and a damaged one is refused with the file and the key."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from geta_hf.errors import GETAError
from geta_hf.qadg import PruningSpace, build_space
from geta_hf.qadg.storage import INDICES, TABLES

from .models import make


@pytest.fixture
def space(batch) -> PruningSpace:
    return build_space(make("bert-sequence"), batch, prune=["residual"])


def plain(space: PruningSpace) -> dict:
    families = [vars(f) | {"members": [(m.tensor, m.dim, m.index.tolist()) for m in f.members]} for f in space.families]
    return vars(space) | {"families": families}


def test_what_is_loaded_is_what_was_saved(space, tmp_path):
    space.save(tmp_path / "new" / "folder")
    loaded = PruningSpace.load(tmp_path / "new" / "folder", make("bert-sequence"))
    assert plain(loaded) == plain(space)
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [TABLES, INDICES]


def test_another_model_is_refused(space, tmp_path):
    space.save(tmp_path)
    with pytest.raises(GETAError, match=r"names bert\.pooler\.dense\.weight, which the model lacks"):
        PruningSpace.load(tmp_path, make("bert-qa"))
    model = make("bert-sequence")
    model.classifier.weight = torch.nn.Parameter(torch.zeros(3, 16))
    with pytest.raises(GETAError, match=re.escape("classifier.weight has shape (3, 16), but (2, 16)")):
        PruningSpace.load(tmp_path, model)


@pytest.mark.parametrize("missing", [TABLES, INDICES])
def test_a_missing_file_is_named(space, tmp_path, missing):
    space.save(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(GETAError, match=f"{missing} is missing"):
        PruningSpace.load(tmp_path)


def test_files_of_two_spaces_are_told_apart(space, batch, tmp_path):
    space.save(tmp_path / "a")
    build_space(make("bert-qa"), batch).save(tmp_path / "b")
    (tmp_path / "a" / INDICES).write_bytes((tmp_path / "b" / INDICES).read_bytes())
    with pytest.raises(GETAError, match="belongs to another space"):
        PruningSpace.load(tmp_path / "a")


def test_a_cut_off_file_is_refused(space, tmp_path):
    space.save(tmp_path)
    for name in (INDICES, TABLES):
        content = (tmp_path / name).read_bytes()
        for length in (0, 1, 8, 100, len(content) // 2, len(content) - 2):
            (tmp_path / name).write_bytes(content[:length])
            with pytest.raises(GETAError, match=name):
                PruningSpace.load(tmp_path)
        (tmp_path / name).write_bytes(content)


EDITS = {
    "version": (lambda t: t.update(format_version=2), "format_version 2"),
    "no families": (lambda t: t.pop("families"), "KeyError: 'families'"),
    "not a table": (lambda t: t.update(families=3), "TypeError"),
    "kind": (lambda t: t["families"][0].update(kind="toes"), "unknown kind 'toes'"),
    "coupling": (lambda t: t["families"][0].update(couplings=["love"]), "unknown couplings"),
    "excludes": (lambda t: t["families"][0].update(excludes=["nobody"]), "not there"),
    "prunable": (lambda t: t["families"][0].update(prunable="yes"), "prunable of"),
    "field": (lambda t: t["families"][0].update(surprise=1), "surprise"),
    "twins": (lambda t: t["families"][1].update(name=t["families"][0]["name"]), "one name"),
    "no members": (lambda t: t["families"][0].update(members=[]), "no members"),
    "dim": (lambda t: t["families"][0]["members"][0].update(dim=7), "dim 7: no such dim"),
    "negative dim": (lambda t: t["families"][0]["members"][0].update(dim=-1), "dim -1: no such dim"),
    "tensor": (lambda t: t["families"][0]["members"][0].update(tensor="nothing"), "no such dim of shape None"),
    "one member more": (lambda t: t["families"][0]["members"].append({"tensor": "a", "dim": 0}), "KeyError"),
    "shapes": (lambda t: t["shapes"].update({name: [1, 1] for name in t["shapes"]}), "beyond"),
    "shape words": (lambda t: t["shapes"].update({name: ["x"] for name in t["shapes"]}), "ValueError"),
}


@pytest.mark.parametrize("name", EDITS)
def test_edited_tables_are_refused(space, tmp_path, name):
    edit, complaint = EDITS[name]
    space.save(tmp_path)
    tables = json.loads((tmp_path / TABLES).read_text())
    edit(tables)
    (tmp_path / TABLES).write_text(json.dumps(tables))
    with pytest.raises(GETAError, match=complaint):
        PruningSpace.load(tmp_path)


@pytest.mark.parametrize(
    "bad", [torch.zeros(4, 4), torch.zeros(0, 1, dtype=torch.long), torch.full((16, 1), 99), torch.zeros(16, 1).long()]
)
def test_edited_indices_are_refused(space, tmp_path, bad):
    import hashlib

    space.save(tmp_path)
    indices = load_file(tmp_path / INDICES)
    save_file(indices | {"0.0": bad}, tmp_path / INDICES)
    tables = json.loads((tmp_path / TABLES).read_text())
    tables["indices_sha256"] = hashlib.sha256((tmp_path / INDICES).read_bytes()).hexdigest()
    (tmp_path / TABLES).write_text(json.dumps(tables))
    with pytest.raises(GETAError, match=r"index is|indices beyond|in two groups"):
        PruningSpace.load(tmp_path)
