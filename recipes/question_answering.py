"""Fine-tunes a question answering model on SQuAD and, with a `geta:` section, compresses it while it learns.

    accelerate launch recipes/question_answering.py recipes/configs/bert_squad.yaml
    accelerate launch recipes/question_answering.py recipes/configs/bert_squad.yaml --geta.target_sparsity 0.3 --seed 1
    accelerate launch recipes/question_answering.py recipes/configs/bert_squad.yaml --geta null      # plain, dense

The YAML file holds the fields of `ModelArguments`, `DataArguments` and Trainer's own `TrainingArguments`, and `geta:`
with the fields of `GETAConfig`. `output_dir/export` receives the model, `output_dir/results.json` the scores.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import (
    AutoModelForQuestionAnswering,
    DataCollatorWithPadding,
    HfArgumentParser,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from geta_hf import GETAConfig, GETAError, GETATrainer, write_card
from geta_hf.evaluation import squad, squad_features
from geta_hf.evaluation.squad_features import Question
from geta_hf.utils.loading import one_line_errors
from recipes.arguments import parse_sections, read_values
from recipes.loading import check_resume, load_config, load_tokenizer
from recipes.output import export


@dataclass
class ModelArguments:
    """Which model to start from."""

    model_name_or_path: str = field(metadata={"help": "a model's name on the Hub, or a local folder"})
    tokenizer_name_or_path: str | None = field(default=None, metadata={"help": "default: the model's own"})


@dataclass
class DataArguments:
    """Which questions to train and to evaluate on: a data set of the Hub, or two local files."""

    dataset_name: str | None = field(default=None, metadata={"help": "a Hub data set with SQuAD's columns"})
    train_split: str = field(default="train", metadata={"help": "split of the Hub data set to train on"})
    eval_split: str = field(default="validation", metadata={"help": "split of the Hub data set to evaluate on"})
    train_file: str | None = field(default=None, metadata={"help": "SQuAD file (.json, .json.gz); goes before a split"})
    eval_file: str | None = field(default=None, metadata={"help": "SQuAD file (.json, .json.gz); goes before a split"})
    max_train_questions: int | None = field(default=None, metadata={"help": "a random sample of so many; default all"})
    max_eval_questions: int | None = field(default=None, metadata={"help": "a random sample of so many; default all"})
    sample_seed: int = field(default=0, metadata={"help": "of both samples"})
    max_length: int = field(default=384, metadata={"help": "tokens a window in training"})
    eval_max_length: int = field(default=384, metadata={"help": "tokens a window in evaluation"})
    doc_stride: int = field(default=128, metadata={"help": "tokens that neighbouring windows share"})
    evaluate_before_export: bool = field(default=True, metadata={"help": "also score the model in memory"})


@dataclass
class Arguments:
    """Everything that one run needs; `geta` None means plain fine-tuning."""

    model: ModelArguments
    data: DataArguments
    training: TrainingArguments
    geta: GETAConfig | None


# -------------------------------------------------------------------------------------------------------- arguments


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Reads `[config.yaml] [--key value ...]`; a dotted key reaches into a section, a key alone means true.

    Raises:
        GETAError: a missing file, a malformed argument, or a key that no part of the recipe knows.
    """
    values, geta = read_values(argv, _parser())
    model, data, training = parse_sections(_parser(), values)
    check_resume(training)
    return Arguments(model, data, training, geta)


def _parser() -> HfArgumentParser:
    return HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))


# ------------------------------------------------------------------------------------------------------------- data


def load_split(data: DataArguments, file: str | None, split: str, limit: int | None) -> list[Question]:
    """The questions of a local file, or else of a split of the Hub's data set; at most `limit`."""
    if file is not None:
        questions = squad_features.load_questions(file)
    elif data.dataset_name is not None:
        try:
            from datasets import load_dataset  # needed for the Hub only
        except ImportError as error:
            raise GETAError("dataset_name needs `pip install datasets`; or give train_file and eval_file") from error
        questions = [squad_features.question_from_row(row) for row in load_dataset(data.dataset_name, split=split)]
    else:
        raise GETAError("no data: give dataset_name (such as `squad`), or train_file and eval_file")
    return squad_features.sample(questions, limit, data.sample_seed)


def tokenize(
    data: DataArguments, tokenizer: PreTrainedTokenizerBase, questions: list[Question], progress: bool
) -> list[dict[str, Any]]:
    """Training windows; says how many questions had to go."""
    features, dropped = squad_features.training_features(
        tokenizer, questions, data.max_length, data.doc_stride, progress
    )
    if progress:
        print(f"{len(questions) - dropped} questions, {len(features)} windows; {dropped} dropped (answer not found)")
    return features


# --------------------------------------------------------------------------------------------------------- training


def load_model(arguments: ModelArguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model with a question answering head, and its tokenizer."""
    name = arguments.model_name_or_path
    load_config(name)  # fails first
    tokenizer = load_tokenizer(arguments.tokenizer_name_or_path or name)
    with one_line_errors(f"the model {name} can't be loaded"):
        return AutoModelForQuestionAnswering.from_pretrained(name), tokenizer


def make_trainer(
    arguments: Arguments,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    features: list[dict[str, Any]],
) -> Trainer:
    """GETATrainer with a `geta` section, Trainer without."""
    common: dict[str, Any] = {
        "model": model,
        "args": arguments.training,
        "train_dataset": features,
        "data_collator": DataCollatorWithPadding(tokenizer),
        "processing_class": tokenizer,
    }
    if arguments.geta is None:
        return Trainer(**common)
    return GETATrainer(geta_config=arguments.geta, **common)


def evaluate(
    arguments: Arguments,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[Question],
) -> dict[str, float | int]:
    """EM and F1 over all reference answers."""
    predictions = squad.predict(
        model,
        tokenizer,
        questions,
        max_length=arguments.data.eval_max_length,
        doc_stride=arguments.data.doc_stride,
        batch_size=arguments.training.per_device_eval_batch_size,
        bf16=arguments.training.bf16,
        progress=not arguments.training.disable_tqdm,
    )
    return squad.score(predictions, questions)


def describe(arguments: Arguments) -> dict[str, Any]:
    """The run's own settings, ready for JSON."""
    return {
        "model": asdict(arguments.model),
        "data": asdict(arguments.data),
        "training": json.loads(arguments.training.to_json_string()),
        "geta": arguments.geta.to_dict() if arguments.geta else None,
    }


def run(arguments: Arguments) -> dict[str, Any]:
    """Trains, exports, scores what was exported, and writes `results.json`.

    Returns:
        What `results.json` holds; on processes other than the first, nothing.
    """
    output = Path(str(arguments.training.output_dir))
    set_seed(arguments.training.seed)
    data = arguments.data
    eval_questions = load_split(data, data.eval_file, data.eval_split, data.max_eval_questions)
    train_questions = load_split(data, data.train_file, data.train_split, data.max_train_questions)
    model, tokenizer = load_model(arguments.model)
    features = tokenize(data, tokenizer, train_questions, progress=not arguments.training.disable_tqdm)

    trainer = make_trainer(arguments, model, tokenizer, features)
    seconds = time.perf_counter()
    outcome = trainer.train(resume_from_checkpoint=arguments.training.resume_from_checkpoint)
    seconds = time.perf_counter() - seconds

    trained = None
    whole = not trainer.is_fsdp_enabled  # of a sharded model no process holds all that it would take
    if data.evaluate_before_export and whole and trainer.is_world_process_zero():
        trained = evaluate(arguments, trainer.accelerator.unwrap_model(trainer.model), tokenizer, eval_questions)
    export(trainer, tokenizer, output / "export")
    trainer.accelerator.wait_for_everyone()
    if not trainer.is_world_process_zero():
        return {}
    results = {
        **evaluate(arguments, *squad.load_folder(output / "export", arguments.training.device), eval_questions),
        "before_export": trained,
        "train_questions": len(train_questions),
        "train_windows": len(features),
        "train_loss": outcome.training_loss,
        "steps": outcome.global_step,
        "train_seconds": round(seconds, 1),
        "config": describe(arguments),
    }
    (output / "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    if arguments.geta is not None:
        scores = {name: results[name] for name in ("em", "f1")}
        write_card(output / "export", dataset=data.dataset_name, metrics={"compressed": scores})
    return results


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command; also the way to run the recipe from Python: `main(["config.yaml", "--seed", "1"])`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or "--help" in argv or "-h" in argv:
        print(__doc__)
        _parser().print_help()
        return {}
    results = run(parse_arguments(argv))
    if results:
        shown = ("em", "f1", "questions", "train_seconds")
        print(json.dumps({key: results[key] for key in shown}))
    return results


if __name__ == "__main__":
    try:
        main()
    except GETAError as error:
        sys.exit(f"error: {error}")
