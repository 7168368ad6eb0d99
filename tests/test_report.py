"""The table and the picture of a compression, from an exported folder alone."""

from __future__ import annotations

import json

import pytest

from geta_hf import build_space, export
from geta_hf.cost import bytes_on_disk
from geta_hf.errors import GETAError
from geta_hf.quantization import attach_input_quantizers, step_size
from geta_hf.report import STRUCTURE_NAME, compare, format_table, load_model, plot_structure, read_structure
from tests.export.tiny_encoders import train_by_hand


@pytest.fixture
def folders(bert, batch, tmp_path):
    bert.save_pretrained(tmp_path / "dense")
    space = build_space(bert, batch)
    train_by_hand(bert, space)
    export(bert, tmp_path / "small", space=space, batch=batch)
    return tmp_path / "dense", tmp_path / "small"


def test_structure_is_what_the_folder_holds(folders) -> None:
    structure, model = read_structure(folders[1]), load_model(folders[1])
    assert [total for _, total in structure.of_kind("heads")] == [4, 4]
    for layer, (kept, _) in enumerate(structure.of_kind("channels")):
        assert model.bert.encoder.layer[layer].intermediate.dense.out_features == kept
    assert structure.bits == {name: model.get_submodule(name).bits for name in structure.bits}
    assert len(structure.bits) == 12


def test_the_table_says_what_was_measured(folders) -> None:
    table = compare(*folders, tokens=16, metrics={"dense": {"em": 90.0}, "compressed": {"em": 88.5}})
    cells = {row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:4]] for row in table.splitlines()}
    assert cells["EM"] == ["90.00", "88.50"]
    assert cells["heads a layer"][0] == "4 4" and cells["mean bits"][0] == "32.00"
    assert cells["bytes on disk"][0] == f"{bytes_on_disk(folders[0]):,}"
    assert cells["parameters"][0] == f"{sum(p.numel() for p in load_model(folders[0]).parameters()):,}"
    assert {"relative BOPs, paper (quantized linears)", "CPU latency, ms"} <= set(cells)


@pytest.mark.parametrize("name", ["picture.png", "picture.svg"])
def test_the_picture_is_written_whole(folders, tmp_path, name: str) -> None:
    path = plot_structure(folders[1], tmp_path / name)
    assert path.stat().st_size > 5000 and not list(tmp_path.glob(".picture*"))


def test_columns_are_aligned() -> None:
    lines = format_table(("", "dense"), [("EM", "1"), ("parameters", "1,000,000")]).splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines) == 4


def test_folders_that_are_no_export_are_refused(folders) -> None:
    with pytest.raises(GETAError, match=r"is .*dense an exported folder"):
        read_structure(folders[0])
    (folders[1] / STRUCTURE_NAME).write_text(json.dumps({"kept": {"a": 3}, "bits": {}}))
    with pytest.raises(GETAError, match="can't be read"):
        read_structure(folders[1])
    config = json.loads((folders[0] / "config.json").read_text())
    (folders[0] / "config.json").write_text(json.dumps({**config, "architectures": None}))
    with pytest.raises(GETAError, match="names no architecture"):
        load_model(folders[0])


def test_rounded_inputs_are_reported(bert, batch, tmp_path) -> None:
    bert.save_pretrained(tmp_path / "dense")
    space = build_space(bert, batch)
    train_by_hand(bert, space, per_channel=True)
    for place, layer in enumerate(attach_input_quantizers(bert, [batch], exclude=["value$"]).values()):
        quantizer = layer.input_quantizer
        quantizer.d.data.copy_(step_size(4 if place % 2 else 8, quantizer.q_m, quantizer.t).detach())
    export(bert, tmp_path / "small", space=space, batch=batch)
    structure = read_structure(tmp_path / "small")
    assert sorted(structure.activation_bits.values()) == [4] * 5 + [8] * 5
    table = compare(tmp_path / "dense", tmp_path / "small", tokens=16)
    assert "6.00 (10 of 12 layers)" in next(row for row in table.splitlines() if "mean bits of inputs" in row)
    assert plot_structure(tmp_path / "small", tmp_path / "picture.png").stat().st_size > 5000


def test_a_folder_from_before_inputs_were_rounded_reads_as_float(folders) -> None:
    file = folders[1] / STRUCTURE_NAME
    stored = json.loads(file.read_text())
    assert stored.pop("activation_bits") == {}
    file.write_text(json.dumps(stored))
    assert read_structure(folders[1]).activation_bits == {}
    assert "bits of inputs" not in compare(*folders, tokens=16)
