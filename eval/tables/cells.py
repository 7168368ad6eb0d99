"""Train and score the cells of a table that its results lack."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, Trainer, set_seed

from eval.results_file import Line, read_results, run_missing
from eval.study_rules import kept_shares
from eval.study_tasks import Lengths, Task, dense_model, training_arguments
from eval.tables.rows import Row, Table, config_of
from geta_hf import GETAError, GETATrainer, compress, measure_costs, prepare_for_inference
from geta_hf.config import CompressionConfig
from geta_hf.methods import OneShotConfig
from geta_hf.reporting.latency import measure_latency


@dataclass(frozen=True)
class Cell:
    """One figure of a table: a row at a sparsity and a seed; dense rows have no sparsity."""

    row: Row
    sparsity: float | None
    seed: int

    @property
    def key(self) -> tuple[str, float | None, int]:
        """What names the cell in a table's results."""
        return (self.row.name, self.sparsity, self.seed)


def cells_of(
    table: Table, seeds: Sequence[int], sparsities: Sequence[float] | None = None, names: Sequence[str] | None = None
) -> list[Cell]:
    """Return the cells of a table in the order in which they are run: all rows of one sparsity and seed together.

    Args:
        table: what to measure.
        seeds: one run of every cell for each; the outer loop.
        sparsities: some of the table's; None for all.
        names: rows to run; None for all.

    Raises:
        GETAError: an unknown row.
    """
    known = [row.name for row in table.rows]
    unknown = sorted(set(names or ()) - set(known))
    if unknown:
        raise GETAError(f"table {table.name} has no rows {unknown}; it has {known}")
    return list(_cells(table, seeds, sparsities or table.sparsities, names))


def _cells(
    table: Table, seeds: Sequence[int], sparsities: Sequence[float], names: Sequence[str] | None
) -> Iterator[Cell]:
    for seed in seeds:
        rows = [row for row in table.rows if names is None or row.name in names]
        for row in rows:
            # No seed changes the model that everything starts from.
            if row.kind == "control" or (row.kind == "dense" and seed == seeds[0]):
                yield Cell(row, None, seed)
        for sparsity in sparsities:
            for row in rows:
                if row.compressed:
                    yield Cell(row, sparsity, seed)


def run_table(table: Table, task: Task, work: Path, lengths: Lengths, cells: Sequence[Cell]) -> list[Line]:
    """Run the cells that `work/results.jsonl` lacks, and append each as it ends.

    Args:
        table: what is measured.
        task: the model, its data and its score.
        work: holds the dense model and the results.
        lengths: of a row whose `steps` is 1.
        cells: those to run.

    Returns:
        The new lines. A cell that raises GETAError is reported, skipped, and tried again by the next run.

    Raises:
        GETAError: results of this table under other settings.
    """
    dense = {**task.settings, **vars(task.dense)}
    settings = json.loads(json.dumps({**vars(lengths), "dense": dense, "scored": task.scored}))
    done = [line for line in read_results(work) if line["table"] == table.name and line["study"] == task.name]
    if any(line["settings"] != settings for line in done):
        raise GETAError(f"{work} holds results of {table.name} under other settings; give another --work or --name")
    finished: dict[tuple[str, float | None, int], Line] = {
        (line["row"], line["sparsity"], line["seed"]): line for line in done
    }
    folder = dense_model(task, work)

    def measure(cell: Cell) -> Line:
        line = {"table": table.name, "study": task.name, "row": cell.row.name, "sparsity": cell.sparsity}
        measured = _run_cell(table, task, cell, folder, lengths, finished)
        return {**line, "seed": cell.seed, "settings": settings, **measured}

    named = [(cell.key, cell) for cell in cells]
    return run_missing(work, named, finished, measure, ("table", "study", "seed", "settings"), f"{table.name}, ")


def _run_cell(
    table: Table, task: Task, cell: Cell, folder: Path, lengths: Lengths, finished: Mapping[Any, Line]
) -> Line:
    seconds = time.perf_counter()
    set_seed(cell.seed)
    if cell.row.kind == "dense":
        return {**task.score(task.load(folder)), "bytes": stored_bytes(folder), "relative_bops": 1.0, "tokens": 0}
    config = None
    if cell.row.compressed:
        config = config_of(table, cell.row, float(cell.sparsity or 0), _figures(cell, finished))
    steps = max(round(lengths.steps * cell.row.steps), 1)
    own = Lengths(steps, lengths.batch_size, lengths.learning_rate)
    if isinstance(config, OneShotConfig):
        found = compress_cell(task, folder, config)
        return {**found, "steps": 0, "seconds": round(time.perf_counter() - seconds, 1)}
    measured = train_cell(task, config, task.load(folder), folder.parent, own, cell.seed)
    return {**measured, "steps": steps, "seconds": round(time.perf_counter() - seconds, 1)}


def _figures(cell: Cell, finished: Mapping[Any, Line]) -> Line | None:
    """Return the result of the row that a cell takes a figure from."""
    if cell.row.equals is None:
        return None
    _, other = cell.row.equals
    found = finished.get((other, cell.sparsity, cell.seed))
    if found is None:
        raise GETAError(f"{cell.row.name!r} takes a figure from {other!r}, which is not measured yet; run that row too")
    return found


def train_cell(
    task: Task, config: CompressionConfig | None, model: PreTrainedModel, work: Path, lengths: Lengths, seed: int
) -> Line:
    """Train one cell, and score what a user would load: the exported folder.

    Args:
        task: what to train.
        config: of the compression; None trains without.
        model: to start from.
        work: holds the dense model in `dense`, and the export, in a folder of its own, until it is scored.
        lengths: of the training.
        seed: of the order of the data and of dropout.
    """
    with tempfile.TemporaryDirectory(dir=work, prefix="cell-") as home:
        return _train_cell(task, config, model, Path(home), lengths, seed, work / "dense")


def _train_cell(
    task: Task,
    config: CompressionConfig | None,
    model: PreTrainedModel,
    home: Path,
    lengths: Lengths,
    seed: int,
    dense: Path,
) -> Line:
    """Do as `train_cell` does, in a folder that no other cell has."""
    # Of images, rows are counted: they have no tokens.
    seen = "no" if task.calibration else "non_padding"
    arguments = training_arguments(task, home / "run", lengths, seed, include_num_input_tokens_seen=seen)
    common: dict[str, Any] = {
        "model": model,
        "args": arguments,
        "train_dataset": task.features,
        "data_collator": task.collator,
    }
    written = home / "exported"
    found: Line = {"relative_bops": 1.0}
    if config is None:
        trainer = Trainer(**common)
        trainer.train()
        trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).save_pretrained(written)
    else:
        trainer = GETATrainer(geta_config=config, **common)
        trainer.train()
        state = trainer.compression_state()
        found = {"relative_bops": state["relative_bops"], "mean_bits": state["mean_bits"]}
        found |= kept_shares(trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False), trainer.space)
        trainer.export_model(written)
    found |= {"bytes": stored_bytes(written), "tokens": int(trainer.state.num_input_tokens_seen)}
    if task.calibration:
        found["images"] = lengths.steps * lengths.batch_size
    found |= task.score(task.load(written))
    found |= time_images(task, written, dense, compressed=config is not None)
    return found


def compress_cell(task: Task, folder: Path, config: OneShotConfig) -> Line:
    """Compress the dense model in a folder without training, and score the exported folder."""
    batches = [task.collator(task.calibration[start : start + 8]) for start in range(0, len(task.calibration), 8)]
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="cell-") as home:
        written = Path(home) / "exported"
        report = compress(task.load(folder), batches, out=written, config=config, progress=False)
        model, dense = task.load(written), task.load(folder)
        names = list(report.outcome.result.weight_bits)
        relative = measure_costs(model).bops_linear / measure_costs(dense, names=names).bops_linear
        found: Line = {"relative_bops": relative, "mean_bits": report.mean_bits, "tokens": 0}
        found |= {"bytes": stored_bytes(written), **task.score(model)}
        return found | time_images(task, written, folder, compressed=True)


def stored_bytes(folder: Path) -> int:
    """Return the bytes of a folder's safetensors files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def time_images(task: Task, folder: Path, dense: Path, *, compressed: bool) -> Line:
    """Time a forward pass on one image, of the model in a folder and of the dense model in turns.

    Args:
        task: of images; there is nothing to time for another.
        folder: the model.
        dense: the folder of the dense model.
        compressed: the folder is an export, whose layers take their fastest path first.

    Returns:
        Medians in milliseconds of the processor's time, summed over threads, which other programs on the machine change
        little: `ms`, and `dense_ms` beside it. Empty for other tasks.
    """
    if not task.calibration:
        return {}
    models = {"ms": task.load(folder).eval(), "dense_ms": task.load(dense).eval()}
    if compressed:
        prepare_for_inference(models["ms"], batch=task.collator(task.calibration[:1]))
    image = measure_costs(models["dense_ms"]).image
    found = measure_latency(models, 0, image=image, clock=time.process_time)
    return {name: round(value, 2) for name, value in found.items()}
