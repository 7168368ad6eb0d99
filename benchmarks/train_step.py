"""What a training step under GETA costs relative to plain fine-tuning, by stage, in time and in peak memory.

    python benchmarks/train_step.py [--device cpu|cuda] [--size NAME ...] [--steps 12] [--paper]
        [--cpu-time] [--no-memory] [--method geta|search] [--granularity layer|group|row]

Time: both models take turns in one process on the same batches with the same fused AdamW; the table gives the median
of the ratios, so that a noisy machine disturbs both alike. Memory: each runs alone in a process of its own, from
building the model to the last stage, and the highest level above the one after imports counts.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import BertConfig, BertForQuestionAnswering, PhiConfig, PhiForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.memory import peak_bytes
from geta_hf import QASSO, GETAConfig, Schedule, SearchConfig, attach_quantizers, build_space
from geta_hf.costs.targets import solve_target
from geta_hf.methods import Method, Run, make_method
from geta_hf.methods.qasso.schedule import COOLDOWN, STAGES
from geta_hf.methods.search.choices import GRANULARITIES
from geta_hf.methods.search.schedule import STAGES as SEARCH_STAGES
from geta_hf.quantization import freeze_quantizers, quantizer_prefixes
from geta_hf.training.plan import make_ledger
from geta_hf.utils.tables import format_table

Batch = dict[str, torch.Tensor]
METHODS = ("plain", "geta")
COMPARED = ("geta", "search")


@dataclass(frozen=True)
class Size:
    """A model and a batch; `weights` is the parameters' dtype, `autocast` whether the model runs in bfloat16.

    `channels` is the hidden size of a model that only tries this script, and that knows few tokens.
    """

    what: str
    family: str
    layers: int
    batch: int
    length: int
    weights: torch.dtype = torch.float32
    autocast: bool = False
    channels: int | None = None

    @property
    def tokens(self) -> int:
        """Return the size of the vocabulary in use, which both families' exceed."""
        return 30000 if self.channels is None else 100


SIZES = {
    "bert-smoke": Size("BERT of 1 layer, 32 channels", "bert", 1, 2, 16, channels=32),
    "phi-smoke": Size("Phi of 1 layer, 64 channels, bf16", "phi", 1, 2, 16, weights=torch.bfloat16, channels=64),
    "bert4-8x128": Size("BERT-base with 4 layers, fp32", "bert", 4, 8, 128),
    "bert4-32x128": Size("BERT-base with 4 layers, fp32", "bert", 4, 32, 128),
    "bert-32x384": Size("BERT-base, bf16 autocast", "bert", 12, 32, 384, autocast=True),
    "phi-4x1024": Size("Phi-like 1.3 B, bf16", "phi", 24, 4, 1024, weights=torch.bfloat16),
}
DEFAULT_SIZES = {"cpu": ("bert4-8x128", "bert4-32x128"), "cuda": ("bert-32x384", "phi-4x1024")}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=DEFAULT_SIZES, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", nargs="+", choices=SIZES, help="default: those of the device")
    parser.add_argument("--steps", type=int, default=12, help="steps timed in each stage")
    parser.add_argument("--granularity", choices=GRANULARITIES, default="layer", help="of the search")
    parser.add_argument("--method", choices=COMPARED, default="geta", help="what is compared with plain training")
    parser.add_argument("--paper", action="store_true", help="the paper's rules instead of the defaults")
    parser.add_argument("--cpu-time", action="store_true", help="of the process, for a machine others use too")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="time alone")
    parser.add_argument(
        "--alone", choices=("plain", *COMPARED), help=argparse.SUPPRESS
    )  # what a memory process is told
    return parser.parse_args()


def make_model(size: Size) -> nn.Module:
    torch.manual_seed(0)
    if size.family == "bert":
        width = size.channels or 768
        bert = BertConfig(
            num_hidden_layers=size.layers,
            hidden_size=width,
            intermediate_size=4 * width,
            num_attention_heads=12 if size.channels is None else 2,
            **_vocabulary(size),
        )
        return BertForQuestionAnswering(bert).to(size.weights).train()
    width = size.channels or 2048
    heads = 32 if size.channels is None else 2
    shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": heads}
    phi = PhiConfig(num_hidden_layers=size.layers, **shape, **_vocabulary(size))
    return PhiForCausalLM(phi).to(size.weights).train()


def _vocabulary(size: Size) -> dict[str, int]:
    """Return the setting of a model that only tries this script; others have their family's vocabulary."""
    return {} if size.channels is None else {"vocab_size": size.tokens, "bos_token_id": 1, "eos_token_id": 2}


def make_batch(size: Size, device: str) -> Batch:
    ids = torch.randint(0, size.tokens, (size.batch, size.length), device=device)
    if size.family == "phi":
        return {"input_ids": ids, "labels": ids}
    return {"input_ids": ids, "start_positions": ids[:, 0] % size.length, "end_positions": ids[:, 1] % size.length}


def plain_optimizer(parameters: Iterable[torch.Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-5, fused=True)


def geta_optimizer(model: nn.Module, batch: Batch, steps: int, paper: bool) -> QASSO:
    """Put quantizers on the model, and QASSO around AdamW with as many steps in every stage."""
    stages = {"warmup": steps, "projection": steps, "joint": steps}
    config = (GETAConfig.paper if paper else GETAConfig)(**stages)
    space = build_space(model, {"input_ids": batch["input_ids"][:2, :128].cpu()})
    attach_quantizers(model, learn_t=config.learn_exponent, clipping=config.clipping)
    names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    schedule = Schedule.from_config(config, 4 * steps, 4 * steps)
    return QASSO(plain_optimizer(list(names)), names, space, quantizer_prefixes(model), schedule, config)


def search_optimizer(
    model: nn.Module, batch: Batch, steps: int, granularity: str = "layer"
) -> tuple[torch.optim.Optimizer, Method]:
    """Put the search around AdamW, with as many steps in every stage."""
    space = build_space(model, {"input_ids": batch["input_ids"][:2, :128].cpu()})
    stages = {"warmup": steps, "search": steps}
    config = SearchConfig(bit_choices=[0, 2, 3, 4, 6], target_bops=3 / 32, granularity=granularity, **stages)
    method = make_method(config)
    method.prepare(space)
    method.attach(model, None)
    ledger = make_ledger(model, space)
    names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    run = Run(space, ledger, solve_target(config, space.trainable, ledger), 3 * steps, 3 * steps)
    return method.wrap_optimizer(plain_optimizer(list(names)), names, model, run), method


def our_optimizer(
    model: nn.Module, batch: Batch, steps: int, chosen: argparse.Namespace
) -> tuple[torch.optim.Optimizer, Method | None]:
    """Return the optimizer of the chosen method, and the method where it takes part in the forward pass."""
    if chosen.method == "search":
        return search_optimizer(model, batch, steps, chosen.granularity)
    return geta_optimizer(model, batch, steps, chosen.paper), None


def timed_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    size: Size,
    cpu_time: bool = False,
    wait: bool = True,
    method: Method | None = None,
) -> float:
    clock = time.process_time if cpu_time else time.perf_counter
    device = batch["input_ids"].device.type
    start = clock()
    optimizer.zero_grad()
    if method is not None:
        method.before_backward(model)
    with torch.autocast(device, torch.bfloat16) if size.autocast else contextlib.nullcontext():
        loss = model(**batch).loss
    extra = None if method is None else method.extra_loss(model)
    if extra is not None:
        loss = loss + extra
    loss.backward()
    optimizer.step()
    if wait and device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def time_both(size: Size, chosen: argparse.Namespace) -> dict[str, list[tuple[float, float]]]:
    """Return the seconds (plain, GETA) of every step by stage, without the first step of each stage."""
    plain, batch = make_model(size), make_batch(size, chosen.device)
    geta = copy.deepcopy(plain).to(chosen.device)
    plain.to(chosen.device)
    (ours, method), theirs = our_optimizer(geta, batch, chosen.steps, chosen), plain_optimizer(plain.parameters())
    timed_step(plain, theirs, batch, size)  # the first step allocates Adam's state
    seconds = defaultdict(list)
    for _ in range((4 if method is None else 3) * chosen.steps):
        stage = ours.phase.stage if method is None else method.stage
        if method is None:
            freeze_quantizers(geta, stage == COOLDOWN)  # as GETATrainer does
        own = timed_step(plain, theirs, batch, size, chosen.cpu_time)
        seconds[stage].append((own, timed_step(geta, ours, batch, size, chosen.cpu_time, method=method)))
    return {stage: times[1:] for stage, times in seconds.items()}


def host_reads(size: Size, chosen: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Count how often a step of a GPU waits for it: the median over the steps of every stage, (plain, GETA).

    Steps that begin or end a period may; they are fewer than half of a stage's.
    """
    plain, batch = make_model(size), make_batch(size, chosen.device)
    geta = copy.deepcopy(plain).to(chosen.device)
    plain.to(chosen.device)
    pairs = (
        (plain, plain_optimizer(plain.parameters())),
        (geta, geta_optimizer(geta, batch, chosen.steps, chosen.paper)),
    )
    counts = defaultdict(list)
    for _ in range(4 * chosen.steps):
        stage = pairs[1][1].phase.stage
        freeze_quantizers(geta, stage == COOLDOWN)
        counts[stage].append([_reads_of_step(*pair, batch, size) for pair in pairs])
    medians = {
        stage: [float(statistics.median(column)) for column in zip(*found, strict=True)]
        for stage, found in counts.items()
    }
    return {stage: (found[0], found[1]) for stage, found in medians.items()}


def _reads_of_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, size: Size) -> int:
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            timed_step(model, optimizer, batch, size, wait=False)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


# --- memory -----------------------------------------------------------------------------------------------------------


def run_alone(size: Size, chosen: argparse.Namespace) -> int:
    """Return the peak bytes of a few steps of one method in this process, above what the imports took."""
    before = peak_bytes(chosen.device)
    model, batch = make_model(size).to(chosen.device), make_batch(size, chosen.device)
    plain = chosen.alone == "plain"
    chosen.method = "geta" if plain else chosen.alone
    steps = 5  # a period of the joint stage takes one at least
    optimizer, method = (
        (plain_optimizer(model.parameters()), None) if plain else our_optimizer(model, batch, steps, chosen)
    )
    for _ in range((4 if method is None else 3) * steps):
        timed_step(model, optimizer, batch, size, method=method)
    return peak_bytes(chosen.device) - before


def peak_of(method: str, name: str, chosen: argparse.Namespace) -> int:
    command = [sys.executable, __file__, "--alone", method, "--size", name, "--device", chosen.device]
    command += ["--granularity", chosen.granularity]
    done = subprocess.run(command + ["--paper"] * chosen.paper, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def show(name: str, chosen: argparse.Namespace) -> None:
    size = SIZES[name]
    where = torch.cuda.get_device_name() if chosen.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"\n{size.what}, batch {size.batch}x{size.length}, {where}", flush=True)
    rows = []
    # Before the time is measured, since on a GPU two processes would share the memory.
    peaks = [peak_of(method, name, chosen) for method in (METHODS[0], chosen.method)] if chosen.memory else []
    for stage, times in time_both(size, chosen).items():
        plain_ms, geta_ms = (1000 * statistics.median(column) for column in zip(*times, strict=True))
        ratio = statistics.median(ours / theirs for theirs, ours in times)
        rows.append((stage, f"{plain_ms:.0f} ms", f"{geta_ms:.0f} ms", f"{ratio:.3f}"))
    order = (*STAGES, *SEARCH_STAGES)
    rows.sort(key=lambda row: order.index(row[0]))
    if peaks:
        rows.append(("peak memory", *(f"{peak / 2**20:.0f} MiB" for peak in peaks), f"{peaks[1] / peaks[0]:.3f}"))
    print(
        format_table(("", "plain", "GETA" if chosen.method == "geta" else chosen.method, "ratio (median)"), rows),
        flush=True,
    )


def main() -> None:
    chosen = options()
    sizes = chosen.size or DEFAULT_SIZES[chosen.device]
    if chosen.alone:
        print(json.dumps(run_alone(SIZES[sizes[0]], chosen)))
        return
    for name in sizes:
        show(name, chosen)


if __name__ == "__main__":
    main()
