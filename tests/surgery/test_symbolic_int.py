"""Integers that remember where they come from."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch

from geta_hf.surgery.symbolic_int import Attribute, Log, TaggedInt, attributes, evaluate

HEADS = Attribute("layer", "num_heads")


def tagged(value: int = 12, log: Log | None = None) -> TaggedInt:
    return TaggedInt(value, HEADS, Log() if log is None else log)


@pytest.mark.parametrize(
    "compute",
    [
        lambda n: n + 5,
        lambda n: 5 + n,
        lambda n: n - 5,
        lambda n: 50 - n,
        lambda n: n * 3,
        lambda n: 3 * n,
        lambda n: n // 5,
        lambda n: 100 // n,
        lambda n: n % 5,
        lambda n: 100 % n,
        lambda n: -n,
        lambda n: (2 * n - 1) // (n % 7),
    ],
)
def test_arithmetic_keeps_the_history(compute) -> None:
    result = compute(tagged())
    assert isinstance(result, TaggedInt)
    assert int(result) == compute(12)
    assert set(attributes(result.expression)) == {HEADS}
    assert evaluate(result.expression, lambda leaf: 9) == compute(9)


def test_comparisons_are_noted_with_their_outcome() -> None:
    log = Log()
    number = tagged(log=log)
    assert number == 12
    assert not number < 5
    assert (3, number) == (3, 12)
    assert [(g.comparison, g.left, g.right, g.outcome) for g in log.guards] == [
        ("eq", HEADS, 12, True),
        ("lt", HEADS, 5, False),
        ("eq", HEADS, 12, True),
    ]
    assert log.guards[0].where.startswith("test_symbolic_int.py:")


@pytest.mark.parametrize("use", [lambda n: n**-0.5, lambda n: math.sqrt(n), lambda n: n / 2, lambda n: 1 / n, float])
def test_a_number_that_becomes_a_value_is_noted(use) -> None:
    log = Log()
    assert use(tagged(log=log)) == pytest.approx(use(12))
    assert [u.expression for u in log.uses] == [HEADS]


def test_a_tensor_takes_over_without_a_note() -> None:
    log = Log()
    assert float(tagged(log=log) / torch.tensor(2.0)) == 6.0
    assert log.uses == []


def test_numbers_of_an_earlier_run_and_of_a_closed_log_are_plain() -> None:
    log = Log()
    old = TaggedInt(4, HEADS, log, log.run)
    log.restart()
    assert type(old + 1) is int
    assert old == 4
    assert log.guards == []
    assert isinstance(tagged(log=log) + old, TaggedInt)
    log.close()
    assert type(tagged(log=log) + 1) is int


def test_copies_stay_tagged_and_pickles_are_plain() -> None:
    number = tagged()
    assert copy.deepcopy(number) is number
    assert type(pickle.loads(pickle.dumps(number))) is int
    assert {12: "found"}[number] == "found"
