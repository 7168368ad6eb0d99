"""The README's example runs as it stands, on a small local model in place of the Hub's, and the page shows anywhere."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from transformers import BertForSequenceClassification, BertTokenizerFast

from tests.conftest import tiny_bert_config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_example_works(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "fine", "dull", "film"]
    Path("vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    BertTokenizerFast(vocab_file="vocab.txt").save_pretrained("base")
    BertForSequenceClassification(tiny_bert_config(vocab_size=len(words))).save_pretrained("base")
    train, load = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len([line for line in train.splitlines() if line]) <= 10
    code = (train + load).replace("google-bert/bert-base-uncased", "base")
    code = code.replace('TrainingArguments("run")', 'TrainingArguments("run", use_cpu=True, report_to="none")')
    code = code.replace("* 100", "* 20")
    names: dict = {}
    exec(code, names)
    assert sum(p.numel() for p in names["small"].parameters()) < sum(p.numel() for p in names["model"].parameters())
    assert names["small"].config.quantization_config.quant_method == "geta"


def test_it_is_short_and_its_code_fits_a_narrow_page() -> None:
    assert len(README.splitlines()) < 200
    code = "".join(re.findall(r"```.*?\n(.*?)```", README, re.S))
    assert max(len(line) for line in code.splitlines()) < 90


def test_links_work_where_the_repository_is_not_at_hand() -> None:
    """PyPI shows the page too: a link or picture needs an address, so files are named by their path and not linked."""
    assert [link for link in re.findall(r"\]\(([^)]*)\)", README) if not link.startswith("https://")] == []
    assert "<img" not in README and "<a " not in README
    paths = set(re.findall(r"`((?:docs|benchmarks)/[\w./-]+|[A-Z]+\.md)`", README))
    assert len(paths) > 15 and {path for path in paths if not (ROOT / path).is_file()} == set()
