"""Define the tasks on which rules are compared: question answering, images, and a small language model.

A task has a dense model, training data and a score; `dense_model` trains the model once and stores it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    DataCollatorWithPadding,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.trainer_utils import get_last_checkpoint

from geta_hf import GETAError
from geta_hf.evaluation import squad
from geta_hf.evaluation.image_classification import accuracies, collate_images, predict_classes
from geta_hf.evaluation.squad_features import Question, load_questions, sample, training_features
from geta_hf.evaluation.texts import perplexity_of_rows, read_text
from geta_hf.recipes.image_classification import (
    ModelArguments,
    channels_of,
    load_model,
    load_processor,
    make_config,
    set_momentum,
)
from geta_hf.recipes.image_data import DataArguments, Rows, check_classes, load_images, usable

HEAD_DIM = 32
SAVE_EVERY = 200  # steps of the dense training between checkpoints


@dataclass(frozen=True)
class Lengths:
    """Hold the length of one training: optimizer steps, sequences a step, and the peak learning rate."""

    steps: int
    batch_size: int
    learning_rate: float


@dataclass(frozen=True)
class Task:
    """Hold one model, its data and its score.

    Attributes:
        name: of the study, in results and tables.
        metrics: keys of what `score` returns, the one that decides first.
        larger_is_better: of that metric.
        start: makes the model that the dense training starts from.
        load: reads a saved model.
        features: training examples.
        collator: makes a batch of them.
        score: from a trained model to its metrics.
        dense: length of the dense training.
        settings: everything else that the dense model depends on, as plain data.
        scored: what the score depends on, as plain data.
        tokenizer: or image processor, saved with the dense model.
        arguments: further `TrainingArguments`.
        calibration: examples for compression without training; empty where a task has none.
    """

    name: str
    metrics: tuple[str, ...]
    larger_is_better: bool
    start: Callable[[], PreTrainedModel]
    load: Callable[[Path], PreTrainedModel]
    features: Any
    collator: Callable[[list[Any]], dict[str, Any]]
    score: Callable[[PreTrainedModel], dict[str, float]]
    dense: Lengths
    settings: dict[str, Any]
    scored: dict[str, Any]
    tokenizer: Any = None
    arguments: dict[str, Any] = field(default_factory=dict)
    calibration: list[dict[str, Any]] = field(default_factory=list)


def training_arguments(task: Task, folder: Path, lengths: Lengths, seed: int, **changes: Any) -> TrainingArguments:
    """Return arguments with linear decay after a short warm-up; the same for all runs of a task."""
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": lengths.steps,
        "per_device_train_batch_size": lengths.batch_size,
        "learning_rate": lengths.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.06,
        "weight_decay": 0.01,
        "logging_steps": 50,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_drop_last": True,
        "use_cpu": not torch.accelerator.is_available(),
        "seed": seed,
    }
    return TrainingArguments(**{**values, **task.arguments, **changes})


def dense_model(task: Task, work: Path) -> Path:
    """Return the folder of the dense model; train it if it is missing, from the last checkpoint if there is one.

    A dense training of 0 steps takes the model as it starts.

    Args:
        task: what to train.
        work: holds a folder for each task.

    Raises:
        GETAError: the folder holds a model of another training.
    """
    folder, note = work / task.name / "dense", work / task.name / "dense.json"
    settings = json.loads(json.dumps({**task.settings, **vars(task.dense)}))
    if note.is_file() and json.loads(note.read_text(encoding="utf-8")) != settings:
        raise GETAError(
            f"{folder} was trained with other settings, see {note}; give another folder or the same settings"
        )
    if (folder / "config.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(settings, indent=1), encoding="utf-8")
    _train_dense(task, folder)
    return folder


def _train_dense(task: Task, folder: Path) -> None:
    checkpoints = folder.with_name("dense_checkpoints")
    set_seed(0)
    model = task.start()
    if task.dense.steps:
        model = _trained(task, model, checkpoints)
    unfinished = folder.with_name("dense_unfinished")  # renamed when complete, so that no reader gets half a model
    model.save_pretrained(unfinished)
    if task.tokenizer is not None:
        task.tokenizer.save_pretrained(unfinished)
    folder.rmdir()
    unfinished.rename(folder)
    shutil.rmtree(checkpoints, ignore_errors=True)


def _trained(task: Task, model: PreTrainedModel, checkpoints: Path) -> PreTrainedModel:
    saving = {"save_strategy": "steps", "save_steps": SAVE_EVERY, "save_total_limit": 1}
    arguments = training_arguments(task, checkpoints, task.dense, 0, **saving)
    trainer = Trainer(model, arguments, train_dataset=task.features, data_collator=task.collator)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None)
    return trainer.accelerator.unwrap_model(trainer.model)


# ------------------------------------------------------------------------------------------------ question answering


@dataclass(frozen=True)
class QuestionOptions:
    """Choose the model and the questions, and how many of them to use.

    Attributes:
        model: a folder or a Hub name, fine-tuned or not.
        train_file, eval_file: SQuAD v1.1, .json or .json.gz.
        other_file: questions about text of another kind, scored as well and never learned from; None for none.
        train_questions, eval_questions, other_questions: sizes of random samples; None takes all.
        max_length, eval_max_length: tokens of a window.
        doc_stride, eval_doc_stride: tokens that neighboring windows share.
        bf16: run under bfloat16 autocast.
    """

    model: str
    train_file: str
    eval_file: str
    other_file: str | None = None
    train_questions: int | None = 12000
    eval_questions: int | None = 1000
    other_questions: int | None = 1000
    max_length: int = 192
    eval_max_length: int = 320
    doc_stride: int = 64
    eval_doc_stride: int = 128
    bf16: bool = False


def question_task(options: QuestionOptions, dense: Lengths, name: str) -> Task:
    """Make the task of fine-tuning on SQuAD; the score is EM and F1 on a fixed sample of the evaluation questions."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    asked = sample(load_questions(options.eval_file), options.eval_questions)
    known = sample(load_questions(options.train_file), options.train_questions)
    features, _ = training_features(tokenizer, known, options.max_length, options.doc_stride)

    # Of other text: what is scored in domain alone flatters a model that was compressed on it.
    other = [] if options.other_file is None else sample(load_questions(options.other_file), options.other_questions)

    def answer(model: PreTrainedModel, questions: Sequence[Question]) -> dict[str, float]:
        predictions = squad.predict(
            model,
            tokenizer,
            questions,
            max_length=options.eval_max_length,
            doc_stride=options.eval_doc_stride,
            bf16=options.bf16,
            progress=False,
        )
        return squad.score(predictions, questions)

    def score(model: PreTrainedModel) -> dict[str, float]:
        asked_scores = answer(model, asked)
        scores = {key: asked_scores[key] for key in ("f1", "em")}
        if other:
            scores["other_f1"] = answer(model, other)["f1"]
        return scores

    scored = {
        "questions": len(asked),
        "max_length": options.eval_max_length,
        "doc_stride": options.eval_doc_stride,
    }
    if other:
        scored["other_questions"] = len(other)
    return Task(
        name=name,
        metrics=("f1", "em"),
        larger_is_better=True,
        start=lambda: AutoModelForQuestionAnswering.from_pretrained(options.model),
        load=AutoModelForQuestionAnswering.from_pretrained,
        features=features,
        collator=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=16),  # few shapes, so that few kernels are kept
        score=score,
        dense=dense,
        settings={
            "windows": len(features),
            "max_length": options.max_length,
            "doc_stride": options.doc_stride,
            "bf16": options.bf16,
        },
        scored=scored,
        tokenizer=tokenizer,
        arguments={"bf16": options.bf16, "train_sampling_strategy": "group_by_length"},
    )


# -------------------------------------------------------------------------------------------------------------- images


@dataclass(frozen=True)
class ImageOptions:
    """Choose the model and the images.

    Attributes:
        model: a folder or a Hub name, or the `model_type` and fields of a config that starts from random weights.
        data: fields of the recipe's `DataArguments`: the source, samples, sizes and augmentation.
        arguments: further `TrainingArguments` of all runs.
        calibration: images of training that compression without training sees.
        batch_norm_momentum: share of a new batch in the running statistics; the model's own by default.
    """

    model: str | Mapping[str, Any]
    data: Mapping[str, Any]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    calibration: int = 256
    batch_norm_momentum: float | None = None


def image_task(options: ImageOptions, dense: Lengths, name: str) -> Task:
    """Make the task of image classification; the score is the accuracy in percent."""
    from_name = isinstance(options.model, str)
    choice = ModelArguments(
        model_name_or_path=str(options.model) if from_name else None,
        architecture=None if from_name else dict(options.model),
        new_head=from_name,
        batch_norm_momentum=options.batch_norm_momentum,
    )
    data = DataArguments(**options.data)
    every_image, images = load_images(data, "eval"), load_images(data, "train")
    check_classes(images, every_image)
    config = make_config(choice, max(images.classes, every_image.classes, key=len))
    channels = channels_of(config)
    known = usable(images.sample(data.max_train_images, data.sample_seed), data, channels)
    held_out = usable(every_image.sample(data.max_eval_images, data.sample_seed), data, channels)
    processor = load_processor(choice, data, config)
    features = Rows(known, processor, data, channels, training=True)
    test = Rows(held_out, processor, data, channels)
    # Not augmented: ranges and gradients of the images as they will be read.
    plain = Rows(known, processor, data, channels)
    calibration = [plain[index] for index in range(min(options.calibration, len(plain)))]

    def load(folder: Path) -> PreTrainedModel:
        return set_momentum(AutoModelForImageClassification.from_pretrained(folder), choice)

    def score(model: PreTrainedModel) -> dict[str, float]:
        found, labels = predict_classes(model, test, collate_images, batch_size=100)
        scores = accuracies(found, labels)
        return {"accuracy": scores["accuracy"], "accuracy_stderr": scores["accuracy_stderr"]}

    # Lines of earlier runs, without the option, keep their settings.
    momentum = {} if choice.batch_norm_momentum is None else {"batch_norm_momentum": choice.batch_norm_momentum}
    return Task(
        name=name,
        metrics=("accuracy",),
        larger_is_better=True,
        start=lambda: load_model(choice, config)[0],
        load=load,
        features=features,
        collator=collate_images,
        score=score,
        dense=dense,
        settings={"model": options.model, "images": len(known), **options.data, **options.arguments, **momentum},
        scored={"images": len(held_out)},
        tokenizer=processor,
        arguments={"remove_unused_columns": False, **options.arguments},
        calibration=calibration,
    )


# ----------------------------------------------------------------------------------------------------- language model


@dataclass(frozen=True)
class TextOptions:
    """Choose the text and the language model that learns it.

    Attributes:
        texts: plain text files to learn from.
        eval_texts: plain text files to be scored on; None holds out the end of `texts`.
        other_texts: plain text files of another kind, scored as well and never learned from; none by default.
        model: a folder or a Hub name of a pretrained model to start from; None makes a Llama of random weights.
        tokenizer: a folder or a Hub name; None takes the model's, and reads bytes where there is no model either.
        layers, hidden: of a Llama with heads of 32 and 8/3 as many MLP channels, where there is no model.
        block: tokens of a sequence.
        eval_blocks: sequences to be scored, spread evenly over `eval_texts`; as many of `other_texts`, or all.
        bf16: train under bfloat16 autocast; the score is float32.
    """

    texts: Sequence[str]
    eval_texts: Sequence[str] | None = None
    other_texts: Sequence[str] = ()
    model: str | None = None
    tokenizer: str | None = None
    layers: int = 4
    hidden: int = 192
    block: int = 128
    eval_blocks: int = 400
    bf16: bool = False


class Blocks(Dataset):
    """Hold sequences of one length that are their own labels.

    Args:
        tokens: int64, shape (sequences, block).
    """

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[position], "labels": self.tokens[position]}


def text_task(options: TextOptions, dense: Lengths, name: str) -> Task:
    """Make the task of next-token prediction; the score is nats per token on held-out text.

    Raises:
        GETAError: too little text, or a missing file.
    """
    source = options.tokenizer or options.model
    tokenizer = None if source is None else AutoTokenizer.from_pretrained(source)
    tokens, held_out = split_blocks(options, tokenizer)
    other = _spread(read_blocks(options.other_texts, tokenizer, options.block), options.eval_blocks)
    vocabulary = 256 if tokenizer is None else len(tokenizer)

    def start() -> PreTrainedModel:
        if options.model is not None:
            return AutoModelForCausalLM.from_pretrained(options.model)
        return LlamaForCausalLM(llama_config(options, vocabulary))

    def score(model: PreTrainedModel) -> dict[str, float]:
        scores = {"nats": nats_per_token(model, held_out)}
        if len(other):
            scores["other_nats"] = nats_per_token(model, other)
        return scores

    shape = {"layers": options.layers, "hidden": options.hidden}
    scored: dict[str, Any] = {"blocks": len(held_out), "held_out": options.eval_texts is None}
    if len(other):
        scored["other_blocks"] = len(other)
    return Task(
        name=name,
        metrics=("nats",),
        larger_is_better=False,
        start=start,
        load=AutoModelForCausalLM.from_pretrained,
        features=Blocks(tokens),
        collator=default_data_collator,
        score=score,
        dense=dense,
        settings={
            "blocks": len(tokens),
            "block": options.block,
            "vocabulary": vocabulary,
            **(shape if options.model is None else {}),
            "bf16": options.bf16,
        },
        scored=scored,
        tokenizer=tokenizer,
        arguments={"bf16": options.bf16},
    )


def split_blocks(options: TextOptions, tokenizer: PreTrainedTokenizerBase | None) -> tuple[Tensor, Tensor]:
    """Return sequences to learn from and sequences to score, each int64, shape (sequences, block).

    Raises:
        GETAError: too little text.
    """
    tokens, count = read_blocks(options.texts, tokenizer, options.block), options.eval_blocks
    other = tokens if options.eval_texts is None else read_blocks(options.eval_texts, tokenizer, options.block)
    if not 0 < count < len(other):
        raise GETAError(f"{count} of {len(other)} blocks of text are to be scored; give more text, or fewer blocks")
    if options.eval_texts is None:
        return tokens[:-count], tokens[-count:]
    return tokens, _spread(other, count)


def _spread(blocks: Tensor, count: int) -> Tensor:
    """Return `count` of the sequences, spread evenly over all; all where there are fewer."""
    count = min(count, len(blocks))
    return blocks[torch.arange(count) * len(blocks) // max(count, 1)]


def read_blocks(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase | None, block: int) -> Tensor:
    """Read all texts in order, split into sequences: int64, shape (sequences, block). Drop the rest.

    Raises:
        GETAError: a file that is no text in UTF-8, plain or .gz.
    """
    pieces = []
    for path in texts:
        text = read_text(path)
        if tokenizer is None:
            pieces.append(np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int64))
        else:
            encoded = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            pieces.append(np.array(encoded, dtype=np.int64))
    tokens = torch.from_numpy(np.concatenate(pieces or [np.zeros(0, dtype=np.int64)]))
    return tokens[: len(tokens) // block * block].view(-1, block)


def llama_config(options: TextOptions, vocabulary: int) -> LlamaConfig:
    """Configure a Llama with tied embeddings. Raise GETAError for a width that heads of 32 do not divide."""
    if options.hidden % HEAD_DIM:
        raise GETAError(f"hidden = {options.hidden} must be a multiple of {HEAD_DIM}, the width of a head")
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // HEAD_DIM,
        intermediate_size=options.hidden * 8 // 3,
        max_position_embeddings=max(options.block, 128),
        tie_word_embeddings=True,
    )


def nats_per_token(model: PreTrainedModel, tokens: Tensor, batch_size: int = 32) -> float:
    """Return the mean cross-entropy of every token except the first of each sequence.

    Args:
        model: a causal language model; its mode does not change.
        tokens: int64, shape (sequences, block).
        batch_size: sequences of a forward pass.
    """
    return perplexity_of_rows(model, Blocks(tokens), default_data_collator, batch_size)["nats_per_token"]
