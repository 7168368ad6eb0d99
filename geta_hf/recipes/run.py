"""Train, export and record one run: what all recipes share."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import TrainOutput

from geta_hf.config import CompressionConfig
from geta_hf.errors import GETAError
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


def wants_help(argv: Sequence[str]) -> bool:
    """Return whether a command line asks for help, or gives nothing to run."""
    return not argv or any(word in HELP for word in argv)


def print_scores(results: dict[str, Any], names: Sequence[str]) -> None:
    """Print the named results as one line of JSON; nothing where there are none, as on later processes."""
    if results:
        print(json.dumps({name: results[name] for name in names}))


def run_command(main: Callable[[], object]) -> None:
    """Run a recipe's `main` as a script: an error of the user's is one line, and the exit code is 1."""
    try:
        main()
    except GETAError as error:
        sys.exit(f"error: {error}")
