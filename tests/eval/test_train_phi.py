from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval import train_phi

STORY = "Once upon a time a small fox met a large bear. They shared a cake, and the bear was glad."


@pytest.fixture
def texts(tmp_path: Path) -> list[Path]:
    book = tmp_path / "book.txt.gz"
    book.write_bytes(gzip.compress(f"CHAPTER 1\n\n{STORY}\n\n{STORY[:40]}\n{STORY[40:]}\n".encode()))
    stories = tmp_path / "stories.txt"
    stories.write_text("\n<|endoftext|>\n".join(f"Story {number}.\n\n{STORY}" for number in range(60)))
    squad = tmp_path / "squad.json"
    paragraphs = [{"context": f"{STORY} {number}"} for number in range(10)]
    squad.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    return [book, stories, squad]


def test_documents_of_every_kind_of_file(texts: list[Path]) -> None:
    book, stories, squad = (list(train_phi.documents(path)) for path in texts)
    assert book[0] == STORY and len(book) == 2  # the heading is gone, the line break within a paragraph is a blank
    assert "\n" not in book[1]
    assert len(stories) == 60 and stories[7] == f"Story 7. {STORY}"  # an empty line does not end a story
    assert squad == [f"{STORY} {number}" for number in range(10)]


def test_what_is_held_out_is_not_learned_from(texts: list[Path], tmp_path: Path) -> None:
    train, held_out = (path.read_text() for path in train_phi.split_texts(texts[1:], tmp_path, 0.1))
    first, second = (set(text.strip().split("\n\n")) for text in (train, held_out))
    assert len(first) == 54 + 9 and len(second) == 6 + 1 and not first & second


def test_a_stopped_run_goes_on_and_leaves_a_model_that_loads(texts: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "phi"
    sizes = ["--hidden", "32", "--layers", "1", "--block", "16", "--batch_size", "4", "--vocabulary", "300"]
    train_phi.main([str(folder), "--texts", *map(str, texts), "--epochs", "1", *sizes])
    tokenizer, model = (kind.from_pretrained(folder / "model") for kind in (AutoTokenizer, AutoModelForCausalLM))
    assert tokenizer.pad_token is None and tokenizer.decode(tokenizer(STORY)["input_ids"]) == STORY
    blocks = train_phi.read_blocks(folder / "train.txt", tokenizer, 16)
    assert blocks[0, 0] == tokenizer.eos_token_id and blocks.shape[1] == 16
    with torch.no_grad():
        assert float(model(input_ids=blocks[:4], labels=blocks[:4]).loss) < 6.0
    before = model.get_input_embeddings().weight.clone()
    train_phi.main([str(folder), "--texts", *map(str, texts), "--epochs", "1", *sizes])  # nothing is left to do
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder / "model").get_input_embeddings().weight, before)
