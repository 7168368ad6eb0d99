"""What benchmarks/compress_memory.py measures of a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.compress_memory import SHAPES, row, run_once

linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from /proc")


@linux
def test_a_record_has_what_was_foreseen_and_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "tiny", (32, 48, 2, 4, 2, 128))
    record = json.loads(json.dumps(run_once("tiny", "60%", 4, 16)))
    assert record["meant"] == sum(
        record[part] for part in ("weights", "covariances", "workspace", "activations", "other")
    )
    # bf16, and the frequencies of positions, which are buffers in fp32.
    assert 0 <= record["weights"] - 2 * record["parameters"] <= 64
    assert 0 < record["measured"] <= record["with_mapped_files"] * 1.1
    assert len(row(record)) == 10
