"""lm-eval's own command on an exported folder, in an environment that has never seen geta_hf."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from geta_hf import build_space, export
from tests.elsewhere import run_elsewhere
from tests.export.tiny_encoders import train_by_hand

pytestmark = pytest.mark.slow

WORDS = ["<s>", "</s>", "<unk>", "a", "big", "small", "red", "cat", "dog"]
TASK = {
    "task": "cat_or_dog",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}},
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "{{text}}",
    "doc_to_choice": ["cat", "dog"],
    "doc_to_target": "{{label}}",
    "metric_list": [{"metric": "acc"}],
}
COMMAND = """
import sys
from lm_eval.__main__ import cli_evaluate
model = ["--model", "hf", "--model_args", "pretrained=out,trust_remote_code=True", "--device", "cpu"]
sys.argv = ["lm_eval", "run", *model, "--tasks", "task.yaml", "--batch_size", "2", "--output_path", "results"]
cli_evaluate()
"""


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_lm_eval_runs_the_folder(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), num_hidden_layers=2, **sizes)).eval()
    batch = {"input_ids": torch.arange(8).view(2, 4)}
    space = build_space(model, batch)
    train_by_hand(model, space)
    export(model, tmp_path / "out", space=space, batch=batch, processing_class=tokenizer())
    rows = [{"text": f"a {word}", "label": place % 2} for place, word in enumerate(["big", "small", "red"])]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "task.yaml").write_text(json.dumps(TASK))  # JSON is YAML
    assert "cat_or_dog" in run_elsewhere(COMMAND, tmp_path)
    (result,) = tmp_path.glob("results/**/results_*.json")
    found = json.loads(result.read_text())["results"]["cat_or_dog"]["acc,none"]
    with torch.no_grad():
        right = [_choice(LlamaForCausalLM.from_pretrained(tmp_path / "out"), row) == row["label"] for row in rows]
    assert found == pytest.approx(sum(right) / len(rows))


def _choice(model: LlamaForCausalLM, row: dict) -> int:
    logits = model(torch.tensor([tokenizer()(row["text"]).input_ids])).logits[0, -1]
    return int(logits[WORDS.index("dog")] > logits[WORDS.index("cat")])
