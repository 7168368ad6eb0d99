"""Tokens a second of a compressed language model in llama.cpp, beside the dense one at Q8_0, and in transformers.

    python benchmarks/llama_cpp.py DENSE COMPRESSED [COMPRESSED ...] --text FILE [--repeats 5] [--threads 1]

    python benchmarks/llama_cpp.py DENSE --make OUT

The second command writes OUT/c60 and OUT/c40, of about 60 and 40 % of the bytes at Q8_0, without data or training: the
model at 4 and 5 bits, or two thirds of the heads of every other layer and 960 or 832 of 1,536 channels, the largest by
magnitude, at 4 bits. They are for SmolLM2-135M, and c40 for its speed alone.

DENSE is a folder of the dense model, every COMPRESSED one of `geta_hf.compress` or of a training. Each becomes a GGUF
file; the dense one has 8 bits and a step size for every 32 inputs, its embedding 8 bits a row, which is Q8_0. All run
in one process, taking turns at batch 1: a prompt of 128 tokens of the text, then 128 new ones. The package xllamacpp
runs llama.cpp. Speeds are given in tokens for each second of the clock, and for each second of the processor, which
other work on the machine does not change. Perplexities are of the first tokens of the text, by transformers and by
llama.cpp.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import geta_hf
from geta_hf.export.export import compress
from geta_hf.export.formats.gguf import proof, run_llama_cpp
from geta_hf.qadg import build_space, kept_indices
from geta_hf.qadg.group_types import Family
from geta_hf.quantization import quantized_layers, step_size
from geta_hf.quantization.blocks import remaining_first
from geta_hf.serialization.embeddings import rounded_embedding
from geta_hf.serialization.remote_code import save_compressed
from geta_hf.surgery.verify import mask_groups
from geta_hf.utils.tables import format_table


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", type=Path)
    parser.add_argument("compressed", type=Path, nargs="*")
    parser.add_argument("--make", type=Path, metavar="OUT", help="write compressed models there")
    parser.add_argument("--text", type=Path, help="a file, for the prompt and the perplexity")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--new", type=int, default=128, help="tokens")
    parser.add_argument("--scored", type=int, default=256, help="tokens of the perplexity")
    parser.add_argument("--files", type=Path, help="keep the files here, and use those that are there")
    parser.add_argument("--without_transformers", action="store_true")
    return parser.parse_args()


@torch.no_grad()
def make(dense: Path, out: Path, channels: tuple[int, int] | None, embedding_bits: int) -> None:
    """Write a compressed model.

    Args:
        dense: a folder of SmolLM2-135M.
        out: the new folder.
        channels: of layers of even and of odd numbers; None keeps everything.
        embedding_bits: of the embedding, which is the head too.
    """
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    batch = {"input_ids": torch.arange(100, 116)[None]}
    space = build_space(model, batch)
    removal = {}
    for family in space.prunable:
        odd = int(family.name.split("layers.")[1].split(".")[0]) % 2
        kept = family.size
        if channels is not None:
            kept = channels[odd] if family.kind == "channels" else family.size - odd
        removal[family.name] = torch.ones(family.size, dtype=torch.bool)
        removal[family.name][magnitudes(family, model).topk(kept).indices] = False
    mask_groups(model, space.families, removal)
    geta_hf.attach_quantizers(model, initial_bits=5, grid="block32", clipping="max")
    remaining = kept_indices(space, removal)
    for place, (name, layer) in enumerate(quantized_layers(model).items()):
        quantizer: Any = layer.weight_quantizer
        inputs = remaining.get(f"{name}.weight", {}).get(1)
        if inputs is not None:  # blocks are formed over what remains
            removed = torch.ones(len(quantizer.order), dtype=torch.bool)
            removed[inputs] = False
            quantizer.set_order(remaining_first(removed))
        bits = 5.0 if channels is None and place % 3 == 0 else 4.0
        quantizer.d.copy_(step_size(bits, quantizer.q_m, quantizer.t))
    with rounded_embedding(model, embedding_bits, "block32") as embedding:
        small = compress(model, space, removal, batch, embedding)
    out.mkdir(parents=True, exist_ok=True)
    save_compressed(small, out)
    AutoTokenizer.from_pretrained(dense).save_pretrained(out)


def magnitudes(family: Family, model: Any) -> torch.Tensor:
    """Return the squared weights of every group."""
    tensors = model.state_dict()
    found = torch.zeros(family.size)
    for member in family.members:
        rows = tensors[member.tensor].movedim(member.dim, 0)[member.index.flatten()]
        found += rows.reshape(family.size, -1).square().sum(1)
    return found


def write_file(source: Path, home: Path, dense: bool) -> Path:
    """Return a folder with model.gguf, made of a model's folder; llama.cpp's proof of it is left out here."""
    target = home / source.name
    if (target / "model.gguf").is_file():
        return target
    proof.RUNNER = "benchmarks_llama_cpp_compares_by_itself"
    if not dense:
        geta_hf.convert(source, target, format="gguf")
        return target
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    geta_hf.attach_quantizers(model, initial_bits=8, grid="block32", clipping="max")
    batch = {"input_ids": torch.arange(16)[None]}
    tokenizer = AutoTokenizer.from_pretrained(source)
    geta_hf.export(model, target, batch=batch, processing_class=tokenizer, embedding_bits=8, format="gguf")
    return target


def llama_server(file: Path, context: int, threads: int) -> Any:
    """Return a server in this process."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.n_gpu_layers = context, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.cpuparams.poll = params.cpuparams_batch.poll = 0  # the server that has no turn does not wait in loops
    params.warmup, params.fit_params, params.verbosity = False, False, 1
    return xllamacpp.Server(params)


def of_llama_cpp(server: Any, prompt: list[int], new: int) -> Callable[[], tuple[float, float]]:
    """Return a call that gives llama.cpp's own (prompt, new) tokens a second."""

    def call() -> tuple[float, float]:
        asked = {"temperature": 0, "n_predict": new, "ignore_eos": True, "cache_prompt": False}
        answer = run_llama_cpp._post(server.listening_address, "completion", prompt=prompt, **asked)
        timings = answer["timings"]
        return timings["prompt_per_second"], timings["predicted_per_second"]

    return call


def of_transformers(folder: Path, prompt: list[int], new: int) -> Callable[[], tuple[float, float]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([prompt])
    fixed = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}

    @torch.no_grad()
    def call() -> tuple[float, float]:
        start = time.perf_counter()
        model.generate(ids, max_new_tokens=1, **fixed)
        middle = time.perf_counter()
        model.generate(ids, max_new_tokens=new, min_new_tokens=new, **fixed)
        first, both = middle - start, time.perf_counter() - middle
        return len(prompt) / first, (new - 1) / (both - first)

    return call


def perplexities(folder: Path, file: Path, tokens: list[int], threads: int) -> tuple[float, float]:
    """Return the perplexity of tokens by transformers and by llama.cpp as it comes, each given those before it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        rows = model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
    expected = -float(rows.gather(1, torch.tensor(tokens[1:])[:, None]).mean())
    del model
    with tempfile.TemporaryDirectory() as home:
        task, result = Path(home) / "task.json", Path(home) / "result.json"
        fields = {"prompts": [], "new_tokens": 0, "listed": 1, "scored": [tokens], "texts": []}
        task.write_text(json.dumps({"model": str(file), "context": len(tokens) + 8, "threads": threads, **fields}))
        run_llama_cpp.main(str(task), str(result))
        scored = [value for value in json.loads(result.read_text())["scored"][0] if value is not None]
    return math.exp(expected), math.exp(-sum(scored) / len(scored))


def main() -> None:
    chosen = options()
    torch.set_num_threads(chosen.threads)
    if chosen.make is not None:
        make(chosen.dense, chosen.make / "c60", None, 5)
        make(chosen.dense, chosen.make / "c40", (960, 832), 4)
        return
    if not chosen.compressed or chosen.text is None:
        raise SystemExit("name a compressed folder and --text, or --make")
    tokenizer = AutoTokenizer.from_pretrained(chosen.dense)
    tokens = tokenizer(chosen.text.read_text(encoding="utf-8")[:20000])["input_ids"]
    prompt, scored = tokens[: chosen.prompt], tokens[: chosen.scored]
    with tempfile.TemporaryDirectory() as temporary:
        home = chosen.files or Path(temporary)
        home.mkdir(exist_ok=True)
        sources = {f"{folder.name}": folder for folder in (chosen.dense, *chosen.compressed)}
        files = {
            name: write_file(folder, home, folder == chosen.dense) / "model.gguf" for name, folder in sources.items()
        }
        found = {name: perplexities(sources[name], file, scored, chosen.threads) for name, file in files.items()}
        context = chosen.prompt + chosen.new + 8
        servers = {name: llama_server(file, context, chosen.threads) for name, file in files.items()}
        calls = {f"llama.cpp, {name}": of_llama_cpp(one, prompt, chosen.new) for name, one in servers.items()}
        if not chosen.without_transformers:
            for name, folder in sources.items():
                calls[f"transformers, {name}"] = of_transformers(folder, prompt, chosen.new)
        speeds: dict[str, list[tuple[float, float, float]]] = {name: [] for name in calls}
        for turn in range(chosen.repeats + 1):
            for name, call in calls.items():
                start = time.process_time()
                first, second = call()
                spent = time.process_time() - start
                if turn:  # the first is to warm up
                    speeds[name].append((first, second, (chosen.prompt + chosen.new) / spent))
        report(chosen, files, found, speeds)


def report(
    chosen: argparse.Namespace,
    files: dict[str, Path],
    found: dict[str, tuple[float, float]],
    speeds: dict[str, list[tuple[float, float, float]]],
) -> None:
    print(f"`python {' '.join(sys.argv)}`\n")
    dense = next(iter(files))
    largest = files[dense].stat().st_size
    rows = []
    for name, file in files.items():
        size, (ours, theirs) = file.stat().st_size, found[name]
        rows.append((name, f"{size / 1e6:.1f} MB ({size / largest:.0%})", f"{ours:.2f}", f"{theirs:.2f}"))
    print(format_table(("file", "size", "perplexity, transformers", "perplexity, llama.cpp"), rows) + "\n")
    medians = {
        name: [statistics.median(row[place] for row in taken) for place in range(3)] for name, taken in speeds.items()
    }
    base = medians[f"llama.cpp, {dense}"]
    table = []
    for name, values in medians.items():
        ratios = [
            statistics.median(a[1] / b[1] for a, b in zip(speeds[name], speeds[f"llama.cpp, {dense}"], strict=True))
        ]
        table.append(
            (
                name,
                f"{values[0]:.1f}",
                f"{values[1]:.1f} ({ratios[0]:.2f}x)",
                f"{values[2]:.1f} ({values[2] / base[2]:.2f}x)",
            )
        )
    header = ("batch 1", "prompt, tokens/s", "new, tokens/s", "all tokens a second of processor")
    print(format_table(header, table))


if __name__ == "__main__":
    main()
