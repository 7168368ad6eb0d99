"""lm-eval's own command on an exported folder, in an environment that has never seen geta_hf."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from geta_hf import build_space, evaluate, export
from geta_hf.evaluation import write_tasks
from tests.elsewhere import run_elsewhere
from tests.export.tiny_encoders import train_by_hand
from tests.tiny_tasks import ROWS, byte_tokenizer, tiny_llama, write_rows

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


LOCAL = """
import sys
from lm_eval.__main__ import cli_evaluate
model = ["--model", "hf", "--model_args", "pretrained=out,trust_remote_code=True", "--device", "cpu"]
tasks = ["--include_path", "tasks", "--tasks", "piqa,blimp"]
sys.argv = ["lm_eval", "run", *model, *tasks, "--batch_size", "2", "--output_path", "results"]
cli_evaluate()
"""


def test_lm_eval_runs_a_generated_task(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    model, batch = tiny_llama(), {"input_ids": torch.arange(8).view(2, 4)}
    space = build_space(model, batch)
    train_by_hand(model, space)
    export(model, tmp_path / "out", space=space, batch=batch, processing_class=byte_tokenizer())
    names = ("piqa/validation", "blimp/transitive", "blimp/passive_1")
    data = write_rows(tmp_path / "data", {name: ROWS[name] for name in names})
    assert write_tasks(data, tmp_path / "tasks") == ["piqa", "blimp"]
    run_elsewhere(LOCAL, tmp_path)
    (result,) = tmp_path.glob("results/**/results_*.json")
    theirs = json.loads(result.read_text())
    ours = evaluate(tmp_path / "out", "piqa,blimp", data_dir=data, device="cpu")
    assert theirs["configs"]["piqa"]["dataset_path"] == "json"  # ours, not lm-eval's own of the same name
    for task, values in ours.results["results"].items():
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        assert numbers == pytest.approx({name: theirs["results"][task][name] for name in numbers}), task
    assert {"groups", "configs", "versions", "n-shot", "n-samples", "higher_is_better"} <= set(ours.results)


def _choice(model: LlamaForCausalLM, row: dict) -> int:
    logits = model(torch.tensor([tokenizer()(row["text"]).input_ids])).logits[0, -1]
    return int(logits[WORDS.index("dog")] > logits[WORDS.index("cat")])
