"""What the first process does reaches the others: its decision, the end of its work, its failure."""

from __future__ import annotations

from typing import Any

import pytest

from geta_hf.errors import GETAError
from geta_hf.training import processes
from geta_hf.training.processes import by_first_process, decided_by_first_process


class Process:
    def __init__(self, is_main_process: bool) -> None:
        self.is_main_process = is_main_process


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the first process sends, and the second one receives."""
    message: list[Any] = []

    def broadcast(own: list[Any]) -> None:
        if message:
            own[:] = message
        else:
            message.extend(own)

    monkeypatch.setattr(processes, "broadcast_object_list", broadcast)
    return message


def test_a_result_stays_and_a_decision_is_shared(sent: list[Any]) -> None:
    assert by_first_process(Process(True), lambda: object) is object
    assert by_first_process(Process(False), lambda: 1 / 0) is None
    sent.clear()
    assert decided_by_first_process(Process(True), lambda: "checkpoint-8") == "checkpoint-8"
    assert decided_by_first_process(Process(False), lambda: "checkpoint-4") == "checkpoint-8"


@pytest.mark.parametrize("error", [GETAError("out exists already"), OSError("disk full"), KeyError("name")])
def test_a_failure_of_the_first_process_ends_all(sent: list[Any], error: Exception) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(type(error)) as own:
        by_first_process(Process(True), fail)
    assert own.value is error
    with pytest.raises(GETAError, match="the first process failed") as other:
        by_first_process(Process(False), fail)
    assert type(error).__name__ in str(other.value)
