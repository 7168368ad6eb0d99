"""The table and the picture of a compression, from an exported folder alone."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest

from geta_hf.costs.model_costs import bytes_on_disk
from geta_hf.errors import GETAError
from geta_hf.export.export import PICTURE_NAME
from geta_hf.reporting.comparison import (
    STRUCTURE_NAME,
    Structure,
    compare,
    load_model,
    read_structure,
    table_rows,
)
from geta_hf.reporting.model_card import write_card
from geta_hf.utils.tables import format_table
from tests.small_folders import exported


@pytest.fixture
def folders(tmp_path):
    return exported(tmp_path)


def test_structure_is_what_the_folder_holds(folders) -> None:
    structure, model = read_structure(folders[1]), load_model(folders[1])
    assert [total for _, total in structure.of_kind("heads")] == [4, 4]
    for layer, (kept, _) in enumerate(structure.of_kind("channels")):
        assert model.bert.encoder.layer[layer].intermediate.dense.out_features == kept
    assert structure.bits == {name: model.get_submodule(name).bits for name in structure.bits}
    assert len(structure.bits) == 12


def test_the_table_says_what_was_measured(folders) -> None:
    table = compare(*folders, tokens=16, metrics={"dense": {"em": 90.0}, "compressed": {"em": 88.5}})
    assert "latency" in table and "latency" not in compare(*folders, tokens=16, latency=False)
    cells = {row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:4]] for row in table.splitlines()}
    assert cells["EM"] == ["90.00", "88.50"]
    assert cells["heads a layer"][0] == "4 4" and cells["mean bits"][0] == "32.00"
    assert cells["bytes on disk"][0] == f"{bytes_on_disk(folders[0]):,}"
    assert cells["parameters"][0] == f"{sum(p.numel() for p in load_model(folders[0]).parameters()):,}"
    assert {"relative BOPs, paper (quantized linears)", "CPU latency, ms"} <= set(cells)


def test_the_picture_is_written_whole(folders) -> None:
    write_card(folders[1])
    path = folders[1] / PICTURE_NAME
    assert path.stat().st_size > 5000 and not list(folders[1].glob(f".{path.stem}*"))
    assert ElementTree.parse(path).getroot().tag.endswith("svg")


def test_columns_are_aligned() -> None:
    lines = format_table(("", "dense"), [("EM", "1"), ("parameters", "1,000,000")]).splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines) == 4


def test_folders_that_are_no_export_are_refused(folders) -> None:
    with pytest.raises(GETAError, match=r"is .*dense an exported folder"):
        read_structure(folders[0])
    (folders[1] / "run/export").mkdir(parents=True)
    (folders[1] / "run/export" / STRUCTURE_NAME).write_text("{}")
    with pytest.raises(GETAError, match=r"give the export of this run, .*run/export$"):
        read_structure(folders[1] / "run")
    (folders[1] / STRUCTURE_NAME).write_text(json.dumps({"kept": {"a": 3}, "bits": {}}))
    with pytest.raises(GETAError, match="can't be read"):
        read_structure(folders[1])
    config = json.loads((folders[0] / "config.json").read_text())
    (folders[0] / "config.json").write_text(json.dumps({**config, "architectures": None}))
    with pytest.raises(GETAError, match="names no architecture"):
        load_model(folders[0])


def test_rounded_inputs_are_reported(folders) -> None:
    structure = read_structure(folders[1])
    assert list(structure.activation_bits.values()) == [6, 6]
    table = compare(*folders, tokens=16)
    assert "6.00 (2 of 12 layers)" in next(row for row in table.splitlines() if "mean bits of inputs" in row)
    write_card(folders[1])
    assert "bits of inputs" in (folders[1] / PICTURE_NAME).read_text(encoding="utf-8")


def test_a_folder_from_before_inputs_were_rounded_reads_as_float(folders) -> None:
    file = folders[1] / STRUCTURE_NAME
    stored = json.loads(file.read_text())
    assert len(stored.pop("activation_bits")) == 2
    file.write_text(json.dumps(stored))
    assert read_structure(folders[1]).activation_bits == {}


def test_what_was_not_measured_has_no_row() -> None:
    structure = Structure({"h.0:heads": (3, 4), "h.1:heads": (1, 4)}, {})
    metrics = {"dense": {"f1": 1.0}, "compressed": {"em": 2.0}}
    assert table_rows(structure, {}, {"compressed": 1234}, metrics, size_name="bytes") == [
        ("EM", "", "2.00"),
        ("heads", "8", "4 (50.0%)"),
        ("groups", "8", "4 (50.0%)"),
        ("bytes", "", "1,234"),
    ]
    shares = {"dense": {"accuracy": 0.875}, "compressed": {"accuracy": 0.8594}}
    assert table_rows(structure, {}, {}, shares)[0] == ("accuracy", "0.8750", "0.8594")
    percent = {"dense": {"em": 0.0, "f1": 0.5}, "compressed": {"em": 12.0}}
    assert table_rows(structure, {}, {}, percent)[0] == ("EM", "0.00", "12.00")
    times = {"latency_ms": {"dense": 3.0, "compressed": 2.0}}
    by_layer = table_rows(structure, {}, {}, times, by_layer=True)
    assert by_layer[0] == ("heads a layer", "4 4", "3 1")
    assert by_layer[-1] == ("CPU latency, ms", "3.00", "2.00 (1.5x faster)")
    times = {"latency_ms": {"dense": 1.0, "compressed": 4.0}}
    assert table_rows(structure, {}, {}, times)[-1][2] == "4.00 (4.0x slower)"
