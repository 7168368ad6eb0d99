"""Draw the structure of a compressed model as SVG: one column for each layer, bars for kept groups, shades for bits."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from statistics import mean

from geta_hf.reporting.comparison import Structure
from geta_hf.reporting.graph_page import pattern

KEPT, BITS, INPUTS = "kept", "bits of weights", "bits of inputs"
MANY_ROWS = 40
"""If a section has more rows, those that differ only in a number (experts, blocks of a stage) share one."""

# A number that is a full part of a name, as in layers.3, and not one inside a word, as in conv2d.
_NUMBER = re.compile(r"(?<![^.#])\d+(?![^.:#])")
# XML has no escape for these: one of them makes the picture unreadable.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")
_AXIS, _TITLE, _LABEL, _BAR, _CELL, _GAP, _LETTER = 34, 24, 15, 34, 22, 7, 6.3
_NARROWEST, _WIDE, _STEP = 300, 760, 26
_REPEAT = 12
"""With more rows than this, the axis is drawn again below them."""

_MEANINGS = {
    KEPT: "bar: share of the dense model's groups",
    BITS: "stronger color: more bits",
    INPUTS: "stronger color: more bits",
}
_STYLE = """
svg { --text: #1c2430; --quiet: #667085; --before: #d5dae3; --kept: #2f6fb5; --bits: #d9772b; --inputs: #2a9d6f; }
@media (prefers-color-scheme: dark) {
  svg { --text: #e6eaf0; --quiet: #98a2b3; --before: #3a4554; --kept: #5b9be6; --bits: #d9772b; --inputs: #2fae7c; }
}
"""


@dataclass(frozen=True)
class Cell:
    """Hold one layer's entry of a row.

    Attributes:
        text: the text in the picture.
        share: how full its bar, or how dark its square is, in [0, 1].
        title: the full description, shown as a tooltip.
    """

    text: str
    share: float
    title: str


@dataclass(frozen=True)
class Row:
    """Hold the same quantity for every layer.

    Attributes:
        section: `KEPT`, `BITS` or `INPUTS`.
        label: its name, without the prefix that all names share.
        cells: column -> cell; not every layer has one.
    """

    section: str
    label: str
    cells: dict[str, Cell]


@dataclass(frozen=True)
class Grid:
    """Hold the rows by layer. `columns` are the layers' numbers in order, and "–" for what has no layer number."""

    columns: list[str]
    rows: list[Row]


def printable(text: object) -> str:
    """Escape any text for HTML, SVG and attributes, and replace characters that UTF-8 or XML cannot represent."""
    return html.escape(_UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", str(text)))


def layer_grid(structure: Structure) -> Grid:
    """Arrange a structure by layer: the first number in a name is its column, the rest of the name its row."""
    rows = [Row(KEPT, label, _map(cells, _kept)) for label, cells in _arranged(structure.kept).items()]
    of_inputs = {name: {bits: 1} for name, bits in structure.activation_bits.items()}
    for section, bits in ((BITS, structure.widths), (INPUTS, of_inputs)):
        rows += [Row(section, label, _map(cells, _bits)) for label, cells in _arranged(bits).items()]
    found = {column for row in rows for column in row.cells}
    # What has no layer number comes last.
    return Grid(sorted(found, key=lambda column: int(column) if column.isdecimal() else 10**9), rows)


def _map(cells: Mapping[str, list[tuple[str, object]]], make: object) -> dict[str, Cell]:
    return {column: make(entries) for column, entries in cells.items()}  # type: ignore[operator]


def _arranged(values: Mapping[str, object]) -> dict[str, dict[str, list[tuple[str, object]]]]:
    """Return label -> column -> the named values."""
    places = {name: _split(name) for name in values}
    if len({(before, after) for before, _, after in places.values()}) > MANY_ROWS:
        # Experts are numbered behind the layer: each would have a row of its own.
        places = {name: (before, number, pattern(after)) for name, (before, number, after) in places.items()}
    shared = _shared([before for before, number, _ in places.values() if number])
    rows: dict[str, dict[str, list[tuple[str, object]]]] = {}
    for name, (before, number, after) in places.items():
        label = f"{before.removeprefix(shared)}*{after}".removeprefix("*") if number else before
        label = label.lstrip(".:").replace(":", " ") or before.rstrip(".") or name
        rows.setdefault(label, {}).setdefault(number or "–", []).append((name, values[name]))
    return rows


def _split(name: str) -> tuple[str, str, str]:
    found = _NUMBER.search(name)
    return (name, "", "") if found is None else (name[: found.start()], found[0], name[found.end() :])


def _shared(prefixes: Sequence[str]) -> str:
    """Return the leading parts that all prefixes have in common."""
    parts = zip(*(prefix.split(".") for prefix in prefixes), strict=False)
    return ".".join(same[0] for same in takewhile(lambda same: len(set(same)) == 1, parts))


def _kept(entries: Sequence[tuple[str, tuple[int, int]]]) -> Cell:
    kept = sum(count for _, (count, _) in entries)
    before = sum(total for _, (_, total) in entries)
    return Cell(str(kept), kept / max(before, 1), f"{_names(entries)}: {kept:,} of {before:,}")


def _bits(entries: Sequence[tuple[str, Mapping[int, int]]]) -> Cell:
    """Return the cell of weights by the widths of their rows or columns, each with how many have it."""
    means = [sum(bits * count for bits, count in widths.items()) / sum(widths.values()) for _, widths in entries]
    found = {bits for _, widths in entries for bits in widths}
    lowest, highest = min(found), max(found)
    text = str(lowest) if lowest == highest else f"{mean(means):.1f}"
    spread = text if lowest == highest else f"{lowest} to {highest}, {text} on average"
    title = f"{_names(entries)}: {spread} bits"
    if len(entries) == 1 and len(found) > 1:
        title += f" ({', '.join(f'{bits} bits: {count:,}' for bits, count in entries[0][1].items())})"
    # On a logarithmic scale from 2 bits (0) to 16 bits (1): each halving is as large a step of the shade.
    return Cell(text, math.log2(mean(means) / 2) / 3, title)


def _names(entries: Sequence[tuple[str, object]]) -> str:
    return entries[0][0] if len(entries) == 1 else f"{entries[0][0]} and {len(entries) - 1} more"


class _Columns:
    """The horizontal places of the columns: in units of the picture, or in percent of a page that sets the width."""

    def __init__(self, grid: Grid, standalone: bool) -> None:
        # As wide as the longest number needs, and wider where few layers leave room.
        longest = max((len(cell.text) for row in grid.rows for cell in row.cells.values()), default=1)
        self.count = max(len(grid.columns), 1)
        self.narrowest = max(_NARROWEST, max(_STEP, round(5.3 * longest + 3)) * self.count)
        self.width = max(self.narrowest, _WIDE)
        self.standalone = standalone

    def _length(self, share: float) -> str:
        return f"{share * self.width:g}" if self.standalone else f"{share * 100:.4g}%"

    def left(self, column: int) -> str:
        return self._length((column + 0.03) / self.count)

    def middle(self, column: int) -> str:
        return self._length((column + 0.5) / self.count)

    @property
    def box(self) -> str:
        """The width of one column without the gap to the next."""
        return self._length(0.94 / self.count)

    @property
    def end(self) -> str:
        return self._length(1)


def draw(grid: Grid, standalone: bool = False) -> str:
    """Draw the grid as one SVG element.

    Layers are columns under one axis. Bars show which share of each family is kept, shades how many bits each weight
    has.

    Args:
        grid: see `layer_grid`.
        standalone: for a separate file: include the colors, and scale as a picture does. Otherwise the surrounding page
            sets `--text`, `--quiet`, `--before`, `--kept`, `--bits` and `--inputs`, and columns fill its width while
            letters keep their size.
    """
    columns = _Columns(grid, standalone)
    parts = list[str]()
    top = 0
    if grid.rows:
        parts += _axis(grid.columns, columns, top)
        top += _AXIS
    section = ""
    for row in grid.rows:
        if row.section != section:
            section = row.section
            parts += _heading(section, columns, top)
            top += _TITLE
        parts.append(_label(row.label, top, columns.narrowest))
        height = _BAR + 14 if section == KEPT else _CELL
        for place, column in enumerate(grid.columns):
            if column in row.cells:
                paint = _bar if section == KEPT else _square
                parts += paint(row.cells[column], section, place, top + _LABEL, columns)
        top += _LABEL + height + _GAP
    if len(grid.rows) > _REPEAT:
        parts += _axis(grid.columns, columns, top)
        top += _AXIS
    if standalone:
        size = f'width="{columns.width}" height="{top}" viewBox="0 0 {columns.width} {top}"'
        style = f"<style>{_STYLE}</style>"
    else:
        size = f'width="100%" height="{top}" style="min-width:{columns.narrowest}px"'
        style = ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} '
        f'role="img" aria-label="kept groups and bits of every layer" font-family="system-ui, sans-serif" '
        f'font-size="11">{style}{"".join(parts)}</svg>'
    )


def _axis(names: Sequence[str], columns: _Columns, top: int) -> Iterator[str]:
    yield _text("layer", "1", top + 12, "--quiet", "start")
    for place, name in enumerate(names):
        yield _text(name, columns.middle(place), top + 28, "--quiet")


def _heading(section: str, columns: _Columns, top: int) -> Iterator[str]:
    yield _text(section, "1", top + 16, "--text", "start", 13, ' font-weight="600"')
    yield _text(_MEANINGS[section], columns.end, top + 16, "--quiet", "end")


def _label(label: str, top: int, width: int) -> str:
    room = int(width / _LETTER)
    short = label if len(label) <= room else f"{label[: room // 3]}…{label[-(room - room // 3 - 1) :]}"
    return f"<g><title>{printable(label)}</title>{_text(short, '1', top + 10, '--quiet', 'start')}</g>"


def _bar(cell: Cell, section: str, place: int, top: float, columns: _Columns) -> Iterator[str]:
    height = round(_BAR * cell.share, 1)
    yield f"<g><title>{printable(cell.title)}</title>{_box(columns, place, top, _BAR, '--before')}"
    yield _box(columns, place, top + _BAR - height, height, "--kept")
    size = 9 if len(cell.text) > 4 else 10
    yield f"{_text(cell.text, columns.middle(place), top + _BAR + 11, '--text', size=size)}</g>"


def _square(cell: Cell, section: str, place: int, top: float, columns: _Columns) -> Iterator[str]:
    colour = "--bits" if section == BITS else "--inputs"
    # At most so dark that the number on it can be read in both schemes.
    shade = round(0.1 + 0.65 * max(0.0, min(cell.share, 1.0)), 2)
    yield f"<g><title>{printable(cell.title)}</title>{_box(columns, place, top, _CELL, colour, shade)}"
    yield f"{_text(cell.text, columns.middle(place), top + 15, '--text')}</g>"


def _box(columns: _Columns, place: int, top: float, height: float, colour: str, opacity: float = 1) -> str:
    at = f'x="{columns.left(place)}" y="{top:g}" width="{columns.box}" height="{height:g}"'
    return f'<rect {at} rx="2" style="fill:var({colour})" fill-opacity="{opacity:g}"/>'


def _text(text: str, x: str, y: float, colour: str, anchor: str = "middle", size: int = 11, more: str = "") -> str:
    at = f'x="{x}" y="{y:g}" text-anchor="{anchor}" font-size="{size}"'
    return f'<text {at} style="fill:var({colour})"{more}>{printable(text)}</text>'
