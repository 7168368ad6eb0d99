from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import BertTokenizer

from geta_hf.errors import GETAError
from geta_hf.evaluation import squad_features
from geta_hf.evaluation.squad_features import Question
from geta_hf.recipes import demo_data
from tests.evaluation.questions import FILLER, ask


def nested(questions: list[Question]) -> dict:
    paragraphs = [
        {
            "context": q.context,
            "qas": [
                {
                    "id": q.id,
                    "question": q.question,
                    "answers": [
                        {"text": text, "answer_start": start} for text, start in zip(q.answers, q.starts, strict=True)
                    ],
                }
            ],
        }
        for q in questions
    ]
    return {"version": "1.1", "data": [{"title": "t", "paragraphs": paragraphs}]}


# ---------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("name", ["dev.json", "dev.json.gz"])
def test_load_questions(tmp_path: Path, name: str) -> None:
    questions = [ask("anna was born in oslo.", "oslo", "in oslo", id="ä1"), ask("boris retired in 1971.", "1971")]
    data = json.dumps(nested(questions), ensure_ascii=False).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert squad_features.load_questions(tmp_path / name) == questions


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", b"{", "not readable as JSON"),
        ("x.json.gz", b"plain", "not readable as JSON"),
        ("x.json.gz", gzip.compress(b'{"data": []}' * 50, mtime=0)[:-9], "not readable as JSON"),
        ("x.json", b'[{"question": "?"}]', "nested format"),
        ("x.json", b'{"data": [{"paragraphs": [{"context": "c", "qas": [{"id": 1}]}]}]}', "'answers'"),
        ("x.json", b'{"data": []}', "no question"),
    ],
)
def test_unusable_files_say_why(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(GETAError, match=message):
        squad_features.load_questions(tmp_path / name)


def test_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(GETAError, match="no such file"):
        squad_features.load_questions(tmp_path / "none.json")


def test_hub_rows() -> None:
    row = {"id": 7, "question": "?", "context": "oslo", "answers": {"text": ["oslo"], "answer_start": [0]}}
    assert squad_features.question_from_row(row) == Question("7", "?", "oslo", ("oslo",), (0,))
    with pytest.raises(GETAError, match="context"):
        squad_features.question_from_row({"id": 7, "question": "?", "answers": row["answers"]})


def test_sample_is_reproducible() -> None:
    questions = [ask("c", "c", id=str(i)) for i in range(50)]
    assert (
        squad_features.sample(questions, 9, 3)
        == squad_features.sample(questions, 9, 3)
        != squad_features.sample(questions, 9, 4)
    )
    assert squad_features.sample(questions, None) == squad_features.sample(questions, 50) == questions
    with pytest.raises(GETAError, match="at least 1"):
        squad_features.sample(questions, 0)


# ---------------------------------------------------------------------------------------------------------- windows


def test_every_generated_answer_decodes_from_its_positions(tokenizer: BertTokenizer, tmp_path: Path) -> None:
    demo_data.write(tmp_path, train_questions=400, eval_questions=60)
    questions = squad_features.load_questions(tmp_path / "train.json")
    features, dropped = squad_features.training_features(tokenizer, questions, 128, 32)
    assert (len(features), dropped) == (400, 0)
    for question, window, feature in zip(
        questions, squad_features.windows(tokenizer, questions, 128, 32), features, strict=True
    ):
        for answer, start in zip(question.answers, question.starts, strict=True):
            assert question.context[start : start + len(answer)] == answer
        span = window.offsets[feature["start_positions"], 0], window.offsets[feature["end_positions"], 1]
        assert question.context[slice(*span)] == question.answers[0]


def test_answer_far_behind_is_in_a_later_window_only(tokenizer: BertTokenizer) -> None:
    question = ask(FILLER * 12 + "anna lives in cape town. " + FILLER, "cape town")
    pieces = list(squad_features.windows(tokenizer, [question], 100, 20))
    features, _ = squad_features.training_features(tokenizer, [question], 100, 20)
    assert len(pieces) == len(features) >= 2
    assert all(len(piece.offsets) <= 100 for piece in pieces)
    assert (features[0]["start_positions"], features[0]["end_positions"]) == (0, 0)
    found = [(w, f) for w, f in zip(pieces, features, strict=True) if f["start_positions"]]
    assert found
    for window, feature in found:
        span = window.offsets[feature["start_positions"], 0], window.offsets[feature["end_positions"], 1]
        assert question.context[slice(*span)] == "cape town"
    covered = {tuple(span) for piece in pieces for span in piece.offsets[piece.offsets[:, 0] >= 0]}
    whole = tokenizer(question.context, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert covered == set(whole)


def test_neighbouring_windows_share_the_stride(tokenizer: BertTokenizer) -> None:
    first, second, *_ = squad_features.windows(tokenizer, [ask(FILLER * 30, "oslo")], 100, 20)
    spans = [{tuple(span) for span in piece.offsets[piece.offsets[:, 0] >= 0]} for piece in (first, second)]
    assert len(spans[0] & spans[1]) == 20


def test_answer_cut_by_the_window_edge_is_not_half_an_answer(tokenizer: BertTokenizer) -> None:
    features, _ = squad_features.training_features(tokenizer, [ask("oslo " * 200, " ".join(["oslo"] * 150))], 98, 5)
    assert {(f["start_positions"], f["end_positions"]) for f in features} == {(0, 0)}


def test_a_long_question_is_cut_and_leaves_room(tokenizer: BertTokenizer) -> None:
    question = ask("anna was born in oslo.", "oslo", question="where " * 500)
    (piece,) = squad_features.windows(tokenizer, [question], 100, 20)
    assert len(piece.offsets) == 64 + 6 + 3
    assert (piece.inputs["input_ids"] == tokenizer.convert_tokens_to_ids("where")).sum() == 64


@pytest.mark.parametrize("shift", [-7, -1, 1, 7])
def test_shifted_start_goes_to_the_nearest_occurrence(shift: int) -> None:
    context = "oslo is far. " * 3 + "anna was born in oslo and stays there. " + "oslo is far. " * 3
    start = context.index("born in oslo") + 8
    assert squad_features.locate(ask(context, "oslo", start=start + shift)) == start


def test_occurrences_may_overlap() -> None:
    assert squad_features.locate(ask("aaaa", "aa", start=1)) == 1


def test_questions_without_their_answer_are_dropped_and_counted(tokenizer: BertTokenizer) -> None:
    good, absent, empty = ask("anna was born in oslo.", "oslo"), ask("nothing.", "oslo"), ask("nothing.")
    features, dropped = squad_features.training_features(tokenizer, [absent, good, empty], 100, 20)
    assert (len(features), dropped) == (1, 2)
    assert features[0]["start_positions"] > 0
    with pytest.raises(GETAError, match="none of 2"):
        squad_features.training_features(tokenizer, [absent, empty])


def test_slow_tokenizer_and_impossible_lengths_are_refused(tokenizer: BertTokenizer) -> None:
    with pytest.raises(GETAError, match="slow tokenizer"):
        list(squad_features.windows(SimpleNamespace(is_fast=False), [ask("c", "c")]))
    with pytest.raises(GETAError, match="doc_stride=128 must be from 0 to 32"):
        list(squad_features.windows(tokenizer, [ask("c", "c")], 100, 128))
    with pytest.raises(GETAError, match="max_length=32"):
        list(squad_features.windows(tokenizer, [ask("c", "c")], 32, 0))
