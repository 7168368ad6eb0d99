"""How much a group is worth: sums over all that leaves with it, and the two scores made of them.

A group's vector [x]_g is every slice that leaves with it, in all tensors. All functions return one value a group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from geta_hf.qadg.group_labels import Cut
from geta_hf.utils.shards import Shard, add_up, local, shard_of

Product = Callable[[Tensor, Tensor], Tensor]


def group_sums(cuts: Sequence[Cut], named: Mapping[str, Tensor], groups: int, product: Product) -> Tensor:
    """Σ of product(x, g) over each group's slices, fp32, shape (groups,).

    Args:
        cuts: what the groups cut; labels may be on the parameters' device.
        named: parameters by name. A parameter without a gradient counts as g = 0.
        groups: number of groups.
        product: elementwise, of a parameter and its gradient.
    """
    device = local(next(iter(named.values()))).device
    whole, split = torch.zeros(2, groups + 1, device=device)
    held: Shard | None = None
    for cut in cuts:
        parameter = named[cut.tensor]
        x = local(parameter.detach())
        g = torch.zeros_like(x) if parameter.grad is None else local(parameter.grad)
        per_slice = sum_others(product(x, g).float(), cut.dim)
        shard = shard_of(parameter, cut.tensor)
        if shard is None:
            whole.index_add_(0, cut.label, per_slice)
        else:
            split.index_add_(0, shard.part(cut.label, cut.dim), per_slice)
            held = shard
    return (whole + add_up(split, held))[:groups]


def sum_others(values: Tensor, dim: int) -> Tensor:
    """Σ over all dimensions but one, shape (size of it,)."""
    others = [other for other in range(values.dim()) if other != dim]
    return values.sum(others) if others else values


def taylor_scores(mean_square: Tensor, cost: Tensor) -> Tensor:
    """√(EMA of ⟨g, x⟩²) per parameter removed: the loss a group's removal costs, by what it saves."""
    return mean_square.sqrt() / cost


def fisher_scores(mean_square: Tensor, cost: Tensor) -> Tensor:
    """EMA of ⟨g, x⟩² per parameter removed.

    With the Hessian taken as E[g gᵀ], half of E⟨g, x⟩² is the loss that removing a group costs near an optimum, and the
    costs of many groups add up. Its root does not: that grows with √n under noise, so that per parameter large groups
    would always seem the cheaper ones.
    """
    return mean_square / cost


def hesso_scores(inner: Tensor, grad_square: Tensor, square: Tensor, cost: Tensor) -> Tensor:
    """HESSO's saliency S(g) = Σ_c w_c s_c(g) / ‖s_c‖₂ with w_c = 0.2 over five criteria (paper Sec. 5).

    The criteria are magnitude ‖x‖, mean magnitude ‖x‖/√n, cosine of (x, -g) + 1, and the first- and second-order
    Taylor estimates |⟨g, x⟩| and ½⟨g, x⟩² of the change in loss (the Hessian taken as g gᵀ). Norms are over all groups.

    Args:
        inner: ⟨g, x⟩ of every group of the space, shape (|G|,).
        grad_square, square: ‖g‖² and ‖x‖² of every group, shape (|G|,).
        cost: number of parameters n of every group, shape (|G|,).
    """
    magnitude = square.sqrt()
    cosine = -inner / (magnitude * grad_square.sqrt()).clamp_min(1e-30)
    criteria = (
        magnitude,
        magnitude / cost.sqrt(),
        cosine + 1,
        inner.abs(),
        0.5 * inner**2,
    )
    return sum((0.2 * score / score.norm().clamp_min(1e-30) for score in criteria), torch.zeros_like(inner))
