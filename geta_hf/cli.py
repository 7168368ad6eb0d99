"""Define the console command `geta-hf`, with one function for each sub-command."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from geta_hf.compress import compress
from geta_hf.convert import convert
from geta_hf.errors import GETAError
from geta_hf.evaluation.command import add_command as add_eval
from geta_hf.export.formats import FORMATS
from geta_hf.inference.measure import MOST_BITS, Conditions, measure_latency
from geta_hf.inference.prepare import COMPUTE
from geta_hf.qadg.group_types import Family
from geta_hf.qadg.missing_heads import missing_heads
from geta_hf.qadg.propagation.propagate import record_and_propagate
from geta_hf.qadg.space import PruningSpace, space_of
from geta_hf.qadg.tracing.dummy_inputs import empty_model, make_dummy_inputs
from geta_hf.qadg.tracing.graph import Graph
from geta_hf.qadg.tracing.raw_reads import recorded_raw_reads
from geta_hf.quantization import select_layers
from geta_hf.recipes.train import train
from geta_hf.reporting.graph_page import gather, gather_unsupported, pattern, span, write_page
from geta_hf.reporting.html_report import write_report
from geta_hf.reporting.hub import files_to_push, push_to_hub
from geta_hf.serialization.validate import check_headers, check_readable
from geta_hf.surgery.trial_cut import try_cuts
from geta_hf.training.recovery import RATES
from geta_hf.utils.quiet import quiet
from geta_hf.utils.version import __version__

_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run `geta-hf`.

    Args:
        argv: the arguments after the command's name; those of the process by default.

    Returns:
        The exit code: 0, or 2 for invalid input, with the reason on stderr. Wrong usage and `--help` raise SystemExit,
        as in argparse.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from transformers import LlamaConfig
        >>> from geta_hf.cli import main
        >>> sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
        >>> with tempfile.TemporaryDirectory() as home:
        ...     LlamaConfig(vocab_size=16, architectures=["LlamaForCausalLM"], **sizes).save_pretrained(home)
        ...     code = main(["inspect", home])  # doctest: +ELLIPSIS
        LlamaForCausalLM: 3,120 parameters in 12 tensors, ...
        >>> code
        0
    """
    arguments, unknown = _parser().parse_known_args(argv)
    if unknown:
        # The main parser would print its own usage, which has no options of the command.
        arguments.fail(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        with quiet():
            arguments.run(arguments)
    # What a user can mend is one line. Anything else is a fault of this package and keeps its traceback.
    except (GETAError, OSError) as error:
        print(f"geta-hf: {error}", file=sys.stderr)
        return 2
    return 0


def _versions() -> str:
    return f"geta-hf {__version__} (torch {torch.__version__}, transformers {transformers.__version__})"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("geta-hf", description="Joint structured pruning and quantization.")
    parser.add_argument("--version", action="version", version=_versions(), help="print the versions that run")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("inspect", help="list what can be removed from a model; no weights are read")
    command.add_argument("model", metavar="MODEL", help="a Hub name, a folder, or a config.json")
    command.add_argument("--html", type=Path, metavar="FILE", help="also draw the dependency graph as one HTML page")
    switch = "a kind, a coupling (norm, tied, output) or a pattern of family names; can be repeated"
    command.add_argument("--prune", action="append", default=[], metavar="WHAT", help=f"make prunable: {switch}")
    command.add_argument("--keep", action="append", default=[], metavar="WHAT", help=f"do not prune: {switch}")
    command.set_defaults(run=inspect)
    # Its own help, and options of any name: no character marks an option for this parser.
    command = commands.add_parser(
        "train", help="fine-tune and compress, by a YAML file", add_help=False, prefix_chars="\0"
    )
    command.add_argument("words", nargs=argparse.REMAINDER)
    command.set_defaults(run=run_train)
    _add_export(commands)
    command = commands.add_parser("compress", help="compress a model without training, in minutes")
    command.add_argument("model", metavar="MODEL", help="the folder of a model, or a Hub name")
    command.add_argument("out", metavar="OUT", help="the folder to write")
    command.add_argument("--data", required=True, metavar="DATA", help="a text file, or the name of a data set")
    command.add_argument("--target-bytes", metavar="N", help='bytes, or a share of the model such as "60%%"')
    command.add_argument("--target-bops", type=float, metavar="SHARE", help="BOPs relative to 32 bits on both sides")
    command.add_argument(
        "--target-parameters", type=float, metavar="SHARE", help="share of prunable parameters to remove"
    )
    command.add_argument("--mean-bits", type=float, metavar="B", help="mean width of the remaining weights")
    command.add_argument(
        "--targets", nargs="+", metavar="N", help='several sizes, as --target-bytes; writes "OUT-80" and so on'
    )
    command.add_argument("--sequences", type=int, default=128, metavar="N", help="of calibration data; default: 128")
    command.add_argument("--sequence-length", type=int, metavar="N", help="tokens of each; default: 256")
    command.add_argument(
        "--no-gradients", dest="gradients", action="store_false", help="score by forward passes alone: less memory"
    )
    command.add_argument(
        "--recover-steps", type=int, default=0, metavar="N", help="training steps towards the dense model; default: 0"
    )
    command.add_argument("--recover", default="full", choices=tuple(RATES), help="what they train; default: full")
    command.add_argument("--overwrite", action="store_true", help="replace OUT if it is the folder of a model")
    command.set_defaults(run=run_compress)
    _add_measure(commands)
    add_eval(commands)
    command = commands.add_parser("report", help="describe an exported folder in one HTML page")
    command.add_argument("folder", metavar="DIR", help="the exported folder")
    command.add_argument("--dense", metavar="DIR", help="the dense model, to measure for comparison")
    command.add_argument("--out", type=Path, metavar="FILE", help="default: report.html")
    command.set_defaults(run=run_report)
    command = commands.add_parser("push", help="upload an exported folder to the Hub")
    command.add_argument("folder", metavar="DIR", help="the exported folder")
    command.add_argument("repo", metavar="REPO", help="the repository, as user/name")
    command.add_argument("--dry-run", action="store_true", help="list what would be uploaded, and send nothing")
    command.add_argument("--private", action="store_true", help="make the repository private")
    command.set_defaults(run=run_push)
    for command in commands.choices.values():
        command.set_defaults(fail=command.error)
    return parser


def _add_export(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("export", help="write a run or an exported folder in a format")
    command.add_argument("source", metavar="SOURCE", help="a run, a checkpoint, or an exported folder")
    command.add_argument("target", metavar="OUT", help="the folder to write")
    command.add_argument("--format", default="geta", choices=tuple(FORMATS), help="default: geta")
    command.add_argument("--embedding-bits", type=int, metavar="N", help="bits of the vocabulary's embedding, 2 to 8")
    command.add_argument("--max-shard-size", metavar="SIZE", help="largest file of weights, such as 2GB (geta format)")
    command.add_argument("--overwrite", action="store_true", help="replace OUT if it is the folder of a model")
    command.set_defaults(run=run_export)


def _add_measure(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("measure", help="time the layers of a model on this machine, for a search")
    command.add_argument("model", metavar="MODEL", help="a Hub name, a folder, or a config.json; no weights are read")
    command.add_argument("out", type=Path, metavar="FILE", help="the latency table to write, as JSON")
    widths = range(2, MOST_BITS + 1)
    command.add_argument("--widths", type=int, nargs="+", default=widths, metavar="B", help="default: 2 to 8")
    command.add_argument("--tokens", type=int, default=128, metavar="N", help="rows of the input; default: 128")
    command.add_argument("--points", type=int, default=4, metavar="N", help="sizes of each side; default: 4")
    command.add_argument("--compute", default="auto", choices=COMPUTE, help="as in prepare_for_inference")
    command.add_argument("--activation-bits", type=int, metavar="B", help="width of the inputs; default: float")
    command.add_argument("--device", default="cpu", metavar="NAME", help="such as cuda; default: cpu")
    command.add_argument("--include", action="append", metavar="NAME", help="layers by a regular expression")
    command.set_defaults(run=run_measure)


def inspect(arguments: argparse.Namespace) -> None:
    """Print the families of a model, the unsupported operators with reasons, and the coverage.

    Args:
        arguments: `model`, `html` (a path or None), `prune` and `keep`, as the parser gives them.

    Raises:
        GETAError: no such model, no dummy inputs fit it, or an entry of `prune` or `keep` matches nothing.

    Example:
        `geta-hf inspect google-bert/bert-base-uncased --html graph.html`
    """
    # Building and recording are what takes time here; the import of torch is not counted.
    start = time.perf_counter()
    check_readable(arguments.model)
    model = empty_model(arguments.model)
    if Path(arguments.model).is_dir():
        check_headers(model, Path(arguments.model))
    batch = make_dummy_inputs(model)
    flow = record_and_propagate(model, batch)
    # As the trainer will: what the model's own code can't follow is not listed as prunable.
    given = space_of(flow, arguments.prune, arguments.keep)
    space = try_cuts(model, given, batch, required=False, warn=False)
    seconds = time.perf_counter() - start
    sections = [_headline(model, batch, len(flow.graph.nodes)), family_table(space.families), *_remarks(model, space)]
    if raw := _read_raw(model, flow.graph):
        sections.append("\n".join(("not quantized: the model reads these weights itself", *_indented(gather(raw)))))
    print("\n\n".join((*sections, f"{_coverage(space)}; {seconds:.1f} s")))
    if arguments.html:
        write_page(flow, space, arguments.html, arguments.model)
        print(f"wrote {arguments.html}")
    print(
        "next: geta-hf train CONFIG.yaml, or without training geta-hf compress MODEL OUT --data FILE;\n"
        "      then geta-hf export, for other programs"
    )


def _read_raw(model: nn.Module, graph: Graph) -> list[str]:
    """Return the layers that would be quantized, did the model not read their weights past their forward."""
    try:
        layers = select_layers(model)
    except GETAError:  # there is nothing to quantize, which does not keep a model from being pruned
        return []
    return recorded_raw_reads(graph, model, layers)


def run_export(arguments: argparse.Namespace) -> None:
    """Write a checkpoint or an exported folder in a format, and print the size of the result.

    Args:
        arguments: `source`, `target`, `format`, `embedding_bits`, `max_shard_size` and `overwrite`, as the parser
            gives them.

    Raises:
        GETAError: as `geta_hf.convert.convert` does.

    Example:
        `geta-hf export runs/phi2/export OUT --format vanilla`
    """
    names = ("format", "embedding_bits", "max_shard_size", "overwrite")
    convert(arguments.source, arguments.target, **{name: getattr(arguments, name) for name in names})
    size = sum(path.stat().st_size for path in Path(arguments.target).rglob("*") if path.is_file())
    print(f"wrote {arguments.target}: {arguments.format} format, {size / 1e6:,.2f} MB")


def run_train(arguments: argparse.Namespace) -> None:
    """Run the recipe that a config names, and print its scores.

    Args:
        arguments: `words`, the config and the values that replace its own.

    Raises:
        GETAError: as `geta_hf.recipes.train.train` does.

    Example:
        `geta-hf train bert_squad --geta.target_sparsity 0.3`
    """
    train(arguments.words)


def run_compress(arguments: argparse.Namespace) -> None:
    """Compress a model without training, and print what it lost.

    Args:
        arguments: `model`, `out`, `data`, the targets (None where not given), `sequences`, `sequence_length` and
            `overwrite`, as the parser gives them.

    Raises:
        GETAError: as `geta_hf.compress` does.

    Example:
        `geta-hf compress HuggingFaceTB/SmolLM2-135M small --data corpus.txt --target-bytes 60%`
    """
    names = (
        "target_bops",
        "target_parameters",
        "mean_bits",
        "sequences",
        "sequence_length",
        "overwrite",
        "gradients",
        "recover_steps",
        "recover",
    )
    targets = None if arguments.targets is None else list(map(_size, arguments.targets))
    found: Any = compress(
        arguments.model,
        arguments.data,
        out=arguments.out,
        target_bytes=None if arguments.target_bytes is None else _size(arguments.target_bytes),
        targets=targets,
        **{name: getattr(arguments, name) for name in names},
    )
    print("\n\n".join(map(str, [found] if targets is None else found)))


def _size(text: str) -> int | str:
    """Return bytes as an integer, and a share as it is."""
    return int(text) if text.isdecimal() else text


def run_measure(arguments: argparse.Namespace) -> None:
    """Time the layers of a model, and write the latency table of a search.

    Args:
        arguments: `model`, `out`, `widths`, `tokens`, `points`, `compute`, `activation_bits` (None for float inputs),
            `device` and `include` (None for the layers of repeated blocks), as the parser gives them.

    Raises:
        GETAError: as `measure_latency` does, or no such model.

    Example:
        `geta-hf measure HuggingFaceTB/SmolLM2-135M latency.json --widths 2 3 4 8 --activation-bits 8`
    """
    if not arguments.out.parent.is_dir():
        raise GETAError(f"{arguments.out}: there is no folder {arguments.out.parent}; make it first")
    check_readable(arguments.model)
    model = empty_model(arguments.model)
    given = Conditions(arguments.tokens, arguments.compute, arguments.activation_bits, arguments.device)
    table = measure_latency(model, arguments.widths, arguments.points, given, arguments.include, print)
    table.save(arguments.out)
    print(f"wrote {arguments.out}: {len(table.shapes)} shapes")


def run_report(arguments: argparse.Namespace) -> None:
    """Write the report of an exported folder.

    Args:
        arguments: `folder`, `dense` and `out` (both may be None), as the parser gives them.

    Raises:
        GETAError: as `write_report` does.

    Example:
        `geta-hf report runs/phi2/export --dense microsoft/phi-2 --out report.html`
    """
    print(f"wrote {write_report(arguments.folder, arguments.out or Path('report.html'), arguments.dense)}")
    formats = ", ".join(name for name in FORMATS if name != "geta")
    print(f"next: geta-hf export {arguments.folder} OUT --format FORMAT, for other programs: {formats}")
    print(f"      geta-hf push {arguments.folder} USER/NAME, to the Hub")


def run_push(arguments: argparse.Namespace) -> None:
    """Upload an exported folder, or list what would be uploaded.

    Args:
        arguments: `folder`, `repo`, `dry_run` and `private`, as the parser gives them.

    Raises:
        GETAError: as `push_to_hub` does.

    Example:
        `geta-hf push runs/phi2/export USER/NAME --dry-run`
    """
    rows = [(name, f"{size:,}") for name, size in files_to_push(arguments.folder)]
    print("\n".join(_aligned([("file", "bytes"), *rows], right={1})))
    # None and not False: without the option the user's own setting on the Hub decides.
    private = True if arguments.private else None
    address = push_to_hub(arguments.folder, arguments.repo, private=private, dry_run=arguments.dry_run)
    print(f"{'would be uploaded to' if arguments.dry_run else 'uploaded to'} {address}")


def _headline(model: nn.Module, batch: Mapping[str, Tensor], operators: int) -> str:
    tensors = list(model.parameters())
    size = _short(sum(tensor.numel() for tensor in tensors))
    inputs = ", ".join(f"{name} {'x'.join(map(str, tensor.shape))}" for name, tensor in batch.items())
    return (
        f"{type(model).__name__}: {size} parameters in {len(tensors)} tensors, {operators:,} operators\n"
        f"run on {inputs}; MACs are those of this batch"
    )


def family_table(families: Iterable[Family]) -> str:
    """Return a table of families; those that are alike in several layers share a line: `layers.{0..31}.mlp:channels`.

    Args:
        families: in any order; the table lists prunable ones first.

    Returns:
        Lines under a heading: name, number of families, kind, groups in each, parameters and MACs of one group, and
        whether it is prunable or why not. A line below lists the families that it excludes.
    """
    alike: dict[tuple[object, ...], list[Family]] = {}
    for family in families:
        alike.setdefault(_likeness(family), []).append(family)
    if not alike:
        return "no families"
    # Sorting is stable, so families remain in the order of the model.
    blocks = sorted(alike.values(), key=lambda block: not block[0].prunable)
    head = ("family", "families", "kind", "groups", "parameters", "MACs", "prunable")
    lines = _aligned([head, *(_cells(block) for block in blocks)], right={1, 3, 4, 5})
    notes = [f"  excludes {other}" if (other := _excluded(block)) else "" for block in blocks]
    return "\n".join(line for pair in zip(lines, ["", *notes], strict=True) for line in pair if line)


def _likeness(family: Family) -> tuple[object, ...]:
    size = (family.size, family.parameters, family.macs)
    return pattern(family.name), size, family.prunable, pattern(family.reason), frozenset(map(pattern, family.excludes))


def _cells(block: Sequence[Family]) -> tuple[str, ...]:
    first = block[0]
    verdict = "yes" if first.prunable else f"no: {pattern(first.reason)}"
    sizes = (str(first.size), _short(first.parameters), _short(first.macs))
    return span([family.name for family in block]), str(len(block)), first.kind, *sizes, verdict


def _excluded(block: Sequence[Family]) -> str:
    return ", ".join(gather(other for family in block for other in family.excludes))


def _aligned(rows: Sequence[Sequence[str]], right: set[int]) -> list[str]:
    """Align columns with two spaces between them; those in `right` are right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: Sequence[str]) -> Iterator[str]:
        for position, (cell, width) in enumerate(zip(row, widths, strict=True)):
            yield cell.rjust(width) if position in right else cell.ljust(width)

    return ["  ".join(line(row)).rstrip() for row in rows]


def _remarks(model: nn.Module, space: PruningSpace) -> Iterator[str]:
    """Yield heads that are not found, unsupported operators, and parameters that no operator reads, if any."""
    if heads := missing_heads(model, space):
        yield "\n".join(heads)
    if space.unsupported:
        yield "\n".join(("unsupported operators, whose inputs are not pruned", *_indented(_unsupported_table(space))))
    if space.untouched:
        yield "\n".join(("untouched: no operator reads these parameters", *_indented(gather(space.untouched))))


def _unsupported_table(space: PruningSpace) -> list[str]:
    rows = [
        (one.operator, modules or "the model", f"{one.count}x", one.reason)
        for one, modules in gather_unsupported(space)
    ]
    return _aligned(rows, right={2})


def _indented(lines: Iterable[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def _coverage(space: PruningSpace) -> str:
    every = space.coverage()
    prunable = space.coverage(prunable_only=True)
    return (
        f"{len(space.families)} families cover {every:.1%} of the matrix parameters; "
        f"{len(space.prunable)} prunable ones with {space.num_groups:,} groups cover {prunable:.1%}"
    )


def _short(number: int) -> str:
    """Format a number with three digits and a unit, as 8.03 G; below ten thousand exactly."""
    if number < 10_000:
        return f"{number:,}"
    unit, letter = next(pair for pair in _UNITS if number >= pair[0])
    scaled = number / unit
    return f"{scaled:.3g} {letter}" if scaled < 100 else f"{scaled:,.0f} {letter}"
