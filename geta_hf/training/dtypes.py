"""Keep the types of the trained tensors until the export, or say that they were changed."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.utils import logging

from geta_hf.utils.module_state import kept_tensors

logger = logging.get_logger(__name__)

DTypes = dict[str, torch.dtype]


def unrounded(model: nn.Module, args: TrainingArguments) -> AbstractContextManager[None]:
    """Return a context after which a model that Trainer converts to 16 bits for an evaluation is as it was trained.

    Trainer would leave it in 16 bits, and an export would hold rounded weights.
    """
    return kept_tensors(model) if args.bf16_full_eval or args.fp16_full_eval else nullcontext()


def dtypes_of(model: nn.Module) -> DTypes:
    """Return the type of every parameter, by name."""
    return {name: parameter.dtype for name, parameter in model.named_parameters()}


def warn_of_other_dtypes(model: nn.Module, trained: Mapping[str, torch.dtype]) -> None:
    """Warn of parameters that have another type than they had when training ended; an export holds them as they are.

    Args:
        model: to be exported.
        trained: of `dtypes_of`; empty where nothing is known.
    """
    changed = {name: dtype for name, dtype in dtypes_of(model).items() if trained.get(name, dtype) != dtype}
    if changed:
        name, dtype = next(iter(changed.items()))
        logger.warning(
            "%d parameters have another dtype than when training ended, such as %s (%s, trained in %s): the export "
            "holds them as they are now; export before the model is converted to keep what was trained",
            len(changed),
            name,
            dtype,
            trained[name],
        )
