from __future__ import annotations

import json
import math
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from geta_hf import GETAConfig, GETAError
from geta_hf.errors import MemoryUnknown
from geta_hf.recipes import language_modeling as recipe
from geta_hf.reporting.comparison import read_structure
from tests.recipes.words import stories, write_model

FOLDER = Path(recipe.__file__).parent / "configs"
GETA = {"target_sparsity": 0.5, "bits": [4, 8], "projection_periods": 1, "pruning_periods": 2}
QUICK = ["--max_steps", "12", "--per_device_train_batch_size", "4", "--use_cpu", "--disable_tqdm"]
QUIET = ["--report_to", "none", "--save_strategy", "no", "--logging_steps", "10", "--learning_rate", "1e-3"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", tmp_path / "downloads")
    datasets.disable_progress_bars()


@pytest.fixture
def argv(tmp_path: Path) -> list[str]:
    """A run over plain text, but for `--geta`."""
    (tmp_path / "train.txt").write_text("\n\n".join(stories(40) * 4))
    (tmp_path / "test.txt").write_text("\n\n".join(stories(15)))
    model = ["--model_name_or_path", str(write_model(tmp_path / "model")), "--output_dir", str(tmp_path / "out")]
    files = ["--train_file", str(tmp_path / "train.txt"), "--eval_file", str(tmp_path / "test.txt")]
    return [*model, *files, "--block_size", "24", *QUICK, *QUIET]


def with_geta(argv: list[str], **changes: object) -> list[str]:
    """The fields as `--geta.name value`."""
    flat = [text for name, value in {**GETA, **changes}.items() for text in (f"--geta.{name}", json.dumps(value))]
    return [*argv, *flat]


@pytest.mark.parametrize("name", ["phi2", "llama", "qwen"])
def test_shipped_configs_are_understood(name: str, tmp_path: Path) -> None:
    arguments = recipe.parse_arguments([str(FOLDER / f"{name}.yaml"), "--output_dir", str(tmp_path)])
    assert arguments.geta == GETAConfig(target_sparsity=0.3, bits=(4, 16), mean_bits=8, uniform=name == "llama")
    training = arguments.training
    assert training.bf16 and training.gradient_checkpointing and training.optim == "adafactor"
    assert not arguments.data.packs and arguments.model.dtype == "float32" and arguments.lora is None


def test_the_small_config_is_understood(tmp_path: Path) -> None:
    arguments = recipe.parse_arguments([str(FOLDER / "smollm2.yaml"), "--output_dir", str(tmp_path)])
    geta = arguments.geta
    assert isinstance(geta, GETAConfig)
    assert (geta.target_parameters, geta.mean_bits, geta.grid, geta.rounding) == (0.3, 8, "channel", "compensated")
    assert geta.distill_logits == 1.0 and geta.compensate
    assert arguments.data.packs and arguments.training.max_steps == 100 and not arguments.training.bf16


def test_gradient_checkpointing_under_either_name(argv: list[str]) -> None:
    for name in ("gradient_checkpointing", "activation_checkpointing"):
        assert recipe.parse_arguments([*argv, f"--{name}"]).training.gradient_checkpointing


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--streaming", "--max_steps", "-1"], "streaming has no length: give max_steps"),
        (["--sample_by", "sentence"], "sample_by = 'sentence' must be one of paragraph, line, document"),
        (["--dtype", "float16"], "dtype = 'float16' must be one of float32, bfloat16$"),
        (["--device_memory", "much"], "80GB"),
        (["--lora.r", "4"], "lora without geta"),
        (["--lora", "yes"], "neither a section"),
        (["--blocks", "4"], "blocks"),
        (["--eval_file", "null", "--eval_strategy", "steps", "--eval_steps", "4"], "give eval_file or eval_split"),
    ],
)
def test_wrong_arguments_say_what_is_wrong(argv: list[str], extra: list[str], message: str) -> None:
    with pytest.raises(GETAError, match=message):
        recipe.parse_arguments([*argv, *extra])


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--block_size", "65"], "block_size = 65 must lie between 2 and the model's 64 positions"),
        (["--text_column", "story"], "no column 'story', only 'text'"),
        (["--device_memory", "0.1MB"], "does not fit"),
        (["--lora.r", "4", "--lora.target_modules", "[lm_head]"], "targets nothing quantized"),
        (["--lora.rank", "4"], "rank"),
        (["--model_name_or_path", "elsewhere/nothing"], "the model elsewhere/nothing can't be loaded"),
        (["--eval_file", "null", "--dataset_name", "none", "--eval_split", "test"], "none can't be read"),
    ],
)
def test_what_can_not_work_fails_before_training(argv: list[str], extra: list[str], message: str) -> None:
    with pytest.raises(GETAError, match=message):
        recipe.main([*with_geta(argv), *extra])


def test_compressed_run_from_end_to_end(argv: list[str], tmp_path: Path) -> None:
    """Over a stream, of which nothing is known but the next row."""
    results = recipe.main(with_geta([*argv, "--streaming"]))
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == json.loads(json.dumps(results))
    assert results["steps"] == 12 and results["tokens"] == 12 * 4 * 24
    assert results["before"]["tokens"] == results["after"]["tokens"] > 0
    assert results["after"]["perplexity"] < 0.9 * results["before"]["perplexity"]  # near 46, the number of words
    assert results["after"]["perplexity"] == pytest.approx(math.exp(results["after"]["nats_per_token"]))
    assert results["memory_foreseen"]["peak"] > 0
    structure = read_structure(tmp_path / "out" / "export")
    assert sum(kept for kept, _ in structure.kept.values()) == (2 * (4 + 48)) // 2
    assert all(4 <= bits <= 8 for bits in structure.bits.values())
    card = (tmp_path / "out" / "export" / "README.md").read_text()
    assert "perplexity" in card and " name: test.txt\n" in card
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "export")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "export")
    inputs = tokenizer("w3 w4 w5", return_tensors="pt", return_token_type_ids=False)
    assert model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=1).shape[1] <= 7


def test_dense_run_over_instructions(argv: list[str], tmp_path: Path) -> None:
    rows = [{"ask": f"w{n % 40}", "tell": f"w{(n + 1) % 40}"} for n in range(80)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    files = ["--train_file", str(tmp_path / "rows.jsonl"), "--eval_file", str(tmp_path / "rows.jsonl")]
    columns = ["--template", "'Ask : {ask} Tell : {tell}'", "--response_column", "tell", "--max_eval_rows", "8"]
    results = recipe.main([*argv, *files, *columns, "--max_steps", "6"])
    assert results["tokens"] == 6 * 4 * 7 and results["after"]["tokens"] == 8 * 2
    assert results["after"]["nats_per_token"] < results["before"]["nats_per_token"]
    assert results["config"]["geta"] is None
    AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "export")


def test_conversations_and_a_look_at_held_out_rows_while_training(argv: list[str], tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'Ask : ' if m.role == 'user' else 'Tell : ' }}{{ m.content }} . {% endfor %}"
        "{% if add_generation_prompt %}Tell : {% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "model")
    words = [(f"w{n % 40}", f"w{(n + 1) % 40}") for n in range(40)]
    rows = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in words]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"messages": row}) for row in rows))
    files = ["--train_file", str(tmp_path / "rows.jsonl"), "--eval_file", str(tmp_path / "rows.jsonl")]
    often = ["--messages_column", "messages", "--eval_strategy", "steps", "--eval_steps", "3", "--max_steps", "6"]
    results = recipe.main([*argv, *files, *often])
    assert results["before"]["tokens"] == 40 * 2 and results["tokens"] == 6 * 4 * 8
    assert results["after"]["nats_per_token"] < results["before"]["nats_per_token"]


def test_a_start_that_can_not_be_trained(argv: list[str], tmp_path: Path) -> None:
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    quantized = {**config, "quantization_config": {"quant_method": "geta", "version": 3}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(quantized))
    with pytest.raises(GETAError, match=r"quantized already \(geta\); start from the dense model"):
        recipe.main([*with_geta(argv), "--plan_only"])
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "vocab_size": 20}))
    with pytest.raises(GETAError, match="no row in the model's embedding of 20 rows"):
        recipe.main(argv)


def test_a_model_whose_memory_can_not_be_foreseen_is_trained(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryUnknown("it asks for data")

    monkeypatch.setattr(recipe, "dry_run", fail)
    assert recipe.check_memory(recipe.parse_arguments(argv)) is None


def test_plan_only_reads_no_weights(argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "train.txt").unlink()
    assert recipe.main([*with_geta(argv), "--plan_only", "--device_memory", "80GB"]) == {}
    printed = capsys.readouterr().out
    assert "| heads    | 2      | 4" in printed and "groups to remove: 52 of 104" in printed
    assert "forward and backward" in printed and " MB of 80.0 GB are needed" in printed
    recipe.main([*with_geta(argv), "--plan_only", "--device_memory", "0.1MB"])
    assert "does not fit" in capsys.readouterr().out
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.slow
def test_lora_section_trains_adapters_and_exports_no_trace_of_them(argv: list[str], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    results = recipe.main(with_geta([*argv, "--lora.r", "4", "--lora.target_modules", "all-linear"]))
    assert results["config"]["lora"] == {"r": 4, "target_modules": "all-linear"}
    full = recipe.plan(recipe.parse_arguments(with_geta(argv))).memory.step
    assert results["memory_foreseen"]["step"]["gradients"] < full.gradients / 2
    structure = read_structure(tmp_path / "out" / "export")
    assert sum(kept for kept, _ in structure.kept.values()) == (2 * (4 + 48)) // 2
    assert not any(
        "lora" in name for name in AutoModelForCausalLM.from_pretrained(tmp_path / "out/export").state_dict()
    )


def test_sizes_and_verdicts(argv: list[str]) -> None:
    sizes = {"80GB": 80 * 10**9, "80g": 80 * 10**9, "24 GiB": 24 * 2**30, "1.5TB": 1500 * 10**9, "100 MB": 10**8}
    assert {text: recipe.parse_bytes(text) for text in sizes} == sizes
    for text in ("80", "1.2.3GB", ".GB", "much"):
        with pytest.raises(GETAError, match="a size with its unit, such as 80GB"):
            recipe.parse_bytes(text)
    arguments = recipe.parse_arguments(argv)
    assert isinstance(arguments.training, TrainingArguments)
    free = recipe.free_memory(arguments)
    assert free is None or free > 2**20
    found = recipe.plan(arguments)
    assert recipe.fit(found, None).startswith("free memory of the device is not known")
    assert recipe.fit(found, int(found.memory.peak * 1.05)).endswith("that is close")


def test_weights_in_half_precision_halve_the_plan(argv: list[str]) -> None:
    whole, half = (
        recipe.plan(recipe.parse_arguments([*argv, "--dtype", dtype])).memory for dtype in ("float32", "bfloat16")
    )
    assert half.step.gradients * 2 == whole.step.gradients
    arguments = recipe.parse_arguments([*argv, "--dtype", "bfloat16"])
    assert recipe.load_model(arguments.model).dtype is torch.bfloat16
