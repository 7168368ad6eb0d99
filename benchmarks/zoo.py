"""Many small Hugging Face architectures: their pruning spaces, the gates that they pass, and how they train and export.

    python -m benchmarks.zoo [--data docs/architectures.jsonl] [--output docs/architectures.md] [--only NAME ...]

One architecture's failure does not stop the others; every failure is listed with its reason. The data file has a line
for each architecture and is written after each, so a run that was stopped goes on where it was: what has a line is
done again only if it is named by `--only`.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.zoo_training import STEPS as STEPS_TRAINED
from benchmarks.zoo_training import train_and_export
from geta_hf import GETAError
from geta_hf.qadg import PruningSpace, verify_space
from geta_hf.qadg.propagation.propagate import record_and_propagate
from geta_hf.qadg.space import apply_policy, space_of
from geta_hf.surgery.trial_cut import try_cuts
from geta_hf.surgery.verify import verify_surgery
from tests.architectures import ARCHITECTURES, build

Record = dict[str, Any]
"""What is known of one architecture: a line of the data file."""

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
    parser.add_argument("--data", type=Path, default=Path("docs/architectures.jsonl"))
    parser.add_argument("--output", type=Path, default=Path("docs/architectures.md"))
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME")
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


def gate_record(result: Result) -> Record:
    """Return what the gates found of one architecture, as plain data."""
    space = result.space
    return {
        "architecture": result.name,
        "model": result.model,
        "families": families_found(space),
        "found": round(100 * space.coverage()),
        "prunable": round(100 * space.coverage(prunable_only=True)),
        "groups": sum(family.size for family in space.prunable if family.size > 1),
        "gates 2-3": result.passed("gates 2-3") + (" (norm-coupled switched on)" if result.norms else ""),
        "all switched on": result.passed("all switched on"),
        "gate 4": result.passed("gate 4"),
        "remarks": _remarks(result),
        "reasons": dict(Counter(family.reason for family in space.families if not family.prunable)),
        "failures": {step: _one_line(why) for step, why in result.failures.items()},
        "gate seconds": round(result.seconds, 1),
    }


def families_found(space: PruningSpace) -> str:
    """Return the kinds with how many of their families are prunable, and how many there are."""
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


def read_records(path: Path) -> dict[str, Record]:
    """Return the lines of a data file by architecture; none where there is no such file."""
    lines = path.read_text().splitlines() if path.exists() else []
    records = [json.loads(line) for line in lines]
    return {record["architecture"]: record for record in records}


def write_records(path: Path, records: Mapping[str, Record]) -> None:
    """Write one line for each architecture, in the order of the list."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(records[name]) for name in ARCHITECTURES if name in records]
    path.write_text("".join(f"{line}\n" for line in lines))


def summary(records: Sequence[Record]) -> str:
    """Return totals in words."""
    pruned = [record for record in records if record["groups"]]
    trained = [record["training"] for record in records if "training" in record]
    exported = [training for training in trained if "failure" not in training]
    passed = sum(_verified(record) == "yes" for record in pruned)
    refused = sum("families refused" in record["remarks"] for record in records)
    return "\n".join(
        (
            f"{len(records)} architectures, of which",
            "",
            f"- {passed} of {len(pruned)} with something to prune pass every gate",
            f"- {len(exported)} of {len(trained)} that were trained export, and load again with equal outputs",
            f"- {sum(bool(training['left_float']) for training in exported)} of them have layers that remain in "
            f"floating point, as the model reads the weight itself or the layer has a forward of its own",
            f"- {refused} have families that the model's own code cannot follow, which are not pruned",
            f"- {len(records) - len(pruned)} end with nothing to prune",
        )
    )


def page(records: Sequence[Record]) -> str:
    """Return the document for readers; what else is known is in the data file."""
    head = ("architecture", "model", "prunable families", "weights in them", "gates", "trained and exported")
    failures = [(record["architecture"], step, why) for record in records for step, why in record["failures"].items()]
    trainings = ((record["architecture"], record.get("training", {})) for record in records)
    failures += [
        (name, training["at"], _one_line(training["failure"], 300))
        for name, training in trainings
        if "failure" in training
    ]
    return (
        "# Architectures\n\n"
        f"Tiny configurations with random weights under the default policy, with transformers "
        f"{transformers.__version__} and torch {torch.__version__}. *Gates*: what is found to be prunable is cut from "
        "the real model, with other counts in every layer, and computes what the model with zeros in those places "
        "computes: with eager and sdpa attention, in other shapes, in generation with and without a cache. *Trained "
        f"and exported*: {STEPS_TRAINED} steps that remove groups and learn bit widths, an export, and a reload with "
        "equal outputs. [architectures.jsonl](architectures.jsonl) has a line for each with all that is known: "
        "families that are not prunable and why, operators without a rule, differences, seconds. `make zoo` makes "
        "both and goes on where it was stopped.\n\n"
        f"{summary(records)}\n\n{_table(head, [_row(record) for record in records])}\n\n"
        "## Failures\n\n"
        + ("\n".join(f"- **{name}**, {step}: {why}" for name, step, why in failures) or "None.")
        + "\n"
    )


def _row(record: Record) -> tuple[str, ...]:
    families = [part.rpartition(" / ")[0] for part in record["families"].split(", ")]
    prunable = ", ".join(family for family in families if not family.endswith(" 0"))
    training = record.get("training")
    if training is None:
        exported = "not tried yet"
    elif "failure" in training:
        exported = f"no, see below ({training['at']})"
    else:
        exported = "yes, some layers in floating point" if training["left_float"] else "yes"
    share = f"{record['prunable']} %"
    return record["architecture"], record["model"], prunable or "none", share, _verified(record), exported


def _verified(record: Record) -> str:
    """Return whether an architecture passes every gate, in one word."""
    verdicts = {record[step].split(" (")[0] for step in ("gates 2-3", "all switched on", "gate 4")}
    if "no" in verdicts or "capture" in record["failures"]:
        return "no"
    return "yes" if record["groups"] else "nothing to prune"


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ("---",) * len(header), *rows))


def _one_line(text: str, limit: int = 600) -> str:
    text = " ".join(text.split()).replace("|", "/")
    return text if len(text) <= limit else f"{text[:limit]} ..."


def main() -> None:
    chosen = options()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    records = read_records(chosen.data)
    for name in chosen.only or ARCHITECTURES:
        record = {} if chosen.only else dict(records.get(name, {}))
        if "families" not in record:
            record = {**gate_record(examine(name)), **record}
        if "training" not in record:
            record["training"] = train_and_export(name)
        if record != records.get(name):
            records[name] = record
            write_records(chosen.data, records)
            failed = ", ".join((*record["failures"], record["training"].get("at", ""))).strip(", ")
            print(f"{name}: {failed + ' failed' if failed else 'ok'}", flush=True)
    ordered = [records[name] for name in ARCHITECTURES if name in records]
    chosen.output.write_text(page(ordered))
    print(f"\n{summary(ordered)}\n\nWritten to {chosen.output}")


if __name__ == "__main__":
    main()
