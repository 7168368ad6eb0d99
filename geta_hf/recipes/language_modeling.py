"""Fine-tune a causal language model and, with a `geta:` section, compress it at the same time.

    geta-hf train phi2
    geta-hf train phi2 --plan_only --device_memory 80GB
    geta-hf train phi2 --train_file notes.txt.gz --response_column null --template null --geta.target_sparsity 0.5
    geta-hf train phi2 --geta null     # plain, dense

On several GPUs it is `accelerate launch -m geta_hf train ...`. The YAML file holds the fields of `ModelArguments`,
`DataArguments` and Trainer's own `TrainingArguments`, `geta:` with the fields of `GETAConfig`, and, where full
gradients do not fit, `lora:` with those of peft's `LoraConfig`. The model is written to `output_dir/export`, the
results of the run to `output_dir/results.json`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedModel,
    set_seed,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import logging

from geta_hf.errors import GETAError, MemoryUnknown
from geta_hf.evaluation.causal_lm import check_causal, check_vocabulary, positions
from geta_hf.evaluation.texts import perplexity_of_rows
from geta_hf.recipes import loading, text_data
from geta_hf.recipes.arguments import ModelArguments as SharedModelArguments
from geta_hf.recipes.arguments import check_choices, make_parser, parse_sections, read_values
from geta_hf.recipes.documents import prepare_tokenizer
from geta_hf.recipes.run import Arguments as SharedArguments
from geta_hf.recipes.run import (
    export,
    launch,
    make_trainer,
    print_closing,
    run_command,
    save_results,
    time_export,
    train,
)
from geta_hf.recipes.speed import reading, writing
from geta_hf.recipes.text_data import DataArguments
from geta_hf.reporting.model_card import write_card
from geta_hf.reporting.results import TaskResult
from geta_hf.training.memory import DryRun, MemoryPlan, dry_run
from geta_hf.utils.free_memory import free_memory as free_on
from geta_hf.utils.loading import one_line_errors

logger = logging.get_logger(__name__)
_UNITS = {"K": 1, "M": 2, "G": 3, "T": 4}


@dataclass
class ModelArguments(SharedModelArguments):
    """Choose the model to start from, and the memory in which it has to fit."""

    dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "dtype of the weights in training"}
    )
    plan_only: bool = field(
        default=False,
        metadata={"help": "only print plan and memory; no weights are read"},
    )
    device_memory: str | None = field(
        default=None,
        metadata={"help": "memory that must suffice, such as 80GB; default: what is free"},
    )

    def __post_init__(self) -> None:
        check_choices(self)


@dataclass
class Arguments(SharedArguments):
    """Hold everything that one run needs; without `lora` all parameters are trained."""

    lora: dict[str, Any] | None = None

    def as_json(self) -> dict[str, Any]:
        """Return all settings as plain data."""
        return {**super().as_json(), "lora": self.lora}


# -------------------------------------------------------------------------------------------------------- arguments


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Read the run's arguments, in the form that `geta_hf.recipes.arguments.read_values` documents.

    Raises:
        GETAError: an unknown key, an invalid value, or options that exclude each other.
    """
    values, geta = read_values(argv, _parser(), "language_modeling")
    lora = values.pop("lora", None)
    model, data, training = parse_sections(_parser(), values)
    arguments = Arguments(model, data, training, geta, lora)
    _check(arguments)
    return arguments


def _parser() -> HfArgumentParser:
    return make_parser(ModelArguments, DataArguments)


def _check(arguments: Arguments) -> None:
    if arguments.data.streaming and arguments.training.max_steps <= 0:
        raise GETAError("streaming has no length: give max_steps, the number of updates")
    if not (arguments.lora is None or isinstance(arguments.lora, dict)):
        raise GETAError(f"lora: {arguments.lora!r} is neither a section with the fields of LoraConfig nor null")
    if arguments.lora is not None and arguments.geta is None:
        raise GETAError("lora without geta is plain peft: use peft itself, add geta, or give `--lora null`")
    if arguments.model.device_memory is not None:
        parse_bytes(arguments.model.device_memory)
    if arguments.training.eval_strategy != "no" and not arguments.data.evaluates:
        raise GETAError("eval_strategy needs rows to evaluate on: give eval_file or eval_split")
    loading.check_folders(arguments.training)


def parse_bytes(text: str) -> int:
    """Return the bytes of `80GB`, `80G`, `24 GiB` or `1.5TB`.

    Raises:
        GETAError: not a number with a unit.
    """
    found = re.fullmatch(r"\s*(\d+\.?\d*)\s*([KMGT])(I?)B?\s*", str(text).upper())
    if found is None:
        raise GETAError(f"device_memory = {text!r} must be a size with its unit, such as 80GB or 24GiB")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** _UNITS[found[2]])


def lora_config(arguments: Arguments) -> Any:
    """Return peft's config; None without a `lora` section."""
    if arguments.lora is None:
        return None
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise GETAError("the lora section needs `pip install peft`") from error
    try:
        return LoraConfig(**{"task_type": "CAUSAL_LM", **arguments.lora})
    except (TypeError, ValueError) as error:
        raise GETAError(f"lora: {error}") from error


# --------------------------------------------------------------------------------------------------------- the plan


def check_positions(config: PreTrainedConfig, block_size: int) -> None:
    """Raise GETAError for rows longer than the model's positions."""
    limit = positions(config)
    if block_size < 2 or (limit is not None and block_size > limit):
        raise GETAError(f"block_size = {block_size} must lie between 2 and the model's {limit} positions")


def plan(arguments: Arguments) -> DryRun:
    """Compute what the run would do and how much memory it needs, without weights."""
    config = loading.load_config(arguments.model.model_name_or_path)
    check_positions(config, arguments.data.block_size)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise GETAError(f"{arguments.model.model_name_or_path}: {type(config).__name__} has no causal language model")
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    config.architectures = [kind.__name__]
    config.dtype = getattr(torch, arguments.model.dtype)
    batch = text_data.largest_batch(arguments.data, arguments.training.per_device_train_batch_size)
    # A memory that is named is that of another machine's GPU, whose optimizer takes temporaries of its own.
    elsewhere = arguments.model.device_memory is not None and not arguments.training.use_cpu
    device = "cuda" if elsewhere else None
    return dry_run(config, batch, arguments.training, arguments.geta, lora_config(arguments), device=device)


def free_memory(arguments: Arguments) -> int | None:
    """Return the bytes that the run may use: `device_memory`, or what is free on its device; None if unknown."""
    if arguments.model.device_memory is not None:
        return parse_bytes(arguments.model.device_memory)
    return free_on(arguments.training.device)


def fit(found: DryRun, free: int | None) -> str:
    """Say in one sentence whether the run fits. Measured peaks were within 10 % of the estimate."""
    if free is None:
        return "free memory of the device is not known; give --device_memory, such as 80GB"
    peak = _size(found.memory.peak)
    room = _size(free)
    if found.memory.peak > free:
        return f"does not fit: {peak} are needed, {room} are available"
    tight = "; that is close" if found.memory.peak > 0.9 * free else ""
    return f"fits: {peak} of {room} are needed{tight}"


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def check_memory(arguments: Arguments) -> MemoryPlan | None:
    """Estimate the memory that the run will need; warn and return None if that is not possible for the model.

    Raises:
        GETAError: the batch does not fit the device. Nothing has been loaded yet.
    """
    try:
        found = plan(arguments)
    except MemoryUnknown as error:
        logger.warning("%s; whether the run fits is not known", error)
        return None
    free = free_memory(arguments)
    if free is not None and found.memory.peak > free and not arguments.training.fsdp:
        raise GETAError(
            f"the run {fit(found, free)}:\n{found.memory}\nlower per_device_train_batch_size or block_size, set "
            f"gradient_checkpointing, choose optim: adafactor, or add a lora section"
        )
    return found.memory


def verdict(arguments: Arguments) -> str:
    """Return what `--plan_only` prints: the plan, the memory, and whether the run fits."""
    name = arguments.model.model_name_or_path
    try:
        found = plan(arguments)
    except MemoryUnknown as error:
        return f"{error.plan}\n\n{name}: {error}; whether it fits is not known"
    return f"{found}\n{name} {fit(found, free_memory(arguments))}"


# --------------------------------------------------------------------------------------------------------- training


def load_model(arguments: ModelArguments) -> PreTrainedModel:
    """Load the model with its weights."""
    name = arguments.model_name_or_path
    with one_line_errors(f"the model {name} can't be loaded"):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, arguments.dtype))
    check_causal(model)
    return model


def load_tokenizer(arguments: ModelArguments) -> PreTrainedTokenizerBase:
    """Load the tokenizer, with a padding token, and check that every token has a row in the model's embedding."""
    tokenizer = loading.load_tokenizer(arguments.tokenizer_name_or_path or arguments.model_name_or_path)
    check_vocabulary(loading.load_config(arguments.model_name_or_path).get_text_config().vocab_size, tokenizer)
    prepare_tokenizer(tokenizer)
    return tokenizer


@dataclass
class HeldOut:
    """Hold rows that are never trained on, and how to score a model on them."""

    rows: Any
    collate: Any
    batch_size: int
    bf16: bool
    samples: int | None = None
    total: int | None = None

    def score(self, model: PreTrainedModel, device: torch.device) -> dict[str, Any]:
        """Move a model to the device, and return its perplexity."""
        nn.Module.to(model, device)
        return perplexity_of_rows(model, self.rows, self.collate, self.batch_size, self.bf16)


def held_out(arguments: Arguments, tokenizer: PreTrainedTokenizerBase) -> HeldOut | None:
    """Return the evaluation rows; None if neither eval_file nor eval_split is given."""
    data, training = arguments.data, arguments.training
    if not data.evaluates:
        return None
    rows = text_data.load_rows(data, data.eval_file, str(data.eval_split), None)
    total = None if data.streaming else len(rows)
    rows = text_data.first_rows(data, rows, data.max_eval_rows)
    ready = text_data.features(data, tokenizer, rows)
    samples = data.max_eval_rows if data.streaming else len(rows)
    collate = text_data.collator(data, tokenizer)
    return HeldOut(ready, collate, training.per_device_eval_batch_size, training.bf16, samples, total)


def run(arguments: Arguments) -> dict[str, Any]:
    """Estimate memory, train, export, score the exported model, and write `results.json`.

    Returns:
        The contents of `results.json`; an empty dict on all processes but the first.
    """
    data, training = arguments.data, arguments.training
    folder = arguments.output / "export"
    set_seed(training.seed)
    estimate = check_memory(arguments)
    tokenizer = load_tokenizer(arguments.model)
    test = held_out(arguments, tokenizer)
    rows = text_data.load_rows(data, data.train_file, data.train_split, data.max_train_rows)
    rows = text_data.features(data, tokenizer, rows)
    model = load_model(arguments.model)
    before = None
    if test is not None and training.process_index == 0:
        held = test
        before = arguments.timed("start", lambda: held.score(model, training.device))

    if training.include_num_input_tokens_seen == "no":
        training.include_num_input_tokens_seen = "all" if data.packs else "non_padding"
    trainer = make_trainer(
        arguments,
        peft_config=lora_config(arguments),
        model=model,
        train_dataset=rows,
        eval_dataset=None if test is None else test.rows,
        data_collator=text_data.collator(data, tokenizer),
        processing_class=tokenizer,
    )
    outcome, seconds = train(trainer)
    export(trainer, tokenizer, folder)
    if not trainer.is_world_process_zero():
        return {}
    small = AutoModelForCausalLM.from_pretrained(folder)
    nn.Module.to(small, training.device)
    after = None
    if test is not None:
        held = test
        after = arguments.timed("exported", lambda: held.score(small, training.device))
    speeds = time_export(arguments, small, (reading(data.block_size, model.config), writing(model.config)))
    results = {
        "train_loss": outcome.training_loss,
        "steps": outcome.global_step,
        "tokens": trainer.state.num_input_tokens_seen,
        "train_seconds": seconds,
        "before": before,
        "after": after,
        "speed": [asdict(one) for one in speeds],
        "memory_foreseen": None if estimate is None else asdict(estimate) | {"peak": estimate.peak},
    }
    results = save_results(arguments, results)
    if arguments.geta is not None:
        write_card(folder, results={} if test is None else _results(data, test, before, after))
    print_closing(arguments, before, after or {}, ("perplexity",) if after else (), speeds)
    return results


def _results(
    data: DataArguments, test: HeldOut, before: dict[str, Any] | None, after: dict[str, Any] | None
) -> dict[str, list[TaskResult]]:
    """Return the perplexities, with the data that they are of, in the form that the model card takes."""
    local = data.eval_file is not None
    place = TaskResult(
        Path(str(data.eval_file)).name if local else str(data.dataset_name),
        {},
        split=None if local else data.eval_split,
        samples=test.samples,
        total=test.total,
    )
    scores = {"dense": before, "compressed": after}
    return {
        side: [replace(place, metrics={"perplexity": score["perplexity"]})]
        for side, score in scores.items()
        if score is not None
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the recipe, from the command line or from Python: `main(["config.yaml", "--seed", "1"])`."""
    return launch(argv, __doc__, _parser(), _run, ("train_loss", "tokens", "before", "after", "train_seconds"))


def _run(argv: Sequence[str]) -> dict[str, Any]:
    arguments = parse_arguments(argv)
    if arguments.model.plan_only:
        print(verdict(arguments))
        return {}
    return run(arguments)


if __name__ == "__main__":
    run_command(main)
