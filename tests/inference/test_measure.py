"""`geta-hf measure`: shapes once, widths that are stored alike once, a table that a search can read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from geta_hf.cli import main
from geta_hf.costs.hardware import Expected, LatencyTable, LayerShape
from geta_hf.errors import GETAError
from geta_hf.inference import measure
from geta_hf.inference.measure import Conditions, measure_latency
from tests.conftest import tiny_bert_config


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Replace the clock: a layer takes as long as it has weights, but the largest one, which is too fast by noise."""
    calls = []

    def seconds(layer: Any, inputs: int, conditions: Conditions) -> float:
        with torch.no_grad():
            outputs = layer(torch.randn(2, inputs)).shape[-1]
        calls.append((outputs, inputs))
        return 0.0 if (outputs, inputs) == (24, 16) else outputs * inputs * 1e-9

    monkeypatch.setattr(measure, "_seconds", seconds)
    return calls


def test_shapes_and_layouts_are_timed_once(timed: list[tuple[int, int]]) -> None:
    model = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 24), nn.Conv2d(3, 4, 3))
    said: list[str] = []
    table = measure_latency(model, [8, 2], points=2, include=["0", "1", "2"], report=said.append)
    assert set(table.shapes) == {(24, 16), (16, 24)} and len(said) == 2
    # On a CPU all widths are stored in the same type, so two by two sizes are four calls.
    assert len(timed) == 8 and set(timed) == {(a, b) for a in (12, 24) for b in (8, 16)} | {
        (a, b) for a in (8, 16) for b in (12, 24)
    }
    own = table.shapes[24, 16]
    assert (own.outputs, own.inputs, list(own.seconds)) == ((12, 24), (8, 16), [2, 8])
    # The full layer is no faster than a part of it.
    assert own.seconds[2].flatten().tolist() == pytest.approx([96e-9, 192e-9, 192e-9, 192e-9])


def test_the_command_writes_a_table_that_a_search_reads(
    tmp_path: Path, timed: list[tuple[int, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_bert_config(architectures=["BertForQuestionAnswering"]).save_pretrained(tmp_path)
    path = tmp_path / "table.json"
    options = ["--widths", "4", "8", "--activation-bits", "8", "--tokens", "3", "--points", "2"]
    assert main(["measure", str(tmp_path), str(path), *options]) == 0
    assert f"wrote {path}: " in capsys.readouterr().out
    table = LatencyTable.load(path)
    assert table.notes["activation_bits"] == 8 and table.notes["tokens"] == 3
    (outputs, inputs), *_ = table.shapes
    layer = LayerShape("layer", outputs, inputs)
    table.check([layer], [4, 8])
    expected = Expected(torch.tensor([0.0, outputs]), torch.tensor(float(inputs)), [4, 8])
    assert float(table.seconds(layer, expected)) == pytest.approx(outputs * inputs * 1e-9)
    assert main(["measure", str(tmp_path), str(tmp_path / "no" / "table.json")]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_a_layer_is_really_timed() -> None:
    table = measure_latency(nn.Sequential(nn.Linear(4, 6)), [3], 2, Conditions(tokens=1), ["0"])
    assert bool((table.shapes[6, 4].seconds[3] > 0).all())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": []}, r"widths are \[\]; give one or more from 2 to 8"),
        ({"widths": [0, 4]}, r"widths are \[0, 4\]"),
        ({"points": 1}, "points is 1; a table needs 2 or more"),
        ({"conditions": Conditions(tokens=0)}, "tokens is 0"),
        ({"conditions": Conditions(activation_bits=1)}, "activation_bits is 1"),
        ({"conditions": Conditions(compute="fast")}, "compute is 'fast'; choose one of auto, int8, float"),
        ({"conditions": Conditions(device="nowhere")}, "device 'nowhere' can't be used"),
        ({"include": ["1"]}, "1 is a Conv2d, whose time depends on its positions too"),
    ],
)
def test_bad_conditions_are_refused(changes: dict[str, Any], message: str) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Conv2d(3, 4, 3))
    with pytest.raises(GETAError, match=message):
        measure_latency(model, **{"include": ["0"], **changes})
