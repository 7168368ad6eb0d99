"""Methods give weights of 2 bits four levels: with the best clipping values, and only where these lose less."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from geta_hf import GETAConfig, GETATrainer, SearchConfig
from geta_hf.methods import PostTrainingConfig
from geta_hf.methods.one_shot.layers import fit_grid, round_on, rounding_losses
from geta_hf.quantization import quantized_layers
from geta_hf.quantization.clipping import (
    BINS,
    count_magnitudes,
    largest_magnitudes,
    search_elements,
    search_rows,
    squared_error,
)
from geta_hf.quantization.error_compensation import output_error, round_compensated
from geta_hf.serialization.encode import four_level_layers
from geta_hf.serialization.packed_layers import packed_layers
from tests.training.test_block_grid import llama
from tests.training.test_trainer import SMALL, arguments, rows

pytestmark = pytest.mark.usefixtures("shared_spaces")


def some_rows() -> Tensor:
    torch.manual_seed(0)
    found = torch.randn(4, 500) * torch.tensor([1.0, 0.01, 30.0, 1.0])[:, None]
    found[3] = found[3] ** 3
    found[2, :200] = 0.0  # inputs that were removed have no say
    return found


def error_at(x: Tensor, q: float) -> float:
    """The squared error of the best of four levels for each element, found by trying all; zeros cost nothing."""
    levels = q * torch.tensor([-1.0, -1 / 3, 1 / 3, 1.0], dtype=torch.float64)
    nearest = (x.double()[:, None] - levels).abs().amin(1)
    return float(nearest[x != 0].square().sum())


def best_of_many(x: Tensor) -> float:
    top = float(x.abs().max())
    return min(error_at(x, top * share) for share in torch.linspace(0.02, 1.2, 600).tolist())


@pytest.mark.parametrize("search", [search_rows, search_elements])
def test_the_search_finds_the_best_clipping_value(search) -> None:
    x = some_rows()
    largest = largest_magnitudes(x)
    errors, shares = search(x, largest, [2], four_levels=True)
    for row in range(len(x)):
        q = float(shares[row, 0] * largest[row])
        found = error_at(x[row], q)
        assert found <= 1.01 * best_of_many(x[row])
        assert float(errors[row, 0] * largest[row] ** 2) == pytest.approx(found, rel=0.02)
        counts = count_magnitudes(x[row : row + 1], largest[row : row + 1])
        fixed = float(squared_error(counts, float(shares[row, 0]), 2, four_levels=True)) * float(largest[row]) ** 2
        assert counts.shape == (1, BINS) and fixed == pytest.approx(found, rel=0.02)


@pytest.mark.parametrize("grid", ["layer", "channel", "block32"])
def test_a_weight_loses_less_on_four_levels(grid: str) -> None:
    x = some_rows()[:1] if grid == "layer" else some_rows()
    three, four = fit_grid(x, 2, grid), fit_grid(x, 2, grid, four_levels=True)
    assert four.four_levels and not fit_grid(x, 3, grid, four_levels=True).four_levels
    lost = [float((round_on(x, own) - x).square().sum()) for own in (three, four)]
    assert lost[1] < 0.75 * lost[0]
    # The step that is stored is a number of fp16, and the width is still 2.
    step = four.d / 3
    assert torch.equal(step.half().float(), step) and torch.equal(four.d, four.q_m)
    layer = torch.nn.Linear(500, len(x), bias=False)
    layer.weight.data = x.clone()
    ones = {"a.weight": torch.ones_like(x)}
    for own, expected in zip((False, True), lost, strict=True):
        assert float(rounding_losses({"a": layer}, ones, [2], grid, own)) == pytest.approx(expected / 2, rel=1e-4)


def test_a_layer_with_many_small_weights_keeps_three_levels() -> None:
    # One clipping value for rows of which one is a hundredth of the other: half of all weights are next to zero.
    x = some_rows()[:2]
    three, chosen = fit_grid(x, 2, "layer"), fit_grid(x, 2, "layer", four_levels=True)
    assert not chosen.four_levels and torch.equal(chosen.d, three.d)


def test_compensated_rounding_ends_on_four_levels() -> None:
    torch.manual_seed(0)
    weight, inputs = torch.randn(8, 24), torch.randn(200, 24) @ torch.randn(24, 24)
    sigma = inputs.t() @ inputs
    own = fit_grid(weight, 2, four_levels=True)
    rounded = round_compensated(weight, sigma, own.d, own.q_m, four_levels=True)
    codes = rounded / (own.d[:, None] / 3)
    assert sorted(codes.round().unique().tolist()) == [-3, -1, 1, 3] and torch.allclose(codes, codes.round())
    nearest = round_on(weight, own)
    assert float(output_error(weight - rounded, sigma).sum()) < float(output_error(weight - nearest, sigma).sum())


class Run:
    def __init__(self, folder: Path, config: GETAConfig) -> None:
        torch.manual_seed(0)
        data = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows()]
        self.trainer = GETATrainer(llama(), arguments(folder), geta_config=config, train_dataset=data)
        self.trainer.train()
        self.layers = quantized_layers(self.trainer.model)


CONFIGS = {
    "qasso": (GETAConfig, {"grid": "channel", "mean_bits": 2.0, "bits": (2, 4)}),
    "one width": (GETAConfig, {"grid": "layer", "bits": (2, 2)}),
    "blocks": (GETAConfig, {"grid": "block32", "mean_bits": 2.5, "bits": (2, 4)}),
    "after training": (PostTrainingConfig, {"grid": "channel", "mean_bits": 2.0, "bits": (2, 4)}),
    "search": (SearchConfig, {"mean_bits": 2.2, "bits": (2, 4)}),
    "search by row": (SearchConfig, {"mean_bits": 2.0, "bits": (2, 4), "granularity": "row"}),
    "search by row, some rows": (SearchConfig, {"mean_bits": 2.6, "bits": (2, 4), "granularity": "row"}),
    "search by group, some columns": (SearchConfig, {"mean_bits": 2.6, "bits": (2, 4), "granularity": "group"}),
}
SEARCH = {"warmup": 2, "search": 8}


@pytest.mark.parametrize("name", CONFIGS)
def test_masked_and_reloaded_models_agree(name: str, tmp_path: Path) -> None:
    kind, changes = CONFIGS[name]
    stages = SEARCH if kind is SearchConfig else SMALL
    run = Run(tmp_path / "run", kind(**{**stages, "target_sparsity": 0.4, **changes}))
    two = [path for path, bits in run.trainer.method.result().weight_bits.items() if bits == 2]
    some = [path for path, layer in run.layers.items() if layer.weight_quantizer.some_four_levels]
    four = [path for path, layer in run.layers.items() if layer.weight_quantizer.four_levels or path in some]
    assert four and set(four) - set(some) <= set(two)
    assert bool(some) == ("some" in name)
    # A search lets clipping values, and steps with them, learn once widths are fixed.
    for path in four if kind is not SearchConfig else ():
        step = run.layers[path].weight_quantizer.step
        assert torch.equal(step.half().float(), step)
    report = run.trainer.export_model(tmp_path / "small")
    small = type(run.trainer.model).from_pretrained(tmp_path / "small")
    assert four_level_layers(small) == four
    assert report.bits == {path: layer.bits for path, layer in packed_layers(small).items()}
    batch = {"input_ids": torch.stack([row["input_ids"] for row in rows(4)])}
    with torch.no_grad():
        wanted, found = (model.eval()(**batch).logits for model in (run.trainer.model, small))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    # What changes the state afterwards is undone.
    own = run.layers[four[0]].weight_quantizer
    before = own.levels
    own.set_four_levels(False)
    run.trainer.restore_compression()
    assert bool(before.any()) and torch.equal(own.levels, before)


def test_three_levels_where_they_are_asked_for(tmp_path: Path) -> None:
    config = GETAConfig(**{**SMALL, "bits": (2, 2), "four_levels": False})
    run = Run(tmp_path, config)
    assert not any(layer.weight_quantizer.four_levels for layer in run.layers.values())
    assert not GETAConfig.paper().four_levels and GETAConfig().four_levels


def test_weights_of_exactly_zero_leave_it(tmp_path: Path) -> None:
    config = GETAConfig(**{**SMALL, "bits": (2, 2)})
    run = Run(tmp_path / "run", config)
    layer = next(iter(run.layers.values()))
    optimizer = run.trainer.method.optimizer
    removed = {name: (own.weight == 0).clone() for name, own in run.layers.items()}
    assert any(bool(mask.any()) for mask in removed.values())
    kept = (~removed[next(iter(run.layers))]).nonzero()[0]
    with torch.no_grad():
        layer.weight[tuple(kept)] = 0.0
    for parameter in run.trainer.model.parameters():
        parameter.grad = None
    optimizer.step()
    # Removed groups are still zero, and nothing else is.
    for name, own in run.layers.items():
        assert torch.equal(own.weight == 0, removed[name])
