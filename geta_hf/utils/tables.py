"""Format rows of text as Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence


def format_table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Format a Markdown table whose columns are padded, so that it reads in a terminal too.

    Args:
        header: the names of the columns.
        rows: one tuple of cells a row, each as long as the header.
    """
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    return "\n".join([text[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *text[1:]])
