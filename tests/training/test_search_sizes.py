"""A stated size in bytes is met by the file itself, with widths of layers, groups and rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from geta_hf import SearchConfig
from tests.training.test_trainer import trainer

pytestmark = pytest.mark.usefixtures("shared_spaces")

BYTES = 34_000


@pytest.mark.parametrize("granularity", ["group", pytest.param("row", marks=pytest.mark.slow)])
def test_the_file_has_the_bytes_that_were_planned(granularity: str, tmp_path: Path) -> None:
    config = SearchConfig(target_bytes=BYTES, bits=(2, 8), warmup=1, search=3, granularity=granularity)
    made = trainer(tmp_path, config, max_steps=5)
    made.train()
    optimizer = made.method.optimizer
    rows = optimizer._rows()
    planned = rows.stored_bytes(optimizer.ledger, optimizer.target, optimizer.removed, optimizer.entry_bits)
    made.export_model(tmp_path / "small")
    assert (tmp_path / "small" / "model.safetensors").stat().st_size == planned <= BYTES
    assert planned > 0.98 * BYTES
