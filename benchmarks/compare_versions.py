"""Compare the speed of this checkout with that of another one, by the figures that the benchmarks print themselves.

    python benchmarks/compare_versions.py OTHER_CHECKOUT [--what train_step|qadg|export] [--pairs 3] [--cpu-time]
        [--arguments="--size bert4-8x128 --steps 5"]

Each pair is one run of the benchmark in this checkout and one in the other, whole processes one after the other; every
second pair starts with the other checkout, so that a machine that slows down disturbs both alike. Of each figure the
table shows the median of this checkout, that of the other, the median over the pairs of the ratio this / other with its
lowest and highest value, and the ratio of the two minima, which other processes disturb least. 1 means no change; above
1, this checkout is slower or takes more memory. The last line of the output is the same as JSON.

Compared are a GETA step in ms and its ratio to a plain step (train_step), the seconds of `build_space` and
`from_config` with the peak of memory (qadg), and seconds, memory and counts (export). Each checkout runs its own
`train_step.py` and `qadg.py`; both run this checkout's `export.py`, which uses only public names of geta_hf. The time
of whole processes is not compared: imports would hide what is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
CPU_CLOCK = "import time\n\ntime.perf_counter = time.process_time\n"
Figures = dict[str, float]
"""Row and column of a printed table -> the number in that cell."""


@dataclass(frozen=True)
class Benchmark:
    """What is run by default, and which columns of its tables are compared."""

    arguments: str
    columns: tuple[str, ...]
    own_script: bool = True
    """Whether each checkout runs its own script, and not this checkout's."""


BENCHMARKS = {
    "train_step": Benchmark("--device cpu --size bert4-8x128 --steps 5 --no-memory", ("GETA", "ratio (median)")),
    "qadg": Benchmark("--models bert-base phi-2 --repeats 3", ("build_space", "from_config", "peak MB above imports")),
    "export": Benchmark(
        "--model bert --repeat 1",
        ("seconds", "CPU seconds", "MiB", "forwards", "recordings", "copies"),
        own_script=False,
    ),
}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="folder of the other checkout")
    parser.add_argument("--what", choices=BENCHMARKS, default="train_step")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--cpu-time", action="store_true", help="CPU time of the process, for a shared machine")
    parser.add_argument("--arguments", help="of the benchmark, as one string; by default its smallest useful run")
    return parser.parse_args()


def run(what: str, checkout: Path, arguments: Sequence[str], cpu_time: bool = False) -> Figures:
    """Run a benchmark on the package of a checkout and return the figures to compare.

    Args:
        what: a key of `BENCHMARKS`.
        checkout: folder of the repository whose package is measured.
        arguments: of the benchmark.
        cpu_time: whether the benchmark's clock is the CPU time of its process. Default False.

    Raises:
        CalledProcessError: the benchmark failed; its errors have been printed.
        ValueError: it printed no table with the expected columns.
    """
    script = (checkout if BENCHMARKS[what].own_script else HERE) / "benchmarks" / f"{what}.py"
    command = [sys.executable, str(script), *arguments]
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(checkout)]
        if cpu_time:
            # Not every benchmark of every version has an option for it; this also reaches the processes it starts.
            (Path(folder) / "sitecustomize.py").write_text(CPU_CLOCK, encoding="utf-8")
            paths.insert(0, folder)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        done = subprocess.run(command, cwd=checkout, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    figures = read_figures(done.stdout, BENCHMARKS[what].columns)
    if not figures:
        raise ValueError(f"{script} printed no table with a column of {', '.join(BENCHMARKS[what].columns)}")
    return figures


def read_figures(text: str, columns: Sequence[str]) -> Figures:
    """Return the numbers of all Markdown tables in a text that stand in one of the columns.

    Args:
        text: the output of a benchmark.
        columns: headers of the columns that are wanted.

    Returns:
        "HEADER ROW, COLUMN" -> number without its unit, where HEADER is that of the first column.
    """
    figures: Figures = {}
    header: list[str] | None = None
    for line in text.splitlines():
        if not line.startswith("|"):
            header = None
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if header is None:
            header = cells
            continue
        for column, cell in zip(header[1:], cells[1:], strict=True):
            number = re.match(r"-?\d+(\.\d+)?", cell)
            if column in columns and number is not None:
                figures[f"{header[0]} {cells[0]}, {column}".strip()] = float(number.group())
    return figures


def compare(pairs: Sequence[tuple[Figures, Figures]]) -> dict[str, dict[str, float]]:
    """Return medians and ratios of the figures that all runs have.

    Args:
        pairs: figures of this checkout and of the other, run one after the other.

    Returns:
        figure -> `this` and `other`, medians; `ratio`, the median over the pairs of this / other; `low` and `high`, the
        lowest and the highest of these ratios; `minima`, lowest of this / lowest of other. A figure that is 0 in any
        run of the other checkout has no ratio and is missing.
    """
    runs = [figures for pair in pairs for figures in pair]
    found = {}
    for name in runs[0]:
        if not all(name in figures for figures in runs):
            continue
        this = [pair[0][name] for pair in pairs]
        other = [pair[1][name] for pair in pairs]
        if 0 in other:
            continue
        ratios = [a / b for a, b in zip(this, other, strict=True)]
        found[name] = {
            "this": statistics.median(this),
            "other": statistics.median(other),
            "ratio": statistics.median(ratios),
            "low": min(ratios),
            "high": max(ratios),
            "minima": min(this) / min(other),
        }
    return found


def print_table(found: Mapping[str, Mapping[str, float]]) -> None:
    print("| figure | this | other | this / other | lowest to highest | of minima |")
    print("|---|---|---|---|---|---|")
    for name, row in found.items():
        medians = f"{row['this']:.4g} | {row['other']:.4g}"
        ratios = f"{row['ratio']:.3f} | {row['low']:.3f} to {row['high']:.3f} | {row['minima']:.3f}"
        print(f"| {name} | {medians} | {ratios} |")


def main() -> None:
    chosen = options()
    other = chosen.other.resolve()
    default = BENCHMARKS[chosen.what].arguments
    arguments = shlex.split(default if chosen.arguments is None else chosen.arguments)
    pairs: list[tuple[Figures, Figures]] = []
    for place in range(chosen.pairs):
        order = [HERE, other] if place % 2 == 0 else [other, HERE]
        results = [run(chosen.what, checkout, arguments, chosen.cpu_time) for checkout in order]
        if place % 2:
            results.reverse()
        pairs.append((results[0], results[1]))
        print(f"pair {place + 1} of {chosen.pairs} done", file=sys.stderr, flush=True)
    found = compare(pairs)
    clock = "CPU time" if chosen.cpu_time else "wall time"
    print(f"{chosen.what} {shlex.join(arguments)}, {chosen.pairs} pairs, {clock}\n")
    print_table(found)
    record = {"what": chosen.what, "arguments": arguments, "pairs": chosen.pairs, "clock": clock, "figures": found}
    print("\n" + json.dumps(record))


if __name__ == "__main__":
    main()
