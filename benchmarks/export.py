"""Measure one export: seconds, peak memory, and how often the model is run, recorded and copied on the way.

    python benchmarks/export.py [--model bert llama tiny] [--repeat 3] [--threads N] [--trainer]

Every repeat is a process of its own. The model has random weights, quantizers of 4 to 8 bits (integers) and 40 to 60 %
of the groups of each prunable family at zero, a different share in each layer; no training is needed. `--trainer`
measures the making of a `GETATrainer` (`GETATrainer.__init__`, with one batch of the same shape) instead of an export.
The script prints one JSON line for each model, then a table with the minimum and the median of seconds and memory.

Time is wall time and CPU time of the process. Memory is the highest resident size (VmHWM, Linux only) during the call
above the resident size before it: the model itself does not count, nor do imports and compiled kernels, since a tiny
model of the same class is exported first and the model runs one batch.

Counted from outside, by patches on torch, transformers and the model's class, so that the numbers mean the same for
every version of geta_hf:

- forwards: calls of the forward of the model's class, including those that are recorded.
- recordings: entries into a `TorchDispatchMode` that geta_hf defines.
- copies: deep copies of a `PreTrainedModel`; a model inside another one that is copied does not count again.
- weight copies: those copies whose parameters have memory of their own: not on meta, not shared with the original.
- built: models of the class that are constructed, such as the one that is loaded from the folder.

The version that is measured is the one that Python imports: `PYTHONPATH=CHECKOUT python benchmarks/export.py`. For
that reason this script uses only what `geta_hf.__all__` names and imports nothing else from its own checkout.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import functools
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    TrainingArguments,
)

sys.path.append(str(Path(__file__).resolve().parent.parent))  # last, so that PYTHONPATH or an installed one goes first
import geta_hf
from geta_hf import GETAConfig, GETATrainer, attach_quantizers, build_space, export

Batch = dict[str, torch.Tensor]

MODELS = ("bert", "llama", "llama-1b", "tiny")
ROWS, TOKENS = 2, 64
COUNTS = ("forwards", "recordings", "copies", "weight_copies", "built")
FIGURES = ("seconds", "cpu_seconds", "peak_mib")
HEADER = ("model", "seconds, min", "seconds", "CPU seconds, min", "CPU seconds", "MiB, min", "MiB", *COUNTS)
CONFIG = GETAConfig(warmup=2, projection=4, joint=12, projection_periods=2, pruning_periods=3)
STEPS = 24


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["bert", "llama"])
    parser.add_argument("--repeat", type=int, default=3, help="processes for each model")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--trainer", action="store_true", help="GETATrainer.__init__ instead of an export")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)  # one measurement in this process
    return parser.parse_args()


# --- models -----------------------------------------------------------------------------------------------------------


def make_model(name: str) -> PreTrainedModel:
    """Return a model with random weights: BERT-base, a Llama of 0.3 B or 1 B, or a tiny one of either."""
    torch.manual_seed(0)
    if name == "bert":
        return BertForSequenceClassification(BertConfig())
    if name == "llama":
        return LlamaForCausalLM(llama_config(1024, 2816, layers=24, heads=16, kv_heads=8, vocabulary=32000))
    if name == "llama-1b":
        return LlamaForCausalLM(llama_config(2048, 5632, layers=22, heads=32, kv_heads=4, vocabulary=32000))
    if name == "tiny llama":
        return LlamaForCausalLM(llama_config(32, 48, layers=2, heads=4, kv_heads=2, vocabulary=128))
    config = BertConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    return BertForSequenceClassification(config)


def llama_config(
    hidden: int, intermediate: int, *, layers: int, heads: int, kv_heads: int, vocabulary: int
) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=True,
    )


def make_batch(model: PreTrainedModel) -> Batch:
    ids = torch.randint(3, model.config.vocab_size, (ROWS, TOKENS))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def compress_by_hand(model: PreTrainedModel, batch: Batch) -> geta_hf.PruningSpace:
    """Set 40 to 60 % of the groups of each prunable family to zero and attach quantizers of 4 to 8 bits.

    The first family loses the smallest share and the last one the largest, so layers differ.

    Returns:
        The pruning space of the model as it was before.
    """
    space = build_space(model, batch)
    tensors = model.state_dict()
    for place, family in enumerate(space.prunable):
        share = 0.4 + 0.2 * place / max(1, len(space.prunable) - 1)
        chosen = torch.randperm(family.size)[: round(share * family.size)]
        for member in family.members:
            tensors[member.tensor].index_fill_(member.dim, member.index[chosen].flatten(), 0.0)
    for place, layer in enumerate(attach_quantizers(model).values()):
        quantizer: Any = layer.weight_quantizer
        bits = 4 + place % 5
        quantizer.d.copy_(quantizer.q_m**quantizer.t / (2.0 ** (bits - 1) - 1))
    return space


def make_trainer(model: PreTrainedModel, batch: Batch, folder: Path) -> GETATrainer:
    """Make a trainer whose data are the rows of one batch."""
    rows = [{name: tensor[row] for name, tensor in batch.items()} for row in range(ROWS)]
    for row in rows:
        row["labels"] = row["input_ids"] if model.can_generate() else torch.tensor(0)
    arguments = TrainingArguments(
        str(folder), max_steps=STEPS, per_device_train_batch_size=ROWS, report_to="none", use_cpu=True
    )
    return GETATrainer(model, arguments, geta_config=CONFIG, train_dataset=rows)


# --- counting ---------------------------------------------------------------------------------------------------------


@contextmanager
def counting(model_class: type[PreTrainedModel]) -> Iterator[Counter[str]]:
    """Count what the docstring of this file lists, for as long as the context is open."""
    counts: Counter[str] = Counter(dict.fromkeys(COUNTS, 0))
    forward = model_class.forward
    init = model_class.__init__
    enter = TorchDispatchMode.__enter__

    @functools.wraps(forward)
    def counted_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        counts["forwards"] += 1
        return forward(self, *args, **kwargs)

    @functools.wraps(init)
    def counted_init(self: Any, *args: Any, **kwargs: Any) -> None:
        counts["built"] += 1
        init(self, *args, **kwargs)

    @functools.wraps(enter)
    def counted_enter(self: Any) -> Any:
        if type(self).__module__.partition(".")[0] == "geta_hf":
            counts["recordings"] += 1
        return enter(self)

    model_class.forward = counted_forward
    model_class.__init__ = counted_init  # type: ignore[method-assign]
    TorchDispatchMode.__enter__ = counted_enter  # type: ignore[method-assign]
    try:
        with counted_copies(counts):
            yield counts
    finally:
        model_class.forward = forward
        model_class.__init__ = init  # type: ignore[method-assign]
        TorchDispatchMode.__enter__ = enter  # type: ignore[method-assign]


@contextmanager
def counted_copies(counts: Counter[str]) -> Iterator[None]:
    """Count deep copies by `__deepcopy__`, which is reached however `copy.deepcopy` was imported."""

    def deepcopy(self: PreTrainedModel, memo: dict[int, Any]) -> PreTrainedModel:
        del PreTrainedModel.__deepcopy__  # type: ignore[attr-defined]  # models inside this one do not count
        try:
            copied = copy.deepcopy(self, memo)
        finally:
            PreTrainedModel.__deepcopy__ = deepcopy  # type: ignore[attr-defined]
        counts["copies"] += 1
        shared = {id(parameter) for parameter in self.parameters()}
        counts["weight_copies"] += any(id(p) not in shared and not p.is_meta for p in copied.parameters())
        return copied

    PreTrainedModel.__deepcopy__ = deepcopy  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del PreTrainedModel.__deepcopy__  # type: ignore[attr-defined]


# --- one measurement --------------------------------------------------------------------------------------------------


def run_once(name: str, trainer: bool) -> dict[str, Any]:
    """Measure one call in this process.

    Returns:
        The figures and counts of the call, and the parameters and groups of the model.
    """
    warm_up(name, trainer)
    model = make_model(name)
    parameters = model.num_parameters()
    batch = make_batch(model)
    with tempfile.TemporaryDirectory() as folder:
        call, space = prepare(model, batch, Path(folder), trainer)
        with torch.no_grad():
            model.eval()(**batch)  # compiles the kernels of the quantizers, and reads every weight
        model.train()
        found = measured(call, type(model))
    return {"parameters": parameters, "groups": space.num_groups if space is not None else None, **found}


def warm_up(name: str, trainer: bool) -> None:
    """Do the same with a tiny model, so that imports and whatever torch prepares once do not count."""
    model = make_model("tiny llama" if name.startswith("llama") else "tiny")
    with tempfile.TemporaryDirectory() as folder:
        call, _ = prepare(model, make_batch(model), Path(folder), trainer)
        call()


def prepare(
    model: PreTrainedModel, batch: Batch, folder: Path, trainer: bool
) -> tuple[Callable[[], Any], geta_hf.PruningSpace | None]:
    """Return the call to measure, and the pruning space where one was needed for it."""
    if trainer:
        return functools.partial(make_trainer, model, batch, folder), None
    space = compress_by_hand(model, batch)
    return functools.partial(export, model, folder / "export", space=space, batch=batch), space


def measured(call: Callable[[], Any], model_class: type[PreTrainedModel]) -> dict[str, Any]:
    release_memory()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak is now the present size
    before = resident_mib("VmRSS")
    with counting(model_class) as counts:
        start = time.perf_counter()
        cpu_start = time.process_time()
        call()
        cpu_seconds = time.process_time() - cpu_start
        seconds = time.perf_counter() - start
    peak = resident_mib("VmHWM") - before
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_mib": peak, **counts}


def release_memory() -> None:
    """Return freed memory to the system; otherwise the call could use it again, and it would not count."""
    gc.collect()
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):  # glibc
        library.malloc_trim(0)


def resident_mib(field: str) -> float:
    """Return the memory of this process in MiB: `VmRSS` is the present size, `VmHWM` the peak."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition(f"{field}:")[2].split()[0]) / 1024


# --- all repeats ------------------------------------------------------------------------------------------------------


def run_alone(name: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """Run `run_once` in a fresh process."""
    command = [sys.executable, __file__, "--alone", "--model", name, "--threads", str(chosen.threads)]
    if chosen.trainer:
        command.append("--trainer")
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def summarize(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join the repeats of one model: a list for each figure; the rest is the same in each of them.

    Raises:
        ValueError: the counts of two repeats differ.
    """
    same = {key: value for key, value in runs[0].items() if key not in FIGURES}
    for run in runs:
        changed = {key: (value, run[key]) for key, value in same.items() if run[key] != value}
        if changed:
            raise ValueError(f"two repeats differ: {changed}")
    return {**same, **{figure: [round(run[figure], 3) for run in runs] for figure in FIGURES}}


def measured_version() -> str:
    """Return the commit of the package that was imported, with `-dirty` where files differ from it."""
    command = ["git", "-C", str(Path(geta_hf.__file__).parent), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def row(record: dict[str, Any]) -> list[str]:
    cells = [record["model"]]
    for figure, digits in zip(FIGURES, (2, 2, 0), strict=True):
        for statistic in (min, statistics.median):
            cells.append(f"{statistic(record[figure]):.{digits}f}")
    return cells + [str(record[count]) for count in COUNTS]


def print_row(cells: Sequence[str]) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    chosen = options()
    torch.set_num_threads(chosen.threads)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    if chosen.alone:
        print(json.dumps(run_once(chosen.model[0], chosen.trainer)))
        return
    what = "GETATrainer.__init__" if chosen.trainer else "export"
    about = {"what": what, "commit": measured_version(), "torch": torch.__version__, "threads": chosen.threads}
    records = []
    for name in chosen.model:
        runs = [run_alone(name, chosen) for _ in range(chosen.repeat)]
        records.append({**about, "model": name, "batch": [ROWS, TOKENS], **summarize(runs)})
        print(json.dumps(records[-1]), flush=True)
    print()
    print_row(HEADER)
    print_row(["---"] * len(HEADER))
    for record in records:
        print_row(row(record))


if __name__ == "__main__":
    main()
