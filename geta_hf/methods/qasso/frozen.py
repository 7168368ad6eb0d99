"""Score and forget groups of tensors that no optimizer steps, as under LoRA.

Their gradients are never kept: each one appears in the backward pass, is added to a few sums and is dropped. As a
frozen tensor does not change between two steps, Σ ⟨g, x⟩ over micro-batches and processes is exact. ‖g‖² is replaced by
the sum of the micro-batches' own ‖g‖², which ignores what these gradients have in common; of one micro-batch in one
process it is exact.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from geta_hf.config import GETAConfig
from geta_hf.errors import GETAError
from geta_hf.methods.frozen_weights import FrozenWeights
from geta_hf.methods.qasso.slices import Named, Slice, sum_others
from geta_hf.qadg.group_labels import GroupLabels


class GradientSums:
    """Sums over the gradients of frozen tensors since the last step; a gradient itself exists for an instant.

    Args:
        frozen: the tensors.
        labels: the groups of any tensors.
        groups: number of groups.
        own_weights: the quantized weights, in the order of their quantizers.
        device: where the tensors are.
    """

    def __init__(
        self,
        frozen: FrozenWeights,
        labels: Sequence[GroupLabels],
        groups: int,
        own_weights: Sequence[str],
        device: torch.device,
    ) -> None:
        self.frozen = frozen
        self._layers = {weight: position for position, weight in enumerate(own_weights)}
        self._labels: dict[str, list[GroupLabels]] = {}
        for cut in labels:
            self._labels.setdefault(cut.tensor, []).append(cut)
        # The last entry takes the indices that belong to no group.
        self._inner = torch.zeros(groups + 1, device=device)
        self._squares = torch.zeros(len(own_weights), device=device)
        self._handles: list[RemovableHandle] | None = None

    def set_active(self, active: bool, named: Named) -> None:
        """Let the tensors have gradients from now on, each for as long as it takes to add it up; or no longer."""
        if active == (self._handles is not None):
            return
        # Outside the stages that score groups, backward then skips these gradients, as under plain LoRA.
        for name in self.frozen.names:
            named[name].requires_grad_(active)
        for handle in self._handles or ():
            handle.remove()
        self._handles = None
        if active:
            self._handles = [self._hook(name, named[name], named) for name in sorted(self.frozen.names)]

    def _hook(self, name: str, tensor: Tensor, named: Named) -> RemovableHandle:
        @torch.no_grad()
        def note(tensor: Tensor) -> None:
            # A post-accumulate hook: it runs when this tensor's gradient is complete, in the midst of the backward
            # pass.
            assert tensor.grad is not None
            # ∂f/∂W is that of the merged weight too, so ⟨g, x⟩ is taken with W + scale · B A.
            self.add(name, self.frozen.merged(name, named), tensor.grad)
            tensor.grad = None  # so that at most one gradient of a frozen tensor exists at a time

        return tensor.register_post_accumulate_grad_hook(note)

    def add(self, name: str, x: Tensor, gradient: Tensor) -> None:
        """Add what one backward pass gave for a tensor.

        Args:
            name: of the tensor.
            x: the value that the model computed with, W + scale · B A under LoRA.
            gradient: of the loss by x, of the same shape.
        """
        if name in self._layers:
            self._squares[self._layers[name]] += torch.linalg.vector_norm(gradient.float()) ** 2
        labels = self._labels.get(name)
        if labels:
            product = (x * gradient).float()
            for cut in labels:
                cut.sums(self._inner.device).add_to(self._inner, sum_others(product, cut.dim))

    def take(self) -> tuple[Tensor, Tensor]:
        """Return ⟨g, x⟩ of every group, shape (groups,), and ‖g‖² of every weight, shape (layers,).

        Both are of the mean gradient over processes. The sums start again at 0.
        """
        # In one tensor, so that processes exchange a single message.
        total = torch.cat([self._inner, self._squares])
        processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if processes > 1:
            dist.all_reduce(total)
            total /= processes
            total[len(self._inner) :] /= processes  # a second time, since these are squares
        self._inner.zero_()
        self._squares.zero_()
        return total[: len(self._inner) - 1], total[len(self._inner) :]


def forget_frozen(slices: Sequence[Slice], named: Named, steps_remaining: int, families: int) -> Tensor:
    """Shrink every redundant slice to (1 - γ) x with γ = 1 / (K_p - k), in place.

    Rows of W and of B, or columns of W and of A, that shrink alike make those of W + scale · B A shrink so, and at the
    last step they are exactly zero.

    Args:
        slices: of the frozen tensors and their adapters.
        named: parameters by name.
        steps_remaining: K_p - k, at least 1.
        families: number of all families.

    Returns:
        γ, shape (families,); NaN where a family has no redundant group.
    """
    rate = torch.full((families,), torch.nan)
    # The frozen W takes no step of its own, so shrinking in place needs no values from before the step.
    for piece in slices:
        piece.multiply(named[piece.tensor].detach(), 1.0 - 1.0 / steps_remaining)
        rate[piece.families] = 1.0 / steps_remaining
    return rate


def check_rules(config: GETAConfig) -> None:
    """Raise GETAError for a rule that needs full gradients, or steps, of frozen weights."""
    wanted = {
        "saliency": ("fisher", "taylor", "mask_fisher"),
        "forgetting": ("uniform",),
        "bit_rule": ("sensitivity", "ppsg"),
    }
    for name, choices in wanted.items():
        value = getattr(config, name)
        if value not in choices:
            raise GETAError(
                f"{name} = {value!r} needs gradients and steps of weights that are frozen; "
                f"choose {' or '.join(map(repr, choices))}"
            )
