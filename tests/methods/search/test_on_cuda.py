"""A search on a pretended card: no mixed devices, and no waiting for the card inside a stage."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from geta_hf import SearchConfig
from geta_hf.costs.hardware import LatencyTable, MeasuredShape
from geta_hf.methods.search.schedule import STAGES
from tests.methods import loop
from tests.methods.qasso.toy import batch_at
from tests.pretend_cuda import Card, pretend_cuda

STEPS = 9


@pytest.fixture
def card() -> Iterator[Card]:
    with pretend_cuda() as made:
        yield made


def table(path: Path) -> str:
    grid = {(12, 8): ((6, 12), (8,)), (8, 12): ((8,), (6, 12)), (6, 8): ((6,), (4, 8)), (8, 6): ((4, 8), (6,))}
    shapes = {
        full: MeasuredShape(*sides, {bits: torch.ones(len(sides[0]), len(sides[1])) for bits in (2, 3, 4)})
        for full, sides in grid.items()
    }
    LatencyTable(shapes).save(path)
    return str(path)


RULES: dict[str, dict[str, Any]] = {
    "softmax": {},
    "gumbel": {"sampling": "gumbel_hard", "architecture_data": 0.2},
    "ne16": {"cost": "ne16_cycles"},
    "mpic": {
        "cost": "mpic_energy",
        "bit_choices": [2, 4],
        "mean_bits": None,
        "target_sparsity": None,
        "target_bops": 0.08,
    },
    "latency": {"cost": "latency"},
}


FAST = ("gumbel", "latency")


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in RULES]
)
def test_no_step_inside_a_stage_waits_for_the_card(name: str, card: Card, tmp_path: Path) -> None:
    rules = dict(RULES[name])
    if name == "latency":
        rules["latency_table"] = table(tmp_path / "table.json")
    config = SearchConfig(**{"bits": (2, 4), "mean_bits": 3, "target_sparsity": 0.3, "warmup": 3, "search": 3, **rules})
    model, method, optimizer = loop.prepare(config, steps=STEPS)
    model.to("cuda")
    found = {}
    for step in range(STEPS):
        x, y = (tensor.to("cuda") for tensor in batch_at(step))
        stage, inside = method.stage, step % 3 == 1
        before = len(card.reads)
        method.before_backward(model)
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        extra = method.extra_loss(model)
        (loss if extra is None else loss + extra).backward()
        optimizer.step()
        if inside:
            found[stage] = card.reads[before:]
    assert found == {stage: [] for stage in STAGES}
    assert method.finished and method.removed_groups > 0
