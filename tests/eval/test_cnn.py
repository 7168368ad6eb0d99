"""The study of a small CNN: its cells and their configs, the bytes they aim at, a run of it, and what it shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval import cnn
from eval.cnn import BY_WEIGHT, CONTROL, DENSE, QASSO, Cell, bytes_at, cells_of, config_of, curve_points, render
from eval.results_file import read_results
from geta_hf import GETAConfig, GETAError, SearchConfig
from tests.recipes.pictures import write_idx


def test_cells_take_their_sizes_from_uniform_rows_that_stand_before_them() -> None:
    cells = cells_of([0, 1], [0.1, 1.0], [4, 2])
    assert len({cell.key for cell in cells}) == len(cells) == 1 + 2 * (1 + 4 + 2 + 2 * 4)
    assert [cell.row for cell in cells[:4]] == [DENSE, CONTROL, "w8a8", "w4a8"]
    assert [cell.row for cell in cells_of([3], [1.0], [3], [QASSO, BY_WEIGHT])] == [BY_WEIGHT, QASSO]
    finished = {("w2a8", None, None, 1): {"bytes": 7.0}}
    assert bytes_at(finished, Cell(QASSO, None, 2, 1)) == 7
    assert bytes_at(finished, Cell("w2a8", None, None, 1)) is None
    with pytest.raises(GETAError, match="takes the size of 'w2a8', which has no result with seed 0"):
        bytes_at(finished, Cell(QASSO, None, 2, 0))
    with pytest.raises(GETAError, match=r"there are no rows \['w5a8'\]; there are \['dense'"):
        cells_of([0], [], [], ["w5a8"])
    with pytest.raises(GETAError, match="no uniform row has 5 bits"):
        cells_of([0], [], [5])


def test_configs_are_those_of_the_rows() -> None:
    assert config_of(Cell(CONTROL, None, None, 0)) is None
    uniform = config_of(Cell("w3a8", None, None, 0))
    assert isinstance(uniform, GETAConfig)
    assert (uniform.bits, uniform.activation_bits, uniform.target_sparsity) == ((3, 3), (8, 8), 0.0)
    swept = config_of(Cell(BY_WEIGHT, 0.3, None, 0))
    assert isinstance(swept, SearchConfig)
    assert (swept.widths, swept.cost, swept.cost_weight, swept.granularity) == ([2, 4, 8], "size", 0.3, "row")
    for row in ("search, layer", "search, group", "search, row", QASSO):
        found = config_of(Cell(row, None, 2, 0), 5000)
        assert found is not None and found.target_bytes == 5000
        assert isinstance(found, GETAConfig) == (row == QASSO)


def test_a_run_from_training_to_table_and_curve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_idx(tmp_path / "idx", 16)
    model = ["model_type=cifar_resnet", "num_channels=1", "depths=[1]", "hidden_sizes=[8]", "embedding_size=8"]
    work = tmp_path / "work"
    common = ["run", "--data", f"idx_dir={data}", "--architecture", *model, "--work", str(work), "--steps", "6"]
    common += ["--dense_steps", "2", "--batch_size", "4", "--seeds", "0", "--weights", "3", "--widths", "4"]
    cnn.main([*common, "--rows", DENSE, "w4a8", BY_WEIGHT, "search, group"])
    lines = {line["row"]: line for line in read_results(work)}
    assert set(lines) == {DENSE, "w4a8", BY_WEIGHT, "search, group"}
    assert lines["w4a8"]["mean_bits"] == 4
    assert lines["search, group"]["bytes"] <= lines["search, group"]["target_bytes"] == lines["w4a8"]["bytes"]
    shown = capsys.readouterr().out
    assert "| search, λ = 3 " in shown and "6 steps of 4 images; accuracy in percent on 16 images" in shown
    # A rerun measures nothing twice.
    cnn.main([*common, "--rows", DENSE, "w4a8"])
    assert len(read_results(work)) == 4
    cnn.main(["render", "--work", str(work), "--curve", str(tmp_path / "curve.svg")])
    assert (tmp_path / "curve.svg").read_text().startswith("<?xml")
    with pytest.raises(GETAError, match="holds results under other settings"):
        cnn.main([*common, "--batch_size", "2", "--dense_steps", "2"])


def test_means_over_seeds_are_drawn_by_size() -> None:
    def line(row: str, size: int, accuracy: float, weight: float | None = None, seed: int = 0) -> dict:
        return {"row": row, "weight": weight, "width": None, "seed": seed, "bytes": size, "accuracy": accuracy}

    lines = [line("w8a8", 8000, 90), line("w2a8", 2000, 50), line("w2a8", 2000, 60, seed=1), line(DENSE, 32000, 91)]
    lines += [line(BY_WEIGHT, 3000, 80, weight=1.0)]
    assert curve_points(lines) == {"uniform": [(2.0, 55), (8.0, 90)], BY_WEIGHT: [(3.0, 80)]}
    assert render([]) == "no results"
