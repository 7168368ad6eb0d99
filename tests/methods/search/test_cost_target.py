"""A stated hardware cost is met exactly, by the likeliest choice that it allows."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from geta_hf import SearchConfig
from geta_hf.config import read_config
from geta_hf.costs.expected_sizes import ExpectedSizes
from geta_hf.costs.hardware import Expected, LatencyTable, LayerShape, MeasuredShape
from geta_hf.costs.ledger import LayerEntry, Ledger
from geta_hf.costs.selection import Limits
from geta_hf.costs.targets import solve_target
from geta_hf.errors import GETAError
from geta_hf.methods.search.choices import WidthChoices
from geta_hf.methods.search.cost_target import CostTarget, Steps
from geta_hf.methods.search.objective import HardwareCost, Objective, layer_cost
from geta_hf.quantization import quantized_layers
from tests.methods import loop
from tests.methods.qasso.toy import Toy, toy_space

SHAPES = ((12, 8), (8, 12), (6, 8), (8, 6))
WIDTHS = [2, 4, 6]


def table() -> LatencyTable:
    """An overhead of 10 for each layer, then its weights, and a bit of each width."""
    shapes = {}
    for outputs, inputs in SHAPES:
        rows, columns = range(1, outputs + 1), range(1, inputs + 1)
        sizes = torch.tensor([[10.0 + row * column for column in columns] for row in rows])
        shapes[outputs, inputs] = MeasuredShape(tuple(rows), tuple(columns), {bits: sizes + bits for bits in WIDTHS})
    return LatencyTable(shapes)


def seconds(removed: dict[str, torch.Tensor], bits: list[int]) -> float:
    """Count by hand: 3 rows for each head, 1 for each channel."""
    heads = 3 * int((~removed["layers:heads"]).sum())
    channels = int((~removed["layers:channels"]).sum())
    return sum(10 + 8 * inner + width for inner, width in zip((heads, heads, channels, channels), bits, strict=True))


@pytest.mark.parametrize("targets", [{"target_cost": 0.55}, {"target_cost": 0.55, "target_bops": 0.08}])
def test_a_latency_is_met_and_spent(targets: dict[str, Any], tmp_path: Path) -> None:
    table().save(tmp_path / "table.json")
    config = SearchConfig(
        bits=(2, 6), bit_choices=WIDTHS, warmup=1, search=8, cost="latency", latency_table=str(tmp_path / "table.json")
    )
    config = read_config({**config.to_dict(), "target_sparsity": None, **targets})
    model, method, optimizer = loop.prepare(config, steps=12)
    loop.train(model, method, optimizer, steps=12)
    found = method.result()
    bits = [found.weight_bits[name] for name in quantized_layers(model)]
    full = seconds({name: torch.zeros_like(mask) for name, mask in found.removed.items()}, [6, 6, 6, 6])
    share = seconds(found.removed, bits) / full
    # One more head would take 48 of 375.
    assert 0.55 - 48 / full < share <= 0.55
    assert method.metrics()["relative_cost"] == pytest.approx(share, abs=1e-4)
    if "target_bops" in targets:
        assert optimizer.ledger.relative_bops(optimizer.removed, torch.tensor(bits, dtype=torch.float64)) <= 0.08


def scatter(optimizer: Any) -> None:
    """Give all choices logits of their own, so that widths differ."""
    generator = torch.Generator().manual_seed(3)
    optimizer.width_logits.data.add_(0.2 * torch.randn(optimizer.width_logits.shape, generator=generator))
    optimizer.keep_logits.data.add_(torch.randn(optimizer.keep_logits.shape, generator=generator))


def cost_of_model(cost: str, method: Any, model: torch.nn.Module) -> float:
    """Count what is left of the toy by hand: outputs and inputs of each product of one width."""
    found = method.result()
    heads = 3 * int((~found.removed["layers:heads"]).sum())
    channels = int((~found.removed["layers:channels"]).sum())
    total = 0.0
    for number, layer in enumerate(quantized_layers(model).values()):
        inner = (heads, heads, channels, channels)[number]
        widths = layer.weight_quantizer.bits().round().long()
        removed = (layer.weight == 0).all(1 - layer.weight_quantizer.channel_dim)
        by_column = layer.weight_quantizer.channel_dim == 1
        for width in WIDTHS:
            count = int(((widths == width) & ~removed).sum())
            other = inner if number % 2 and not by_column else 8
            outputs, inputs = (other, count) if by_column else (count, other)
            shape = LayerShape(f"layers.{number}", *SHAPES[number])
            alone = Expected(torch.tensor([float(outputs)]), torch.tensor(float(inputs)), [width])
            total += float(layer_cost(cost, 8, table())(shape, alone))
    return total


FULL = {"bitops": 8 * 6 * 288.0, "size": 6 * 288.0}


@pytest.mark.parametrize("granularity", ["group", "row"])
@pytest.mark.parametrize(
    ("cost", "targets"),
    [
        ("size", {}),
        ("bitops", {}),
        ("latency", {}),
        ("ne16_cycles", {}),
        ("size", {"target_bops": 0.08}),
        ("latency", {"target_bytes": 1700}),
    ],
)
def test_a_cost_of_rows_and_groups_is_met_and_spent(
    granularity: str, cost: str, targets: dict[str, Any], tmp_path: Path
) -> None:
    table().save(tmp_path / "table.json")
    share = 0.94 if cost == "ne16_cycles" else 0.6
    path = str(tmp_path / "table.json") if cost == "latency" else None
    config = SearchConfig(
        bits=(2, 6),
        bit_choices=WIDTHS,
        warmup=1,
        search=7,
        granularity=granularity,
        cost=cost,
        latency_table=path,
        target_cost=share,
        activation_bits=(8, 8),
        choice_learning_rate=1e-6,  # what is not met by itself
        **targets,
    )
    model, method, optimizer = loop.prepare(config, steps=12)
    scatter(optimizer)
    loop.train(model, method, optimizer, steps=12)
    spent = cost_of_model(cost, method, model) / optimizer.objective.full_cost(torch.zeros(10))
    assert method.metrics()["relative_cost"] == pytest.approx(spent, abs=1e-4)
    assert spent <= share + 1e-9
    # A table has an overhead for each product, and tiles are counted in full.
    if not targets and cost in FULL:
        assert spent > 0.95 * share
        assert optimizer.objective.full_cost(torch.zeros(10)) == pytest.approx(FULL[cost])
    if "target_bytes" in targets:
        rows = optimizer._rows()
        own = (optimizer.ledger, optimizer.target, optimizer.removed, optimizer.entry_bits)
        assert rows.stored_bytes(*own) <= targets["target_bytes"]


def cost_target(cost: str, target: float) -> CostTarget:
    space = toy_space()
    shapes = {name: tuple(p.shape) for name, p in Toy().named_parameters()}
    entries = [LayerEntry(f"layers.{number}.weight") for number in range(4)]
    ledger = Ledger.of(space.trainable, shapes, entries, dict.fromkeys(shapes, 4))
    config = SearchConfig(bit_choices=WIDTHS, bits=(2, 6), cost="bitops", target_cost=target)
    own = HardwareCost(layer_cost(cost, 8, table()), [LayerShape(f"layers.{n}", *SHAPES[n]) for n in range(4)], {})
    goal = solve_target(config, space.trainable, ledger)
    objective = Objective(ExpectedSizes(space.trainable, ledger), goal, WIDTHS, 1.0, own, 1.0, target)
    layers = torch.arange(4)
    choices = WidthChoices(4, layers, layers, torch.full((4,), ledger.groups), by_layer=True)
    return CostTarget(space.trainable, Limits(), ledger, objective, choices)


@pytest.mark.parametrize(("cost", "share"), [("bitops", 0.6), ("latency", 0.6), ("ne16_cycles", 0.94)])
def test_the_choice_is_near_the_likeliest_of_all(cost: str, share: float) -> None:
    """Brute force over kept groups and widths."""
    generator = torch.Generator().manual_seed(1)
    keep = torch.rand(10, generator=generator, dtype=torch.float64) * 20
    widths = torch.tensor([9.0, 4.0, 0.0], dtype=torch.float64) * torch.rand(4, 1, generator=generator).double() * 4
    target = cost_target(cost, share)
    start = Steps(torch.zeros(10, dtype=torch.bool), torch.full((4,), 2))
    found = target.meet(start, widths, keep)
    assert target.cost(found) <= share
    lost = float(keep[found.removed].sum() + widths.gather(1, found.steps[:, None]).sum())
    heads, channels = keep[:4].argsort(), keep[4:].argsort() + 4
    best = float("inf")
    for first, second in itertools.product(range(4), range(6)):
        removed = torch.zeros(10, dtype=torch.bool)
        removed[heads[:first]] = True
        removed[channels[:second]] = True
        costs = torch.stack([target.cost_of_layers(removed, step) for step in range(3)], 1)
        for steps in itertools.product(range(3), repeat=4):
            if sum(float(costs[number, step]) for number, step in enumerate(steps)) <= share:
                total = keep[removed].sum() + sum(widths[number, step] for number, step in enumerate(steps))
                best = min(best, float(total))
    assert best - 1e-9 <= lost <= 1.6 * best + 1e-9


def test_what_is_cheap_enough_remains_as_it_is() -> None:
    target = cost_target("bitops", 0.9)
    start = Steps(torch.zeros(10, dtype=torch.bool), torch.tensor([0, 1, 2, 0]))
    assert target.meet(start, torch.rand(4, 3).double(), torch.rand(10).double()) is start


def test_a_cost_below_the_cheapest_choice_is_refused() -> None:
    # One head and one channel at 2 bits: of 288 columns and rows at 6 bits, 64 at 2.
    cost_target("bitops", 2 * 64 / (6 * 288) + 1e-6).check()
    with pytest.raises(GETAError, match=r"target_cost = 0.07 can't be reached: .* the cost is 0.07407 of the full"):
        cost_target("bitops", 0.07).check()
    config = SearchConfig(bit_choices=WIDTHS, bits=(2, 6), warmup=1, search=8, cost="bitops", target_cost=0.05)
    with pytest.raises(GETAError, match=r"target_cost = 0.05 can't be reached"):
        loop.prepare(config, steps=12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cost": "none"}, "target_cost = 0.5 limits `cost`, which is none"),
        ({"mean_bits": 4}, "decides how much is pruned .* and so does mean_bits"),
        ({"target_sparsity": 0.5}, "and so does target_sparsity"),
        ({"target_cost": 1.5}, r"SearchConfig.target_cost = 1.5 must be a number in \(0, 1\)"),
    ],
)
def test_contradicting_targets_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GETAError, match=message):
        SearchConfig(**{"cost": "bitops", "target_cost": 0.5, **changes})


def test_short_searches_take_larger_steps() -> None:
    rates = [SearchConfig().choice_rate(steps) for steps in (1, 10, 50, 100, 5000)]
    assert rates == pytest.approx([0.5, 0.3, 0.06, 0.05, 0.05])
    assert SearchConfig(choice_learning_rate=0.01).choice_rate(10) == 0.01
    # 10 steps of a search: each logit of a clear gradient crosses from 90 % to below a half.
    config = SearchConfig(
        bit_choices=WIDTHS, bits=(2, 6), warmup=0, search=10, cost="bitops", target_cost=0.1, strength=1000
    )
    model, method, optimizer = loop.prepare(config, steps=12)
    loop.train(model, method, optimizer, steps=9)
    assert float(optimizer.expected().keep.mean()) < 0.5
