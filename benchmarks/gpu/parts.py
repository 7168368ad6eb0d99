"""The parts: each measures one thing with the benchmarks of this folder's parent and returns its figures."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForQuestionAnswering,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.trainer_utils import get_last_checkpoint

from benchmarks import inference, llm_scale, memory_plan, train_step
from benchmarks.gpu import seven_tasks
from benchmarks.gpu.figures import Figure
from eval.compare import run as compare
from eval.compare.table import texts_of
from eval.results_file import read_results
from eval.tables import __main__ as tables
from geta_hf.export.export import compress
from geta_hf.export.formats.vllm import write_vllm
from geta_hf.qadg import build_space
from geta_hf.quantization import attach_quantizers
from geta_hf.recipes import demo_data, question_answering
from geta_hf.surgery.verify import mask_groups

ROOT = Path(__file__).resolve().parent.parent.parent
STEP, MEMORY, TOKENS = 1.05, 1.15, 2.5
"""Targets: a step's and memory's ratio to plain training, and tokens a second's ratio to dense bf16."""


@dataclass(frozen=True)
class Setup:
    """What all parts are given.

    Args:
        out: folder of the results; a part may keep what it resumes from in it.
        smoke: whether tiny sizes only show that the part runs.
        paths: name of an environment variable -> the path that it holds; those that are not set are missing.
    """

    out: Path
    smoke: bool
    paths: Mapping[str, Path]

    @property
    def device(self) -> str:
        """Return the device that is measured."""
        return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Part:
    """A part of the measurement.

    Args:
        run: measures and returns the figures.
        needs: environment variables without which the part is left out.
    """

    run: Callable[[Setup], list[Figure]]
    needs: tuple[str, ...] = ()


# --- tests ------------------------------------------------------------------------------------------------------------


def run_tests(setup: Setup, room: str, smoke: str) -> list[Figure]:
    """Run a folder of tests, one file of it to try this script."""
    chosen = f"tests/{room}/{smoke}" if setup.smoke else f"tests/{room}"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", chosen]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout[-8000:], done.stderr[-2000:], flush=True)
    return test_figures(done.stdout, done.returncode)


def test_figures(printed: str, code: int) -> list[Figure]:
    """Return the counts of pytest's last line; an error of pytest itself is a failure too."""
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", printed[-400:])}
    failed = counts.get("failed", 0) + counts.get("error", 0)
    failed = failed or int(code != 0)
    return [
        Figure("failed", failed, most=0),
        Figure("passed", counts.get("passed", 0), least=1),
        Figure("skipped", counts.get("skipped", 0)),
    ]


# --- steps ------------------------------------------------------------------------------------------------------------


def run_steps(setup: Setup, name: str, smoke: str) -> list[Figure]:
    """Compare plain and GETA steps in every stage: seconds, memory, and how often the host waits for the GPU."""
    name = smoke if setup.smoke else name
    size = train_step.SIZES[name]
    chosen = argparse.Namespace(
        device=setup.device, steps=5 if setup.smoke else 12, paper=False, cpu_time=False, method="geta"
    )
    # First, since a process of its own has to share the GPU's memory with this one.
    plain, geta = (train_step.peak_of(method, name, chosen) for method in train_step.METHODS)
    figures = [
        Figure("peak memory, plain", plain / 2**20, "MiB"),
        Figure("peak memory, GETA", geta / 2**20, "MiB"),
        Figure("peak memory, ratio", geta / plain if plain else None, most=MEMORY),
    ]
    for stage, times in train_step.time_both(size, chosen).items():
        figures.append(Figure(f"{stage}: plain step", 1000 * statistics.median(old for old, _ in times), "ms"))
        figures.append(Figure(f"{stage}: ratio", statistics.median(new / old for old, new in times), most=STEP))
    if setup.device != "cuda":
        return [*figures, Figure("waits of the host", None, most=0, note="needs a GPU")]
    for stage, (old, new) in train_step.host_reads(size, chosen).items():
        figures.append(Figure(f"{stage}: waits of the host, beyond plain", new - old, most=0, note=f"plain {old:g}"))
    return figures


# --- inference --------------------------------------------------------------------------------------------------------


def _folders(setup: Setup, size: str) -> Path:
    """Return the dense and the small folder of a size, made once."""
    home = setup.out / "models" / size
    if not (home / "complete").exists():
        inference.make_folders(size, home)
        (home / "complete").touch()
    return home


def run_inference(setup: Setup) -> list[Figure]:
    """Time the encoders' ways, dense and small, in turns."""
    sizes = ["bert-smoke"] if setup.smoke else ["minilm", "bert-base"]
    chosen = argparse.Namespace(
        device=setup.device, repeats=2 if setup.smoke else 20, cpu_time=False, compile=not setup.smoke
    )
    figures = []
    for size in sizes:
        home = _folders(setup, size)
        models = {way: inference.load(way, home, setup.device) for way in inference.WAYS[setup.device]}
        for batch in (1,) if setup.smoke else (1, 8):
            for row in inference.encoder_rows(size, models, batch, 16 if setup.smoke else 384, chosen):
                name, shape, way, milliseconds, _, over, error, _ = row
                note = f"{over}x the speed of dense bf16" + (f", error {error}" if error else "")
                figures.append(Figure(f"{name}, {shape}, {way}", float(milliseconds), "ms", note=note))
    return figures


def run_generation(setup: Setup) -> list[Figure]:
    """Compare tokens a second of one row: dense bf16 and compressed, by a growing cache and by a static one.

    On a GPU transformers compiles the step of a static cache, and runs it as a CUDA graph.
    """
    size, tokens = ("phi-smoke", 4) if setup.smoke else ("phi-1.3b", 64)
    home = _folders(setup, size)
    prompt = torch.randint(3, 30000, (1, 64), device=setup.device)
    fixed = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    calls: dict[str, Callable[[], Any]] = {}
    figures = []
    for way in ("dense", "float", "auto"):
        model = inference.load(way, home, setup.device)
        for cache in ("", ", static cache"):
            options = {**fixed, "cache_implementation": "static"} if cache else fixed
            call = partial(model.generate, prompt, **options)
            try:
                call()
            except Exception as error:  # the other ways are worth measuring all the same
                figures.append(Figure(f"{way}{cache}", None, "tokens/s", note=f"{type(error).__name__}: {error}"[:120]))
                continue
            calls[way + cache] = call
    chosen = argparse.Namespace(repeats=2 if setup.smoke else 10, cpu_time=False)
    with torch.no_grad():
        times = inference.take_turns(calls, chosen)
    figures += [Figure(way, tokens / statistics.median(spent), "tokens/s") for way, spent in times.items()]
    for way in times:
        cache = ", static cache" if "static" in way else ""
        if not way.startswith("dense") and f"dense{cache}" in times:
            # Only "auto" is what users run; the float path has no kernels of its own.
            target = TOKENS if way.startswith("auto") else None
            figures.append(
                Figure(f"{way}, over dense", float(inference.ratio(times, f"dense{cache}", way)), least=target)
            )
    return figures


# --- memory -----------------------------------------------------------------------------------------------------------


def run_memory(setup: Setup) -> list[Figure]:
    """Compare memory foreseen and measured; every setting is kept, so that a run that is stopped goes on."""
    sizes = {"hidden": 64, "layers": 1, "vocabulary": 256, "rows": 2, "length": 16}
    if not setup.smoke:
        sizes = {"hidden": 2048, "layers": 8, "vocabulary": 51200, "rows": 4, "length": 512}
    options = argparse.Namespace(device=setup.device, **sizes)
    folder = setup.out / "memory"
    folder.mkdir(exist_ok=True)
    figures = []
    for name in list(memory_plan.SETTINGS)[: 1 if setup.smoke else None]:
        kept = folder / f"{name}.json"
        if not kept.exists():
            found = memory_plan.in_child(options, name)
            kept.write_text(json.dumps(found), encoding="utf-8")
        found = json.loads(kept.read_text(encoding="utf-8"))
        for measured, foreseen in (("trained", "training"), ("made", "before")):
            share = found[foreseen] / found[measured] if found[measured] > 0 else None
            note = f"foreseen {found[foreseen] / 1e6:,.0f} MB, measured {found[measured] / 1e6:,.0f} MB"
            figures.append(Figure(f"{name}, {foreseen}: foreseen / measured", share, note=note))
    return figures


# --- SQuAD ------------------------------------------------------------------------------------------------------------


def run_squad(setup: Setup, model: str) -> list[Figure]:
    """Train and compress a model on all of SQuAD; a run that is stopped goes on from its checkpoint.

    Args:
        setup: its paths DATA (with squad/) and MINILM (model and tokenizer).
        model: `minilm`, or `bert` for BERT-base's size with random weights, whose tokenizer is MiniLM's.
    """
    home = setup.out / f"squad_{model}"
    options = _smoke_questions(home) if setup.smoke else _all_questions(setup, home, model)
    run = home / "run"
    options |= {"output_dir": run, "save_strategy": "steps", "save_total_limit": 1, "disable_tqdm": True}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    if run.is_dir() and get_last_checkpoint(str(run)) is not None:
        words += ["--resume_from_checkpoint", "true"]
    results = question_answering.main([str(ROOT / "recipes/configs/bert_squad.yaml"), *words])
    before = results["before_export"]
    return [
        Figure("EM", results["em"]),
        Figure("F1", results["f1"], note=f"before export {before['f1']:.2f}" if before else ""),
        Figure("steps", results["steps"]),
        Figure("training since the last checkpoint", results["train_seconds"], "s"),
    ]


def _all_questions(setup: Setup, home: Path, model: str) -> dict[str, Any]:
    data, folder = setup.paths["DATA"] / "squad", setup.paths["MINILM"]
    if model == "bert":
        tokenizer, folder = AutoTokenizer.from_pretrained(folder), home / "model"
        torch.manual_seed(0)
        BertForQuestionAnswering(BertConfig(vocab_size=len(tokenizer))).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return {
        "model_name_or_path": folder,
        "train_file": data / "train-v1.1.json.gz",
        "eval_file": data / "dev-v1.1.json.gz",
        "num_train_epochs": 2,
        "per_device_train_batch_size": 32,
        "save_steps": 500,
    }


def _smoke_questions(home: Path) -> dict[str, Any]:
    short = {"max_length": 128, "eval_max_length": 128, "doc_stride": 32, "bf16": False}
    return {
        **_smoke_files(home, "model_name_or_path"),
        **short,
        "max_steps": 12,
        "per_device_train_batch_size": 2,
        "save_steps": 6,
    }


def _smoke_files(home: Path, model: str) -> dict[str, Path]:
    """Return generated questions and a model as options; `model` is the name of the model's. Written once."""
    if not (home / "dev.json").exists():
        demo_data.write(home, train_questions=60, eval_questions=10, layers=1)
    return {"train_file": home / "train.json", "eval_file": home / "dev.json", model: home / "model"}


def run_table5(setup: Setup) -> list[Figure]:
    """Run Table 5's protocol on the model in MINILM, such as BERT-base: `eval.tables table5`.

    The dense model and finished cells are kept in OUT/table5: the part goes on from there, however often it is stopped.

    Args:
        setup: its paths DATA (with squad/, and squad_other/ for text of another kind) and MINILM.
    """
    home = setup.out / "table5"
    tables.main(["table5", "--work", str(home), *(_smoke_table5(setup.out) if setup.smoke else _table5(setup))])
    figures = []
    for line in read_results(home):
        share = "" if line["sparsity"] is None else f", {line['sparsity']:.0%}"
        note = f"{line['relative_bops']:.2%} of the BOPs"
        figures.append(Figure(f"{line['row']}{share}, seed {line['seed']}: F1", line["f1"], note=note))
    return figures


def _table5(setup: Setup) -> list[str]:
    data = setup.paths["DATA"]
    argv = ["--model", str(setup.paths["MINILM"]), "--train_file", str(data / "squad/train-v1.1.json.gz")]
    argv += ["--eval_file", str(data / "squad/dev-v1.1.json.gz"), "--bf16"]
    other = data / "squad_other/amazon_reviews_v1.0.json.gz"
    if other.is_file():
        argv += ["--other_file", str(other)]
    # Two epochs for the dense model and one for each cell.
    argv += ["--batch_size", "32", "--dense_steps", "5500", "--steps", "2750"]
    return [*argv, "--learning_rate", "1e-4", "--dense_learning_rate", "1e-4"]


def _smoke_table5(out: Path) -> list[str]:
    argv = [
        word for name, path in _smoke_files(out / "table5_data", "model").items() for word in (f"--{name}", str(path))
    ]
    argv += ["--max_length", "128", "--doc_stride", "32", "--sparsity", "0.5"]
    argv += ["--rows", "dense", "the paper's rules", "defaults, at the BOPs of the paper's rules"]
    return [*argv, "--batch_size", "2", "--dense_steps", "2", "--steps", "12"]


# --- language models --------------------------------------------------------------------------------------------------


def run_seven_tasks(setup: Setup) -> list[Figure]:
    """Score the folders in LM (several are separated by colons) on the seven tasks; every score is kept."""
    figures = []
    with tempfile.TemporaryDirectory() as spare:
        data = _smoke_rows(Path(spare)) if setup.smoke else setup.paths["DATA"] / "lmeval"
        for folder in [""] if setup.smoke else str(setup.paths["LM"]).split(os.pathsep):
            kept = setup.out / "seven_tasks"
            kept.mkdir(exist_ok=True)
            loaded: tuple[PreTrainedModel, Any] | None = None
            for task in seven_tasks.TASKS:
                name = f"{Path(folder).name or 'smoke'}, {task}"
                file = kept / f"{name}.json"
                if not file.exists():
                    loaded = loaded or _language_model(setup, folder)
                    scores = seven_tasks.score(*loaded, seven_tasks.read_items(data, task))
                    file.write_text(json.dumps(scores), encoding="utf-8")
                scores = json.loads(file.read_text(encoding="utf-8"))
                figures.append(Figure(f"{name}: acc", scores["acc"], note=f"acc_norm {scores['acc_norm']:.4f}"))
    return figures


def _language_model(setup: Setup, folder: str) -> tuple[PreTrainedModel, Any]:
    if setup.smoke:
        small = setup.out / "smoke_bytes"
        if not small.exists():
            _write_smoke_model(small)
        folder = str(small)
    dtype = torch.bfloat16 if setup.device == "cuda" else "auto"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(setup.device).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def _write_smoke_model(folder: Path) -> None:
    """Write a Llama of 1 layer whose tokens are characters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {"<end>": 1, **{chr(code): code for code in range(32, 127)}}
    tokenizer = Tokenizer(models.BPE(vocab={"<unk>": 0, **letters}, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=128, **sizes)).save_pretrained(folder)


def _smoke_rows(folder: Path) -> Path:
    """Write one row of every task."""
    choices = {"text": ["red", "blue"], "label": ["A", "B"]}
    rows: dict[str, dict[str, Any]] = {
        "boolq": {"passage": "The sky is blue.", "question": "is the sky blue", "label": 1},
        "piqa": {"goal": "See the sky.", "sol1": "Look up.", "sol2": "Look down.", "label": 0},
        "hellaswag": {
            "activity_label": "Looking",
            "ctx_a": "A man stands.",
            "ctx_b": "he",
            "endings": ["looks up.", "falls.", "eats [title] it.", "is red."],
            "label": "0",
        },
        "winogrande": {"sentence": "Ann saw Eve, so _ waved.", "option1": "Ann", "option2": "Eve", "answer": "1"},
        "openbookqa": {"question_stem": "The sky is", "choices": choices, "answerKey": "B"},
    }
    for task in ("arc_easy", "arc_challenge"):
        rows[task] = {"question": "Which is the sky?", "choices": choices, "answerKey": "B"}
    for task, row in rows.items():
        (folder / task).mkdir(parents=True)
        (folder / task / f"{seven_tasks.TASKS[task][0]}.jsonl").write_text(json.dumps(row), encoding="utf-8")
    return folder


def run_scale(setup: Setup) -> list[Figure]:
    """Take a model of Phi-2's shape ten steps through every stage, export it with its proofs, and load it again."""
    meter = llm_scale.Meter(setup.device)
    chosen = argparse.Namespace(
        size="smoke" if setup.smoke else "2.8b",
        layers=None,
        dtype="bf16",
        device=setup.device,
        optim="adafactor",
        gradient_checkpointing=False,
        batch=1 if setup.smoke else 4,
        length=16 if setup.smoke else 512,
        steps=4 if setup.smoke else 10,
        sparsity=0.3,
        uniform=False,
        drop_layers=0,
        cpu_time=False,
        out=None,
    )
    with tempfile.TemporaryDirectory() as folder:
        llm_scale.run(chosen, meter, folder)
    return [Figure(name, float(seconds), "s", note=f"peak {peak}") for name, seconds, peak in meter.rows]


def run_compare(setup: Setup) -> list[Figure]:
    """Compare methods at equal bytes on the first folder in LM, such as Phi-2: 30 % removed, 8 and 4 bits.

    Cells are kept in OUT/compare, one line each: the part goes on from there, however often it is stopped. The seven
    tasks are scored where lm-eval is installed.
    """
    with tempfile.TemporaryDirectory() as spare:
        argv = _smoke_comparison(setup, Path(spare)) if setup.smoke else _comparison(setup)
        lines = compare.run(compare.parser().parse_args([*argv, "--work", str(setup.out / "compare")]))
    figures = []
    for line in lines:
        name = f"{line['method']}, {line['budget']}, {line['steps']} steps"
        if "skipped" in line or "reason" in line:
            figures.append(Figure(name, None, note=line.get("skipped") or line["reason"]))
            continue
        for text in texts_of([line]):
            figures.append(Figure(f"{name}: {text}", statistics.fmean(line[text]["above"]), "nats above dense"))
    return figures


def _comparison(setup: Setup) -> list[str]:
    data = setup.paths["DATA"]
    texts = {"wikitext": data / "lm/wikitext-2/test.txt.gz", "gutenberg": data / "lm/gutenberg/austen-emma.txt.gz"}
    argv = ["--model", str(setup.paths["LM"]).split(os.pathsep)[0]]
    argv += ["--text", str(data / "lm/wikitext-2/valid.txt.gz")]
    argv += ["--scored", *(f"{name}={path}" for name, path in texts.items())]
    argv += ["--budgets", "30%@8", "30%@4", "--steps", "0", "100", "--bf16"]
    argv += ["--blocks", "128", "--scored_blocks", "100"]
    if importlib.util.find_spec("lm_eval") is not None:
        argv += ["--tasks", "commonsense", "--data_dir", str(data / "lmeval"), "--limit", "1000"]
    return argv


def _smoke_comparison(setup: Setup, folder: Path) -> list[str]:
    small = setup.out / "smoke_bytes"
    if not small.exists():
        _write_smoke_model(small)
    (folder / "text.txt").write_text("Once upon a time there was a cat. " * 40, encoding="utf-8")
    argv = ["--model", str(small), "--text", str(folder / "text.txt"), "--scored", f"text={folder / 'text.txt'}"]
    sizes = ["--blocks", "8", "--length", "16", "--scored_blocks", "2", "--budgets", "30%@8", "--steps", "0", "2"]
    return [*argv, *sizes, "--methods", "ours", "FLAP + GPTQ", "--no_export"]


# --- vLLM -------------------------------------------------------------------------------------------------------------


def run_vllm(setup: Setup) -> list[Figure]:
    """Load a Llama whose layers differ, and one whose layers are alike, in vLLM, and compare log probabilities.

    VLLM_PYTHON names the interpreter that has vLLM, where it is not this one.
    """
    python = os.environ.get("VLLM_PYTHON", sys.executable)
    found = subprocess.run([python, "-c", "import vllm"], capture_output=True, text=True)
    figures = []
    for name, alike in (("layers that differ", False), ("layers alike", True)):
        what = f"{name}: largest difference of a log probability from transformers"
        with tempfile.TemporaryDirectory() as home:
            folder = Path(home) / "model"
            expected, prompts = _write_for_vllm(folder, alike, setup.smoke)
            if found.returncode:
                figures.append(Figure(what, None, note=f"written, but {python} has no vllm"))
                continue
            task, result = Path(home) / "task.json", Path(home) / "result.json"
            task.write_text(json.dumps({"model": str(folder), "prompts": prompts}))
            command = [python, str(ROOT / "benchmarks" / "gpu" / "run_vllm.py"), str(task), str(result)]
            subprocess.run(command, check=True)
            answer = json.loads(result.read_text())
            gaps = [
                abs(a - b)
                for ours, theirs in zip(expected, answer["scored"], strict=True)
                for a, b in zip(ours, theirs, strict=True)
            ]
            figures.append(Figure(what, max(gaps), "nats", most=0.1, note=f"vllm {answer['version']}"))
    return figures


@torch.no_grad()
def _write_for_vllm(folder: Path, alike: bool, smoke: bool) -> tuple[list[list[float]], list[list[int]]]:
    """Write a compressed Llama of random weights; return log probabilities of the tokens of prompts, and these."""
    torch.manual_seed(0)
    width, heads = (64, 4) if smoke else (1024, 16)
    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_attention_heads": heads, "vocab_size": 512}
    config = LlamaConfig(**sizes, num_key_value_heads=heads // 2, num_hidden_layers=2, max_position_embeddings=256)
    model = LlamaForCausalLM(config).eval()
    batch = {"input_ids": torch.randint(0, 512, (2, 128))}
    space = build_space(model, batch)
    removal = {}
    for place, family in enumerate(space.prunable):
        differs = family.kind == "channels" and not alike and place % 2
        kept = family.size // 4 if differs else family.size // 2
        removal[family.name] = torch.arange(family.size) >= kept
    mask_groups(model, space.families, removal)
    attach_quantizers(model, initial_bits=4, grid="channel")
    small = compress(model, space, removal, batch)
    folder.mkdir()
    write_vllm(small, folder, batch)
    steps = small(**batch).logits.log_softmax(-1)[:, :-1]
    scored = steps.gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
    return scored.tolist(), batch["input_ids"].tolist()


PARTS: dict[str, Part] = {
    "tests_quantization": Part(partial(run_tests, room="quantization", smoke="test_linear.py")),
    "tests_inference": Part(partial(run_tests, room="inference", smoke="test_gpu_layout.py")),
    "tests_methods": Part(partial(run_tests, room="methods", smoke="test_paper_index.py")),
    "steps_bert": Part(partial(run_steps, name="bert-32x384", smoke="bert-smoke")),
    "steps_1.3b": Part(partial(run_steps, name="phi-4x1024", smoke="phi-smoke")),
    "inference": Part(run_inference),
    "generation": Part(run_generation),
    "memory": Part(run_memory),
    "phi2": Part(run_scale),
    "vllm": Part(run_vllm),
    "squad_minilm": Part(partial(run_squad, model="minilm"), ("DATA", "MINILM")),
    "squad_bert": Part(partial(run_squad, model="bert"), ("DATA", "MINILM")),
    "table5": Part(run_table5, ("DATA", "MINILM")),
    "seven_tasks": Part(run_seven_tasks, ("DATA", "LM")),
    "compare": Part(run_compare, ("DATA", "LM")),
}
"""Name -> part, in the order in which they run."""
