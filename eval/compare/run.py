"""Run the cells of a comparison that its results lack: every method, at every budget, on the same data.

    python -m eval.compare.run --model DIR --text calibration.txt --scored wikitext=test.txt books=emma.txt \\
        --budgets B=3.2 B=2.4 --work runs/compare

A budget is `B=3.2`, bits that are stored for each weight of the original layers, step sizes counted; or `30%@8`, the
bytes of a file with 30 % of the prunable parameters removed at 8 bits. With `--steps N` each method has a second row,
after as many steps of recovery on the same batches. A finished cell is one line of `WORK/results.jsonl`; an interrupted
command goes on where it stopped. A method whose package is missing is named, skipped, and tried again by the next run.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, set_seed

from eval.compare.job import Budget, Job, batches_of, loss_of_each, read_budget
from eval.compare.method import Compressed, Method, load_methods, missing_packages
from eval.compare.shared import recover
from eval.compare.table import render
from eval.results_file import Line, append_result, read_results
from geta_hf.errors import GETAError
from geta_hf.evaluation import evaluate
from geta_hf.evaluation.harness import default_device
from geta_hf.evaluation.tasks import COMMONSENSE
from geta_hf.evaluation.texts import read_text
from geta_hf.export import export
from geta_hf.methods import OneShotConfig, make_method
from geta_hf.methods.one_shot import Calibration
from geta_hf.quantization import detach_quantizers, quantized_layers
from geta_hf.surgery.build_space import prepare_space
from geta_hf.training.plan import make_ledger
from geta_hf.training.preparation import empty_copy

DENSE = "dense"

Key = tuple[str, str, int, int, str]
"""Method, budget, steps, number of the draw, grid."""


@dataclass
class Study:
    """What all cells share.

    Attributes:
        options: of the command line.
        calibration: int64, shape (blocks, length): what draws are taken from.
        training: for methods that train, and for recovery; none of it is in `calibration`.
        scored: name -> blocks to measure the loss on.
        dense: name -> loss of each block, of the dense model.
    """

    options: argparse.Namespace
    tokenizer: Any
    calibration: Tensor
    training: Tensor
    scored: dict[str, Tensor]
    dense: dict[str, Tensor] = field(default_factory=dict)
    jobs: dict[tuple[int, str], Job] = field(default_factory=dict)
    last: tuple[Any, Compressed, float] | None = None

    def load(self) -> PreTrainedModel:
        """Return the dense model."""
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(self.options.model, dtype=torch.float32)
        return model.to(self.options.device).eval()  # type: ignore[arg-type]

    def dense_losses(self) -> dict[str, Tensor]:
        """Return the dense model's loss of each block, by the name of the text."""
        if not self.dense:
            model = self.load()
            self.dense = {name: loss_of_each(model, blocks) for name, blocks in self.scored.items()}
        return self.dense

    def job(self, draw: int, grid: str) -> Job:
        """Return what all methods of a draw share; its budget is only a place."""
        if (draw, grid) not in self.jobs:
            generator = torch.Generator().manual_seed(draw)
            order = torch.randperm(len(self.calibration), generator=generator)
            chosen = self.calibration[order[: self.options.blocks]].to(self.options.device)
            # A quarter is held back, the same blocks for every method.
            split = 3 * len(chosen) // 4
            used = batches_of(chosen[:split])
            model = self.load()
            space, _ = prepare_space(model, {"input_ids": chosen[:2, :32]})  # no space depends on the length
            empty = empty_copy(model)
            make_method(OneShotConfig(target_bytes=1, grid=grid)).attach(empty, None)
            self.jobs[draw, grid] = Job(
                load=self.load,
                space=space,
                ledger=make_ledger(empty, space),
                budget=Budget("", 0),
                data=Calibration(used, used, batches_of(chosen[split:])),
                training=self.training,
                rows=self.options.rows,
                learning_rate=self.options.learning_rate,
                grid=grid,
                tokenizer=self.tokenizer,
                bf16=self.options.bf16,
                seed=draw,
            )
        return self.jobs[draw, grid]


def blocks_of(path: str, tokenizer: Any, length: int, separator: str) -> Tensor:
    """Return a text file as blocks of tokens, int64, shape (blocks, length). Raise GETAError for less than one."""
    ids: list[int] = []
    for part in read_text(path).split(separator):
        if part.strip():
            ids += tokenizer(part.strip(), verbose=False)["input_ids"]
    count = len(ids) // length
    if not count:
        raise GETAError(f"{path} has {len(ids)} tokens, fewer than a block of {length}; give a longer text")
    return torch.tensor(ids[: count * length]).view(count, length)


def make_study(options: argparse.Namespace) -> Study:
    """Read the texts. Raise GETAError for too little of them."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    read = [blocks_of(path, tokenizer, options.length, options.separator) for path in options.text]
    blocks = torch.cat(read)
    # Mixed, so that calibration and training have a part of every file.
    blocks = blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(1))]
    # The same split with and without training, so that all rows of a folder are calibrated alike.
    count = min(4 * options.blocks, len(blocks) // 2)
    if count < options.blocks:
        raise GETAError(
            f"{options.text} has {len(blocks)} blocks, but {2 * options.blocks} are needed, half of them for training; "
            f"give more text, or lower --blocks"
        )
    scored = {}
    for item in options.scored:
        name, found, path = item.partition("=")
        if not found:
            raise GETAError(f"--scored {item!r} must be NAME=FILE, such as wikitext=test.txt")
        own = blocks_of(path, tokenizer, options.length, options.separator)
        # Spread evenly, since a book's start is not like the rest.
        number = min(options.scored_blocks, len(own))
        scored[name] = own[torch.arange(number) * len(own) // number].to(options.device)
    return Study(options, tokenizer, blocks[:count], blocks[count:].to(options.device), scored)


def cells_of(options: argparse.Namespace, methods: Mapping[str, Method]) -> Iterator[Key]:
    """Yield the cells in the order in which they are run: rows of one budget and draw together.

    Methods that train have none without steps, and those whose results can't be trained none with steps.
    """
    yield (DENSE, "", 0, 0, "")
    for draw in range(options.draws):
        for budget in options.budgets:
            for name, method in methods.items():
                for steps in options.steps:
                    if method.recovers if steps else method.needs != "training":
                        yield (name, budget, steps, draw, options.grid)


def measure(study: Study, key: Key, method: Method | None) -> Line:
    """Run one cell, and return its line."""
    name, budget, steps, draw, grid = key
    line: Line = {"method": name, "budget": budget, "steps": steps, "draw": draw, "grid": grid}
    if method is None:
        model = study.load()
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        return {**line, "bytes": size, "share": 0.0, "mean_bits": 32, "tokens": 0, **score(study, model)}
    missing = missing_packages(method)
    if missing:
        return {**line, "skipped": f"{', '.join(missing)} not installed"}
    common = study.job(draw, grid)
    job = replace(common, budget=read_budget(budget, common.ledger), steps=steps)
    set_seed(draw)
    start = time.perf_counter()
    try:
        compressed, before = _compress(study, key, method, job)
        if steps and not compressed.trained:
            recover(job, compressed)
    except GETAError as error:
        # One width, or step sizes alone, may not reach a budget.
        return {**line, "target_bytes": job.budget.bytes, "reason": str(error)}
    seconds = time.perf_counter() - start + before
    found = {
        "target_bytes": job.budget.bytes,
        "bytes": compressed.bytes,
        "share": compressed.share,
        "mean_bits": compressed.mean_bits,
        "needs": method.needs,
        "trials": compressed.trials,
        "tokens": job.calibration_tokens() + compressed.tokens,
        "seconds": round(seconds, 1),
        "note": compressed.note,
        "settings": settings_of(study.options),
    }
    if compressed.result is not None and not study.options.no_export:
        found |= write(job, compressed)
    found |= score(study, plain_copy(compressed.model))
    found["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return {**line, **found}


def _compress(study: Study, key: Key, method: Method, job: Job) -> tuple[Compressed, float]:
    """Return what a method made, and the seconds that an earlier cell took for it where recovery goes on from there."""
    name, budget, steps, draw, grid = key
    own = (name, budget, draw, grid)
    if steps and study.last is not None and study.last[0] == own and not study.last[1].trained:
        _, compressed, seconds = study.last
        study.last = None  # recovery changes it
        return compressed, seconds
    study.last = None
    start = time.perf_counter()
    compressed = method.run(job)
    if not steps:
        study.last = (own, compressed, time.perf_counter() - start)
    return compressed, 0.0


def settings_of(options: argparse.Namespace) -> Line:
    """Return what all rows of a table have in common, as far as scores depend on it."""
    names = ("model", "text", "scored", "blocks", "length", "scored_blocks", "rows", "learning_rate", "tasks", "limit")
    own = {name: getattr(options, name) for name in names}
    # Without folders: results are compared by what was read, wherever it lies.
    own["text"] = [Path(path).name for path in own["text"]]
    own["scored"] = [f"{name}={Path(path).name}" for name, _, path in (item.partition("=") for item in own["scored"])]
    # Named only where it is set, since results from before there was a choice are without it.
    precision = {"bf16": True} if options.bf16 else {}
    return {**own, "model": Path(options.model).name, **precision}


def write(job: Job, compressed: Compressed) -> Line:
    """Export a result, which proves it by reload, and return the bytes of the file."""
    batch = {"input_ids": job.data.held_back[0]["input_ids"][:2]}
    with tempfile.TemporaryDirectory() as folder:
        report = export(
            compressed.model,
            Path(folder) / "small",
            space=job.space,
            batch=batch,
            config=compressed.config,
            result=compressed.result,
        )
    if report.file_bytes > job.budget.bytes:
        raise GETAError(
            f"the file has {report.file_bytes} bytes, more than the {job.budget.bytes} of {job.budget.name}"
        )
    return {"bytes": report.file_bytes, "difference": report.difference}


@torch.no_grad()
def plain_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy whose layers have rounded weights in place of quantizers: the same values, faster."""
    copied = copy.deepcopy(model)
    rounded = {name: layer.quantized_weight() for name, layer in quantized_layers(copied).items()}
    detach_quantizers(copied)
    for name, weight in rounded.items():
        copied.get_submodule(name).weight.copy_(weight)
    return copied


def score(study: Study, model: PreTrainedModel) -> Line:
    """Return the losses on the scored texts above the dense model's, block by block, and the tasks' answers."""
    found: Line = {}
    dense = study.dense_losses()
    for name, blocks in study.scored.items():
        change = loss_of_each(model, blocks) - dense[name]
        # Of each block, so that errors can be paired between any two rows.
        found[name] = {"dense": float(dense[name].mean()), "above": [round(value, 5) for value in change.tolist()]}
    if study.options.tasks:
        if study.options.bf16:
            # Not by a context around all of it: lm-eval turns autocast off.
            forward = torch.autocast(model.device.type, torch.bfloat16)(model.forward)
            model.forward = convert_outputs_to_fp32(forward)
        result = evaluate(
            model,
            study.options.tasks,
            tokenizer=study.tokenizer,
            data_dir=study.options.data_dir,
            limit=study.options.limit,
        )
        answers = {}
        for task, metrics in result.scores.items():
            questions = metrics.get(COMMONSENSE.get(task, "acc"))
            if questions is not None and questions.questions:
                # One character a question, for the same reason.
                answers[task] = "".join(str(int(right)) for right in questions.questions)
        found["answers"] = answers
    return found


def run(options: argparse.Namespace) -> list[Line]:
    """Run what is missing; return all lines."""
    known = load_methods()
    chosen = options.methods or list(known)
    unknown = sorted(set(chosen) - set(known))
    if unknown:
        raise GETAError(f"there are no methods {unknown}; there are {sorted(known)}")
    done = read_results(options.work)
    finished = {key_of(line) for line in done if "skipped" not in line}
    others = [line for line in done if line.get("settings", settings_of(options)) != settings_of(options)]
    if others:
        raise GETAError(f"{options.work} holds results under other settings; give another --work")
    study = make_study(options)
    for key in cells_of(options, {name: known[name] for name in chosen}):
        if key in finished:
            continue
        line = measure(study, key, known.get(key[0]))
        append_result(options.work, line)
        done.append(line)
        hidden = ("settings", "answers", *study.scored)
        shown = {name: value for name, value in line.items() if name not in hidden}
        means = {name: round(fmean(line[name]["above"]), 4) for name in study.scored if name in line}
        print(json.dumps({**shown, **means}), flush=True)
    return done


def key_of(line: Line) -> Key:
    """Return what names a cell in the results."""
    return (line["method"], line["budget"], line["steps"], line["draw"], line["grid"])


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser("python -m eval.compare.run", description=(__doc__ or "").splitlines()[0])
    add = made.add_argument
    add("--model", required=True, help="folder or Hub name of a causal language model")
    add("--text", required=True, nargs="+", help="files to calibrate on and to recover with")
    add("--scored", required=True, nargs="+", metavar="NAME=FILE", help="texts to measure the loss on")
    add("--work", required=True, type=Path, help="folder of the results; a rerun continues there")
    add("--budgets", nargs="+", default=["B=4.0", "B=3.2", "B=2.4"])
    add("--methods", nargs="+", help="some of them; all by default")
    add("--steps", nargs="+", type=int, default=[0], help="of recovery; 0 is the row without training")
    add("--draws", type=int, default=1, help="draws of calibration data")
    add("--grid", default="channel", choices=("layer", "channel", "block32"))
    add("--blocks", type=int, default=64, help="of calibration data, a quarter of them held back")
    add("--length", type=int, default=256, help="tokens of a block")
    add("--scored_blocks", type=int, default=40, help="of each scored text, evenly spread")
    add("--rows", type=int, default=4, help="blocks of a training step")
    add("--learning_rate", type=float, default=1e-4)
    add("--separator", default="<|endoftext|>", help="between the documents of a text file")
    add("--tasks", help="of lm-eval, such as commonsense")
    add("--data_dir", help="rows of these tasks as local files")
    add("--limit", type=int, help="questions of each task, from the first on; all by default")
    add("--bf16", action="store_true", help="train and answer tasks in bfloat16 (autocast); losses stay in float32")
    add("--device", default=default_device(), help="where models run; by default an accelerator if there is one")
    add("--no_export", action="store_true", help="take the foreseen bytes, without writing and proving a folder")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that the module's docstring describes, and print the tables."""
    print(render(run(parser().parse_args(argv))))


if __name__ == "__main__":
    try:
        main()
    except GETAError as error:
        sys.exit(f"error: {error}")
