"""Train an image classification model and, with a `geta:` section, compress it at the same time.

    geta-hf train vit
    geta-hf train resnet --train_dir train --eval_dir val
    geta-hf train resnet20 --idx_dir fashion-mnist --geta null

The YAML file holds the fields of `ModelArguments`, `DataArguments` and Trainer's own `TrainingArguments`, and `geta:`
with the fields of `GETAConfig`. The model is written to `output_dir/export`, the scores to `output_dir/results.json`.
Label smoothing is Trainer's `label_smoothing_factor`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedModel,
    ViTImageProcessor,
    set_seed,
)

from geta_hf import GETAError
from geta_hf.evaluation.image_classification import accuracies, collate_images, predict_classes
from geta_hf.recipes import cifar_models  # noqa: F401 - registers its models
from geta_hf.recipes.arguments import MEASURE_SPEED, make_parser, parse_sections, read_values
from geta_hf.recipes.averages import Averages
from geta_hf.recipes.image_data import (
    DataArguments,
    Rows,
    check_classes,
    image_side,
    load_images,
    set_side,
    usable,
)
from geta_hf.recipes.loading import check_folders, load_config
from geta_hf.recipes.run import Arguments, Scoring, finish, launch, make_trainer, run_command, score_start, scored_data
from geta_hf.recipes.speed import looking
from geta_hf.training.early_checks import check_batch_norm
from geta_hf.utils.loading import one_line_errors


@dataclass
class ModelArguments:
    """Choose the model to start from."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "name of a model on the Hub, or a local folder"}
    )
    architecture: dict[str, Any] | None = field(
        default=None,
        metadata={"help": "instead: model_type and fields of its config, of a model that starts from random weights"},
    )
    new_head: bool = field(
        default=False, metadata={"help": "replace a head of another number of labels by a random one"}
    )
    batch_norm_momentum: float | None = field(
        default=None,
        metadata={"help": "share of a new batch in the running statistics of batch norm; the model's own by default"},
    )
    ema_decay: float | None = field(
        default=None, metadata={"help": "end with a moving average of the weights of this decay, such as 0.999"}
    )
    measure_speed: bool = field(default=True, metadata={"help": MEASURE_SPEED})

    def __post_init__(self) -> None:
        if (self.model_name_or_path is None) == (self.architecture is None):
            raise GETAError("give one of model_name_or_path (a trained model) and architecture (random weights)")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise GETAError(f"ema_decay = {self.ema_decay} must lie between 0 and 1, such as 0.999")
        if self.batch_norm_momentum is not None and not 0 < self.batch_norm_momentum <= 1:
            raise GETAError(f"batch_norm_momentum = {self.batch_norm_momentum} must lie in (0, 1], such as 0.1")


# -------------------------------------------------------------------------------------------------------- arguments


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Read `[config.yaml] [--key value ...]`; a dotted key sets a field of a section, a key without a value means true.

    Raises:
        GETAError: a missing file, a malformed argument, or a key that is no field of any section.
    """
    values, geta = read_values(argv, _parser(), "image_classification")
    # Rows are read by this recipe: Trainer must not drop what it does not find in the model's signature.
    values.setdefault("remove_unused_columns", False)
    model, data, training = parse_sections(_parser(), values)
    if model.ema_decay is not None and (training.resume_from_checkpoint or training.load_best_model_at_end):
        raise GETAError(
            "ema_decay goes with neither resume_from_checkpoint nor load_best_model_at_end: averages of the weights "
            "are not part of a checkpoint"
        )
    check_folders(training)
    return Arguments(model, data, training, geta)


def _parser() -> HfArgumentParser:
    return make_parser(ModelArguments, DataArguments)


# ------------------------------------------------------------------------------------------------------ model and rows


def make_config(arguments: ModelArguments, classes: Sequence[str]) -> PreTrainedConfig:
    """Return the config of the model, with the data's classes.

    Raises:
        GETAError: an unknown model type, or a trained head of another number of labels without `new_head`.
    """
    names = dict(enumerate(classes))
    labels = {"id2label": names, "label2id": {name: label for label, name in names.items()}}
    if arguments.architecture is not None:
        values = dict(arguments.architecture)
        kind = values.pop("model_type", None)
        if kind is None:
            raise GETAError("architecture needs model_type, such as {model_type: resnet, depths: [3, 3, 3]}")
        with one_line_errors(f"architecture: no config of model type {kind!r}"):
            config = AutoConfig.for_model(kind, **values, **labels)
        # Of several classes, as DeiT has, transformers reads this for the one to take; None would be an error.
        config.architectures = config.architectures or []
        return config
    config = load_config(str(arguments.model_name_or_path))
    trained = any("ForImageClassification" in name for name in config.architectures or ())
    if trained and config.num_labels != len(classes) and not arguments.new_head:
        raise GETAError(
            f"{arguments.model_name_or_path} has a head for {config.num_labels} labels, and the data has "
            f"{len(classes)} classes; pass --new_head to start with a random head"
        )
    # A head that is kept keeps the names of its labels.
    if not trained or config.num_labels != len(classes) or arguments.new_head:
        config.update(labels)
    return config


def load_model(arguments: ModelArguments, config: PreTrainedConfig) -> tuple[PreTrainedModel, bool]:
    """Load the model with a head for the config's labels; with `architecture`, make it with random weights.

    Returns:
        The model, and whether it had all of its weights: the scores of a new head would mean nothing.
    """
    if arguments.architecture is not None:
        with one_line_errors(f"no image classification model of type {config.model_type!r} can be made"):
            return set_momentum(AutoModelForImageClassification.from_config(config), arguments), False
    name = str(arguments.model_name_or_path)
    with one_line_errors(f"the model {name} can't be loaded"):
        model, found = AutoModelForImageClassification.from_pretrained(
            name, config=config, ignore_mismatched_sizes=arguments.new_head, output_loading_info=True
        )
    return set_momentum(model, arguments), not found["missing_keys"] and not found["mismatched_keys"]


def set_momentum(model: PreTrainedModel, arguments: ModelArguments) -> PreTrainedModel:
    """Set the momentum of all batch norms in place where the arguments name one, and return the model.

    No config holds it. MobileNetV1 and V2 of transformers have TensorFlow's 0.997, which in PyTorch is the share of the
    new batch: a model in evaluation would run on the statistics of the last batch alone.
    """
    if arguments.batch_norm_momentum is not None:
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.momentum = arguments.batch_norm_momentum
    return model


def load_processor(arguments: ModelArguments, data: DataArguments, config: PreTrainedConfig) -> Any:
    """Return what resizes and normalizes images: the model's own, or for random weights one for values in [-1, 1]."""
    if arguments.architecture is None:
        with one_line_errors(f"the image processor of {arguments.model_name_or_path} can't be loaded"):
            processor = AutoImageProcessor.from_pretrained(arguments.model_name_or_path)
        if data.image_size is not None:
            set_side(processor, data.image_size)
        return processor
    side = data.image_size or getattr(config, "image_size", 224)
    height, width = side if isinstance(side, list | tuple) else (side, side)
    half = [0.5] * channels_of(config)
    return ViTImageProcessor(size={"height": height, "width": width}, image_mean=half, image_std=half)


def channels_of(config: PreTrainedConfig) -> int:
    """Return the channels of the images that a model takes; 3 where its config does not say."""
    return int(getattr(config, "num_channels", 3))


@torch.no_grad()
def check_runs(model: PreTrainedModel, rows: Rows) -> None:
    """Run the model on one image of the size that the processor makes.

    Raises:
        GETAError: the model can't take this size, or gives another number of labels than there are classes.
    """
    batch = collate_images([rows[0]])
    sides = " · ".join(str(size) for size in batch["pixel_values"].shape[-2:])
    training = model.training
    try:
        logits = model.eval()(pixel_values=batch["pixel_values"].to(model.device)).logits
    except (RuntimeError, ValueError, IndexError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise GETAError(
            f"{type(model).__name__} can't run images of {sides} pixels ({reason}); set image_size to one that it takes"
        ) from error
    finally:
        model.train(training)
    if logits.shape[-1] != len(rows.images.classes):
        raise GETAError(
            f"{type(model).__name__} gives {logits.shape[-1]} labels, and {rows.images.source} has "
            f"{len(rows.images.classes)} classes; pass --new_head, or set num_labels"
        )


# --------------------------------------------------------------------------------------------------------- training


class MixedLoss:
    """Compute the cross entropy of labels that are shares of classes, as mixup makes them, and of plain labels.

    Args:
        smoothing: share of each label that is spread over all classes, in training alone.
    """

    def __init__(self, smoothing: float) -> None:
        self.smoothing = smoothing

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """Return the loss, divided by the rows of the whole step where Trainer counts its labels.

        Args:
            outputs: with `logits`, shape (rows, classes).
            labels: shares, shape (rows, classes), or classes, int64, shape (rows,).
            num_items_in_batch: elements of all labels of a step. Default None: the mean over these rows.
        """
        logits = outputs["logits"]
        mixed = labels.is_floating_point()
        smoothing = self.smoothing if mixed else 0.0
        total = F.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=smoothing)
        if num_items_in_batch is None:
            return total / len(labels)
        return total / (num_items_in_batch / (logits.shape[-1] if mixed else 1))


def count_right(prediction: Any) -> dict[str, float]:
    """Return the accuracy in percent, for Trainer's own evaluations."""
    found = torch.as_tensor(prediction.predictions).argmax(-1, keepdim=True)
    return {"accuracy": accuracies(found, torch.as_tensor(prediction.label_ids))["accuracy"]}


def score(arguments: Arguments, model: PreTrainedModel, rows: Rows) -> dict[str, float | int]:
    """Return the accuracies of a model with their standard errors, and the number of images."""
    training = arguments.training
    found, labels = predict_classes(
        model,
        rows,
        collate_images,
        batch_size=training.per_device_eval_batch_size,
        bf16=training.bf16,
        workers=training.dataloader_num_workers,
        progress=not training.disable_tqdm,
    )
    return {**accuracies(found, labels), "images": len(labels)}


def run(arguments: Arguments) -> dict[str, Any]:
    """Train, export, score the exported model, and write `results.json`.

    Returns:
        The contents of `results.json`; an empty dict on all processes but the first.
    """
    data, training = arguments.data, arguments.training
    set_seed(training.seed)
    every_image = load_images(data, "eval")
    images = load_images(data, "train")
    check_classes(images, every_image)
    classes = max(images.classes, every_image.classes, key=len)
    config = make_config(arguments.model, classes)
    channels = channels_of(config)
    chosen = usable(images.sample(data.max_train_images, data.sample_seed), data, channels)
    held_out = usable(every_image.sample(data.max_eval_images, data.sample_seed), data, channels)
    model, trained = load_model(arguments.model, config)
    processor = load_processor(arguments.model, data, config)
    rows = Rows(chosen, processor, data, channels, training=True)
    test = Rows(held_out, processor, data, channels)
    check_runs(model, test)
    check_batch_norm(model, training, rows=len(rows))

    side = image_side(processor)
    scoring = Scoring(
        lambda one: score(arguments, one, test),
        AutoModelForImageClassification.from_pretrained,
        *scored_data(data.dataset_name, held_out.source if data.is_local else None, data.eval_split),
        total=len(every_image),
        works=(looking((channels, *side)),),
        metrics=("accuracy",),
        count="images",
    )
    start = score_start(arguments, model, trained, scoring)
    averages = None if arguments.model.ema_decay is None else Averages(arguments.model.ema_decay)
    trainer = make_trainer(
        arguments,
        model=model,
        train_dataset=rows,
        eval_dataset=test,
        data_collator=collate_images,
        processing_class=processor,
        compute_metrics=count_right,
        compute_loss_func=MixedLoss(training.label_smoothing_factor) if data.mixup else None,
        callbacks=[] if averages is None else [averages],
    )
    if averages is not None:
        averages.trainer = trainer
    facts = {"train_images": len(rows), "image_size": list(side)}
    return finish(arguments, trainer, processor, scoring, start=start, task="image-classification", facts=facts)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the recipe, from the command line or from Python: `main(["config.yaml", "--seed", "1"])`."""
    shown = ("accuracy", "images", "train_seconds")
    return launch(argv, __doc__, _parser(), lambda words: run(parse_arguments(words)), shown)


if __name__ == "__main__":
    run_command(main)
