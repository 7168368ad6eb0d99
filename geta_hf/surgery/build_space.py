"""Build a pruning space and let it pass all four gates: the form of `build_space` that users call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from geta_hf import qadg
from geta_hf.qadg import PruningSpace, verify_space
from geta_hf.surgery.trial_cut import try_cuts
from geta_hf.surgery.verify import verify_surgery


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
        prune: kinds, couplings or name patterns to make prunable beside heads and channels; see `apply_policy`.
        keep: kinds, couplings or name patterns to keep whole.
        verify: whether to let the space pass all gates: `verify_space`, then, for a Hugging Face model with weights,
            `verify_surgery`; families that the model's own code can't follow become unprunable.

    Returns:
        Every family found, those that the policy lets QASSO prune with `prunable` set and the others with the reason
        why not, the operators that no rule covers, and the parameters that nothing read.

    Raises:
        GETAError: the model cannot run the batch, returns no tensor, nothing in it may be pruned, an entry of `prune`
            or `keep` matches nothing, or a gate failed.
    """
    space = qadg.build_space(model, batch, prune=prune, keep=keep)
    if not verify:
        return space
    verify_space(model, batch, space)
    if not isinstance(model, PreTrainedModel) or any(parameter.is_meta for parameter in model.parameters()):
        return space  # gate 4 cuts a real Hugging Face model
    space = try_cuts(model, space, batch)
    verify_surgery(model, batch, space)
    return space
