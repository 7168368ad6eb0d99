from __future__ import annotations

import gzip
import math
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from geta_hf import GETAError, perplexity
from geta_hf.evaluation.texts import read_text
from tests.tiny_tasks import byte_tokenizer, tiny_llama

TEXT = "The pen is blue; déjà vu, said the rain. " * 2


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama(positions=64)


@torch.no_grad()
def one_by_one(model: LlamaForCausalLM, tokens: list[int], block: int, stride: int) -> float:
    """Each token from the context that its window gives it: the definition, without batches."""
    count, done, total, start = len(tokens) - 1, 0, 0.0, 0
    while done < count:
        end = min(start + block, count)
        begin = max(end - block, 0)  # the last window ends with the text
        for place in range(done + 1, end + 1):
            logits = model(torch.tensor([tokens[begin:place]])).logits[0, -1].double()
            total -= float(logits.log_softmax(-1)[tokens[place]])
        done, start = end, start + stride
    return total / count


@pytest.mark.parametrize(("block", "stride"), [(16, 8), (16, 16), (16, 1), (10, 7), (64, 64), (1, 1), (64, 63)])
def test_every_token_is_scored_once_from_its_window(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, block: int, stride: int
) -> None:
    tokenizer = byte_tokenizer()
    tokens = [tokenizer.bos_token_id, *tokenizer(TEXT).input_ids]
    expected = one_by_one(model, tokens, block, stride)
    for positions in (3 * block, 2048):  # several batches, and one
        monkeypatch.setattr("geta_hf.evaluation.texts._POSITIONS", positions)
        found = perplexity(model, tokenizer, TEXT, block=block, stride=stride)
        assert found.nats_per_token == pytest.approx(expected, abs=1e-5)
        assert (found.tokens, found.bytes, found.block) == (len(TEXT.encode()), len(TEXT.encode()), block)


def test_a_short_text_is_one_window_and_what_transformers_says(model: LlamaForCausalLM) -> None:
    tokenizer = byte_tokenizer()
    tokens = torch.tensor([[tokenizer.bos_token_id, *tokenizer("a pen").input_ids]])
    loss = model(tokens, labels=tokens).loss.item()
    found = perplexity(model.train(), tokenizer, "a pen")
    assert model.training
    assert found.nats_per_token == pytest.approx(loss, abs=1e-5)
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-5)


def test_units_of_a_model_that_knows_nothing() -> None:
    blank = tiny_llama()
    with torch.no_grad():
        blank.lm_head.weight.zero_()
    found = perplexity(blank, byte_tokenizer(eos_token="<s>"), "déjà")  # 4 letters, 6 bytes
    assert found.perplexity == pytest.approx(257, rel=1e-5)
    assert found.bits_per_byte == pytest.approx(math.log2(257), rel=1e-5)
    assert found.bytes == 6


def test_bad_input_is_refused(model: LlamaForCausalLM) -> None:
    tokenizer = byte_tokenizer()
    for text, options, told in [
        ("", {}, "not empty"),
        ("a", {"block": 65}, "64 tokens"),
        ("a", {"block": 0}, "block=0"),
        ("a", {"block": 8, "stride": 9}, "stride=9"),
        ("a", {"block": 8, "stride": 0}, "stride=0"),
    ]:
        with pytest.raises(GETAError, match=told):
            perplexity(model, tokenizer, text, **options)
    with pytest.raises(GETAError, match="neither bos_token nor eos_token"):
        perplexity(model, byte_tokenizer(pad_token="<s>"), "a")


def test_texts_are_read_packed_or_plain(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("déjà\r\n".encode())
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("déjà\r\n".encode()))
    assert read_text(tmp_path / "a.txt") == read_text(tmp_path / "a.txt.gz") == "déjà\r\n"
    (tmp_path / "latin.txt").write_bytes("déjà".encode("latin-1"))
    (tmp_path / "false.gz").write_bytes(b"no gzip")
    for name in ("latin.txt", "false.gz", "none.txt"):
        with pytest.raises(GETAError, match=name):
            read_text(tmp_path / name)
