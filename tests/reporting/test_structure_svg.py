"""The picture shows every layer once, to scale, under names that cannot break it."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from geta_hf.reporting.comparison import Structure
from geta_hf.reporting.structure_svg import BITS, INPUTS, KEPT, MANY_ROWS, Grid, draw, layer_grid, printable

SVG = "{http://www.w3.org/2000/svg}"


def bert_like(layers: int = 3) -> Structure:
    kept = {f"bert.encoder.layer.{i}.attention:heads": (i + 1, 4) for i in range(layers)}
    kept |= {f"bert.encoder.layer.{i}:channels": (10 * i, 64) for i in range(layers)}
    bits = {f"bert.encoder.layer.{i}.{m}": 4 + i for i in range(layers) for m in ("query", "output.dense")}
    return Structure(kept, {**bits, "classifier": 8}, {"bert.encoder.layer.1.query": 6})


def test_layers_are_columns_and_what_they_share_are_rows() -> None:
    grid = layer_grid(bert_like())
    assert grid.columns == ["0", "1", "2", "–"]
    assert [(row.section, row.label) for row in grid.rows] == [
        (KEPT, "attention heads"),
        (KEPT, "channels"),
        (BITS, "query"),
        (BITS, "output.dense"),
        (BITS, "classifier"),
        (INPUTS, "query"),
    ]
    assert {column: cell.text for column, cell in grid.rows[0].cells.items()} == {"0": "1", "1": "2", "2": "3"}
    assert list(grid.rows[4].cells) == ["–"] and list(grid.rows[5].cells) == ["1"]
    assert grid.rows[0].cells["1"].title == "bert.encoder.layer.1.attention:heads: 2 of 4"


def test_columns_are_in_the_order_of_numbers() -> None:
    grid = layer_grid(Structure({}, {f"h.{i}.mlp": 4 for i in (10, 9, 0, 100)}))
    assert grid.columns == ["0", "9", "10", "100"] and [row.label for row in grid.rows] == ["mlp"]


def test_two_towers_have_rows_of_their_own() -> None:
    bits = {f"{tower}.block.{i}.layer.0.q": 4 for tower in ("encoder", "decoder") for i in range(2)}
    labels = [row.label for row in layer_grid(Structure({}, bits)).rows]
    assert labels == ["encoder.block.*.layer.0.q", "decoder.block.*.layer.0.q"]


def test_too_many_rows_become_one_with_sums_and_means() -> None:
    kept = {f"layers.{i}.experts.{j}:channels": (j, 64) for i in range(2) for j in range(MANY_ROWS + 1)}
    bits = {f"layers.{i}.experts.{j}.w1": 4 + j % 2 for i in range(2) for j in range(MANY_ROWS + 1)}
    channels, widths = layer_grid(Structure(kept, bits)).rows
    assert channels.label == "experts.* channels" and channels.cells["1"].text == str(sum(range(MANY_ROWS + 1)))
    assert widths.cells["0"].text == "4.5" and "4 to 5" in widths.cells["0"].title


def test_every_value_is_drawn_once_and_to_scale() -> None:
    structure = bert_like()
    root = ElementTree.fromstring(draw(layer_grid(structure), standalone=True))
    cells = [group for group in root.iter(f"{SVG}g") if group.find(f"{SVG}rect") is not None]
    assert len(cells) == len(structure.kept) + len(structure.bits) + len(structure.activation_bits)
    for name, (left, before) in structure.kept.items():
        (cell,) = [group for group in cells if group.findtext(f"{SVG}title") == f"{name}: {left} of {before}"]
        whole, kept = (float(box.get("height")) for box in cell.iter(f"{SVG}rect"))
        assert kept / whole == pytest.approx(left / before, abs=0.01)
    width, height = (float(root.get(side)) for side in ("width", "height"))
    for box in root.iter(f"{SVG}rect"):
        assert float(box.get("x")) >= 0 and float(box.get("x")) + float(box.get("width")) <= width
        assert float(box.get("y")) + float(box.get("height")) <= height
    assert "prefers-color-scheme: dark" in root.findtext(f"{SVG}style")


@pytest.mark.parametrize("name", ["</svg><script>alert(1)</script>", "a\"'&b", "a\x00\ud800b", "x" * 900, "", "…"])
def test_no_name_breaks_the_picture(name: str) -> None:
    picture = draw(layer_grid(Structure({f"{name}.0:heads": (0, 0)}, {name: 4})))
    root = ElementTree.fromstring(picture)
    assert picture.encode() and "<script" not in picture
    # A long name widens nothing.
    assert root.get("width") == "100%" and root.get("style") == "min-width:300px"


def test_columns_fill_a_page_of_any_width() -> None:
    root = ElementTree.fromstring(draw(layer_grid(bert_like(2))))
    boxes = list(root.iter(f"{SVG}rect"))
    assert all(float(box.get(side).removesuffix("%")) <= 100 for box in boxes for side in ("x", "width"))
    assert {box.get("width") for box in boxes} == {"31.33%"}  # three columns, one for what has no layer
    assert max(float(box.get("x")[:-1]) + float(box.get("width")[:-1]) for box in boxes) > 98
    assert root.get("viewBox") is None


def test_the_axis_is_named_once_and_again_below_many_rows() -> None:
    def axes(structure: Structure) -> int:
        root = ElementTree.fromstring(draw(layer_grid(structure)))
        return [text.text for text in root.iter(f"{SVG}text")].count("layer")

    assert axes(bert_like()) == 1
    assert axes(Structure({}, {f"layer.{i}.part{j}": 4 for i in range(2) for j in range(20)})) == 2


def test_nothing_is_drawn_of_nothing() -> None:
    assert layer_grid(Structure({}, {})) == Grid([], [])
    assert ElementTree.fromstring(draw(Grid([], []))).get("height") == "0"


def test_printable_keeps_lines_and_drops_what_xml_cannot_hold() -> None:
    assert printable("a\n\tb") == "a\n\tb" and printable("\x00<\ud800>") == "�&lt;�&gt;"
