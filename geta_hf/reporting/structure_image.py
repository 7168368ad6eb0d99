"""Draw the structure of a compressed model as pixels, for trackers of experiments, which show no SVG."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from geta_hf.errors import GETAError
from geta_hf.reporting.structure_svg import KEPT, Cell, Grid

if TYPE_CHECKING:
    import numpy as np

_CELL, _LINE, _GAP, _MARGIN = 34, 20, 4, 10
_TEXT, _QUIET, _BEFORE = (28, 36, 48), (102, 112, 133), (213, 218, 227)
_KEPT, _BITS = (47, 111, 181), (217, 119, 43)


def structure_image(grid: Grid) -> np.ndarray:
    """Return the picture as uint8, shape (height, width, 3): a row for each kind of part, a column for each layer.

    A blue bar is the share of groups that is kept, a darker orange means more bits; both have their number.

    Args:
        grid: of `layer_grid`.

    Raises:
        GETAError: pillow is not installed.
    """
    try:
        from PIL import Image, ImageDraw
    except ImportError as error:
        raise GETAError("a picture for trackers needs `pip install pillow`") from error
    import numpy as np

    labels = [f"{row.section}: {row.label}" for row in grid.rows]
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left = _MARGIN + int(max((pen.textlength(_plain(label)) for label in labels), default=0)) + _MARGIN
    width = left + len(grid.columns) * (_CELL + _GAP) + _MARGIN
    height = _MARGIN + (len(grid.rows) + 1) * (_LINE + _GAP) + _MARGIN
    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)
    for place, column in enumerate(grid.columns):
        pen.text((left + place * (_CELL + _GAP) + _CELL / 2, _MARGIN), _plain(column), fill=_QUIET, anchor="ma")
    for number, row in enumerate(grid.rows, start=1):
        top = _MARGIN + number * (_LINE + _GAP)
        pen.text((_MARGIN, top + _LINE / 2), _plain(labels[number - 1]), fill=_TEXT, anchor="lm")
        for place, column in enumerate(grid.columns):
            if column in row.cells:
                _draw_cell(pen, row.cells[column], row.section == KEPT, left + place * (_CELL + _GAP), top)
    return np.asarray(image)


def _draw_cell(pen: Any, cell: Cell, bar: bool, x: int, y: int) -> None:
    share = min(max(cell.share, 0.0), 1.0)
    pen.rectangle((x, y, x + _CELL - 1, y + _LINE - 1), fill=_BEFORE if bar else _mixed(share))
    if bar and share > 0:
        pen.rectangle((x, y, x + max(round(_CELL * share), 1) - 1, y + _LINE - 1), fill=_KEPT)
    dark = bar and share > 0.5
    pen.text((x + _CELL / 2, y + _LINE / 2), _plain(cell.text), fill="white" if dark else _TEXT, anchor="mm")


def _mixed(share: float) -> tuple[int, ...]:
    """Return a color between white and that of bits."""
    return tuple(round(255 + share * (part - 255)) for part in _BITS)


def _plain(text: str) -> str:
    # Pillow's own font is small where freetype is missing, and then knows Latin-1 alone.
    return text.replace("–", "-").encode("latin-1", "replace").decode("latin-1")
