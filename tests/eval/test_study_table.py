from __future__ import annotations

from typing import Any

from eval.study_table import CONTROL, DENSE, OURS, PAPER, spread, tables

COSTS = {"relative_bops": 0.0625, "mean_bits": 4.0, "kept_parameters": 0.5, "kept_heads": 0.25, "kept_channels": 0.75}
RULES = {
    PAPER: {"saliency": "hesso", "forgetting": "paper", "bit_rule": "paper", "clipping": "max"},
    OURS: {"saliency": "taylor", "forgetting": "uniform", "bit_rule": "sensitivity"},
}


def line(study: str, cell: str, seed: int, larger: bool = True, **scores: float) -> dict[str, Any]:
    dense = cell in (DENSE, CONTROL)
    rules = {"rules": RULES.get(cell, {}), "metrics": list(scores), "larger_is_better": larger}
    return {"study": study, "cell": cell, "seed": seed, **rules, **scores, **({} if dense else COSTS)}


def cells(text: str) -> dict[str, list[str]]:
    """Rows of a markdown table by their first cell."""
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in text.splitlines() if row.startswith("| ")]
    return {row[0]: row[1:] for row in rows}


QUESTIONS = [
    line("qa", PAPER, 0, f1=60.0, em=50.0),
    line("qa", OURS, 0, f1=70.0, em=55.0),
    line("qa", CONTROL, 0, f1=75.0, em=60.0),
    line("qa", DENSE, 0, f1=74.0, em=59.0),
    line("qa", "hesso / uniform / ppsg", 0, f1=65.0, em=50.0),
    line("qa", PAPER, 1, f1=62.0, em=52.0),
    line("qa", OURS, 1, f1=72.0, em=57.0),
    line("qa", CONTROL, 1, f1=77.0, em=62.0),
    line("qa", PAPER, 2, f1=0.0, em=0.0),  # a seed without a control loses against nothing
]


def test_table_of_a_metric_that_should_be_large() -> None:
    text = tables(QUESTIONS[:-1])
    rows = cells(text)
    assert list(rows) == ["cell", DENSE, CONTROL, PAPER, OURS, "hesso / uniform / ppsg"]
    costs = ["6.25%", "4.00", "50.0%", "25%", "75%"]
    assert rows[PAPER] == [
        *("hesso", "paper", "paper", "61.00 ± 1.41", "51.00 ± 1.41", "15.00 ± 0.00", "1.00", *costs, "2")
    ]
    assert rows[OURS] == [
        *("taylor", "uniform", "sensitivity", "71.00 ± 1.41", "56.00 ± 1.41", "5.00 ± 0.00", "0.33", *costs, "2")
    ]
    assert rows["hesso / uniform / ppsg"][3:7] == ["65.00", "50.00", "10.00", "0.67"]
    assert rows[CONTROL] == ["", "", "", "76.00 ± 1.41", "61.00 ± 1.41", "", "", "", "", "", "", "", "2"]
    assert text.endswith("Ours loses 0.33 of what the paper's rules lose (f1, 2 seeds).")


def test_losses_are_paired_by_seed() -> None:
    rows = cells(tables(QUESTIONS))
    assert rows[PAPER][5:7] == ["15.00 ± 0.00", "1.00"]
    assert rows[PAPER][-1] == "3"


def test_table_of_a_metric_that_should_be_small() -> None:
    lines = [
        line("lm", CONTROL, 0, larger=False, nats=1.5),
        line("lm", PAPER, 0, larger=False, nats=1.9),
        line("lm", OURS, 0, larger=False, nats=1.6),
    ]
    rows = cells(tables(lines))
    assert rows[PAPER][3:6] == ["1.9000", "0.4000", "1.00"]
    assert rows[OURS][3:6] == ["1.6000", "0.1000", "0.25"]


def test_each_study_has_a_table_and_a_half_finished_one_says_what_it_has() -> None:
    text = tables([line("lm", OURS, 0, larger=False, nats=1.6), *QUESTIONS])
    assert text.index("### lm") < text.index("### qa")
    rows = cells(text.split("### qa")[0])
    assert rows[OURS][3:6] == ["1.6000", "", ""]
    assert tables([]) == ""


def test_spread_is_the_deviation_of_a_sample() -> None:
    assert spread([1.0, 2.0, 3.0], 2) == "2.00 ± 1.00"
    assert spread([1.234], 1) == "1.2"
