"""How long the dependency graph takes, and how much memory, on models of which no weight is there.

    python benchmarks/qadg.py [--models bert-base phi-2 llama-3-8b] [--repeats 5] [--threads N]

Three tables: every step on models of real shapes on meta, each in a process of its own; how the time grows with the
number of layers; and Torch-Pruning's time on bert-base with real weights, the two taking turns in one process so that
a noisy machine disturbs both alike. All times are medians. Torch-Pruning is no dependency of this package, and its
table is left out where it is not installed. The peak of memory is read from /proc, so from Linux alone.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import BertConfig, BertForQuestionAnswering, LlamaConfig, PhiConfig, PreTrainedConfig

from geta_hf.qadg import PruningSpace, build_space
from geta_hf.qadg.families.find import find_families
from geta_hf.qadg.propagation.propagate import propagate
from geta_hf.qadg.tracing.dummy_inputs import empty_model, make_dummy_inputs
from geta_hf.qadg.tracing.merge import merge_branches
from geta_hf.qadg.tracing.record_forward import record_forward
from geta_hf.utils.tables import format_table

CONFIGS: dict[str, PreTrainedConfig] = {
    "bert-base": BertConfig(architectures=["BertForMaskedLM"]),
    "phi-2": PhiConfig(
        architectures=["PhiForCausalLM"],
        vocab_size=51200,
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=32,
        num_attention_heads=32,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.4},
    ),
    "llama-3-8b": LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    ),
}
LAYERS = (8, 16, 32, 64)
STEPS = ("empty_model", "record", "merge", "propagate", "families", "build_space", "from_config")

T = TypeVar("T")
Timings = defaultdict[str, list[float]]


@dataclass(frozen=True)
class Measured:
    """What one model took: medians of seconds by step, the peak of memory above the imports, and the model's size."""

    seconds: dict[str, float]
    megabytes: float
    parameters: int
    groups: int


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=CONFIGS, default=list(CONFIGS), help="of the first table")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def main() -> None:
    chosen = options()
    torch.set_num_threads(chosen.threads)
    print(f"torch {torch.__version__}, {chosen.threads} threads, medians of {chosen.repeats}; seconds\n")
    print_steps(chosen.models, chosen.repeats, chosen.threads)
    print_growth(chosen.repeats)
    print_against_torch_pruning(chosen.repeats)


def print_steps(models: Sequence[str], repeats: int, threads: int) -> None:
    """Run every model in a fresh process, of which the peak of memory tells about this model alone."""
    rows = []
    context = multiprocessing.get_context("spawn")
    for name in models:
        with ProcessPoolExecutor(max_workers=1, mp_context=context) as process:
            found = process.submit(measure, CONFIGS[name], repeats, threads).result()
        steps = (f"{found.seconds[step]:.2f}" for step in STEPS)
        rows.append((name, f"{found.parameters / 1e9:.2f} B", str(found.groups), *steps, f"{found.megabytes:.0f}"))
    print(format_table(("model", "parameters", "groups", *STEPS, "peak MB above imports"), rows), end="\n\n")


def measure(config: PreTrainedConfig, repeats: int, threads: int) -> Measured:
    """Time each step; transformers imports a model's code when its first is built, so a shallow one goes first."""
    torch.set_num_threads(threads)
    PruningSpace.from_config(shallow(config))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory("VmRSS")
    space = PruningSpace.from_config(config)
    megabytes = memory("VmHWM") - before
    timings: Timings = defaultdict(list)
    for _ in range(repeats):
        model = time_steps(config, timings)
    seconds = {step: statistics.median(times) for step, times in timings.items()}
    return Measured(seconds, megabytes, sum(p.numel() for p in model.parameters()), space.num_groups)


def shallow(config: PreTrainedConfig, layers: int = 1) -> PreTrainedConfig:
    changed = copy.deepcopy(config)
    changed.num_hidden_layers = layers
    return changed


def memory(field: str) -> float:
    """MB of this process: `VmRSS` now, `VmHWM` at the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def time_steps(config: PreTrainedConfig, timings: Timings) -> torch.nn.Module:
    """Time each step of `build_space` for itself, which records once where that records twice, and then both in all."""
    model = timed(timings["empty_model"], empty_model, config)
    batch = make_dummy_inputs(model)
    graph = timed(timings["record"], record_forward, model, batch)
    merged = timed(timings["merge"], merge_branches, graph)
    flow = timed(timings["propagate"], propagate, merged)
    timed(timings["families"], find_families, flow)
    timed(timings["build_space"], build_space, model, batch)
    timed(timings["from_config"], PruningSpace.from_config, config)
    return model


def timed(times: list[float], run: Callable[..., T], *args: Any) -> T:
    start = time.perf_counter()
    result = run(*args)
    times.append(time.perf_counter() - start)
    return result


def print_growth(repeats: int) -> None:
    """Time `build_space` on the phi-2 shape with ever more layers, taking turns."""
    models = {layers: empty_model(shallow(CONFIGS["phi-2"], layers)) for layers in LAYERS}
    seconds: defaultdict[int, list[float]] = defaultdict(list)
    build_space(models[LAYERS[0]], make_dummy_inputs(models[LAYERS[0]]))
    for _ in range(repeats):
        for layers, model in models.items():
            timed(seconds[layers], build_space, model, make_dummy_inputs(model))
    medians = {layers: statistics.median(times) for layers, times in seconds.items()}
    rows = [(str(n), f"{time:.2f}", f"{1000 * time / n:.1f}") for n, time in medians.items()]
    print(format_table(("layers of phi-2", "build_space", "ms per layer"), rows), end="\n\n")


def print_against_torch_pruning(repeats: int) -> None:
    """Run both on bert-base with a head for questions, taking turns.

    One group of Torch-Pruning is a layer's channels in all. What corresponds to our groups, each of which says what
    leaves with it, is to ask for them one by one, so there is a row for that as well, measured once.
    """
    try:
        import torch_pruning
    except ImportError:
        print("Torch-Pruning is not installed: pip install --no-deps torch-pruning")
        return

    def whole_layers() -> list[Any]:
        return list(torch_pruning.DependencyGraph().build_dependency(model, batch).get_all_groups())

    def one_by_one() -> list[Any]:
        graph = torch_pruning.DependencyGraph().build_dependency(model, batch)
        wanted = [(m.tensor, row) for m in (f.members[0] for f in space.prunable) for row in m.index.tolist()]
        layers = {tensor: model.get_submodule(tensor.rpartition(".")[0]) for tensor, _ in wanted}
        return [graph.get_pruning_group(layers[t], torch_pruning.prune_linear_out_channels, row) for t, row in wanted]

    model = BertForQuestionAnswering(BertConfig()).eval()
    batch = make_dummy_inputs(model)
    ours, theirs, each = list[float](), list[float](), list[float]()
    for _ in range(repeats + 1):
        space = timed(ours, build_space, model, batch)
        groups = timed(theirs, whole_layers)
    single = timed(each, one_by_one)
    ours, theirs = ours[1:], theirs[1:]
    ratio = statistics.median(t / o for t, o in zip(theirs, ours, strict=True))
    together = sum(map(cuts_attention, groups))
    seconds = statistics.median(ours)
    rows = [
        ("build_space", f"{seconds:.2f}", "1", str(len(space.families)), str(space.num_groups), heads(space)),
        ("get_all_groups", f"{statistics.median(theirs):.2f}", f"{ratio:.2f}", str(len(groups)), "", f"0 ({together})"),
        ("get_pruning_group", f"{each[0]:.2f}", f"{each[0] / seconds:.2f}", "", str(len(single)), ""),
    ]
    print(f"Torch-Pruning {torch_pruning.__version__} on bert-base; in brackets: attentions as one group of channels")
    print(format_table(("", "seconds", "ratio", "families", "prunable groups", "attentions with heads"), rows))


def heads(space: PruningSpace) -> str:
    """Return in how many attentions heads were found, and how many each has."""
    sizes = [family.size for family in space.prunable if family.kind == "heads"]
    return f"{len(sizes)} of {'/'.join(map(str, sorted(set(sizes))))}"


def cuts_attention(group: Any) -> bool:
    """Return whether query, key and value leave together; where one head ends is for Torch-Pruning to be told."""
    cut = [item.dep.target.name for item in group.items if item.dep.handler.__name__ == "prune_out_channels"]
    return all(any(f"self.{layer} " in name for name in cut) for layer in ("query", "key", "value"))


if __name__ == "__main__":
    main()
