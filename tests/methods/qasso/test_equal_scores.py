"""Scores that say nothing: a warning that names the families, and none where there was nothing to decide."""

from __future__ import annotations

import logging

import pytest
import torch

from geta_hf.config import GETAConfig
from geta_hf.errors import GETAError
from geta_hf.methods.qasso.checks import warn_of_equal_scores
from tests.methods.loop import prepare, train
from tests.methods.qasso.toy import Toy, toy_space

STEPS = 14
SHORT = {"warmup": 1, "projection": 3, "joint": 8, "target_sparsity": 0.5}
SAID = "the saliency does not tell groups apart in"
NONE = torch.zeros(10, dtype=torch.bool)


class Unused(Toy):
    """The second block is computed, but nothing reads it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up, down, mix, out = self.layers
        x = x + down(self.activation(up(x)))
        return self.head(x + 0 * out(self.activation(mix(x))))


def said_of(scores: list[float], taken: list[int], caplog, removed: torch.Tensor = NONE) -> str:
    with caplog.at_level(logging.WARNING):
        warn_of_equal_scores(
            toy_space().families, torch.tensor(scores), removed, torch.tensor(taken, dtype=torch.int64)
        )
    return caplog.text


@pytest.mark.parametrize("value", [0.0, 1.0, 3e-9])
def test_families_of_equal_scores_that_lose_groups_are_named(caplog, value: float) -> None:
    text = said_of([1.0, 2, 3, 4] + [value] * 6, [0, 4, 5], caplog)
    assert f"{SAID} layers:channels (all 6 score {value:g})" in text and "heads" not in text


def test_all_families_are_named_where_everything_is_equal(caplog) -> None:
    text = said_of([0.0] * 10, [0, 4], caplog)
    assert "layers:heads (all 4 score 0), layers:channels (all 6 score 0)" in text


@pytest.mark.parametrize(
    ("scores", "taken"),
    [
        ([1.0, 2, 3, 4] + [0.0] * 6, [0, 1]),  # nothing of the equal family is removed
        ([1.0, 2, 3, 4] + [0.0] * 5 + [1.0], [4, 5]),  # ties, but a choice
        ([1.0, 2, 3, 4] + [0.0] * 6, [4, 5, 6, 7, 8, 9]),  # all of it
        ([0.0] * 10, []),
    ],
)
def test_nothing_is_said_where_scores_decide_or_nothing_is_to_decide(caplog, scores, taken) -> None:
    assert said_of(scores, taken, caplog) == ""


def test_removed_groups_do_not_count(caplog) -> None:
    removed = NONE.clone()
    removed[4:6] = True
    text = said_of([1.0, 2, 3, 4] + [9.0, 8] + [5.0] * 4, [6], caplog, removed)
    assert "layers:channels (all 4 score 5)" in text


@pytest.mark.parametrize("changes", [{}, {"joint": 0}, {"saliency": "taylor"}])
def test_a_block_without_gradients_is_named_in_a_run(caplog, changes: dict) -> None:
    model, method, optimizer = prepare(GETAConfig(**{**SHORT, **changes}), Unused(), steps=STEPS)
    with caplog.at_level(logging.WARNING):
        train(model, method, optimizer, STEPS)
    assert f"{SAID} layers:channels (all 6 score 0)" in caplog.text and method.finished


def test_an_ordinary_run_says_nothing(caplog) -> None:
    model, method, optimizer = prepare(GETAConfig(**SHORT), steps=STEPS)
    with caplog.at_level(logging.WARNING):
        train(model, method, optimizer, STEPS)
    assert SAID not in caplog.text


def test_scores_that_are_not_numbers_are_refused() -> None:
    model, method, optimizer = prepare(GETAConfig(warmup=1, projection=0, joint=5, target_sparsity=0.5), steps=10)
    train(model, method, optimizer, 1)
    optimizer.qasso_state.mean_square.fill_(float("nan"))
    with pytest.raises(GETAError, match="the saliency of layers:heads is not finite"):
        train(model, method, optimizer, 10)
