from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import datasets
import pytest
import torch
from transformers import PhiForCausalLM

from geta_hf import GETAError
from geta_hf.evaluation.texts import perplexity_of_rows
from geta_hf.recipes.documents import pack, prepare_tokenizer, prompt_and_response
from geta_hf.recipes.text_data import DataArguments, check_columns, collator, features, load_rows
from geta_hf.training.distillation import IGNORED
from tests.recipes.words import END, WORDS, stories, word_tokenizer, write_model

TEMPLATE = "Ask : {question}\n{hint}\nTell : {answer}"
ROWS = [
    {"question": "w1 w2", "hint": "", "answer": "w3"},
    {"question": "w4", "hint": "w5", "answer": "w6 w7"},
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", tmp_path / "downloads")
    monkeypatch.setattr(datasets.config, "EXTRACTED_DATASETS_PATH", tmp_path / "extracted")
    datasets.disable_progress_bars()


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def write(path: Path, rows: list[dict]) -> Path:
    text = "\n\n".join(row["text"] for row in rows)
    if ".jsonl" in path.suffixes:
        text = "\n".join(json.dumps(row) for row in rows)
    if ".csv" in path.suffixes:
        text = "\n".join(["text", *(row["text"] for row in rows)])
    if ".parquet" in path.suffixes:
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.json", "a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str, streaming: bool) -> None:
    texts = ["w1 w2 .", "w3 .", "w4 w5 w6 ."]
    path = write(tmp_path / name, [{"text": text} for text in texts])
    data = DataArguments(train_file=str(path), streaming=streaming)
    assert [row["text"].strip() for row in load_rows(data, str(path), "train", None)] == texts
    assert [row["text"].strip() for row in load_rows(data, str(path), "train", 2)] == texts[:2]


def test_a_table_of_commas(tmp_path: Path) -> None:
    """Not as a stream: datasets then leaves the file open."""
    path = write(tmp_path / "a.csv", [{"text": "w1 w2 ."}, {"text": "w3 ."}])
    assert [row["text"] for row in load_rows(DataArguments(), str(path), "train", None)] == ["w1 w2 .", "w3 ."]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_that_datasets_saved(tmp_path: Path, streaming: bool) -> None:
    saved = datasets.Dataset.from_list([{"text": text} for text in stories(3)])
    datasets.DatasetDict({"train": saved, "test": saved.select([1])}).save_to_disk(str(tmp_path / "both"))
    saved.save_to_disk(str(tmp_path / "one"))
    data = DataArguments(dataset_name=str(tmp_path / "both"), streaming=streaming)
    assert [row["text"] for row in load_rows(data, None, "test", None)] == stories(3)[1:2]
    with pytest.raises(GETAError, match="no split 'dev', only train, test"):
        load_rows(data, None, "dev", None)
    data = DataArguments(dataset_name=str(tmp_path / "one"), streaming=streaming)
    assert len(list(load_rows(data, None, "train", None))) == 3


def test_packing_puts_the_end_between_documents_and_loses_only_the_rest(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list([{"text": "w1 w2 w3"}, {"text": "w4"}, {"text": "w5 w6"}])
    found = features(DataArguments(block_size=4), word_tokenizer(), rows)
    assert found["input_ids"] == [ids(f"w1 w2 w3 {END}"), ids(f"w4 {END} w5 w6")]
    assert found["labels"] == found["input_ids"] and set(found.column_names) == {"input_ids", "labels"}
    batch = collator(DataArguments(), word_tokenizer())([found[0], found[1]])
    assert batch["input_ids"].shape == (2, 4) and "attention_mask" not in batch


def test_packed_labels_stay_beside_their_ids() -> None:
    columns = {"input_ids": [[1, 2, 3], [4, 5], [6, 7]], "labels": [[-100, 2, 3], [-100, 5], [6, 7]]}
    assert pack(columns, 3) == {"input_ids": [[1, 2, 3], [4, 5, 6]], "labels": [[-100, 2, 3], [-100, 5, 6]]}


@pytest.mark.parametrize("streaming", [False, True])
def test_prompts_are_not_learned_and_responses_end(streaming: bool) -> None:
    rows = datasets.Dataset.from_list(ROWS)
    data = DataArguments(template=TEMPLATE, response_column="answer", block_size=16, streaming=streaming)
    found = list(features(data, word_tokenizer(), rows.to_iterable_dataset() if streaming else rows))
    assert found[0]["input_ids"] == ids(f"Ask : w1 w2 Tell : w3 {END}")
    assert found[0]["labels"] == [IGNORED] * 6 + ids(f"w3 {END}")
    assert found[1]["labels"] == [IGNORED] * 6 + ids(f"w6 w7 {END}")


def test_padding_is_the_end_of_text_but_never_a_label() -> None:
    tokenizer = word_tokenizer()
    assert tokenizer.pad_token_id is None
    prepare_tokenizer(tokenizer)
    assert tokenizer.pad_token == END
    data = DataArguments(template=TEMPLATE, response_column="answer", block_size=16)
    found = features(data, tokenizer, datasets.Dataset.from_list(ROWS))
    batch = collator(data, tokenizer)([found[0], found[1]])
    assert batch["input_ids"].shape == (2, 9) and batch["input_ids"][0, -1] == ids(END)[0]
    assert batch["labels"][0].tolist() == [IGNORED] * 6 + ids(f"w3 {END}") + [IGNORED]
    assert batch["attention_mask"].sum(1).tolist() == [8, 9]


def test_rows_too_long_are_cut_and_dropped_where_nothing_is_left_to_learn() -> None:
    data = DataArguments(template=TEMPLATE, response_column="answer", block_size=7)
    rows = [*ROWS, {"question": "w1 w2 w3 w4 w5", "hint": "", "answer": "w6"}]
    found = features(data, word_tokenizer(), datasets.Dataset.from_list(rows))
    assert [row["labels"] for row in found] == [[IGNORED] * 6 + ids("w3"), [IGNORED] * 6 + ids("w6")]


def test_spaces_before_the_response_belong_to_it() -> None:
    data = DataArguments(template="Q: {question}\nA: {answer}", response_column="answer")
    assert prompt_and_response(data, ROWS[0]) == ("Q: w1 w2\nA:", " w3")
    data = DataArguments(prompt_column="question", response_column="answer")
    assert prompt_and_response(data, ROWS[0]) == ("w1 w2\n", "w3")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_column": "body"}, "no column 'body', only 'question', 'hint', 'answer'"),
        ({"response_column": "reply"}, "no column 'reply'"),
        ({"response_column": "answer", "template": "{riddle}: {answer}"}, "no column 'riddle'"),
        ({"response_column": "answer", "template": "{answer}: {question}"}, "must end with {answer}"),
        ({"template": TEMPLATE}, "need response_column"),
    ],
)
def test_columns_that_are_not_there_are_named(changes: dict, message: str) -> None:
    with pytest.raises(GETAError, match=message):
        check_columns(DataArguments(**changes), datasets.Dataset.from_list(ROWS))


def test_data_that_is_missing_empty_or_too_short(tmp_path: Path) -> None:
    with pytest.raises(GETAError, match="give dataset_name"):
        load_rows(DataArguments(), None, "train", None)
    for name, message in (
        ("none.txt", "^[^:]*none.txt: no such file"),
        ("a.xml", "files are read as"),
        ("a.jsonl", "a.jsonl can't be read"),
    ):
        (tmp_path / "a.xml").write_text("text")
        (tmp_path / "a.jsonl").write_text("")
        with pytest.raises(GETAError, match=message):
            load_rows(DataArguments(), str(tmp_path / name), "train", None)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(GETAError, match="can't be read"):
        load_rows(DataArguments(), str(tmp_path / "broken.json"), "train", None)
    with pytest.raises(GETAError, match="empty"):
        features(DataArguments(), word_tokenizer(), datasets.Dataset.from_list([]))
    with pytest.raises(GETAError, match="shorter than one block"):
        features(DataArguments(block_size=64), word_tokenizer(), datasets.Dataset.from_list([{"text": "w1"}]))
    with pytest.raises(GETAError, match="no end-of-text"):
        prepare_tokenizer(word_tokenizer(eos_token=None))


def test_perplexity_counts_every_label_once(tmp_path: Path) -> None:
    """Whatever the batches: against the sum over rows one by one."""
    model = PhiForCausalLM.from_pretrained(write_model(tmp_path)).eval()
    tokenizer = word_tokenizer(pad_token="<unk>")
    data = DataArguments(template=TEMPLATE, response_column="answer", block_size=16)
    rows = features(data, tokenizer, datasets.Dataset.from_list([*ROWS, ROWS[1]]))
    total = 0.0
    for row in rows:
        logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1].detach().log_softmax(-1)
        total -= sum(float(logits[i, label]) for i, label in enumerate(row["labels"][1:]) if label != IGNORED)
    found = perplexity_of_rows(model, rows, collator(data, tokenizer), batch_size=2)
    assert found["tokens"] == 2 + 3 + 3
    assert found["nats_per_token"] == pytest.approx(total / 8, abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(total / 8), rel=1e-5)
