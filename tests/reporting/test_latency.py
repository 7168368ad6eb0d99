"""Calls are timed in turns."""

from __future__ import annotations

import itertools

import pytest

from geta_hf.reporting import latency
from geta_hf.reporting.latency import faster, time_in_turns


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that the calls of a test move."""
    now = [0.0]
    monkeypatch.setattr(latency.time, "perf_counter", lambda: now[0])
    return now


def test_medians_without_the_first_turns(clock: list[float]) -> None:
    """The first three of each are slow, and one later turn is disturbed."""
    order: list[str] = []

    def call(name: str, lengths: list[float]):
        rest = iter(lengths)

        def run() -> None:
            order.append(name)
            clock[0] += next(rest)

        return run

    calls = {"a": call("a", [9, 9, 9, 1, 1, 5]), "b": call("b", [9, 9, 9, 2, 2, 2])}
    assert time_in_turns(calls, repeats=3) == {"a": 1000, "b": 2000}
    assert order == ["a", "b"] * 6


@pytest.mark.parametrize(("seconds", "turns"), [(0.0, 2), (5.0, 2), (35.0, 4), (1e9, 33)])
def test_no_turn_begins_after_the_limit(clock: list[float], seconds: float, turns: int) -> None:
    counted = itertools.count()

    def call() -> None:
        next(counted)
        clock[0] += 10

    assert time_in_turns({"a": call}, seconds=seconds) == {"a": 10_000}
    assert next(counted) == turns


def test_noise_is_no_difference() -> None:
    assert faster(104, 100) == "about as fast" == faster(100, 104)
    assert faster(110, 100) == "1.1x faster" and faster(100, 200) == "2.0x slower"
