"""Pruning spaces for tests of other rooms than `qadg`: each is found once, however many tests use such a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from geta_hf import qadg
from geta_hf.qadg import PruningSpace
from geta_hf.surgery import build_space as surgery

_found: dict[Any, PruningSpace] = {}


def build_space(model: PreTrainedModel, batch: Mapping[str, Tensor], **policy: Sequence[str]) -> PruningSpace:
    """Return what `geta_hf.qadg.build_space` does, from a dict if the same modules and batch have been seen.

    A space does not depend on the values of weights and cannot be changed, so tests may share it.
    """
    key = ("built", _described(model, batch), str(policy))
    if key not in _found:
        _found[key] = qadg.build_space(model, batch, **policy)
    return _found[key]


def prepare_space(
    model: PreTrainedModel,
    batch: Mapping[str, Tensor],
    *,
    prune: Sequence[str],
    keep: Sequence[str],
    narrow: Callable[[PruningSpace], PruningSpace] | None,
) -> tuple[PruningSpace, None]:
    """Return the space that `geta_hf.surgery.build_space.prepare_space` does, as `build_space` here."""
    trained = tuple(parameter.requires_grad for parameter in model.parameters())
    key = ("prepared", _described(model, batch), tuple(prune), tuple(keep), narrow is None, trained)
    if key not in _found:
        _found[key], _ = surgery.prepare_space(model, batch, prune=prune, keep=keep, narrow=narrow)
    return _found[key], None


def _described(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> tuple[Any, ...]:
    """Return all that a space depends on."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    first: dict[int, str] = {}
    config = getattr(model, "config", None)
    return (
        config and (config.to_json_string(use_diff=False), getattr(config, "_attn_implementation", None)),
        tuple((name, type(module), module.training) for name, module in model.named_modules()),
        # The first name of a tied tensor says with which it is tied.
        tuple((first.setdefault(id(tensor), name), tensor.shape, tensor.dtype) for name, tensor in tensors),
        tuple((name, tensor.dtype, str(tensor.tolist())) for name, tensor in batch.items()),
    )
