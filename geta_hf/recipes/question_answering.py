"""Fine-tune a question answering model on SQuAD and, with a `geta:` section, compress it at the same time.

    geta-hf train bert_squad
    geta-hf train bert_squad --geta.target_sparsity 0.3 --seed 1
    geta-hf train bert_squad --geta null      # plain, dense

On several GPUs it is `accelerate launch -m geta_hf train ...`. The YAML file holds the fields of `ModelArguments`,
`DataArguments` and Trainer's own `TrainingArguments`, and `geta:` with the fields of `GETAConfig`. The model is written
to `output_dir/export`, the scores to `output_dir/results.json`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import (
    AutoModelForQuestionAnswering,
    DataCollatorWithPadding,
    HfArgumentParser,
    PreTrainedModel,
    set_seed,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from geta_hf.errors import GETAError
from geta_hf.evaluation import squad, squad_features
from geta_hf.evaluation.squad_features import Question
from geta_hf.recipes.arguments import ModelArguments, make_parser
from geta_hf.recipes.loading import load_model, load_tokenizer
from geta_hf.recipes.run import (
    Arguments,
    Scoring,
    finish,
    launch,
    make_trainer,
    read_arguments,
    run_command,
    score_start,
    scored_data,
)
from geta_hf.recipes.speed import reading


@dataclass
class DataArguments:
    """Choose the questions to train and to evaluate on: a data set of the Hub, or two local files."""

    dataset_name: str | None = field(default=None, metadata={"help": "a Hub data set with SQuAD's columns"})
    train_split: str = field(default="train", metadata={"help": "split of the Hub data set to train on"})
    eval_split: str = field(default="validation", metadata={"help": "split of the Hub data set to evaluate on"})
    train_file: str | None = field(default=None, metadata={"help": "SQuAD file (.json, .json.gz), instead of a split"})
    eval_file: str | None = field(default=None, metadata={"help": "SQuAD file (.json, .json.gz), instead of a split"})
    max_train_questions: int | None = field(default=None, metadata={"help": "size of a random sample; default: all"})
    max_eval_questions: int | None = field(default=None, metadata={"help": "size of a random sample; default: all"})
    sample_seed: int = field(default=0, metadata={"help": "seed of both samples"})
    max_length: int = field(default=384, metadata={"help": "tokens of a window in training"})
    eval_max_length: int = field(default=384, metadata={"help": "tokens of a window in evaluation"})
    doc_stride: int = field(default=128, metadata={"help": "tokens that neighboring windows share"})
    evaluate_before_export: bool = field(default=True, metadata={"help": "also score the model before export"})


# -------------------------------------------------------------------------------------------------------- arguments


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Read the run's arguments, as `geta_hf.recipes.run.read_arguments` documents."""
    return read_arguments(argv, _parser(), "question_answering")


def _parser() -> HfArgumentParser:
    return make_parser(ModelArguments, DataArguments)


# ------------------------------------------------------------------------------------------------------------- data


def load_split(data: DataArguments, file: str | None, split: str, limit: int | None) -> list[Question]:
    """Return the questions of a local file, otherwise of a split of the data set on the Hub; at most `limit`."""
    return squad_features.sample(read_split(data, file, split), limit, data.sample_seed)


def read_split(data: DataArguments, file: str | None, split: str) -> list[Question]:
    """Return all questions of a local file, otherwise of a split of the data set on the Hub."""
    if file is not None:
        return squad_features.load_questions(file)
    if data.dataset_name is not None:
        try:
            from datasets import load_dataset  # only needed for data sets of the Hub
        except ImportError as error:
            raise GETAError("dataset_name needs `pip install datasets`; or give train_file and eval_file") from error
        return [squad_features.question_from_row(row) for row in load_dataset(data.dataset_name, split=split)]
    raise GETAError("no data: give dataset_name (such as `squad`), or train_file and eval_file")


def tokenize(
    data: DataArguments, tokenizer: PreTrainedTokenizerBase, questions: list[Question], progress: bool
) -> list[dict[str, Any]]:
    """Return the training windows, and print how many questions were dropped."""
    features, dropped = squad_features.training_features(
        tokenizer, questions, data.max_length, data.doc_stride, progress
    )
    if progress:
        print(f"{len(questions) - dropped} questions, {len(features)} windows; {dropped} dropped (answer not found)")
    return features


# --------------------------------------------------------------------------------------------------------- training


def score(
    arguments: Arguments,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[Question],
) -> dict[str, float | int]:
    """Return EM and F1 over all reference answers, and their standard errors."""
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
    errors = squad.standard_errors(predictions, questions)
    return {**squad.score(predictions, questions), **{f"{name}_stderr": error for name, error in errors.items()}}


def run(arguments: Arguments) -> dict[str, Any]:
    """Train, export, score the exported model, and write `results.json`.

    Returns:
        The contents of `results.json`; an empty dict on all processes but the first.
    """
    data, training = arguments.data, arguments.training
    set_seed(training.seed)
    every_question = read_split(data, data.eval_file, data.eval_split)
    eval_questions = squad_features.sample(every_question, data.max_eval_questions, data.sample_seed)
    train_questions = load_split(data, data.train_file, data.train_split, data.max_train_questions)
    name = arguments.model.model_name_or_path
    tokenizer = load_tokenizer(arguments.model.tokenizer_name_or_path or name)
    model, trained = load_model(AutoModelForQuestionAnswering, name)
    scoring = Scoring(
        lambda one: score(arguments, one, tokenizer, eval_questions),
        lambda path: squad.load_folder(path, training.device)[0],
        *scored_data(data.dataset_name, data.eval_file, data.eval_split),
        total=len(every_question),
        works=(reading(data.eval_max_length, model.config),),
        metrics=("em", "f1"),
        count="questions",
    )
    start = score_start(arguments, model, trained, scoring)
    features = tokenize(data, tokenizer, train_questions, progress=not training.disable_tqdm)
    trainer = make_trainer(
        arguments,
        model=model,
        train_dataset=features,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
    )
    return finish(
        arguments,
        trainer,
        tokenizer,
        scoring,
        start=start,
        before_export=data.evaluate_before_export,
        facts={"train_questions": len(train_questions), "train_windows": len(features)},
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the recipe, from the command line or from Python: `main(["config.yaml", "--seed", "1"])`."""
    return launch(
        argv, __doc__, _parser(), lambda words: run(parse_arguments(words)), ("em", "f1", "questions", "train_seconds")
    )


if __name__ == "__main__":
    run_command(main)
