"""What a row of the currency study says when the row that it depends on has no result."""

from __future__ import annotations

import pytest

from eval.currency import PAPER, TARGETS, Cell, bytes_of_preset
from geta_hf import GETAError


def test_a_preset_that_failed_is_named() -> None:
    cell = Cell(TARGETS[4], None, 1)
    assert bytes_of_preset({(PAPER, None, 1): {"bytes": 7}}, cell) == 7
    with pytest.raises(GETAError, match='takes the size of "the paper\'s preset", which has no result with seed 1'):
        bytes_of_preset({(PAPER, None, 0): {"bytes": 7}}, cell)
