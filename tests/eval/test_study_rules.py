from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from eval import study_rules
from eval.results_file import append_result, read_results
from eval.study_rules import Cell, Limits
from eval.study_table import CONTROL, DENSE, MASKED, OURS, PAPER, ROUNDED, TAUGHT
from eval.study_tasks import Lengths, Task, TextOptions, dense_model, text_task
from geta_hf import GETAConfig, GETAError
from geta_hf.qadg import build_space

pytestmark = pytest.mark.usefixtures("shared_spaces")

LENGTHS = Lengths(12, 4, 1e-3)
LIMITS = Limits(bits=(4, 8), mean_bits=6, changes={"pruning_periods": 2, "projection_periods": 1})


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 100)
    options = TextOptions(texts=[str(text)], layers=2, hidden=64, block=16, eval_blocks=8)
    return text_task(options, Lengths(4, 4, 1e-3), "tiny")


def test_cells_cross_all_rules_and_the_telling_ones_come_first() -> None:
    cells = study_rules.all_cells()
    assert [cell.name for cell in cells[:4]] == [PAPER, OURS, CONTROL, DENSE]
    crossed = {(c.rules["saliency"], c.rules["forgetting"], c.rules["bit_rule"]) for c in [cells[1], *cells[4:-3]]}
    assert len(crossed) == len(cells) - 6 == 18
    assert len({cell.name for cell in cells}) == len(cells) and [c.name for c in cells[-3:]] == [
        ROUNDED,
        TAUGHT,
        MASKED,
    ]
    distances = [study_rules._changed(cell.rules) for cell in cells[4:-3]]
    assert distances == sorted(distances) == [1] * 5 + [2] * 8 + [3] * 4
    default, paper = GETAConfig(), GETAConfig.paper()
    assert cells[1].rules == {name: getattr(default, name) for name in study_rules.RULES}
    # No cell has widths of 2 bits.
    assert GETAConfig(**cells[0].rules, four_levels=False) == paper


@pytest.mark.parametrize("name", [PAPER, OURS, ROUNDED, TAUGHT])
def test_a_cell_reaches_its_limits(task: Task, tmp_path: Path, name: str) -> None:
    (line,) = study_rules.run_study(task, tmp_path, LENGTHS, LIMITS, [0], [name])
    # One of two heads a layer is an eighth of all that can go, so the target is met no closer than that.
    assert line["kept_parameters"] == pytest.approx(0.5, abs=0.07)
    assert line["mean_bits"] == pytest.approx(6, abs=0.2)
    assert line["relative_bops"] == pytest.approx(line["mean_bits"] / 32 * line["kept_parameters"], rel=0.02)
    assert 0 < line["nats"] < 10
    assert line["rules"] == next(cell.rules for cell in study_rules.all_cells() if cell.name == name)


def test_a_rerun_skips_what_is_finished_and_says_when_settings_differ(task: Task, tmp_path: Path) -> None:
    first = study_rules.run_study(task, tmp_path, LENGTHS, LIMITS, [0, 1], [CONTROL, DENSE])
    assert [(line["cell"], line["seed"]) for line in first] == [(CONTROL, 0), (DENSE, 0), (CONTROL, 1)]
    assert len({line["nats"] for line in first}) == 3
    again = study_rules.run_study(task, tmp_path, LENGTHS, LIMITS, [0, 1, 2], [CONTROL, DENSE])
    assert [(line["cell"], line["seed"]) for line in again] == [(CONTROL, 2)]
    assert read_results(tmp_path) == json.loads(json.dumps([*first, *again]))
    with pytest.raises(GETAError, match="other settings"):
        study_rules.run_study(task, tmp_path, Lengths(13, 4, 1e-3), LIMITS, [0])


def test_the_same_seed_gives_the_same_score(task: Task, tmp_path: Path) -> None:
    folder = dense_model(task, tmp_path)
    runs = [study_rules.run_cell(task, Cell(CONTROL), seed, folder, LENGTHS, LIMITS)["nats"] for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_a_cell_that_fails_is_reported_and_left_for_the_next_run(
    task: Task, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    impossible = Limits(bits=(4, 8), mean_bits=2, changes=LIMITS.changes)
    lines = study_rules.run_study(task, tmp_path, LENGTHS, impossible, [0], [OURS, DENSE])
    assert [line["cell"] for line in lines] == [DENSE]
    assert "mean_bits" in capsys.readouterr().err


def test_an_unknown_cell_is_refused(task: Task, tmp_path: Path) -> None:
    with pytest.raises(GETAError, match=r"no cell.*ours"):
        study_rules.run_study(task, tmp_path, LENGTHS, LIMITS, [0], ["ours"])


def test_a_line_cut_off_half_way_is_not_a_result(tmp_path: Path) -> None:
    append_result(tmp_path, {"cell": "a"})
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('\n{"cell": "b", "se')
    append_result(tmp_path, {"cell": "c"})
    assert [line["cell"] for line in read_results(tmp_path)] == ["a", "c"]


def test_kept_shares_counts_zero_groups_alone() -> None:
    config = LlamaConfig(
        vocab_size=20, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=10
    )
    model = LlamaForCausalLM(config).eval()
    space = build_space(model, {"input_ids": torch.zeros(2, 5, dtype=torch.long)})
    assert study_rules.kept_shares(model, space) == {"kept_parameters": 1, "kept_heads": 1, "kept_channels": 1}
    mlp = model.model.layers[0].mlp
    with torch.no_grad():
        for row in (1, 4, 7):
            mlp.gate_proj.weight[row], mlp.up_proj.weight[row], mlp.down_proj.weight[:, row] = 0, 0, 0
        mlp.gate_proj.weight[0] = 0  # its up and down are still there
    prunable = 4 * 64 * 64 + 3 * 64 * 10
    shares = study_rules.kept_shares(model, space)
    assert shares == pytest.approx(
        {"kept_parameters": 1 - 3 * 3 * 64 / prunable, "kept_heads": 1, "kept_channels": 0.7}
    )


def test_the_command_runs_a_study_and_prints_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("a rose is a rose is a rose. " * 60)
    work = ["--work", str(tmp_path / "work")]
    sizes = ["--layers", "1", "--hidden", "32", "--block", "16", "--eval_blocks", "4"]
    steps = ["--dense_steps", "2", "--steps", "3", "--dense_batch_size", "2", "--batch_size", "2"]
    cells = ["--cells", CONTROL, "--seeds", "3", "5"]
    study_rules.main(["text", "--texts", str(tmp_path / "text.txt"), *work, *sizes, *steps, *cells])
    printed = capsys.readouterr().out
    study_rules.main(["table", *work])
    table = capsys.readouterr().out
    assert table in printed
    assert table.splitlines()[0] == "### text"
    assert [line["settings"]["dense"]["hidden"] for line in read_results(tmp_path / "work")] == [32, 32]
