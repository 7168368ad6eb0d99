"""Refuse, when the trainer is made, what the export would refuse after hours of training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel, TrainingArguments
from transformers.utils import logging

from geta_hf.errors import GETAError
from geta_hf.quantization.layers import check_parameter
from geta_hf.serialization.packed_layers import packed_layers
from geta_hf.surgery.rebuild import check_rebuilds
from geta_hf.utils.model_io import Batch

logger = logging.get_logger(__name__)


def check_is_model(model: Any) -> None:
    """Raise GETAError for what is no module at all, such as a name on the Hub, or was exported already."""
    if isinstance(model, str):
        raise GETAError(
            f"model is the string {model!r}; pass a model, such as "
            f"AutoModelForSequenceClassification.from_pretrained({model!r})"
        )
    if not isinstance(model, nn.Module):
        raise GETAError(f"model is a {type(model).__name__}; pass a transformers model")
    if packed := packed_layers(model):
        raise GETAError(
            f"{type(model).__name__} is compressed already ({next(iter(packed))} and others hold packed weights); load "
            f"the dense model"
        )


def check_model(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Check what shows on a model alone, without a batch.

    Args:
        model: dense.
        layers: those to quantize, by path.

    Raises:
        GETAError: a model without a config, a layer whose weight is no parameter, or values that cannot be trained.
    """
    if not isinstance(model, PreTrainedModel):
        raise GETAError(
            f"GETATrainer exports transformers models, which their config rebuilds, and {type(model).__name__} is "
            f"none: derive it from PreTrainedModel, with a config class, or use build_space and QASSO in your own loop"
        )
    for name, layer in layers.items():
        check_parameter(layer, name)
    check_values(model)


def check_exports(model: nn.Module, batch: Batch, layers: Iterable[str]) -> None:
    """Check that a folder could hold the model; see `geta_hf.surgery.rebuild.check_rebuilds`.

    Args:
        model: that `check_model` has accepted.
        batch: keyword arguments of its forward, without labels.
        layers: paths of those to quantize.

    Raises:
        GETAError: its class and config build another model.
    """
    assert isinstance(model, PreTrainedModel)
    check_rebuilds(model, batch, layers)


@torch.no_grad()
def check_values(model: nn.Module) -> None:
    """Raise GETAError for a tensor that is not finite, or in double precision.

    Infinity in a buffer is allowed, since masks hold it.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta or not tensor.is_floating_point() or not tensor.numel():
            continue
        is_parameter = isinstance(tensor, nn.Parameter)
        if is_parameter and tensor.dtype == torch.float64:
            raise GETAError(f"{name} is torch.float64, which quantizers and exports do not keep; call model.float()")
        # One pass without a copy; NaN is both the least and the largest.
        largest = max(map(abs, (float(value) for value in torch.aminmax(tensor.detach().flatten()))), key=_bad_last)
        if largest != largest or (is_parameter and largest == float("inf")):
            raise GETAError(f"{name} holds {largest} before training; load the weights again, or initialize the tensor")


def _bad_last(value: float) -> float:
    return float("inf") if value != value else value


def check_length(args: TrainingArguments) -> None:
    """Raise GETAError for a training without a step."""
    if args.max_steps == 0:
        raise GETAError(
            "max_steps = 0 trains no step; set it to how many there are to be, or to -1 for num_train_epochs"
        )
    if args.max_steps < 0 and args.num_train_epochs <= 0:
        raise GETAError(f"num_train_epochs = {args.num_train_epochs} trains no step; set it above 0, or max_steps")


def check_batch_norm(model: nn.Module, args: TrainingArguments, batch: Batch | None = None, rows: int = 0) -> None:
    """Raise GETAError where batch norm in training mode would see batches of one row, whose statistics say nothing.

    Warn where its running statistics will be nearly those of the last batch alone.

    Args:
        model: any module.
        args: with the batch size.
        batch: one of those that the data gives, if known: a collator may make several rows of one.
        rows: of the data, if known: the last batch may have a single row.
    """
    norms = [(name, module) for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    if not norms:
        return
    found, module = norms[0]
    size = args.train_batch_size
    several = any(isinstance(item, torch.Tensor) and item.shape[:1] > (1,) for item in (batch or {}).values())
    if size == 1 and not several:
        raise GETAError(
            f"batch norm ({found}) needs batches of 2 rows or more, and per_device_train_batch_size is 1: "
            f"its statistics would be those of one row; raise it (gradient accumulation does not help)"
        )
    if size > 1 and rows % size == 1 and not args.dataloader_drop_last and args.world_size == 1:
        raise GETAError(
            f"batch norm ({found}) needs batches of 2 rows or more, and the last of {rows} rows in batches of {size} "
            f"has one; pass dataloader_drop_last, or choose another batch size"
        )
    if (module.momentum or 0) > 0.5:
        # Once, since a recipe checks before the trainer does.
        logger.warning_once(
            f"batch norm ({found}) has momentum {module.momentum}: in evaluation the model runs on the statistics of "
            f"little more than its last batch. In PyTorch momentum is the share of the new batch, in TensorFlow of the "
            f"old ones; set module.momentum of all batch norms, in the recipe by --batch_norm_momentum 0.1"
        )
