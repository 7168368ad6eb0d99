"""Fine-tunes a causal language model and, with a `geta:` section, compresses it while it learns.

    accelerate launch recipes/language_modeling.py recipes/configs/phi2.yaml
    accelerate launch recipes/language_modeling.py recipes/configs/phi2.yaml --plan_only --device_memory 80GB
    accelerate launch recipes/language_modeling.py recipes/configs/phi2.yaml --train_file notes.txt.gz \
        --response_column null --template null --geta.target_sparsity 0.5
    accelerate launch recipes/language_modeling.py recipes/configs/phi2.yaml --geta null     # plain, dense

The YAML file holds the fields of `ModelArguments`, `DataArguments` and Trainer's own `TrainingArguments`, `geta:` with
the fields of `GETAConfig`, and, where full gradients do not fit, `lora:` with those of peft's `LoraConfig`.
`output_dir/export` receives the model, `output_dir/results.json` what came of the run.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from geta_hf import DryRun, GETAConfig, GETAError, GETATrainer, MemoryPlan, dry_run, write_card
from geta_hf.errors import MemoryUnknown
from geta_hf.evaluation.causal_lm import check_causal, check_vocabulary, positions
from geta_hf.evaluation.texts import perplexity_of_rows
from geta_hf.utils.loading import one_line_errors
from recipes import loading, text_data
from recipes.arguments import parse_sections, read_values
from recipes.documents import prepare_tokenizer
from recipes.output import export
from recipes.text_data import DataArguments

logger = logging.get_logger(__name__)
_UNITS = {"K": 1, "M": 2, "G": 3, "T": 4}


@dataclass
class ModelArguments:
    """Which model to start from, and where it is to fit."""

    model_name_or_path: str = field(metadata={"help": "a model's name on the Hub, or a local folder"})
    tokenizer_name_or_path: str | None = field(default=None, metadata={"help": "default: the model's own"})
    dtype: str = field(default="float32", metadata={"help": "of the weights in training: float32 or bfloat16"})
    plan_only: bool = field(default=False, metadata={"help": "print the plan and the memory; read no weights"})
    device_memory: str | None = field(
        default=None, metadata={"help": "what must be enough, such as 80GB; default: what is free on the device"}
    )


@dataclass
class Arguments:
    """Everything that one run needs; `geta` None means plain fine-tuning, `lora` None means all parameters."""

    model: ModelArguments
    data: DataArguments
    training: TrainingArguments
    geta: GETAConfig | None
    lora: dict[str, Any] | None = None


# -------------------------------------------------------------------------------------------------------- arguments


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """The run's arguments; see `recipes.arguments.read_values` for how they are written.

    Raises:
        GETAError: an unknown key, a value that can't be, or options that can't go together.
    """
    values, geta = read_values(argv, _parser())
    lora = values.pop("lora", None)
    model, data, training = parse_sections(_parser(), values)
    arguments = Arguments(model, data, training, geta, lora)
    _check(arguments)
    return arguments


def _parser() -> HfArgumentParser:
    return HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))


def _check(arguments: Arguments) -> None:
    if arguments.data.streaming and arguments.training.max_steps <= 0:
        raise GETAError("streaming has no length: give max_steps, the number of updates")
    if arguments.model.dtype not in ("float32", "bfloat16"):
        raise GETAError(f"dtype = {arguments.model.dtype!r} must be float32 or bfloat16")
    if not (arguments.lora is None or isinstance(arguments.lora, dict)):
        raise GETAError(f"lora: {arguments.lora!r} is neither a section with the fields of LoraConfig nor null")
    if arguments.lora is not None and arguments.geta is None:
        raise GETAError("lora without geta is peft's own business; give a geta section, or `--lora null`")
    if arguments.model.device_memory is not None:
        parse_bytes(arguments.model.device_memory)
    if arguments.training.eval_strategy != "no" and not arguments.data.evaluates:
        raise GETAError("eval_strategy needs rows to evaluate on: give eval_file or eval_split")
    loading.check_resume(arguments.training)


def parse_bytes(text: str) -> int:
    """Bytes of `80GB`, `80G`, `24 GiB` or `1.5TB`.

    Raises:
        GETAError: not a number with a unit.
    """
    found = re.fullmatch(r"\s*(\d+\.?\d*)\s*([KMGT])(I?)B?\s*", str(text).upper())
    if found is None:
        raise GETAError(f"device_memory = {text!r} must be a size with its unit, such as 80GB or 24GiB")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** _UNITS[found[2]])


def lora_config(arguments: Arguments) -> Any:
    """peft's config; None without a `lora` section."""
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
    """Raises GETAError for rows longer than the model's positions."""
    limit = positions(config)
    if block_size < 2 or (limit is not None and block_size > limit):
        raise GETAError(f"block_size = {block_size} must lie between 2 and the model's {limit} positions")


def plan(arguments: Arguments) -> DryRun:
    """What the run would do and need, found without weights."""
    config = loading.load_config(arguments.model.model_name_or_path)
    check_positions(config, arguments.data.block_size)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise GETAError(f"{arguments.model.model_name_or_path}: {type(config).__name__} has no causal language model")
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__]
    config.dtype = getattr(torch, arguments.model.dtype)
    batch = text_data.largest_batch(arguments.data, arguments.training.per_device_train_batch_size)
    return dry_run(config, batch, arguments.training, arguments.geta, lora_config(arguments))


def free_memory(arguments: Arguments) -> int | None:
    """Bytes that the run may take: as told, or what is free on its device; None where that is not known."""
    if arguments.model.device_memory is not None:
        return parse_bytes(arguments.model.device_memory)
    device = arguments.training.device
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    status = Path("/proc/meminfo")
    if device.type != "cpu" or not status.is_file():
        return None
    return 1024 * int(status.read_text(encoding="utf-8").partition("MemAvailable:")[2].split()[0])


def fit(found: DryRun, free: int | None) -> str:
    """One sentence: whether the run fits. The estimate was within 10 % of what was measured."""
    if free is None:
        return "free memory of the device is not known; give --device_memory, such as 80GB"
    peak, room = _size(found.memory.peak), _size(free)
    if found.memory.peak > free:
        return f"does not fit: {peak} are needed, {room} are there"
    tight = "; that is close" if found.memory.peak > 0.9 * free else ""
    return f"fits: {peak} of {room} are needed{tight}"


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def check_memory(arguments: Arguments) -> MemoryPlan | None:
    """The memory that the run will need; None, and a warning, for a model whose memory can't be foreseen.

    Raises:
        GETAError: the batch does not fit the device; nothing has been loaded yet.
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
    """What `--plan_only` prints: the plan, the memory, and whether that fits."""
    name = arguments.model.model_name_or_path
    try:
        found = plan(arguments)
    except MemoryUnknown as error:
        return f"{error.plan}\n\n{name}: {error}; whether it fits is not known"
    return f"{found}\n{name} {fit(found, free_memory(arguments))}"


# --------------------------------------------------------------------------------------------------------- training


def load_model(arguments: ModelArguments) -> PreTrainedModel:
    """The model with its weights."""
    name = arguments.model_name_or_path
    with one_line_errors(f"the model {name} can't be loaded"):
        model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, arguments.dtype))
    check_causal(model)
    return model


def load_tokenizer(arguments: ModelArguments) -> PreTrainedTokenizerBase:
    """The tokenizer, with a padding token; every token has a row in the model's embedding."""
    tokenizer = loading.load_tokenizer(arguments.tokenizer_name_or_path or arguments.model_name_or_path)
    check_vocabulary(loading.load_config(arguments.model_name_or_path).get_text_config().vocab_size, tokenizer)
    prepare_tokenizer(tokenizer)
    return tokenizer


@dataclass
class HeldOut:
    """Rows that are never trained on, and how to score a model on them."""

    rows: Any
    collate: Any
    batch_size: int
    bf16: bool

    def score(self, model: PreTrainedModel) -> dict[str, Any]:
        """Perplexity of a model."""
        return perplexity_of_rows(model, self.rows, self.collate, self.batch_size, self.bf16)


def held_out(arguments: Arguments, tokenizer: PreTrainedTokenizerBase) -> HeldOut | None:
    """The evaluation rows; None where neither eval_file nor eval_split is given."""
    data, training = arguments.data, arguments.training
    if not data.evaluates:
        return None
    rows = text_data.load_rows(data, data.eval_file, str(data.eval_split), data.max_eval_rows)
    ready = text_data.features(data, tokenizer, rows)
    return HeldOut(ready, text_data.collator(data, tokenizer), training.per_device_eval_batch_size, training.bf16)


def make_trainer(
    arguments: Arguments, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Any, test: HeldOut | None
) -> Trainer:
    """GETATrainer with a `geta` section, Trainer without."""
    common: dict[str, Any] = {
        "model": model,
        "args": arguments.training,
        "train_dataset": rows,
        "eval_dataset": None if test is None else test.rows,
        "data_collator": text_data.collator(arguments.data, tokenizer),
        "processing_class": tokenizer,
    }
    if arguments.geta is None:
        return Trainer(**common)
    return GETATrainer(geta_config=arguments.geta, peft_config=lora_config(arguments), **common)


def describe(arguments: Arguments) -> dict[str, Any]:
    """The run's own settings, ready for JSON."""
    return {
        "model": asdict(arguments.model),
        "data": asdict(arguments.data),
        "training": json.loads(arguments.training.to_json_string()),
        "geta": arguments.geta.to_dict() if arguments.geta else None,
        "lora": arguments.lora,
    }


def run(arguments: Arguments) -> dict[str, Any]:
    """Plans, trains, exports, scores what was exported, and writes `results.json`.

    Returns:
        What `results.json` holds; on processes other than the first, nothing.
    """
    output, training = Path(str(arguments.training.output_dir)), arguments.training
    set_seed(training.seed)
    foreseen = check_memory(arguments)
    tokenizer = load_tokenizer(arguments.model)
    data = arguments.data
    test = held_out(arguments, tokenizer)
    rows = text_data.load_rows(data, data.train_file, data.train_split, data.max_train_rows)
    rows = text_data.features(data, tokenizer, rows)
    model = load_model(arguments.model)
    before = test.score(model.to(training.device)) if test is not None and training.process_index == 0 else None

    if training.include_num_input_tokens_seen == "no":
        training.include_num_input_tokens_seen = "all" if data.packs else "non_padding"
    trainer = make_trainer(arguments, model, tokenizer, rows, test)
    seconds = time.perf_counter()
    outcome = trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    seconds = time.perf_counter() - seconds
    export(trainer, tokenizer, output / "export")
    trainer.accelerator.wait_for_everyone()
    if not trainer.is_world_process_zero():
        return {}
    results = {
        "train_loss": outcome.training_loss,
        "steps": outcome.global_step,
        "tokens": trainer.state.num_input_tokens_seen,
        "train_seconds": round(seconds, 1),
        "before": before,
        "after": None if test is None else test.score(_exported(output, training)),
        "memory_foreseen": None if foreseen is None else asdict(foreseen) | {"peak": foreseen.peak},
        "config": describe(arguments),
    }
    (output / "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    if arguments.geta is not None:
        write_card(output / "export", dataset=data.dataset_name, metrics=_metrics(results))
    return results


def _exported(output: Path, training: TrainingArguments) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(output / "export").to(training.device)


def _metrics(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    columns = {"dense": results["before"], "compressed": results["after"]}
    return {name: {"perplexity": score["perplexity"]} for name, score in columns.items() if score is not None}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command; also the way to run the recipe from Python: `main(["config.yaml", "--seed", "1"])`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or "--help" in argv or "-h" in argv:
        print(__doc__)
        _parser().print_help()
        return {}
    arguments = parse_arguments(argv)
    if arguments.model.plan_only:
        print(verdict(arguments))
        return {}
    results = run(arguments)
    if results:
        print(json.dumps({key: results[key] for key in ("train_loss", "tokens", "before", "after", "train_seconds")}))
    return results


if __name__ == "__main__":
    try:
        main()
    except GETAError as error:
        sys.exit(f"error: {error}")
