from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from geta_hf.evaluation.squad_features import Question, load_questions
from geta_hf.recipes import demo_data


def test_same_seed_same_files_and_exact_counts(tmp_path: Path) -> None:
    for name in ("one", "two"):
        demo_data.write(tmp_path / name, train_questions=103, eval_questions=31, seed=3)
    for file in ("train.json", "dev.json", "model/model.safetensors", "model/tokenizer.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert len(load_questions(tmp_path / "one" / "train.json")) == 103
    assert len(load_questions(tmp_path / "one" / "dev.json")) == 31


def test_people_of_the_evaluation_set_are_new_and_answers_unique(tmp_path: Path) -> None:
    demo_data.write(tmp_path, train_questions=600, eval_questions=200)
    train, dev = (load_questions(tmp_path / f"{name}.json") for name in ("train", "dev"))

    def people(questions: list[Question]) -> set[str]:
        return {name for name in demo_data.PEOPLE if any(name in q.question for q in questions)}

    assert not people(train) & people(dev)
    assert len({question.id for question in train + dev}) == 800
    assert any(len(question.answers) > 1 for question in dev)
    assert all(question.context.count(question.answers[0]) == 1 for question in dev)


def test_tokenizer_knows_every_word_and_spells_the_rest(tmp_path: Path) -> None:
    demo_data.write(tmp_path, train_questions=200, eval_questions=50)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    text = json.loads((tmp_path / "dev.json").read_text())["data"][0]["paragraphs"][0]["context"]
    assert not [token for token in tokenizer.tokenize(text) if token == "[UNK]" or token.startswith("##")]
    assert tokenizer.tokenize("xyz") == ["x", "##y", "##z"]


def test_model_loads_with_its_groups(tmp_path: Path) -> None:
    demo_data.write(tmp_path, train_questions=5, eval_questions=5)
    config = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "model").config
    assert config.num_hidden_layers * (config.num_attention_heads + config.intermediate_size) == 1056
