"""Groups and families as plain data: which slices of which tensors are removed together."""

from __future__ import annotations

from dataclasses import dataclass

import torch

KINDS = ("heads", "query_heads", "channels", "head_dim", "residual", "other")
"""Attention heads (with grouped queries: a key-value head and its query heads); query heads evenly across those; MLP,
expert and convolution channels; dims within heads; the residual stream's width; the rest."""

COUPLINGS = ("norm", "tied", "output")
"""A normalisation or a mean over the dim; a tensor tied across the model; a layer that makes an output."""


@dataclass(frozen=True)
class Member:
    """One (tensor, dim) of which a family's groups own slices.

    Attributes:
        tensor: name in the model's `state_dict()` (a parameter, or rarely a buffer).
        dim: the dimension that is cut.
        index: int64, shape (groups, elements), on CPU: row g holds the indices along `dim` that are removed with
            group g.
        consumer: whether a weight reads the groups' output along this dim, as `down.weight` does along its columns.
            Default False.
    """

    tensor: str
    dim: int
    # A head of 64 dims has 64 of them, a channel one.
    index: torch.Tensor
    consumer: bool = False


@dataclass(frozen=True)
class Family:
    """The groups of one kind in one place, such as the attention heads of layer 3.

    Attributes:
        name: module path and kind, such as `encoder.layer.3.attention:heads`; unique in its space.
        kind: one of `KINDS`.
        members: every (tensor, dim) that a group cuts; all have the same number of groups.
        prunable: whether the policy lets QASSO remove groups of this family.
        reason: why not, when not prunable; otherwise empty.
        excludes: names of families that cut the same indices and must not be pruned together with this one.
        couplings: which of `COUPLINGS` it has.
        parameters: elements of parameters that are removed with one group.
        macs: multiply-accumulates of the batch it was built with that are removed with one group, on average.
        counts: numbers of groups that may remain where all families of a kind keep equally many (`uniform`),
            ascending; empty where any will do.
    """

    name: str
    kind: str
    members: tuple[Member, ...]
    prunable: bool
    reason: str = ""
    excludes: tuple[str, ...] = ()
    couplings: tuple[str, ...] = ()
    parameters: int = 0
    macs: int = 0
    counts: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """Return the number of groups."""
        return self.members[0].index.shape[0]


@dataclass(frozen=True)
class UnsupportedOperator:
    """An operator without a rule, or one that a rule refuses: reported, with all that it reads pinned (gate 1).

    Attributes:
        operator: its name, such as `cumprod`.
        module: path of the module that called it; empty for the model itself.
        reason: why it cannot be followed.
        count: how often it occurred there.
    """

    operator: str
    module: str
    reason: str
    count: int = 1
