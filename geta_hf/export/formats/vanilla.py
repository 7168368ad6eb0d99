"""The vanilla format: an ordinary dense checkpoint, which plain transformers, vLLM or a GGUF converter loads."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from geta_hf.errors import GETAError
from geta_hf.export.formats.plain import plain_models
from geta_hf.quantization.experts import stacked_experts, unstacked_experts
from geta_hf.serialization.encode import activation_bits
from geta_hf.surgery.compare_outputs import attention_outputs, prove_alike
from geta_hf.surgery.verify import check_generation
from geta_hf.utils.model_io import to_device
from geta_hf.utils.module_state import HALVES

logger = logging.get_logger(__name__)


def write_vanilla(model: PreTrainedModel, folder: Path, batch: Mapping[str, Tensor]) -> None:
    """Write a compressed model as an ordinary dense checkpoint that needs no code of ours.

    The weights are the quantized values, each in the dtype it has; the file is as small as the pruning made it and no
    smaller. config.json says what was cut (fewer heads, fewer channels), so every layer must have kept equally many.
    Experts whose rows are no longer a multiple of 16 bytes run one by one, by `experts_implementation` in config.json.

    Args:
        model: compressed, or plain; not changed.
        folder: an existing empty folder.
        batch: what the proof runs on.

    Raises:
        GETAError: layers that differ, a cut that the configuration cannot express, activations that are rounded, or
            outputs that differ once reloaded.
    """
    write_plain(model, folder, batch, lambda plain: plain.save_pretrained(folder), "vanilla")


def write_plain(
    model: PreTrainedModel,
    folder: Path,
    batch: Mapping[str, Tensor],
    save: Callable[[PreTrainedModel], None],
    name: str,
) -> None:
    """Save a model by an ordinary configuration, reload it as anyone would, and prove that it computes the same.

    Args:
        model: as in `write_vanilla`.
        folder: an existing empty folder.
        batch: what the proof runs on.
        save: writes a model of an ordinary configuration into the folder.
        name: of the format, for errors.

    Raises:
        GETAError: as `write_vanilla` does.
    """
    rounded = activation_bits(model)
    # An ordinary reader would compute with float inputs, so the folder would give other outputs without a word.
    if rounded:
        raise GETAError(
            f"the {name} format has no place for rounded activations, which {len(rounded)} layers have (the first is "
            f"{next(iter(rounded))}); export in the geta format, or train on float activations"
        )
    inputs = to_device(batch, model.device)
    failure: GETAError | None = None
    for plain in plain_models(model):
        _settle_experts(plain, model)
        save(plain)
        try:
            return _prove(model, folder, inputs, name)
        except GETAError as error:
            failure = error
        # Sizes alone may allow several configurations (half the heads, or half of each head). This one computes
        # something else, so its files must not mix with those of the next.
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert failure is not None
    raise failure


def _settle_experts(plain: PreTrainedModel, model: PreTrainedModel) -> None:
    """Let config.json say that experts run one by one, where their remaining rows do not suit the fused kernel."""
    # Experts that were apart run one by one in this model, whatever their sizes.
    if unstacked_experts(model) and any(_unaligned(stack) for stack in _stacks(plain)):
        eager = True
    else:
        eager = model.config._experts_implementation == "eager"
    if eager and model._can_set_experts_implementation():
        plain.config.experts_implementation = "eager"
        logger.warning(
            "config.json says experts_implementation = eager, which is slower: the fused kernel needs rows of a "
            "multiple of 16 bytes, which the cut experts do not have; train with multiple_of = 8 to use it"
        )


def _stacks(model: PreTrainedModel) -> list[Tensor]:
    """Return the tensors of stacked experts."""
    modules = stacked_experts(model).values()
    return [tensor for module in modules for tensor in module._parameters.values() if tensor.dim() == 3]


def _unaligned(stack: Tensor) -> bool:
    return any(size * stack.element_size() % 16 for size in stack.shape[1:])


@torch.no_grad()
def _prove(model: PreTrainedModel, folder: Path, batch: Mapping[str, Tensor], name: str) -> None:
    # No dtype is named: the folder has to say by itself in which one it is loaded.
    reloaded = type(model).from_pretrained(folder)
    reloaded.to(model.device)  # type: ignore[arg-type]
    try:
        reloaded(**batch)  # some formats decode their weights in the first pass
    except RuntimeError as error:
        raise GETAError(f"the {name} folder loads, but {type(model).__name__} can't run it: {error}") from error
    prove_alike(model, attention_outputs(model, batch), reloaded, batch, name)
    if model.can_generate() and model.dtype not in HALVES:  # or rounding chooses between tokens
        check_generation(model, reloaded, batch)
