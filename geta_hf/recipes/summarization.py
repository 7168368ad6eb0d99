"""Fine-tune an encoder-decoder to summarize and, with a `geta:` section, compress it at the same time.

    geta-hf train t5_summarization
    geta-hf train t5_summarization --train_file train.jsonl --eval_file dev.jsonl --text_column article

Any task from text to text will do, such as translation; `metric` scores what the model writes. The YAML file holds the
fields of `ModelArguments`, `DataArguments` and Trainer's own `TrainingArguments`, and `geta:` with the fields of
`GETAConfig`. The model is written to `output_dir/export`, the scores to `output_dir/results.json`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import (
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    PreTrainedModel,
    set_seed,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from geta_hf.errors import GETAError
from geta_hf.evaluation.metrics import Metric, Scores, load_metric
from geta_hf.evaluation.rows import random_rows, read_rows, text_column
from geta_hf.evaluation.summaries import write_texts
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
from geta_hf.recipes.speed import writing


@dataclass
class DataArguments:
    """Choose the texts and summaries to train and to evaluate on: a data set of the Hub, or two local files."""

    dataset_name: str | None = field(default=None, metadata={"help": "a Hub data set, or a folder saved by datasets"})
    dataset_config: str | None = field(default=None, metadata={"help": "its configuration, if it has several"})
    train_split: str = field(default="train", metadata={"help": "split to train on"})
    eval_split: str = field(default="validation", metadata={"help": "split to evaluate on"})
    train_file: str | None = field(
        default=None, metadata={"help": ".json, .jsonl, .csv (also .gz) or .parquet, instead of a split"}
    )
    eval_file: str | None = field(default=None, metadata={"help": "of the same kinds, instead of a split"})
    text_column: str = field(default="document", metadata={"help": "column of the texts to read"})
    summary_column: str = field(default="summary", metadata={"help": "column of the texts to write"})
    source_prefix: str = field(default="", metadata={"help": "put before each text; T5 expects 'summarize: '"})
    max_source_length: int = field(default=512, metadata={"help": "tokens of a text, which is cut there"})
    max_target_length: int = field(default=64, metadata={"help": "tokens of a summary, to learn and to write"})
    num_beams: int = field(default=1, metadata={"help": "beams in evaluation; 1 is greedy"})
    metric: str = field(default="rouge", metadata={"help": "a name or a script for evaluate.load"})
    metric_config: str | None = field(default=None, metadata={"help": "the metric's configuration"})
    max_train_rows: int | None = field(default=None, metadata={"help": "size of a random sample; default: all"})
    max_eval_rows: int | None = field(default=None, metadata={"help": "size of a random sample; default: all"})
    sample_seed: int = field(default=0, metadata={"help": "seed of both samples"})
    evaluate_before_export: bool = field(default=True, metadata={"help": "also score the model before export"})


# -------------------------------------------------------------------------------------------------------- arguments


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Read the run's arguments, as `geta_hf.recipes.run.read_arguments` documents."""
    return read_arguments(argv, _parser(), "summarization")


def _parser() -> HfArgumentParser:
    return make_parser(ModelArguments, DataArguments)


# ------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Pairs:
    """Hold texts, with the prefix that the model expects, and their summaries."""

    sources: list[str]
    targets: list[str]
    total: int
    """Rows of which a sample may have been drawn."""


def load_pairs(data: DataArguments, file: str | None, split: str, limit: int | None) -> Pairs:
    """Return the texts of a local file, otherwise of a split; a random sample where there is a limit.

    Raises:
        GETAError: no data, a missing column, or values that are not text.
    """
    rows = read_rows(file, data.dataset_name, data.dataset_config, split)
    chosen = random_rows(rows, limit, data.sample_seed)
    sources = [data.source_prefix + text for text in text_column(chosen, data.text_column)]
    return Pairs(sources, text_column(chosen, data.summary_column), len(rows))


def features(data: DataArguments, tokenizer: PreTrainedTokenizerBase, pairs: Pairs) -> list[dict[str, Any]]:
    """Return rows of tokens and `labels` for Trainer."""
    read = tokenizer(pairs.sources, truncation=True, max_length=data.max_source_length)
    written = tokenizer(text_target=pairs.targets, truncation=True, max_length=data.max_target_length)
    columns = zip(read["input_ids"], read["attention_mask"], written["input_ids"], strict=True)
    return [{"input_ids": ids, "attention_mask": mask, "labels": labels} for ids, mask, labels in columns]


# --------------------------------------------------------------------------------------------------------- training


def score(
    arguments: Arguments, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, test: Pairs, metric: Metric
) -> Scores:
    """Return the metric of what a model writes for the texts to evaluate on."""
    data, training = arguments.data, arguments.training
    written = write_texts(
        model,
        tokenizer,
        test.sources,
        max_source_length=data.max_source_length,
        max_target_length=data.max_target_length,
        num_beams=data.num_beams,
        batch_size=training.per_device_eval_batch_size,
        progress=not training.disable_tqdm,
    )
    return metric.compute(written, test.targets)


def run(arguments: Arguments) -> dict[str, Any]:
    """Train, export, score the exported model, and write `results.json`.

    Returns:
        The contents of `results.json`; an empty dict on all processes but the first.
    """
    data, training = arguments.data, arguments.training
    name = arguments.model.model_name_or_path
    set_seed(training.seed)
    metric = load_metric(data.metric, data.metric_config)
    train = load_pairs(data, data.train_file, data.train_split, data.max_train_rows)
    test = load_pairs(data, data.eval_file, data.eval_split, data.max_eval_rows)
    tokenizer = load_tokenizer(arguments.model.tokenizer_name_or_path or name)
    model, trained = load_model(AutoModelForSeq2SeqLM, name)
    if tokenizer.pad_token_id is None:
        raise GETAError(f"the tokenizer of {name} has no padding token, which batches of texts need")
    scoring = Scoring(
        lambda one: score(arguments, one, tokenizer, test, metric),
        AutoModelForSeq2SeqLM.from_pretrained,
        *scored_data(data.dataset_name, data.eval_file, data.eval_split),
        total=test.total,
        works=(writing(model.config),),
    )
    start = score_start(arguments, model, trained, scoring)
    trainer = make_trainer(
        arguments,
        model=model,
        train_dataset=features(data, tokenizer, train),
        eval_dataset=features(data, tokenizer, test),
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        processing_class=tokenizer,
    )
    return finish(
        arguments,
        trainer,
        tokenizer,
        scoring,
        start=start,
        before_export=data.evaluate_before_export,
        facts={"train_rows": len(train.sources)},
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the recipe, from the command line or from Python: `main(["config.yaml", "--seed", "1"])`."""
    return launch(argv, __doc__, _parser(), lambda words: run(parse_arguments(words)))


if __name__ == "__main__":
    run_command(main)
