"""Train, export and record one run: what all recipes share."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import TrainOutput

from geta_hf.config import CompressionConfig
from geta_hf.errors import GETAError
from geta_hf.evaluation.metrics import Scores, task_result
from geta_hf.reporting.model_card import write_card
from geta_hf.training.trainer import GETATrainer

HELP = ("--help", "-h")


@dataclass
class Arguments:
    """Hold everything that one run needs.

    Attributes:
        model: the recipe's `ModelArguments`.
        data: the recipe's `DataArguments`.
        training: Trainer's own arguments.
        geta: how to compress; None trains the dense model.
    """

    model: Any
    data: Any
    training: TrainingArguments
    geta: CompressionConfig | None

    @property
    def output(self) -> Path:
        """Return the folder that receives everything."""
        return Path(str(self.training.output_dir))

    def as_json(self) -> dict[str, Any]:
        """Return all settings as plain data."""
        return {
            "model": asdict(self.model),
            "data": asdict(self.data),
            "training": json.loads(self.training.to_json_string()),
            "geta": self.geta.to_dict() if self.geta else None,
        }


def make_trainer(arguments: Arguments, *, peft_config: Any = None, **options: Any) -> Trainer:
    """Make a GETATrainer if there is a `geta` section, otherwise a Trainer.

    Args:
        arguments: of the run.
        peft_config: peft's LoraConfig, for GETATrainer.
        options: further arguments of Trainer: the model, the data, the tokenizer.
    """
    options["args"] = arguments.training
    if arguments.geta is None:
        return Trainer(**options)
    return GETATrainer(geta_config=arguments.geta, peft_config=peft_config, **options)


def train(trainer: Trainer) -> tuple[TrainOutput, float]:
    """Train, from a checkpoint if the arguments name one; return Trainer's outcome and the seconds, to one decimal."""
    start = time.perf_counter()
    outcome = trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    return outcome, round(time.perf_counter() - start, 1)


@dataclass(frozen=True)
class Trained:
    """Hold how a run ended, on its first process.

    Attributes:
        scores: of the exported model.
        before_export: of the trained model; None where it was not scored.
        record: what `results.json` has of training.
    """

    scores: Scores
    before_export: Scores | None
    record: dict[str, Any]


def train_and_score(
    arguments: Arguments,
    trainer: Trainer,
    processing: Any,
    score: Callable[[PreTrainedModel], Scores],
    load: Callable[[Path], PreTrainedModel],
    before_export: bool,
) -> Trained | None:
    """Train, export, and score the exported model; None on all processes but the first.

    Args:
        arguments: of the run.
        trainer: of `make_trainer`.
        processing: the tokenizer or image processor, saved with the model.
        score: scores a model on its device.
        load: loads an exported folder.
        before_export: score the trained model as well. Under FSDP it is not, since no process holds all of it.
    """
    outcome, seconds = train(trainer)
    before = None
    if before_export and not trainer.is_fsdp_enabled and trainer.is_world_process_zero():
        before = score(trainer.accelerator.unwrap_model(trainer.model))
    folder = arguments.output / "export"
    export(trainer, processing, folder)
    if not trainer.is_world_process_zero():
        return None
    model = load(folder)
    nn.Module.to(model, arguments.training.device)
    record = {"train_loss": outcome.training_loss, "steps": outcome.global_step, "train_seconds": seconds}
    return Trained(score(model.eval()), before, record)


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


def write_scores(
    arguments: Arguments, data: str, split: str | None, total: int, start: Scores | None, scores: Scores
) -> None:
    """Write the scores into the card of the exported model; nothing without `geta`, where the folder has no card.

    Args:
        arguments: of the run.
        data: the name of the data that was scored.
        split: of the data set; None for a file.
        total: number of rows of which a sample may have been drawn.
        start: scores of the model that the run started from; None where it was not scored.
        scores: of the exported model.
    """
    if arguments.geta is None:
        return
    sides = {"dense": start, "compressed": scores}
    results = {side: [task_result(one, data, split, total)] for side, one in sides.items() if one is not None}
    write_card(arguments.output / "export", results=results)


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
        main()
    except GETAError as error:
        sys.exit(f"error: {error}")
