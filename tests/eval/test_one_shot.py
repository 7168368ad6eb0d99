"""The study of compression without training: budgets are what they are called, and finished rows are not run again."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from eval import one_shot
from geta_hf.costs.ledger import LayerEntry, Ledger
from tests.tiny_tasks import byte_tokenizer, tiny_llama


def test_a_budget_counts_codes_and_step_sizes() -> None:
    shapes = {"a.weight": (8, 100), "b.weight": (4, 100), "norm": (100,)}
    layers = [LayerEntry(name, channel_dim=0) for name in ("a.weight", "b.weight")]
    ledger = Ledger.of((), shapes, layers, dict.fromkeys(shapes, 4))
    bits = (1200 * 3 + 12 * 32) / 1200
    assert abs(one_shot.bytes_for(ledger, bits) - ledger.stored_bytes(ledger.nothing, 3)) <= 8


def test_texts_are_cut_into_blocks() -> None:
    blocks = one_shot.blocks_of("abc<|endoftext|>defgh<|endoftext|>", byte_tokenizer(), 4, "<|endoftext|>")
    assert blocks.flatten().tolist() == byte_tokenizer()("abcdefgh")["input_ids"]


@pytest.mark.slow
def test_rows_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "a.txt").write_text("Once upon a time. " * 40, encoding="utf-8")
    options = [
        "--model",
        "model",
        "--text",
        "a.txt",
        "--work",
        "work",
        "--blocks",
        "8",
        "--scored",
        "8",
        "--length",
        "16",
    ]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["one_shot", *options, "--bits", "5", "2.2"])
    one_shot.main()
    first = capsys.readouterr().out
    # Step sizes alone take more than what is left of 2.2 bits.
    assert "out of reach" in first and "same, unpruned" in first
    monkeypatch.setattr(one_shot, "run", lambda *_: pytest.fail("a finished row is run again"))
    one_shot.main()
    assert capsys.readouterr().out == first
