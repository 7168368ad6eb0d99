"""Fine-tune a classifier of texts and, with a `geta:` section, compress it at the same time.

    geta-hf train bert_sst2
    geta-hf train bert_sst2 --task mrpc --geta.target_sparsity 0.3
    geta-hf train minilm_texts --train_file train.csv --eval_file dev.csv --text_column review --label_column stars

`task` is one of GLUE's, whose data and metric come from the Hub. Other data, from the Hub or local files, has a column
of texts, perhaps one of second texts, and one of labels: class numbers, names, or numbers with a fraction (regression).
The YAML file holds the fields of `ModelArguments`, `DataArguments` and Trainer's own `TrainingArguments`, and `geta:`
with the fields of `GETAConfig`. The model is written to `output_dir/export`, the scores to `output_dir/results.json`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    HfArgumentParser,
    PreTrainedModel,
    set_seed,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from geta_hf.errors import GETAError
from geta_hf.evaluation import classification
from geta_hf.evaluation.classification import GLUE_DATASET, LabeledTexts, glue_task, read_labeled, same_classes
from geta_hf.evaluation.metrics import Metric, Scores, load_metric
from geta_hf.evaluation.rows import random_rows, read_rows
from geta_hf.recipes.arguments import ModelArguments, make_parser
from geta_hf.recipes.loading import load_config, load_model, load_tokenizer
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
    """Choose the texts to train and to evaluate on: a task of GLUE, a data set of the Hub, or two local files."""

    task: str | None = field(default=None, metadata={"help": "a task of GLUE, such as sst2, with its data and metric"})
    dataset_name: str | None = field(default=None, metadata={"help": "a Hub data set, or a folder saved by datasets"})
    dataset_config: str | None = field(default=None, metadata={"help": "its configuration, if it has several"})
    train_split: str = field(default="train", metadata={"help": "split to train on"})
    eval_split: str | None = field(default=None, metadata={"help": "split to evaluate on; default: validation"})
    train_file: str | None = field(
        default=None, metadata={"help": ".json, .jsonl, .csv (also .gz) or .parquet, instead of a split"}
    )
    eval_file: str | None = field(default=None, metadata={"help": "of the same kinds, instead of a split"})
    text_column: str | None = field(default=None, metadata={"help": "column of texts; default: the task's, or text"})
    pair_column: str | None = field(default=None, metadata={"help": "column of second texts; default: the task's"})
    label_column: str = field(default="label", metadata={"help": "column of class numbers, names, or numbers"})
    metric: str | None = field(
        default=None,
        metadata={"help": "accuracy, or a name or a script for evaluate.load; default: the task's, or accuracy"},
    )
    metric_config: str | None = field(default=None, metadata={"help": "the metric's configuration"})
    max_train_rows: int | None = field(default=None, metadata={"help": "size of a random sample; default: all"})
    max_eval_rows: int | None = field(default=None, metadata={"help": "size of a random sample; default: all"})
    sample_seed: int = field(default=0, metadata={"help": "seed of both samples"})
    max_length: int = field(default=128, metadata={"help": "tokens of a text, which is cut there"})
    evaluate_before_export: bool = field(default=True, metadata={"help": "also score the model before export"})

    def __post_init__(self) -> None:
        """Fill in what a task of GLUE says."""
        if self.task is not None:
            known = glue_task(self.task)
            self.text_column = self.text_column or known.text
            self.pair_column = self.pair_column or known.pair
            self.eval_split = self.eval_split or known.split
            if self.dataset_name is None:
                self.dataset_name, self.dataset_config = GLUE_DATASET, self.task
            if self.metric is None:
                self.metric, self.metric_config = "glue", self.task
        self.text_column = self.text_column or "text"
        self.eval_split = self.eval_split or "validation"


# -------------------------------------------------------------------------------------------------------- arguments


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Read the run's arguments, as `geta_hf.recipes.run.read_arguments` documents."""
    return read_arguments(argv, _parser(), "text_classification")


def _parser() -> HfArgumentParser:
    return make_parser(ModelArguments, DataArguments)


# ------------------------------------------------------------------------------------------------------------- data


def load_data(data: DataArguments, name: str) -> tuple[LabeledTexts, LabeledTexts, int]:
    """Return the texts to train on, those to evaluate on, and how many the latter were drawn from.

    Args:
        data: of the run.
        name: of the model, which may have the same classes in an order of its own.
    """
    columns = (str(data.text_column), data.pair_column, data.label_column)
    train = random_rows(_rows(data, data.train_file, data.train_split), data.max_train_rows, data.sample_seed)
    found = read_labeled(train, *columns)
    names = same_classes(load_config(name), found.names) if found.names else []
    every = _rows(data, data.eval_file, str(data.eval_split))
    test = read_labeled(random_rows(every, data.max_eval_rows, data.sample_seed), *columns, names)
    return read_labeled(train, *columns, names), test, len(every)


def _rows(data: DataArguments, file: str | None, split: str) -> Any:
    if file is None and data.dataset_name is None:
        raise GETAError("no data: give task (such as sst2), dataset_name, or train_file and eval_file")
    return read_rows(file, data.dataset_name, data.dataset_config, split)


def features(data: DataArguments, tokenizer: PreTrainedTokenizerBase, texts: LabeledTexts) -> list[dict[str, Any]]:
    """Return rows of tokens and `labels` for Trainer."""
    rows = texts.tokenize(tokenizer, data.max_length)
    return [{**row, "labels": label} for row, label in zip(rows, texts.labels, strict=True)]


# --------------------------------------------------------------------------------------------------------- training


def load_classifier(name: str, names: Sequence[str]) -> tuple[PreTrainedModel, bool]:
    """Load a classifier of these classes, or with one output where there are none; see `load_model`."""
    options: dict[str, Any] = {"num_labels": max(len(names), 1)}
    if names:
        options |= {"id2label": dict(enumerate(names)), "label2id": {one: place for place, one in enumerate(names)}}
    else:
        options["problem_type"] = "regression"
    # A head for other classes is replaced by a new one.
    return load_model(AutoModelForSequenceClassification, name, ignore_mismatched_sizes=True, **options)


def score(
    arguments: Arguments,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    test: LabeledTexts,
    metric: Metric,
) -> Scores:
    """Return the metric of a model on the texts to evaluate on."""
    training = arguments.training
    return classification.score(
        model,
        tokenizer,
        test,
        metric,
        max_length=arguments.data.max_length,
        batch_size=training.per_device_eval_batch_size,
        bf16=training.bf16,
        progress=not training.disable_tqdm,
    )


def run(arguments: Arguments) -> dict[str, Any]:
    """Train, export, score the exported model, and write `results.json`.

    Returns:
        The contents of `results.json`; an empty dict on all processes but the first.
    """
    data, training = arguments.data, arguments.training
    name = arguments.model.model_name_or_path
    set_seed(training.seed)
    metric = load_metric(data.metric or "accuracy", data.metric_config)
    train, test, total = load_data(data, name)
    if train.regression and metric.name == "accuracy":
        raise GETAError(
            f"{data.label_column!r} holds numbers, and numbers have no accuracy; give metric, such as pearsonr"
        )
    tokenizer = load_tokenizer(arguments.model.tokenizer_name_or_path or name)
    model, trained = load_classifier(name, train.names)
    if tokenizer.pad_token_id is None:
        raise GETAError(f"the tokenizer of {name} has no padding token, which batches of texts need")
    scoring = Scoring(
        lambda one: score(arguments, one, tokenizer, test, metric),
        AutoModelForSequenceClassification.from_pretrained,
        *scored_data(data.task or data.dataset_name, data.eval_file, data.eval_split),
        total=total,
        works=(reading(data.max_length, model.config),),
    )
    start = score_start(arguments, model, trained, scoring)
    trainer = make_trainer(
        arguments,
        model=model,
        train_dataset=features(data, tokenizer, train),
        eval_dataset=features(data, tokenizer, test),
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
        facts={"train_rows": len(train.texts), "classes": train.names},
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the recipe, from the command line or from Python: `main(["config.yaml", "--seed", "1"])`."""
    return launch(argv, __doc__, _parser(), lambda words: run(parse_arguments(words)))


if __name__ == "__main__":
    run_command(main)
