"""Take the experts of a mixture apart, so that each is a pair of linear layers, and put them together again.

transformers holds the experts of a layer in tensors of three dims, (experts, out, in) or (experts, in, out), which no
quantizer covers. Taken apart, every expert has layers of its own: with its own bit width, its own channels to remove
and its own covariance, as any other linear layer. What such a module computes is the same; tokens are sent to the
experts by the model's own router.

A model whose experts are apart says so in its config (`unstacked_experts`), by which folders are read again. Folders
carry a copy of this module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from geta_hf.errors import GETAError

MARK = "unstacked_experts"
"""The attribute of a config that says that each expert has layers of its own."""

EVENLY = "evenly"
"""See `routed_evenly`."""

_RECORDED = "batched_mm"
"""Recordings choose this implementation of experts, which needs no look at what the router chose."""

_UP = ("gate_up_proj", "up_proj")
_DOWN = "down_proj"
_BIAS = "_bias"


class UnstackedExperts(nn.Module):
    """Mixin of a module of experts whose tensors were taken apart: its children `0`, `1`, ... have `up` and `down`.

    Attributes:
        up_name: the attribute that held the first matrices, `gate_up_proj` or `up_proj`.
        plain_class: class of the module before.
        routing: None, or `EVENLY`.
    """

    up_name: str
    plain_class: type[nn.Module]
    routing: str | None
    config: Any
    has_gate: bool
    has_post_expert_norm: bool = False  # older transformers has neither such experts nor the attribute
    is_transposed: bool
    act_fn: Callable[[Tensor], Tensor]
    _apply_gate: Callable[[Tensor], Tensor]

    @property
    def experts(self) -> list[nn.ModuleDict]:
        """The experts, in the order in which the router counts them."""
        return [module for name, module in self._modules.items() if name.isdecimal()]  # type: ignore[misc]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of what the chosen experts give.

        Args:
            hidden_states: shape (tokens, hidden).
            top_k_index: int64, shape (tokens, k): the experts of each token.
            top_k_weights: shape (tokens, k): how much each counts.
        """
        if self.config._experts_implementation == _RECORDED:
            return self._all(hidden_states, top_k_index, top_k_weights)
        if self.routing == EVENLY or _has_no_data(hidden_states):
            return self._chosen(hidden_states, top_k_weights, *self._even_routes(top_k_index))
        return self._chosen(hidden_states, top_k_weights, *self._routes(top_k_index))

    @torch.no_grad()
    def contributions(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Iterator[tuple[float, int]]:
        """Yield for each expert Σ over its tokens of router weight · norm of its output, and how many tokens it has.

        Args:
            hidden_states, top_k_index, top_k_weights: as in `forward`.
        """
        order, counts = self._routes(top_k_index)
        parts = hidden_states[order // top_k_weights.shape[-1]].split(counts)
        weights = top_k_weights.reshape(-1)[order].double().split(counts)
        for expert, part, weight in zip(self.experts, parts, weights, strict=True):
            norms = self._run(expert, part).double().norm(dim=-1)
            yield float((weight.abs() * norms).sum()), len(part)

    def _all(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Run every expert on every token: the same operators whatever the router chooses."""
        total = torch.zeros_like(hidden_states)
        for place, expert in enumerate(self.experts):
            weight = (top_k_weights * (top_k_index == place)).sum(-1, keepdim=True)
            total = total + self._run(expert, hidden_states) * weight
        return total.to(hidden_states.dtype)

    def _chosen(self, hidden_states: Tensor, top_k_weights: Tensor, order: Tensor, counts: list[int]) -> Tensor:
        """Run every expert on its tokens.

        Args:
            hidden_states, top_k_weights: as in `forward`.
            order: int64, shape (choices,): places among the tokens · k choices, those of the first expert first.
            counts: how many choices each expert has.
        """
        k = top_k_weights.shape[-1]
        parts = hidden_states[order // k].split(counts)
        # In training an expert without tokens runs all the same: with gradients of zero, all processes agree on them.
        found = [
            self._run(expert, part)
            for expert, part in zip(self.experts, parts, strict=True)
            if self.training or part.shape[0]
        ]
        if not found:
            return torch.zeros_like(hidden_states)
        weighted = torch.cat(found) * top_k_weights.reshape(-1)[order, None]
        every = weighted.new_zeros(top_k_weights.numel(), weighted.shape[-1]).index_copy(0, order, weighted)
        return every.view(*top_k_weights.shape, -1).sum(dim=1).to(hidden_states.dtype)

    def _routes(self, top_k_index: Tensor) -> tuple[Tensor, list[int]]:
        chosen = top_k_index.reshape(-1)
        # Whatever lies behind the experts, as some models' choice of none does, adds nothing.
        counts = torch.bincount(chosen, minlength=len(self.experts))[: len(self.experts)].tolist()
        return torch.argsort(chosen, stable=True)[: sum(counts)], counts

    def _even_routes(self, top_k_index: Tensor) -> tuple[Tensor, list[int]]:
        total, number = top_k_index.numel(), len(self.experts)
        counts = [total // number + (place < total % number) for place in range(number)]
        return torch.arange(total, device=top_k_index.device), counts

    def _run(self, expert: nn.ModuleDict, x: Tensor) -> Tensor:
        """Return what one expert gives, shape (tokens, hidden)."""
        inner = expert["up"](x)
        inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
        out: Tensor = expert["down"](inner)
        if self.has_post_expert_norm:
            out = self.post_expert_norm(out)  # type: ignore[operator]
        return out

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, experts apart".removeprefix(", ")


def _has_no_data(x: Tensor) -> bool:
    # Meta and fake tensors have no values to look at.
    return x.is_meta or type(x).__name__ == "FakeTensor"


def stacked_experts(model: nn.Module) -> dict[str, Any]:
    """Return the modules that hold the experts of a layer in tensors of three dims, by path.

    They are known by what transformers' `use_experts_implementation` gives a class, not by their architecture.
    """
    return {name: module for name, module in model.named_modules() if _up_name(module) is not None}


def unstacked_experts(model: nn.Module) -> dict[str, UnstackedExperts]:
    """Return the modules of experts that were taken apart, by path."""
    return {name: module for name, module in model.named_modules() if isinstance(module, UnstackedExperts)}


def _up_name(module: nn.Module) -> str | None:
    """Return the name of a module's first stacked tensor; None for any other module."""
    if not all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed")):
        return None
    up, down = _UP[not module.has_gate], module._parameters.get(_DOWN)
    first = module._parameters.get(up)
    fits = first is not None and down is not None and first.dim() == down.dim() == 3
    return up if fits else None


@cache
def _unstacked_class(original: Any) -> type[nn.Module]:
    # Cached, since modules of one class have to be of one class afterwards.
    return type(f"Unstacked{original.__name__}", (UnstackedExperts, original), {})


def is_unstacked(config: Any) -> bool:
    """Return whether a config says that each expert has layers of its own."""
    return bool(getattr(config, MARK, False))


@torch.no_grad()
def unstack_experts(model: nn.Module) -> None:
    """Give every expert of a model linear layers of its own, in place; nothing happens where there are no stacks.

    The layers are `<experts>.<place>.up` and `.down`. Their weights are copies, (out, in), one module at a time, and
    the stacked tensors are freed. On meta only shapes are made.

    Args:
        model: any module; without quantizers.
    """
    found = stacked_experts(model)
    for module in found.values():
        _unstack(module)
    if found or unstacked_experts(model):
        for config in _configs(model):
            setattr(config, MARK, True)


def _unstack(module: Any) -> None:
    up_name = _up_name(module)
    assert up_name is not None
    stacks = {}
    for name in (up_name, _DOWN):
        bias = module._parameters.pop(f"{name}{_BIAS}", None)
        stacks[name] = (module._parameters.pop(name), bias)
    number = stacks[up_name][0].shape[0]
    for place in range(number):
        layers = {
            kind: _layer(weight, bias, place, module.is_transposed)
            for kind, (weight, bias) in zip(("up", "down"), stacks.values(), strict=True)
        }
        module.add_module(str(place), nn.ModuleDict(layers).train(module.training))
    original = type(module)
    module.__class__ = _unstacked_class(original)  # type: ignore[arg-type]  # a class can be hashed
    module.up_name = up_name
    module.plain_class = original
    module.routing = None
    # transformers would initialize the stacked tensors, which are gone.
    module._is_hf_initialized = True


def _layer(stack: nn.Parameter, biases: nn.Parameter | None, place: int, transposed: bool) -> nn.Linear:
    weight = stack[place].t() if transposed else stack[place]
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=biases is not None, dtype=weight.dtype)
    layer.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format), stack.requires_grad)
    if biases is not None:
        layer.bias = nn.Parameter(biases[place].detach().clone(), biases.requires_grad)
    return layer


def _dense(layer: Any) -> Tensor:
    weight: Tensor = layer.weight
    return weight


@torch.no_grad()
def restack_experts(model: nn.Module, weight_of: Callable[[Any], Tensor] = _dense) -> None:
    """Put the experts of a model together again, in place: the opposite of `unstack_experts`.

    Args:
        model: any module; its experts may be cut, all those of a layer alike.
        weight_of: returns the weight of a layer of an expert. Default: its `weight`.

    Raises:
        GETAError: the experts of a layer differ in size; the model is not changed then.
    """
    found = unstacked_experts(model)
    for path, module in found.items():
        sizes = {tuple(_dense(layer).shape for layer in expert.values()) for expert in module.experts}
        if len(sizes) > 1:
            raise GETAError(
                f"the experts of {path} kept different numbers of channels, which one tensor for all of them can't "
                f"hold; train with uniform=True in GETAConfig, or export in the geta format"
            )
    for module in found.values():
        _restack(module, weight_of)
    for config in _configs(model):
        vars(config).pop(MARK, None)


def _restack(module: UnstackedExperts, weight_of: Callable[[Any], Tensor]) -> None:
    experts = module.experts
    for kind, name in (("up", module.up_name), ("down", _DOWN)):
        layers: list[Any] = [expert[kind] for expert in experts]
        weights = [weight_of(layer) for layer in layers]
        stack = torch.stack([weight.t() if module.is_transposed else weight for weight in weights])
        module.register_parameter(name, nn.Parameter(stack.contiguous(), layers[0].weight.requires_grad))
        if layers[0].bias is not None:
            biases = torch.stack([layer.bias for layer in layers])
            module.register_parameter(f"{name}{_BIAS}", nn.Parameter(biases, layers[0].bias.requires_grad))
    for name in [name for name in module._modules if name.isdecimal()]:
        del module._modules[name]
    module.__class__ = module.plain_class  # type: ignore[assignment]  # plain again from here on
    for name in ("up_name", "plain_class", "routing", "_is_hf_initialized"):
        del module.__dict__[name]


def apart_class(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return a class whose models have their experts apart as soon as they are built, where their config says so.

    A training checkpoint of such a model is loaded by it.
    """

    def __init__(self: PreTrainedModel, config: Any, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, config, *args, **kwargs)
        if is_unstacked(config):
            unstack_experts(self)

    return type(model_class.__name__, (model_class,), {"__init__": __init__, "__module__": model_class.__module__})


def _configs(model: nn.Module) -> list[Any]:
    """Return the configs of a model and of every model inside it, each of which may be saved alone."""
    return [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]


@contextmanager
def experts_apart(model: nn.Module, always: bool = False) -> Iterator[None]:
    """Take the experts of a model apart; on a failure, or always, they are put together again at the end.

    Args:
        model: any module; those of its experts that are apart already remain so.
        always: put them together again on success, too. Default False.
    """
    stacked = bool(stacked_experts(model))
    unstack_experts(model)
    try:
        yield
    except BaseException:
        if stacked:
            restack_experts(model)
        raise
    if stacked and always:
        restack_experts(model)


@contextmanager
def routed_evenly(model: nn.Module) -> Iterator[None]:
    """Let every expert of a model that is apart get its share of the tokens, whatever the router says, for a while.

    What is counted then, such as multiplications, is what to expect of any data: k of the experts for each token.
    """
    found = unstacked_experts(model).values()
    before = [module.routing for module in found]
    for module in found:
        module.routing = EVENLY
    try:
        yield
    finally:
        for module, routing in zip(found, before, strict=True):
            module.routing = routing
