from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertTokenizer

from geta_hf.errors import GETAError
from geta_hf.evaluation import squad
from geta_hf.evaluation.squad_features import Question
from tests.evaluation.questions import FILLER, ask

# ----------------------------------------------------------------------------------------------------------- metric


@pytest.mark.parametrize(
    ("prediction", "answer", "em", "f1"),
    [
        ("The Eiffel Tower!", "eiffel tower", 1, 1),  # articles, case, punctuation
        ("an  apple\tpie", "apple pie", 1, 1),  # white space
        ("U.S.A.", "usa", 1, 1),  # punctuation goes without leaving a space
        ("theatre", "atre", 0, 0),  # an article is a word, not a piece of one
        ("Café Zürich", "café zürich", 1, 1),  # unicode keeps its accents
        ("cafe", "café", 0, 0),
        ("“Paris”", "Paris", 0, 0),  # only ASCII punctuation goes, as in the official script
        ("in the city of Oslo", "Oslo", 0, 2 * (1 / 4) / (1 / 4 + 1)),
        ("black black cat", "black cat", 0, 2 * (2 / 3) / (2 / 3 + 1)),  # a repeated word counts once
        ("", "Oslo", 0, 0),
        ("yes", "no", 0, 0),
        ("Yes.", "yes", 1, 1),
        ("the", "a", 1, 0),  # both normalize to nothing: equal, but without a common word
    ],
)
def test_metric_by_hand(prediction: str, answer: str, em: float, f1: float) -> None:
    assert squad.exact_match(prediction, answer) == em
    assert squad.f1(prediction, answer) == pytest.approx(f1)


def test_score_takes_the_best_reference_and_counts_what_is_missing() -> None:
    questions = [
        Question("a", "?", "c", ("Oslo", "the city of Oslo"), (0, 0)),
        Question("b", "?", "c", ("1971",), (0,)),
        Question("c", "?", "c", ("cello",), (0,)),
        Question("d", "?", "c", (), ()),
    ]
    scores = squad.score({"a": "city of Oslo", "b": "in 1971", "d": "x"}, questions)
    assert scores == {
        "em": pytest.approx(100 / 3),
        "f1": pytest.approx(100 * (1 + 2 / 3 + 0) / 3),
        "questions": 3,
        "missing": 1,
        "unanswerable": 1,
    }


def test_score_refuses_questions_without_any_answer() -> None:
    with pytest.raises(GETAError, match="reference answer"):
        squad.score({}, [Question("d", "?", "c", (), ())])


# ------------------------------------------------------------------------------------------------------- prediction


def test_best_span_obeys_paragraph_order_length_and_n_best() -> None:
    start, end = np.array([9.0, 1, 5, 0, 4, 0]), np.array([9.0, 8, 0, 2, 0, 3])
    inside = np.array([False, True, True, True, True, True])
    assert squad.best_span(start, end, inside) == (9.0, 1, 1)  # 2 -> 1 would give 13 but runs backwards
    assert squad.best_span(start, end, inside & (np.arange(6) > 1)) == (8.0, 2, 5)
    assert squad.best_span(start, end, inside & (np.arange(6) > 1), max_answer_length=2) == (7.0, 2, 3)
    assert squad.best_span(start, end, inside, n_best=1)[0] == -np.inf
    assert squad.best_span(start, end, np.zeros(6, bool)) == (-np.inf, 0, 0)


class Planted(nn.Module):
    """Points at one token id as the start and at another as the end; at special tokens and padding even more."""

    def __init__(self, first: int, last: int) -> None:
        super().__init__()
        self.first, self.last, self.batches = first, last, []
        self.device = torch.device("cpu")

    def forward(self, input_ids: torch.Tensor, **_: torch.Tensor) -> SimpleNamespace:
        assert not self.training
        self.batches.append(tuple(input_ids.shape))
        special = 100.0 * (input_ids < 5)
        return SimpleNamespace(
            start_logits=10.0 * (input_ids == self.first) + special,
            end_logits=10.0 * (input_ids == self.last) + special,
        )


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_predict_recovers_planted_answers(tokenizer: BertTokenizer, batch_size: int) -> None:
    model = Planted(*tokenizer.convert_tokens_to_ids(["cape", "town"])).train()
    questions = [
        ask(FILLER * before + "Anna lives in Cape Town. " + FILLER * after, "Cape Town", id=f"{before}-{after}")
        for before, after in ((0, 0), (14, 3), (3, 14), (0, 1), (20, 20))
    ]
    found = squad.predict(model, tokenizer, questions, 100, 20, batch_size, progress=False)
    assert found == {question.id: "Cape Town" for question in questions}
    assert list(found) == [question.id for question in questions]
    assert model.training
    lengths = [length for _, length in model.batches]
    assert lengths == sorted(lengths, reverse=True)
    assert all(rows <= batch_size for rows, _ in model.batches)


def test_predict_ignores_words_of_the_question_and_empty_paragraphs(tokenizer: BertTokenizer) -> None:
    model = Planted(*tokenizer.convert_tokens_to_ids(["oslo", "oslo"])).eval()
    questions = [ask("anna likes oslo.", "oslo", question="oslo or porto?"), ask("", "x", id="empty")]
    assert squad.predict(model, tokenizer, questions, 100, 20, progress=False) == {"q": "oslo", "empty": ""}


def test_standard_errors_are_those_of_a_mean() -> None:
    questions = [Question(name, "?", "c", ("yes",), (0,)) for name in "abcd"]
    found = squad.standard_errors({"a": "yes", "b": "yes", "c": "no"}, questions)
    expected = 100 * math.sqrt(sum((x - 0.5) ** 2 for x in (1, 1, 0, 0)) / 3) / 2
    assert found == {"em": pytest.approx(expected), "f1": pytest.approx(expected)}
    assert squad.standard_errors({}, questions[:1]) == {}
