"""Train, export and record one run: what all recipes share."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from transformers import HfArgumentParser, PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import TrainOutput

from geta_hf.config import CompressionConfig
from geta_hf.errors import GETAError
from geta_hf.evaluation.metrics import Scores, metric_names, task_result
from geta_hf.recipes.arguments import parse_sections, print_help, read_values
from geta_hf.recipes.closing import closing
from geta_hf.recipes.loading import check_folders
from geta_hf.recipes.speed import DenseModel, Speed, Work, measure_speeds
from geta_hf.reporting.model_card import write_card
from geta_hf.reporting.results import TaskResult
from geta_hf.training.trainer import GETATrainer
from geta_hf.utils.quiet import quiet

HELP = ("--help", "-h")


@dataclass
class Arguments:
    """Hold everything that one run needs.

    Attributes:
        model: the recipe's `ModelArguments`.
        data: the recipe's `DataArguments`.
        training: Trainer's own arguments.
        geta: how to compress; None trains the dense model.
        dense: the model that the run starts from; None before it is loaded.
        seconds: how long scoring took, of the model at the `start` and of the `exported` one.
    """

    model: Any
    data: Any
    training: TrainingArguments
    geta: CompressionConfig | None
    dense: DenseModel | None = field(default=None, init=False)
    seconds: dict[str, float] = field(default_factory=dict, init=False)

    @property
    def output(self) -> Path:
        """Return the folder that receives everything."""
        return Path(str(self.training.output_dir))

    def timed(self, which: str, score: Callable[[], Scores]) -> Scores:
        """Return what `score` does, and keep in `seconds` how long it took."""
        start = time.perf_counter()
        found = score()
        self.seconds[which] = time.perf_counter() - start
        return found

    def as_json(self) -> dict[str, Any]:
        """Return all settings as plain data."""
        return {
            "model": asdict(self.model),
            "data": asdict(self.data),
            "training": json.loads(self.training.to_json_string()),
            "geta": self.geta.to_dict() if self.geta else None,
        }


def read_arguments(argv: Sequence[str], parser: HfArgumentParser, recipe: str) -> Arguments:
    """Read the arguments of a run whose only sections are the recipe's own and `geta`.

    Args:
        argv: `[CONFIG.yaml] [--key value ...]`, as `geta_hf.recipes.arguments.read_values` documents.
        parser: of the recipe's `ModelArguments` and `DataArguments`.
        recipe: its name.

    Raises:
        GETAError: a missing file, a malformed argument, or a key that is no field of any section.
    """
    values, geta = read_values(argv, parser, recipe)
    model, data, training = parse_sections(parser, values)
    check_folders(training)
    return Arguments(model, data, training, geta)


def make_trainer(arguments: Arguments, *, peft_config: Any = None, **options: Any) -> Trainer:
    """Make a GETATrainer if there is a `geta` section, otherwise a Trainer.

    Args:
        arguments: of the run.
        peft_config: peft's LoraConfig, for GETATrainer.
        options: further arguments of Trainer: the model, the data, the tokenizer.
    """
    options["args"] = arguments.training
    arguments.dense = DenseModel.of(options["model"])
    if arguments.geta is None:
        return Trainer(**options)
    return GETATrainer(geta_config=arguments.geta, peft_config=peft_config, **options)


def train(trainer: Trainer) -> tuple[TrainOutput, float]:
    """Train, from a checkpoint if the arguments name one; return Trainer's outcome and the seconds, to one decimal."""
    start = time.perf_counter()
    outcome = trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    return outcome, round(time.perf_counter() - start, 1)


@dataclass(frozen=True)
class Scoring:
    """Say how the models of a run are scored and timed, and on what.

    Attributes:
        score: scores a model on its device.
        load: loads an exported folder.
        data: the name of the data.
        split: of the data set; None for a file.
        total: number of rows of which a sample may have been drawn.
        works: what models are timed at.
        metrics: names of the scores for the card and the last lines. Default: all but counts and standard errors.
        count: name of the number of samples among the scores. Default `samples`.
    """

    score: Callable[[PreTrainedModel], Scores]
    load: Callable[[Path], PreTrainedModel]
    data: str
    split: str | None
    total: int
    works: Sequence[Work] = ()
    metrics: Sequence[str] = ()
    count: str = "samples"

    def names(self, scores: Scores) -> Sequence[str]:
        """Return the names of the scores to show."""
        return self.metrics or metric_names(scores)

    def card_result(self, scores: Scores) -> TaskResult:
        """Return scores with the data that they are of, as the model card shows them."""
        names = self.names(scores)
        kept = {name: value for name, value in scores.items() if name.removesuffix("_stderr") in names}
        return task_result({**kept, "samples": scores[self.count]}, self.data, self.split, self.total)


def scored_data(dataset: str | None, file: str | None, split: str | None) -> tuple[str, str | None]:
    """Return the name and the split of the data that is scored: a local file has no split.

    Args:
        dataset: name of the data set, or of a task.
        file: scored instead of a split of it.
        split: of the data set.
    """
    return (Path(file).name, None) if file is not None else (str(dataset), split)


def score_start(arguments: Arguments, model: PreTrainedModel, trained: bool, scoring: Scoring) -> Scores | None:
    """Return the scores of the model that a compressed run starts from; None on all processes but the first.

    Args:
        arguments: of the run.
        model: moved to the device of the run.
        trained: None is returned where it is False: the scores of a new head would mean nothing.
        scoring: of the recipe.
    """
    if not trained or arguments.geta is None or arguments.training.process_index != 0:
        return None
    nn.Module.to(model, arguments.training.device)
    return arguments.timed("start", lambda: scoring.score(model))


def finish(
    arguments: Arguments,
    trainer: Trainer,
    processing: Any,
    scoring: Scoring,
    *,
    start: Scores | None = None,
    before_export: bool = True,
    task: str | None = None,
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Train, export, score and time the exported model, write `results.json` and the card, and print the last lines.

    Args:
        arguments: of the run.
        trainer: of `make_trainer`.
        processing: the tokenizer or image processor, saved with the model.
        scoring: of the recipe.
        start: of `score_start`.
        before_export: score the trained model as well. Under FSDP it is not, since no process holds all of it.
        task: the Hub's tag of a pipeline, for the card. Default: that of the architecture.
        facts: what else `results.json` has.

    Returns:
        The contents of `results.json`; an empty dict on all processes but the first.
    """
    outcome, seconds = train(trainer)
    before = None
    if before_export and not trainer.is_fsdp_enabled and trainer.is_world_process_zero():
        before = scoring.score(trainer.accelerator.unwrap_model(trainer.model))
    folder = arguments.output / "export"
    export(trainer, processing, folder)
    if not trainer.is_world_process_zero():
        return {}
    model = scoring.load(folder)
    nn.Module.to(model, arguments.training.device)
    scores = arguments.timed("exported", lambda: scoring.score(model.eval()))
    speeds = time_export(arguments, model, scoring.works)
    results = {
        **scores,
        "start": start,
        "before_export": before,
        **(facts or {}),
        "train_loss": outcome.training_loss,
        "steps": outcome.global_step,
        "train_seconds": seconds,
        "speed": [asdict(one) for one in speeds],
    }
    results = save_results(arguments, results)
    if arguments.geta is not None:
        sides = {"dense": start, "compressed": scores}
        cards = {side: [scoring.card_result(one)] for side, one in sides.items() if one is not None}
        write_card(folder, task=task, results=cards)
    print_closing(arguments, start, scores, scoring.names(scores), speeds)
    return results


def time_export(arguments: Arguments, model: PreTrainedModel, works: Sequence[Work]) -> list[Speed]:
    """Return the speed of the exported model beside the one before; nothing for a dense run, or if not asked for."""
    if arguments.geta is None or arguments.dense is None or not arguments.model.measure_speed:
        return []
    return measure_speeds(arguments.dense, model, works)


def export(trainer: Trainer, processing: Any, folder: Path) -> None:
    """Write the trained model in place of an earlier run's: the compressed folder, or a plain one without `geta`.

    Args:
        trainer: that has trained.
        processing: the tokenizer or image processor, saved with a plain model.
        folder: to write.
    """
    if isinstance(trainer, GETATrainer):
        trainer.export_model(folder, overwrite=True)
    elif trainer.is_world_process_zero():
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(folder)
        processing.save_pretrained(folder)
    trainer.accelerator.wait_for_everyone()


def save_results(arguments: Arguments, results: dict[str, Any]) -> dict[str, Any]:
    """Write `results.json` with the settings of the run, and return what it contains."""
    results = {**results, "config": arguments.as_json()}
    (arguments.output / "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    return results


def print_closing(
    arguments: Arguments,
    start: Mapping[str, Any] | None,
    scores: Mapping[str, Any],
    metrics: Sequence[str],
    speeds: Sequence[Speed],
) -> None:
    """Print what the run brought, and what to do next; see `closing`.

    Args:
        arguments: of the run.
        start: scores of the model that the run started from; None where it was not scored.
        scores: of the exported model.
        metrics: the names of the scores to show.
        speeds: of `time_export`.
    """
    folder = arguments.output / "export"
    size = None if arguments.dense is None else arguments.dense.nbytes
    print(closing(folder, arguments.geta is not None, size, start, scores, metrics, arguments.seconds, speeds))


def launch(
    argv: Sequence[str] | None,
    text: str | None,
    parser: HfArgumentParser,
    run: Callable[[list[str]], dict[str, Any]],
    shown: Sequence[str] = (),
) -> dict[str, Any]:
    """Run a recipe and print its results as one line, or print its help.

    Args:
        argv: words of the command line; by default this program's.
        text: what the help begins with, the docstring of the recipe.
        parser: of the recipe's arguments.
        run: takes the words, and returns the results.
        shown: names of the results to print; see `print_scores`.

    Returns:
        The results; an empty dict after help, and on all processes but the first.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if wants_help(words):
        print(text)
        print_help(parser)
        return {}
    results = run(words)
    print_scores(results, shown)
    return results


def wants_help(argv: Sequence[str]) -> bool:
    """Return whether a command line asks for help, or gives nothing to run."""
    return not argv or any(word in HELP for word in argv)


def print_scores(results: dict[str, Any], names: Sequence[str] = ()) -> None:
    """Print results as one line of JSON; nothing where there are none, as on later processes.

    Args:
        results: of a run.
        names: which; by default the metrics of the exported model, their sample size, and the seconds of training.
    """
    if not results:
        return
    if not names:
        numbers = [name for name, value in results.items() if isinstance(value, int | float) and name != "steps"]
        names = [name for name in numbers if not name.startswith("train_") or name == "train_seconds"]
    print(json.dumps({name: results[name] for name in names}))


def run_command(main: Callable[[], object]) -> None:
    """Run a recipe's `main` as a script: an error of the user's is one line, and the exit code is 1."""
    try:
        with quiet():
            main()
    except GETAError as error:
        sys.exit(f"error: {error}")
