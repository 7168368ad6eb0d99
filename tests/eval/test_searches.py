"""The study of searches: its cells and their configs, the bytes they aim at, a run of it, and what it shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval import searches
from eval.results_file import read_results
from eval.searches import (
    BY_WEIGHT,
    CONTROL,
    DENSE,
    IMAGES,
    QASSO,
    WEIGHTS,
    Cell,
    bytes_at,
    cells_of,
    config_of,
    curve_points,
    render,
)
from geta_hf import GETAConfig, GETAError, SearchConfig
from tests.recipes.pictures import write_idx


def test_cells_take_their_sizes_from_uniform_rows_that_stand_before_them() -> None:
    cells = cells_of(IMAGES, [0, 1], [0.1, 1.0], [4, 2])
    assert len({cell.key for cell in cells}) == len(cells) == 1 + 2 * (1 + 4 + 2 + 2 * 4)
    assert [cell.row for cell in cells[:4]] == [DENSE, CONTROL, "w8a8", "w4a8"]
    assert [cell.row for cell in cells_of(IMAGES, [3], [1.0], [3], [QASSO, BY_WEIGHT])] == [BY_WEIGHT, QASSO]
    # Rates of exchange are rows of their own, and nobody's default.
    named = cells_of(IMAGES, [3], [], [3], [QASSO, "QASSO, rate 1"])
    assert [(cell.row, cell.width) for cell in named] == [(QASSO, 3), ("QASSO, rate 1", 3)]
    finished = {("w2a8", None, None, 1): {"bytes": 7.0}}
    assert bytes_at(IMAGES, finished, Cell(QASSO, None, 2, 1)) == 7
    assert bytes_at(IMAGES, finished, Cell("w2a8", None, None, 1)) is None
    with pytest.raises(GETAError, match="takes the size of 'w2a8', which has no result with seed 0"):
        bytes_at(IMAGES, finished, Cell(QASSO, None, 2, 0))
    with pytest.raises(GETAError, match=r"there are no rows \['w5a8'\]; there are \['dense'"):
        cells_of(IMAGES, [0], [], [], ["w5a8"])
    with pytest.raises(GETAError, match="no uniform row has 5 bits"):
        cells_of(IMAGES, [0], [], [5])


def test_configs_are_those_of_the_rows() -> None:
    assert config_of(IMAGES, Cell(CONTROL, None, None, 0)) is None
    uniform = config_of(IMAGES, Cell("w3a8", None, None, 0))
    assert isinstance(uniform, GETAConfig)
    assert (uniform.bits, uniform.activation_bits, uniform.target_sparsity) == ((3, 3), (8, 8), 0.0)
    swept = config_of(IMAGES, Cell(BY_WEIGHT, 0.3, None, 0))
    assert isinstance(swept, SearchConfig)
    assert (swept.widths, swept.cost, swept.cost_weight, swept.granularity) == ([2, 4, 8], "size", 0.3, "row")
    for row in ("search, layer", "search, group", "search, row", QASSO):
        found = config_of(IMAGES, Cell(row, None, 2, 0), 5000)
        assert found is not None and found.target_bytes == 5000
        assert isinstance(found, GETAConfig) == (row == QASSO)
    rated = config_of(IMAGES, Cell("QASSO, rate 1", None, 2, 0), 5000)
    assert isinstance(rated, GETAConfig) and rated.exchange_rate == 1.0


def test_a_run_from_training_to_table_and_curve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_idx(tmp_path / "idx", 16)
    model = ["model_type=cifar_resnet", "num_channels=1", "depths=[1]", "hidden_sizes=[8]", "embedding_size=8"]
    work = tmp_path / "work"
    common = ["images", "--data", f"idx_dir={data}", "--architecture", *model, "--work", str(work), "--steps", "6"]
    common += ["--dense_steps", "2", "--batch_size", "4", "--seeds", "0", "--weights", "3", "--widths", "4"]
    searches.main([*common, "--rows", DENSE, "w4a8", BY_WEIGHT, "search, group"])
    lines = {line["row"]: line for line in read_results(work)}
    assert set(lines) == {DENSE, "w4a8", BY_WEIGHT, "search, group"}
    assert lines["w4a8"]["mean_bits"] == 4
    assert lines["search, group"]["bytes"] <= lines["search, group"]["target_bytes"] == lines["w4a8"]["bytes"]
    shown = capsys.readouterr().out
    assert "| search, λ = 3 " in shown
    assert "6 steps of batches of 4, of which a search takes 33%; accuracy on 16 images" in shown
    # A rerun measures nothing twice.
    searches.main([*common, "--rows", DENSE, "w4a8"])
    assert len(read_results(work)) == 4
    seeds = [{"strength": 1, "seed": seed, "bytes": 4000, "accuracy": 50 + seed} for seed in (0, 1)]
    (work / "plinio.jsonl").write_text("\n".join(map(json.dumps, seeds)))
    searches.main(["render", "--work", str(work), "--curve", str(tmp_path / "curve.svg")])
    picture = (tmp_path / "curve.svg").read_text()
    assert picture.startswith("<?xml") and "PLiNIO" in picture
    with pytest.raises(GETAError, match="holds results under other settings"):
        searches.main([*common, "--batch_size", "2", "--dense_steps", "2"])


def test_means_over_seeds_are_drawn_by_size() -> None:
    def line(row: str, size: int, accuracy: float, weight: float | None = None, seed: int = 0) -> dict:
        found = {"row": row, "weight": weight, "width": None, "seed": seed, "bytes": size, "accuracy": accuracy}
        return {**found, "settings": {"metric": "accuracy"}}

    lines = [line("w8a8", 8000, 90), line("w2a8", 2000, 50), line("w2a8", 2000, 60, seed=1), line(DENSE, 32000, 91)]
    lines += [line(BY_WEIGHT, 3000, 80, weight=1.0)]
    assert curve_points(lines) == {"uniform": [(2.0, 55), (8.0, 90)], BY_WEIGHT: [(3.0, 80)]}
    assert render([]) == "no results"


def test_a_score_on_other_text_has_a_column() -> None:
    settings = {"metric": "nats", "steps": 1, "batch_size": 2, "search": 0.3, "dense": {"steps": 0}, "scored": {}}
    line = {"row": DENSE, "weight": None, "width": None, "seed": 0, "bytes": 1000, "nats": 2.0, "settings": settings}
    assert "other" not in render([line])
    table = render([{**line, "other_nats": 3.25}])
    assert "| nats, other text |" in table and "| 3.250 " in table


def test_weights_alone_are_quantized_on_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 40)
    work = tmp_path / "work"
    common = ["text", "--texts", str(text), "--layers", "1", "--hidden", "32", "--block", "16", "--eval_blocks", "4"]
    common += ["--work", str(work), "--steps", "5", "--batch_size", "2", "--seeds", "0", "--weights", "--widths", "3"]
    searches.main([*common, "--search", "0.4", "--rows", "w3", "search, row"])
    uniform, found = read_results(work)
    assert (uniform["row"], found["row"]) == ("w3", "search, row")
    assert uniform["mean_bits"] == 3
    assert found["bytes"] <= found["target_bytes"] == uniform["bytes"]
    assert found["settings"]["search"] == 0.4
    assert "nats on 4 blocks" in capsys.readouterr().out
    uniform_config = config_of(WEIGHTS, Cell("w3", None, None, 0))
    assert uniform_config is not None and uniform_config.activation_bits is None
