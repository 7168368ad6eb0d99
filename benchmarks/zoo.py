"""The pruning spaces of many small Hugging Face architectures, and which of the four gates they pass.

    python -m benchmarks.zoo [--output docs/architectures.md] [--only NAME ...]

One architecture's failure does not stop the others; every failure is listed with its reason.
"""

from __future__ import annotations

import argparse
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers

from geta_hf.export import verify_surgery
from geta_hf.qadg import PruningSpace, verify_space
from geta_hf.qadg.build import space_of
from geta_hf.qadg.propagate import analyse
from tests.architectures import ARCHITECTURES, build

HEADER = (
    "architecture",
    "model",
    "families, prunable / found",
    "matrix parameters found",
    "prunable",
    "groups tested",
    "gates 1-3",
    "gate 4",
    "frozen, and why",
    "seconds",
)
STEPS = ("capture", "gates 2-3", "gate 4")


@dataclass
class Result:
    """What became of one architecture: how far it came, and why no further."""

    name: str
    model: str = ""
    space: PruningSpace = field(default_factory=lambda: PruningSpace(()))
    failures: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def passed(self, step: str) -> str:
        if "capture" in self.failures:
            return ""
        if not self.space.prunable:
            return "nothing to prune"
        return "no" if step in self.failures else "yes"


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/architectures.md"))
    parser.add_argument("--only", nargs="+", default=list(ARCHITECTURES), metavar="NAME")
    return parser.parse_args()


def examine(name: str) -> Result:
    """Build the model, find its space, and let it pass the gates."""
    result = Result(name, ARCHITECTURES[name].model)
    start = time.perf_counter()

    def attempt(step: str, run: Callable[[], None]) -> None:
        try:
            run()
        except Exception as error:  # a survey goes on
            result.failures[step] = f"{type(error).__name__}: {error}" if str(error) else repr(error)

    def find() -> None:
        model, batch = build(name)
        result.space = space_of(analyse(model, batch))

    attempt("capture", find)
    if result.space.prunable:
        model, batch = build(name)
        attempt("gates 2-3", lambda: verify_space(model, batch, result.space))
        attempt("gate 4", lambda: verify_surgery(model, batch, result.space))
    result.seconds = time.perf_counter() - start
    return result


def row(result: Result) -> tuple[str, ...]:
    """One line of the table."""
    space = result.space
    return (
        result.name,
        result.model,
        _families(space),
        f"{100 * space.coverage():.0f} %",
        f"{100 * space.coverage(prunable_only=True):.0f} %",
        str(sum(family.size for family in space.prunable if family.size > 1)),
        result.passed("gates 2-3"),
        result.passed("gate 4"),
        _frozen(space),
        f"{result.seconds:.1f}",
    )


def _families(space: PruningSpace) -> str:
    found = Counter(family.kind for family in space.families)
    prunable = Counter(family.kind for family in space.prunable)
    return ", ".join(f"{kind} {prunable[kind]} / {count}" for kind, count in sorted(found.items()))


def _frozen(space: PruningSpace) -> str:
    counts: Counter[str] = Counter()
    for frozen in space.frozen:
        counts[f"{frozen.operator}: {frozen.reason}"] += frozen.count
    parts = [f"{what} ({count}x)" for what, count in counts.most_common()]
    if space.untouched:
        parts.append(f"{len(space.untouched)} parameters that no operator reads, such as {space.untouched[0]}")
    return "; ".join(parts)


def summary(results: Sequence[Result]) -> str:
    """Totals in words."""
    pruned = [result for result in results if result.space.prunable]
    lines = [f"{len(results)} architectures, of which"]
    for step in STEPS:
        among = results if step == "capture" else pruned
        lines.append(f"- {sum(step not in r.failures for r in among)} of {len(among)} pass {step}")
    lines.append(f"- {len(results) - len(pruned)} have nothing that the default policy prunes or could not be captured")
    lines.append(f"- {sum(not r.space.frozen for r in results)} have no frozen operator")
    if pruned:
        found = sum(r.space.coverage() for r in pruned) / len(pruned)
        prunable = sum(r.space.coverage(prunable_only=True) for r in pruned) / len(pruned)
        groups = sum(r.space.num_groups for r in pruned)
        lines.append(
            f"- {groups} groups; on average {100 * found:.0f} % of the elements of matrix parameters lie in a family, "
            f"{100 * prunable:.0f} % in a prunable one"
        )
    return "\n".join(lines)


def page(results: Sequence[Result]) -> str:
    """The whole document."""
    failures = [f"- **{r.name}**, {step}: {_one_line(why)}" for r in results for step, why in r.failures.items()]
    return (
        "# Architectures\n\n"
        "Made by `make zoo`: tiny configurations with random weights, the default policy, transformers "
        f"{transformers.__version__}, torch {torch.__version__}. Gate 1 freezes what no rule covers, gate 2 is "
        "completeness, gate 3 alignment, gate 4 the real model after surgery. The seconds are those of capture, "
        "propagation and all gates together, on one core.\n\n"
        f"{summary(results)}\n\n{_table(HEADER, [row(result) for result in results])}\n\n"
        "## Failures\n\n" + ("\n".join(failures) or "None.") + "\n\n"
        "## Found, but not prunable by default\n\n" + _table(("families", "reason"), _reasons(results)) + "\n"
    )


def _reasons(results: Sequence[Result]) -> list[tuple[str, ...]]:
    families = (family for result in results for family in result.space.families if not family.prunable)
    counts = Counter(re.sub(r"(the same indices as) .*", r"\1 a prunable family", family.reason) for family in families)
    return [(str(count), reason) for reason, count in counts.most_common()]


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Not padded: the reasons are long."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ("---",) * len(header), *rows))


def _one_line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 600 else f"{text[:600]} ..."


def main() -> None:
    chosen = options()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    results = []
    for name in chosen.only:
        results.append(examine(name))
        failed = ", ".join(results[-1].failures)
        print(f"{name}: {failed + ' failed' if failed else 'ok'} ({results[-1].seconds:.1f} s)", flush=True)
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    chosen.output.write_text(page(results))
    print(f"\n{summary(results)}\n\nWritten to {chosen.output}")


if __name__ == "__main__":
    main()
