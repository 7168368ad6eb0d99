"""The table of what a run needs."""

from __future__ import annotations

from geta_hf.training.memory_report import MemoryPlan, Moment


def test_a_table_of_a_small_run_is_in_megabytes_and_of_a_large_one_in_gigabytes() -> None:
    for scale, unit in ((10**6, "MB"), (10**9, "GB")):
        backward = Moment(weights=scale, activations=2 * scale)
        plan = MemoryPlan(Moment(), backward, Moment(weights=scale, optimizer=4 * scale), ("a note",))
        assert plan.peak == 5 * scale
        assert f"memory, {unit}" in str(plan) and str(plan).endswith(f"peak: 5.00 {unit}\na note")
        assert "| weights and buffers      | 0.00   | 1.00 " in str(plan) and "teacher" not in str(plan)
