from __future__ import annotations

from typing import Any

import datasets
import pytest
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from geta_hf import GETAError
from geta_hf.recipes.documents import has_target, pack, tokenize
from geta_hf.recipes.text_data import DataArguments, features
from geta_hf.training.distillation import IGNORED
from tests.recipes.words import END, WORDS, word_tokenizer

CHAT = DataArguments(messages_column="messages")
TEMPLATE = "{% for m in messages %}{{ 'Ask' if m.role == 'user' else 'Tell' }} : {{ m.content }} . {% endfor %}"
ASKING = "{% if add_generation_prompt %}Tell : {% endif %}"


@pytest.fixture(autouse=True)
def quiet() -> None:
    datasets.disable_progress_bars()


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": "user" if n % 2 == 0 else "assistant", "content": text} for n, text in enumerate(contents)]


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def learned(
    data: DataArguments, tokenizer: PreTrainedTokenizerFast, row: dict[str, Any]
) -> tuple[list[int], list[int]]:
    """Ids of a row, and those of them that are labels."""
    found = tokenize(data, tokenizer, {name: [value] for name, value in row.items()})
    (document,), (labels,) = found["input_ids"], found["labels"]
    assert all(label in (IGNORED, token) for label, token in zip(labels, document, strict=True))
    return document, [label for label in labels if label != IGNORED]


@pytest.mark.parametrize("empty", [None, "", "  "])
def test_rows_without_an_answer_are_left_out_and_counted(empty: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"ask": "w1", "tell": "w2"}, {"ask": "w1", "tell": empty}, {"ask": None, "tell": "w3"}]
    data = DataArguments(template="Ask : {ask}\nTell : {tell}", response_column="tell", block_size=8)
    found = features(data, word_tokenizer(), datasets.Dataset.from_list(rows))
    assert found["input_ids"] == [ids(f"Ask : w1 Tell : w2 {END}"), ids(f"Tell : w3 {END}")]
    assert "1 of 3 rows have nothing in 'tell' to learn" in capsys.readouterr().out
    assert not has_target(DataArguments(), {"text": empty}) and has_target(DataArguments(), {"text": 0})


def test_what_is_no_text_is_named() -> None:
    with pytest.raises(GETAError, match=r"column 'messages' holds lists, not text.*messages_column"):
        has_target(DataArguments(text_column="messages"), {"messages": turns("w1", "w2")})
    with pytest.raises(GETAError, match="must hold lists of messages"):
        has_target(CHAT, {"messages": [{"from": "human", "value": "w1"}]})
    with pytest.raises(GETAError, match="excludes response_column, prompt_column and template"):
        features(
            DataArguments(messages_column="messages", response_column="text"),
            word_tokenizer(),
            datasets.Dataset.from_list([{"messages": turns("w1", "w2")}]),
        )


def test_prompt_and_answer_are_tokenized_together() -> None:
    """A tokenizer that marks where a text begins would mark it twice, were they tokenized apart."""
    vocabulary = {"?": 0, "▁a": 1, ":": 2, "▁b": 3, "</s>": 4, "▁": 5, "a": 6, "b": 7}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("▁", "a"), ("▁", "b")], unk_token="?"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="?")
    data = DataArguments(template="{ask}: {tell}", response_column="tell")
    assert learned(data, whole, {"ask": "a", "tell": "b"}) == ([1, 2, 3, 4], [3, 4])


def test_a_token_across_the_border_is_learned() -> None:
    tokenizer = Tokenizer(models.BPE({"?": 0, "a": 1, "b": 2, "ab": 3, "</s>": 4}, [("a", "b")], unk_token="?"))
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="?")
    data = DataArguments(template="{ask}{tell}", response_column="tell")
    assert learned(data, whole, {"ask": "a", "tell": "ba"}) == ([3, 1, 4], [3, 1, 4])


def test_of_a_conversation_the_assistants_turns_are_learned() -> None:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE + ASKING
    document, labels = learned(CHAT, tokenizer, {"messages": turns("w1", "w2", "w3", "w4 w5")})
    assert document == ids("Ask : w1 . Tell : w2 . Ask : w3 . Tell : w4 w5 .")
    assert labels == ids("w2 . w4 w5 .")


def test_turns_that_a_template_writes_anew_are_not_learned() -> None:
    tokenizer = word_tokenizer()
    last = "{{ 'w9 ' if loop.last and m.role == 'assistant' }}"  # a thought, which is dropped once others follow
    tokenizer.chat_template = TEMPLATE.replace("{{ m.content }}", last + "{{ m.content }}") + ASKING
    document, labels = learned(CHAT, tokenizer, {"messages": turns("w1", "w2", "w3", "w4")})
    assert document == ids("Ask : w1 . Tell : w2 . Ask : w3 . Tell : w9 w4 .")
    assert labels == ids("w9 w4 .")


def test_a_conversation_needs_a_template_that_takes_it() -> None:
    tokenizer = word_tokenizer()
    with pytest.raises(GETAError, match="chat template can't write a conversation"):
        tokenize(CHAT, tokenizer, {"messages": [turns("w1", "w2")]})
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(GETAError, match="no system role"):
        tokenize(CHAT, tokenizer, {"messages": [turns("w1", "w2")]})


def test_blocks_of_prompts_alone_are_dropped() -> None:
    """The mean loss of nothing is no number; a label in the first place is never predicted."""
    columns = {"input_ids": [[1, 2, 3, 4, 5, 6, 7, 8, 9]], "labels": [[-100] * 3 + [4, -100, -100, 7, 8, 9]]}
    assert pack(columns, 3) == {"input_ids": [[7, 8, 9]], "labels": [[7, 8, 9]]}


@pytest.mark.parametrize("template", ["Q {ask A {tell}", "{} {tell}", "{ask.x} {tell}"])
def test_templates_that_are_none(template: str) -> None:
    data = DataArguments(template=template, response_column="tell")
    with pytest.raises(GETAError, match="template"):
        features(data, word_tokenizer(), datasets.Dataset.from_list([{"ask": "w1", "tell": "w2"}]))
