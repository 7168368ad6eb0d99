"""The recipe for encoder-decoders: a tiny run, and what is scored."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import evaluate
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, T5Config, T5ForConditionalGeneration

from geta_hf import GETAError
from geta_hf.evaluation.summaries import write_texts
from geta_hf.recipes import CONFIGS
from geta_hf.recipes import summarization as recipe
from geta_hf.reporting.results import read_results
from tests.recipes.words import WORDS, word_tokenizer

QUICK = ["--use_cpu", "--disable_tqdm", "--report_to", "none", "--save_strategy", "no", "--learning_rate", "1e-2"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small T5 whose tokenizer knows whole words."""
    folder = tmp_path_factory.mktemp("t5")
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 4}
    end = WORDS.index("<end>")
    config = T5Config(vocab_size=len(WORDS), **sizes, dropout_rate=0.0, decoder_start_token_id=0, eos_token_id=end)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    word_tokenizer(pad_token="<unk>", model_input_names=["input_ids", "attention_mask"]).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def write_rows(path: Path, count: int, seed: int = 0) -> Path:
    """Texts of five words; the summary is the first."""
    draw = random.Random(seed)
    rows = [[f"w{draw.randrange(40)}" for _ in range(5)] for _ in range(count)]
    lines = [json.dumps({"document": " ".join(words) + " .", "summary": words[0] + " <end>"}) for words in rows]
    path.write_text("\n".join(lines))
    return path


def rouge(predictions: list[str], references: list[str]) -> dict[str, float]:
    scorer = RougeScorer(["rouge1"])
    found = [scorer.score(one, other)["rouge1"].fmeasure for one, other in zip(references, predictions, strict=True)]
    return {"rouge1": sum(found) / len(found)}


def test_a_compressed_run(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The score is that of what the exported folder writes for one text at a time."""
    monkeypatch.setattr(evaluate, "load", lambda name, config=None: SimpleNamespace(compute=lambda **o: rouge(**o)))
    files = ["--train_file", str(write_rows(tmp_path / "train.jsonl", 48))]
    files += ["--eval_file", str(write_rows(tmp_path / "dev.jsonl", 12, seed=1)), "--max_target_length", "4"]
    words = ["--model_name_or_path", str(model_folder), *files, "--output_dir", str(tmp_path / "out"), *QUICK]
    results = recipe.main([*words, "--max_steps", "40", "--geta.target_sparsity", "0.3"])
    assert results["samples"] == 12 and results["train_rows"] == 48 and results["start"]["samples"] == 12
    assert results["rouge1"] == results["before_export"]["rouge1"]
    folder = tmp_path / "out" / "export"
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [json.loads(line) for line in (tmp_path / "dev.jsonl").read_text().splitlines()]
    written = []
    for row in rows:
        tokens = model.generate(**tokenizer(row["document"], return_tensors="pt"), max_new_tokens=4, do_sample=False)
        written.append(tokenizer.decode(tokens[0], skip_special_tokens=True))
    assert results["rouge1"] == pytest.approx(100 * rouge(written, [row["summary"] for row in rows])["rouge1"])
    found = read_results(folder)
    assert found["compressed"][0].data == "dev.jsonl" and found["dense"][0].metrics == {
        "rouge1": results["start"]["rouge1"]
    }


def test_a_prefix_and_a_sample(tmp_path: Path) -> None:
    data = recipe.DataArguments(source_prefix="Tell : ")
    pairs = recipe.load_pairs(data, str(write_rows(tmp_path / "a.jsonl", 9)), "train", 4)
    assert len(pairs.sources) == len(pairs.targets) == 4 and pairs.total == 9
    assert all(text.startswith("Tell : w") for text in pairs.sources)
    for source, target in zip(pairs.sources, pairs.targets, strict=True):
        assert source.split()[2] == target.split()[0]  # rows stay together
    with pytest.raises(GETAError, match="no column 'article', only 'document', 'summary'"):
        recipe.load_pairs(recipe.DataArguments(text_column="article"), str(tmp_path / "a.jsonl"), "train", None)


def test_batches_write_as_single_texts_do(model_folder: Path) -> None:
    model = T5ForConditionalGeneration.from_pretrained(model_folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    texts = ["w1 w2 w3 .", "w4", "w5 w6"]
    options: dict[str, Any] = {"max_target_length": 5, "progress": False}
    together = write_texts(model, tokenizer, texts, batch_size=3, **options)
    assert together == [write_texts(model, tokenizer, [text], **options)[0] for text in texts]


def test_the_ready_made_config(tmp_path: Path) -> None:
    found = recipe.parse_arguments([str(CONFIGS / "t5_summarization.yaml"), "--output_dir", str(tmp_path)])
    assert found.data.source_prefix == "summarize: " and found.geta is not None
