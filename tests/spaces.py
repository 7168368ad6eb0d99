"""Pruning spaces for tests of other rooms than `qadg`: each is found once, however many tests use such a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from geta_hf import qadg
from geta_hf.qadg import PruningSpace
from geta_hf.surgery import build_space as surgery
from geta_hf.surgery.record import Recordings

_found: dict[Any, PruningSpace] = {}


def build_space(model: PreTrainedModel, batch: Mapping[str, Tensor], **policy: Sequence[str]) -> PruningSpace:
    """Return what `geta_hf.qadg.build_space` does, from a dict if the same modules and batch have been seen.

    A space does not depend on the values of weights and cannot be changed, so tests may share it. A class of a test's
    own may compute by anything, so its models share nothing.
    """
    if not _is_of_transformers(model):
        return qadg.build_space(model, batch, **policy)
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
    labels: Mapping[str, Tensor] | None = None,
) -> tuple[PruningSpace, Recordings | None]:
    """Return the space that `geta_hf.surgery.build_space.prepare_space` does, as `build_space` here."""
    if not _is_of_transformers(model):
        return surgery.prepare_space(model, batch, prune=prune, keep=keep, narrow=narrow, labels=labels)
    trained = tuple(parameter.requires_grad for parameter in model.parameters())
    key = ("prepared", _described(model, batch), tuple(prune), tuple(keep), narrow is None, trained, *(labels or ()))
    if key not in _found:
        _found[key], _ = surgery.prepare_space(model, batch, prune=prune, keep=keep, narrow=narrow, labels=labels)
    return _found[key], None


def _is_of_transformers(model: PreTrainedModel) -> bool:
    return type(model).__module__.startswith("transformers.")


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
