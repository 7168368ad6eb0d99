from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eval.results_file import Line, append_result, read_results
from eval.study_tasks import Lengths, QuestionOptions, Task, question_task
from eval.tables import __main__ as command
from eval.tables import cells
from eval.tables.cells import Cell, cells_of, run_table
from eval.tables.curve import curve_points, draw_curve
from eval.tables.render import SCORES, Score, losses, render
from eval.tables.rows import CONTROL, DENSE, OURS, PAPER, SEQUENTIAL, TABLES, UNTRAINED, config_of
from geta_hf import GETAConfig, GETAError
from geta_hf.methods import PostTrainingConfig
from geta_hf.recipes import demo_data
from tests.recipes.pictures import write_idx

pytestmark = pytest.mark.usefixtures("shared_spaces")

LENGTHS = Lengths(20, 4, 1e-3)
F1 = SCORES[0]
EQUAL = f"{OURS}, at the BOPs of the paper's rules"


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    folder = tmp_path_factory.mktemp("questions")
    demo_data.write(folder, train_questions=60, eval_questions=10)
    options = QuestionOptions(
        model=str(folder / "model"),
        train_file=str(folder / "train.json"),
        eval_file=str(folder / "dev.json"),
        other_file=str(folder / "train.json"),
        train_questions=40,
        eval_questions=4,
        other_questions=3,
    )
    return question_task(options, Lengths(2, 4, 1e-3), "tiny")


@pytest.mark.parametrize("name", TABLES)
def test_every_cell_of_every_table_has_a_config(name: str) -> None:
    table = TABLES[name]
    figures = {"relative_bops": 0.12, "bytes": 10_000_000}
    names: list[str] = []
    for row in table.rows:
        # A row takes its figure from one that is run before it.
        assert row.equals is None or row.equals[1] in names
        names.append(row.name)
        for sparsity in table.sparsities if row.compressed else ():
            config = config_of(table, row, sparsity, figures)
            # Without training, how a size is split between pruning and widths is not given.
            if row.kind != "one_shot":
                assert getattr(config, table.target) == sparsity
            if row.equals is not None:
                assert getattr(config, row.equals[0]) in figures.values()
    assert len(set(names)) == len(names)


def test_the_rows_of_table_5_are_what_they_are_called() -> None:
    table = TABLES["table5"]
    rows = {row.name: row for row in table.rows}
    paper = config_of(table, rows[PAPER], 0.5)
    expected = GETAConfig.paper(
        target_sparsity=0.5, bits=(4, 8), keep=["heads"], warmup=0.1, projection=0.1, joint=0.3, pruning_periods=10
    )
    assert paper == expected and paper.wanted_mean_bits is None
    sequential = config_of(table, rows[SEQUENTIAL], 0.5)
    assert isinstance(sequential, PostTrainingConfig)
    assert (sequential.saliency, sequential.clipping, sequential.bits) == ("hesso", "max", (8, 8))
    ours = config_of(table, rows[EQUAL], 0.5, {"relative_bops": 0.11})
    assert isinstance(ours, GETAConfig) and ours.target_bops == 0.11 and ours.keep == ["heads"]


def test_no_cool_down_ends_with_the_joint_stage() -> None:
    table = TABLES["stages"]
    for row in table.rows:
        if row.name.endswith("no cool-down"):
            config = config_of(table, row, 0.5, {"relative_bops": 0.1})
            assert isinstance(config, GETAConfig)
            assert float(config.warmup) + float(config.projection) + float(config.joint) == pytest.approx(1)


def test_cells_are_run_by_seed_and_then_by_sparsity() -> None:
    table = TABLES["table5"]
    found = cells_of(table, [0, 1], [0.5, 0.1], [DENSE, CONTROL, PAPER])
    assert [cell.key for cell in found] == [
        (DENSE, None, 0),
        (CONTROL, None, 0),
        (PAPER, 0.5, 0),
        (PAPER, 0.1, 0),
        (CONTROL, None, 1),
        (PAPER, 0.5, 1),
        (PAPER, 0.1, 1),
    ]
    with pytest.raises(GETAError, match="has no rows"):
        cells_of(table, [0], None, ["the papers rules"])


def test_a_row_takes_the_figure_of_another_and_a_rerun_skips_what_is_finished(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Any] = []

    def train(_: Task, config: Any, __: Any, ___: Path, lengths: Lengths, seed: int) -> Line:
        seen.append(config)
        return {"f1": 50.0, "em": 40.0, "relative_bops": 0.1, "mean_bits": 6.0, "bytes": 1000, "tokens": lengths.steps}

    monkeypatch.setattr(cells, "train_cell", train)
    table = TABLES["table5"]
    run_table(table, task, tmp_path, LENGTHS, cells_of(table, [0], [0.5], [EQUAL]))
    assert "not measured yet" in capsys.readouterr().err and not seen
    both = cells_of(table, [0], [0.5], [PAPER, EQUAL])
    first = run_table(table, task, tmp_path, LENGTHS, both)
    assert [line["row"] for line in first] == [PAPER, EQUAL] and seen[1].target_bops == 0.1
    assert run_table(table, task, tmp_path, LENGTHS, both) == [] and len(seen) == 2
    assert read_results(tmp_path) == first
    with pytest.raises(GETAError, match="other settings"):
        run_table(table, task, tmp_path, replace(LENGTHS, steps=21), both)


def test_losses_are_against_the_dense_model_of_the_same_seed_and_length() -> None:
    plain = [
        {"row": CONTROL, "seed": 0, "steps": 9, "f1": 70.0},
        {"row": CONTROL, "seed": 1, "steps": 9, "f1": 71.0},
        {"row": f"{CONTROL}, 1/3 of the steps", "seed": 0, "steps": 3, "f1": 60.0},
    ]
    cell = [
        {"row": PAPER, "seed": seed, "steps": steps, "f1": 50.0} for seed, steps in ((0, 9), (1, 9), (0, 3), (2, 9))
    ]
    assert losses(cell, plain, F1) == [20.0, 21.0, 10.0]
    assert losses(plain, plain, F1) == [] and losses(cell, plain, replace(F1, key="other_f1")) == []


def test_the_page_shows_rows_by_sparsity(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"steps": 9, "batch_size": 4, "learning_rate": 1e-3, "dense": {"steps": 5}}
    settings["scored"] = {"questions": 1000, "other_questions": 500}
    common = {"table": "table5", "study": "minilm", "settings": settings, "steps": 9, "em": 40.0, "tokens": 2_000_000}
    dense = {**common, "row": CONTROL, "sparsity": None, "f1": 70.0, "other_f1": 50.0, "bytes": 4e6}
    paper = {**common, "row": PAPER, "sparsity": 0.5, "f1": 60.0, "other_f1": 35.0, "bytes": 1e6}
    paper |= {"mean_bits": 6.5, "relative_bops": 0.125}
    for seed in (0, 1):
        append_result(tmp_path, {**dense, "seed": seed})
        append_result(tmp_path, {**paper, "seed": seed, "f1": 60.0 + seed})
    command.main(["render", "--work", str(tmp_path)])
    page = capsys.readouterr().out
    assert page == render(read_results(tmp_path)) + "\n"
    assert "**50% of the prunable groups removed**" in page and "1,000 questions and on 500" in page
    (row,) = [line for line in page.splitlines() if line.startswith(f"| {PAPER}")]
    columns = [column.strip() for column in row.strip("|").split("|")]
    expected = ["60.50 ± 0.71", "40.00 ± 0.00", "9.50 ± 0.71", "15.00 ± 0.00", "12.50%", "1.00", "6.50", "2.0", "2"]
    assert columns[1:] == expected


def _text_line(row: str, sparsity: float | None, seed: int, nats: float, **costs: float) -> Line:
    settings = {"steps": 9, "batch_size": 4, "learning_rate": 1e-3, "dense": {"steps": 0}, "scored": {"blocks": 100}}
    common = {"table": "table5", "study": "stories", "settings": settings, "steps": 9, "tokens": 5, "bytes": 4e6}
    return {**common, "row": row, "sparsity": sparsity, "seed": seed, "nats": nats, "relative_bops": 1.0, **costs}


def test_lower_is_better_for_nats(tmp_path: Path) -> None:
    page = render([_text_line(CONTROL, None, 0, 2.0), _text_line(PAPER, 0.5, 0, 2.25)])
    assert "scored on 100 blocks. The dense model is the pretrained one as it is." in page
    (row,) = [line for line in page.splitlines() if line.startswith(f"| {PAPER}")]
    assert [column.strip() for column in row.strip("|").split("|")][1:3] == ["2.250", "0.250"]


def test_a_curve_has_a_point_for_each_sparsity_and_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nats = Score("nats", "nats", 3, larger_is_better=False)
    plain = [_text_line(CONTROL, None, seed, 2.0 + seed) for seed in (0, 1)]
    cut = [
        _text_line(PAPER, sparsity, seed, 3.0 + seed + sparsity + 0.1 * seed, relative_bops=0.2 - 0.1 * sparsity)
        for sparsity in (0.5, 0.1)
        for seed in (0, 1)
    ]
    points = sorted(curve_points(cut, plain, nats, "relative_bops"))
    assert points == [(pytest.approx(0.15), pytest.approx(1.55)), (pytest.approx(0.19), pytest.approx(1.15))]
    assert curve_points(cut, [], nats, "bytes") == []
    for line in (*plain, *cut):
        append_result(tmp_path, line)
    pytest.importorskip("matplotlib")
    command.main(["render", "--work", str(tmp_path), "--curve", str(tmp_path / "curve.svg")])
    assert PAPER.encode() in (tmp_path / "curve.svg").read_bytes()
    with pytest.raises(GETAError, match="no compressed result of table5"):
        draw_curve(plain, tmp_path / "none.svg")
    append_result(tmp_path, {**cut[0], "study": "other", "relative_bops": 9.0})
    with pytest.raises(GETAError, match=r"results of \['other', 'stories'\].*name one study"):
        command.main(["render", "--work", str(tmp_path), "--curve", str(tmp_path / "both.svg")])
    command.main(["render", "--work", str(tmp_path), "--study", "stories", "--curve", str(tmp_path / "one.svg")])
    assert (tmp_path / "one.svg").is_file() and not (tmp_path / "both.svg").exists()


@pytest.mark.parametrize(
    "given", [[], ["--train_file", "a"], ["--train_file", "a", "--eval_file", "b", "--texts", "c"]]
)
def test_questions_or_text_are_given_whole_and_not_both(given: list[str], tmp_path: Path) -> None:
    with pytest.raises(GETAError, match="or --texts for plain text"):
        command.main(["table5", "--model", "m", "--work", str(tmp_path), *given])


@pytest.mark.slow
def test_a_cell_scores_the_folder_that_was_exported(task: Task, tmp_path: Path) -> None:
    table = TABLES["table5"]
    rows = {row.name: row for row in table.rows}
    chosen = [Cell(rows[DENSE], None, 0), Cell(rows[PAPER], 0.5, 0)]
    dense, paper = run_table(table, task, tmp_path, LENGTHS, chosen)
    assert 0 <= paper["f1"] <= 100 and 0 <= paper["other_f1"] <= 100
    assert paper["kept_channels"] == 0.5 and "kept_heads" not in paper
    assert 4 <= paper["mean_bits"] <= 8
    assert paper["bytes"] < dense["bytes"] / 2
    # Every real token of 20 batches of 4 windows, and no padding: windows are longer than a question, shorter than 192.
    assert 20 * 4 * 10 < paper["tokens"] < 20 * 4 * 192
    assert not list((tmp_path / "tiny").glob("cell*"))


def test_cells_that_run_at_once_do_not_meet(task: Task, tmp_path: Path) -> None:
    """A second one starts and ends while the first one is being scored, as in another process."""
    (tmp_path / "dense").mkdir()
    plain = replace(task, score=lambda model: {"parameters": model.num_parameters()})

    def score(model: Any) -> Line:
        return cells.train_cell(plain, None, plain.start(), tmp_path, Lengths(1, 2, 1e-3), seed=1)

    found = cells.train_cell(replace(task, score=score), None, task.start(), tmp_path, Lengths(1, 2, 1e-3), seed=0)
    assert found["parameters"] and [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_table_of_images_from_training_to_the_rendered_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_idx(tmp_path / "idx", 16)
    model = ["model_type=cifar_resnet", "num_channels=1", "depths=[1]", "hidden_sizes=[8]", "embedding_size=8"]
    common = ["images", "--architecture", *model, "--data", f"idx_dir={data}", "--work", str(tmp_path / "work")]
    common += ["--steps", "20", "--dense_steps", "2", "--batch_size", "4", "--name", "tiny"]
    common += ["--batch_norm_momentum", "0.2"]
    command.main([*common, "--rows", DENSE, OURS, UNTRAINED])
    lines = {line["row"]: line for line in read_results(tmp_path / "work")}
    assert set(lines) == {DENSE, OURS, UNTRAINED}
    assert lines[UNTRAINED]["relative_bops"] <= lines[OURS]["relative_bops"]
    assert lines[OURS]["kept_channels"] == 0.5 and lines[OURS]["images"] == 80
    assert lines[OURS]["settings"]["dense"]["batch_norm_momentum"] == 0.2
    assert all(0 <= line["accuracy"] <= 100 and line["bytes"] > 0 for line in lines.values())
    # The dense model is timed beside each compressed one, since machines differ.
    assert all(line["ms"] > 0 and line["dense_ms"] > 0 for name, line in lines.items() if name != DENSE)
    shown = capsys.readouterr().out
    assert "| CPU ms an image | dense, beside it |" in shown
    assert "of 4 images, of 16" in shown and "accuracy in percent on 16 images" in shown
    for options, message in (
        (["--architecture", *model, "--model", "x"], "give one of --model and --architecture"),
        (["--architecture", "depths"], "expected key=value"),
    ):
        with pytest.raises(GETAError, match=message):
            command.main(["images", *options, "--data", f"idx_dir={data}", "--work", str(tmp_path / "other")])
