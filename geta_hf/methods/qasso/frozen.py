"""Tensors that no optimizer steps, as under LoRA: how their groups are scored and forgotten.

Their gradients are never kept: each one appears in backward, is added to a few sums and is dropped. As a frozen tensor
stands still between two steps, Σ ⟨g, x⟩ over micro-batches and processes is exact. For ‖g‖² the sum of their own ‖g‖²
stands in, which leaves out what these gradients have in common; of one micro-batch in one process it is exact.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from geta_hf.config import GETAConfig
from geta_hf.errors import GETAError
from geta_hf.methods.qasso.saliency import sum_others
from geta_hf.methods.qasso.slices import Named, Slice
from geta_hf.qadg.group_labels import Cut
from geta_hf.quantization.lora import merge


@dataclass(frozen=True)
class Adapter:
    """The trained matrices that move a frozen weight: W + scale · B A.

    Attributes:
        a, b: their names; shapes (r, in) and (out, r).
        scale: of their product.
        transposed: whether W is (in, out).
    """

    a: str
    b: str
    scale: float
    transposed: bool = False

    def follow(self, cut: Cut) -> Cut:
        """The cut of A or B that takes the same rows or columns off B A as `cut` takes off W."""
        of_output = cut.dim == (1 if self.transposed else 0)
        return replace(cut, tensor=self.b, dim=0) if of_output else replace(cut, tensor=self.a, dim=1)


@dataclass(frozen=True)
class Frozen:
    """What is not trained though it is cut or quantized.

    Attributes:
        names: the tensors; the base optimizer holds them, but they have no gradient when it steps.
        adapters: weight -> what moves it.
    """

    names: Collection[str] = frozenset()
    adapters: Mapping[str, Adapter] = field(default_factory=dict)

    def merged(self, name: str, named: Named) -> Tensor:
        """The value that the model computes with, of a frozen tensor or any other."""
        value = named[name].detach()
        if name not in self.adapters:
            return value
        own = self.adapters[name]
        return merge(value, named[own.a].detach(), named[own.b].detach(), own.scale, own.transposed)

    def with_adapters(self, cuts: Sequence[Cut]) -> list[Cut]:
        """The cuts, and those of the adapters that follow from them."""
        return [*cuts, *(self.adapters[cut.tensor].follow(cut) for cut in cuts if cut.tensor in self.adapters)]


class Watch:
    """Sums over the gradients of frozen tensors since the last step, each of which exists for an instant.

    Args:
        frozen: the tensors.
        cuts: of any tensors.
        groups: number of groups.
        own_weights: the quantized weights, in the order of their quantizers.
        device: where the tensors are.
    """

    def __init__(
        self, frozen: Frozen, cuts: Sequence[Cut], groups: int, own_weights: Sequence[str], device: torch.device
    ) -> None:
        self.frozen = frozen
        self._layers = {weight: position for position, weight in enumerate(own_weights)}
        self._cuts: dict[str, list[Cut]] = {}
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
