"""Build a pruning space and let it pass all four gates: the form of `build_space` that users call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

from torch import nn
from transformers import PreTrainedModel

from geta_hf import qadg
from geta_hf.qadg import PruningSpace, verify_space
from geta_hf.qadg.tracing.record_forward import check_same_path
from geta_hf.surgery.record import Recordings, record_batch, record_sizes
from geta_hf.surgery.trial_cut import try_cuts
from geta_hf.surgery.verify import verify_surgery
from geta_hf.utils.process_state import exclusive


def build_space(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    prune: Sequence[str] = (),
    keep: Sequence[str] = (),
    verify: bool = False,
) -> PruningSpace:
    """Find what may be removed from `model`: the quantization-aware dependency graph (paper Sec. 4, Alg. 1).

    The forward runs twice, to see whether it takes the same path, without computing with the parameters, which may lie
    on any device or on meta; the model is as before afterwards. Quantizers, own or foreign, change nothing about the
    groups. Caches are switched off.

    Args:
        model: a Hugging Face model, or any module that `model(**batch)` runs.
        batch: one batch of real inputs; one or two rows will do, with padding if training has it.
        prune: kinds, couplings or name patterns to make prunable in addition to heads and channels; see `apply_policy`.
        keep: kinds, couplings or name patterns that must not be pruned.
        verify: whether to let the space pass all gates: `verify_space`, then, for a Hugging Face model with weights,
            `verify_surgery`; families that the model's own code can't follow become unprunable, on meta too.

    Returns:
        Every family found, those that the policy lets QASSO prune with `prunable` set and the others with the reason
        why not, the operators that no rule covers, and the parameters that nothing read.

    Raises:
        GETAError: the model cannot run the batch, returns no tensor, nothing in it may be pruned, an entry of `prune`
            or `keep` matches nothing, or a gate failed.

    Example:
        >>> import torch
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> sizes = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 32, "num_hidden_layers": 1}
        >>> model = BertForSequenceClassification(BertConfig(vocab_size=30, **sizes))
        >>> batch = {"input_ids": torch.arange(1, 9)[None]}
        >>> from geta_hf import build_space
        >>> space = build_space(model, batch)
        >>> [(family.kind, family.size) for family in space.prunable]
        [('heads', 4), ('channels', 32)]
    """
    if not verify:
        return qadg.build_space(model, batch, prune=prune, keep=keep)
    space, recordings = prepare_space(model, batch, prune=prune, keep=keep)
    # Gates 2 and 3 first: they name the wrong family, where a failure of gate 4 may be due to any of those removed.
    verify_space(model, batch, space, flow=None if recordings is None else recordings.flow)
    if _can_be_cut(model):
        verify_surgery(model, batch, space)
    return space


@exclusive()
def prepare_space(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    prune: Sequence[str] = (),
    keep: Sequence[str] = (),
    narrow: Callable[[PruningSpace], PruningSpace] | None = None,
    labels: Mapping[str, Any] | None = None,
    required: bool = True,
) -> tuple[PruningSpace, Recordings | None]:
    """Build a pruning space and make unprunable, by trial cuts, what the model's own code can't follow.

    Three recordings serve both: the batch (the space comes from it), the same batch again to see whether the forward
    takes the same path, and all variations of the batch together. Of a model on meta the sizes alone are tried, and a
    module that is not Hugging Face's is recorded twice, and nothing is tried.

    Args:
        model, batch, prune, keep: as in `build_space`; the model is unchanged afterwards.
        narrow: what else is to become unprunable before anything is cut in trial, such as parameters that are not
            trained: takes the space and returns the narrower one.
        labels: entries that only training passes; with them cuts are compared in training mode as well.
        required: whether it is an error if nothing may be pruned. Default True.

    Returns:
        The space, and what was recorded of the model; None for a model that surgery does not cut.

    Raises:
        GETAError: as `build_space` and `try_cuts`.
    """
    if not _can_be_cut(model):
        space = qadg.build_space(model, batch, prune=prune, keep=keep, required=required)
        space = space if narrow is None else narrow(space)
        if isinstance(model, PreTrainedModel):
            space = try_cuts(model, space, batch, required=required)
        return space, None
    first = record_batch(model, batch)
    check_same_path(model, batch, first.graph)
    space = qadg.build_space(model, batch, prune=prune, keep=keep, flow=first.flow, required=required)
    # Narrowed first, so that no time goes into cutting what will not be pruned anyway.
    if narrow is not None:
        space = narrow(space)
    recordings = record_sizes(model, batch, first)
    return try_cuts(model, space, batch, recordings, labels, required), recordings


def _can_be_cut(model: nn.Module) -> TypeGuard[PreTrainedModel]:
    """Return whether gate 4 applies: it cuts a real Hugging Face model."""
    return isinstance(model, PreTrainedModel) and not any(parameter.is_meta for parameter in model.parameters())
