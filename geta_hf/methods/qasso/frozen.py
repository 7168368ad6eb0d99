"""Tensors that no optimizer steps, as under LoRA: how their groups are scored and forgotten.

Their gradients are never kept: each one appears in backward, is added to a few sums and is dropped. As a frozen tensor
stands still between two steps, Σ ⟨g, x⟩ over micro-batches and processes is exact. For ‖g‖² the sum of their own ‖g‖²
stands in, which leaves out what these gradients have in common; of one micro-batch in one process it is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from geta_hf.config import GETAConfig
from geta_hf.errors import GETAError
from geta_hf.methods.frozen_weights import FrozenWeights
from geta_hf.methods.qasso.saliency import sum_others
from geta_hf.methods.qasso.slices import Named, Slice
from geta_hf.qadg.group_labels import GroupLabels


class GradientSums:
    """Sums over the gradients of frozen tensors since the last step, each of which exists for an instant.

    Args:
        frozen: the tensors.
        cuts: of any tensors.
        groups: number of groups.
        own_weights: the quantized weights, in the order of their quantizers.
        device: where the tensors are.
    """

    def __init__(
        self,
        frozen: FrozenWeights,
        cuts: Sequence[GroupLabels],
        groups: int,
        own_weights: Sequence[str],
        device: torch.device,
    ) -> None:
        self.frozen = frozen
        self._layers = {weight: position for position, weight in enumerate(own_weights)}
        self._cuts: dict[str, list[GroupLabels]] = {}
        for cut in cuts:
            self._cuts.setdefault(cut.tensor, []).append(replace(cut, label=cut.label.to(device)))
        self._inner = torch.zeros(groups + 1, device=device)
        self._squares = torch.zeros(len(own_weights), device=device)
        self._handles: list[RemovableHandle] | None = None

    def follow(self, wanted: bool, named: Named) -> None:
        """Let the tensors have gradients from now on, each for as long as it takes to add it up; or no more."""
        if wanted == (self._handles is not None):
            return
        tensors = {name: named[name].requires_grad_(wanted) for name in sorted(self.frozen.names)}
        for handle in self._handles or ():
            handle.remove()
        self._handles = [self._hook(name, tensor, named) for name, tensor in tensors.items()] if wanted else None

    def _hook(self, name: str, tensor: Tensor, named: Named) -> RemovableHandle:
        @torch.no_grad()
        def note(tensor: Tensor) -> None:
            assert tensor.grad is not None
            self.add(name, self.frozen.merged(name, named), tensor.grad)
            tensor.grad = None

        return tensor.register_post_accumulate_grad_hook(note)

    def add(self, name: str, x: Tensor, gradient: Tensor) -> None:
        """Add what one backward pass gave for a tensor of value x."""
        if name in self._layers:
            self._squares[self._layers[name]] += torch.linalg.vector_norm(gradient.float()) ** 2
        if cuts := self._cuts.get(name):
            product = (x * gradient).float()
            for cut in cuts:
                self._inner.index_add_(0, cut.label, sum_others(product, cut.dim))

    def take(self) -> tuple[Tensor, Tensor]:
        """⟨g, x⟩ of every group, shape (groups,), and ‖g‖² of every weight, shape (size,), of the mean over processes.

        The sums start anew.
        """
        total = torch.cat([self._inner, self._squares])
        if dist.is_available() and dist.is_initialized() and (processes := dist.get_world_size()) > 1:
            dist.all_reduce(total)
            total /= processes
            total[len(self._inner) :] /= processes
        self._inner.zero_()
        self._squares.zero_()
        return total[: len(self._inner) - 1], total[len(self._inner) :]


def forget(slices: Sequence[Slice], named: Named, steps_left: int, families: int) -> Tensor:
    """x_R <- (1 - γ) x_R with γ = 1 / steps left on every redundant slice, in place.

    Rows of W and of B, or columns of W and of A, that shrink alike make those of W + scale · B A shrink so, and at the
    last step they are exactly zero.

    Returns:
        γ, shape (families,); NaN where a family has no redundant group.
    """
    rate = torch.full((families,), torch.nan)
    for piece in slices:
        piece.multiply(named[piece.tensor].detach(), 1.0 - 1.0 / steps_left)
        rate[piece.families] = 1.0 / steps_left
    return rate


def check_rules(config: GETAConfig) -> None:
    """Raises GETAError for a rule that needs whole gradients, or steps, of what is frozen."""
    wanted = {"saliency": ("fisher", "taylor"), "forgetting": ("uniform",), "bit_rule": ("sensitivity", "ppsg")}
    for name, choices in wanted.items():
        if (value := getattr(config, name)) not in choices:
            raise GETAError(
                f"{name} = {value!r} needs gradients and steps of weights that are frozen; "
                f"choose {' or '.join(map(repr, choices))}"
            )
