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

from geta_hf import GETAError
from geta_hf.qadg import PruningSpace, verify_space
from geta_hf.qadg.propagation.propagate import record_and_propagate
from geta_hf.qadg.space import apply_policy, space_of
from geta_hf.surgery.trial_cut import try_cuts
from geta_hf.surgery.verify import verify_surgery
from tests.architectures import ARCHITECTURES, build

HEADER = (
    "architecture",
    "model",
    "families, prunable / found",
    "matrix parameters found",
    "prunable",
    "groups tested",
    "gates 1-3",
    "with all switched on",
    "gate 4",
    "frozen, untouched or refused, and why",
    "seconds",
)
STEPS = ("capture", "gates 2-3", "all switched on", "gate 4")
EVERYTHING = (("residual", "norm", "tied", "output"), ("query_heads",), ("head_dim",))
"""Policies that together make every family prunable but those of kind `other`, such as rows of a table of positions."""


@dataclass
class Result:
    """What became of one architecture: how far it came, and why no further.

    Attributes:
        name: of the architecture.
        model: its class.
        space: under the default policy, without what the model's own code can't follow; with norm-coupled families
            switched on where the default leaves nothing.
        norms: whether they were.
        refused: families that the model's own code can't follow, by reason.
        failures: step to error.
        seconds: for all steps.
    """

    name: str
    model: str = ""
    space: PruningSpace = field(default_factory=lambda: PruningSpace(()))
    norms: bool = False
    refused: Counter[str] = field(default_factory=Counter)
    failures: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def passed(self, step: str) -> str:
        if "capture" in self.failures:
            return ""
        if not self.space.prunable and step != "all switched on":
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

    attempt("capture", lambda: _find(result))
    if "capture" not in result.failures:
        attempt("gates 2-3", lambda: _verify(result, [()]))
        attempt("all switched on", lambda: _verify(result, EVERYTHING))
        attempt("gate 4", lambda: _cut(result))
    result.seconds = time.perf_counter() - start
    return result


def _find(result: Result) -> None:
    model, batch = build(result.name)
    space = space_of(record_and_propagate(model, batch, times=2))
    result.norms = not space.prunable
    result.space = apply_policy(space, prune=("norm",)) if result.norms else space


def _verify(result: Result, policies: Sequence[Sequence[str]]) -> None:
    model, batch = build(result.name)
    for policy in policies:
        space = apply_policy(result.space, prune=policy) if policy else result.space
        if space.prunable:
            verify_space(model, batch, space)


def _cut(result: Result) -> None:
    model, batch = build(result.name)
    before = {family.name for family in result.space.prunable}
    if not before:
        return
    try:
        result.space = try_cuts(model, result.space, batch)
    except GETAError as error:
        result.refused[str(error)] += len(before)
        result.space = apply_policy(result.space, keep=("*",))
        return
    result.refused.update(f.reason for f in result.space.families if f.name in before and not f.prunable)
    verify_surgery(model, batch, result.space)


def row(result: Result) -> tuple[str, ...]:
    """One line of the table."""
    space = result.space
    return (
        result.name,
        result.model,
        families_found(space),
        f"{100 * space.coverage():.0f} %",
        f"{100 * space.coverage(prunable_only=True):.0f} %",
        str(sum(family.size for family in space.prunable if family.size > 1)),
        result.passed("gates 2-3") + (" (norm-coupled switched on)" if result.norms else ""),
        result.passed("all switched on"),
        result.passed("gate 4"),
        _remarks(result),
        f"{result.seconds:.1f}",
    )


def families_found(space: PruningSpace) -> str:
    """Kinds with how many of their families are prunable, and how many there are."""
    found = Counter(family.kind for family in space.families)
    prunable = Counter(family.kind for family in space.prunable)
    return ", ".join(f"{kind} {prunable[kind]} / {count}" for kind, count in sorted(found.items()))


def _remarks(result: Result) -> str:
    space = result.space
    counts: Counter[str] = Counter()
    for frozen in space.unsupported:
        counts[f"{frozen.operator}: {frozen.reason}"] += frozen.count
    parts = [f"{what} ({count}x)" for what, count in counts.most_common()]
    parts += [f"{count} families refused: {_one_line(why, 200)}" for why, count in result.refused.most_common(2)]
    if space.untouched:
        parts.append(f"{len(space.untouched)} parameters that no operator reads, such as {space.untouched[0]}")
    return "; ".join(parts)


def summary(results: Sequence[Result]) -> str:
    """Totals in words."""
    pruned = [result for result in results if result.space.prunable]
    lines = [f"{len(results)} architectures, of which"]
    for step in STEPS:
        among = pruned if step in ("gates 2-3", "gate 4") else results
        lines.append(f"- {sum(step not in r.failures for r in among)} of {len(among)} pass {step}")
    lines.append(f"- {sum(r.norms for r in results)} have families coupled to norms alone, which were switched on")
    lines.append(f"- {sum(bool(r.refused) for r in results)} have families that the model's own code can't follow")
    lines.append(f"- {len(results) - len(pruned)} end with nothing to prune")
    lines.append(f"- {sum(not r.space.unsupported for r in results)} have no frozen operator")
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
        "completeness, gate 3 alignment, gate 4 the real model after surgery: cut with other counts in every layer, "
        "eager and sdpa, other shapes, generation with and without cache. Gates 2 and 3 run on the batch, with other "
        "rows, and shorter with padding where the model runs those. *With all switched on* repeats them for residual "
        "width, norm-coupled, tied and output-facing families, query heads and head dims. The seconds are those of "
        "everything together, on one core.\n\n"
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


def _one_line(text: str, limit: int = 600) -> str:
    text = " ".join(text.split()).replace("|", "/")
    return text if len(text) <= limit else f"{text[:limit]} ..."


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
