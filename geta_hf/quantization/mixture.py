"""Compute a layer on a mixture of its weight at several bit widths: Σ_p θ_p Q_p(W), with gradients for W and θ.

A search trains θ, the shares of the widths. Each width p has clipping values of its own, c_p, which are not trained
here; its grid is symmetric and uniform, as that of every `Quantizer`, with d_p = c_p / (2^(p-1) - 1), or with the four
levels ±c_p/3 and ±c_p at 2 bits. The gradient of Q_p for W is 1 within c_p and 0 beyond it.

All widths are computed in one pass over W, and in one pass over W and its gradient, where kernels are compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from geta_hf.quantization.functional import EAGER
from geta_hf.quantization.kernels import choose, must_stay_plain
from geta_hf.quantization.kernels.blocked import BLOCK
from geta_hf.quantization.kernels.compiled import Attempt
from geta_hf.quantization.maths import FOUR_LEVEL_BITS

Mix = Callable[..., Tensor]
Gradients = Callable[..., tuple[Tensor, Tensor]]


@dataclass
class Mixture:
    """What a layer's weight and its inputs are multiplied by in a search.

    Attributes:
        shares: θ, shape (widths, 1, 1), or (widths, rows, 1) with shares for each output channel.
        clips: c_p, in one of these shapes; where the weight is stored transposed, (widths, 1, rows).
        levels: of each width, as `levels_of` gives them, fp32, shape (widths,).
        inputs: what each input is multiplied by, shape (inputs,); None where nothing is.
        outputs: what each output is multiplied by, its bias included, shape (outputs,); None where nothing is.
    """

    shares: Tensor
    clips: Tensor
    levels: Tensor
    inputs: Tensor | None = None
    outputs: Tensor | None = None

    def scaled_inputs(self, x: Tensor, channel_dim: int = -1) -> Tensor:
        """Return a layer's input, with each channel multiplied by its factor."""
        return _scaled(x, self.inputs, channel_dim)

    def scaled_outputs(self, out: Tensor, channel_dim: int = -1) -> Tensor:
        """Return a layer's output, with each channel multiplied by its factor."""
        return _scaled(out, self.outputs, channel_dim)


def levels_of(widths: Sequence[int], device: torch.device | None = None, four_levels: bool = False) -> Tensor:
    """Return how many steps the clipping value of each width is away from zero, fp32, shape (widths,).

    On a grid of whole steps that is the largest code, 2^(p-1) - 1. On one of four levels it is 1.5, and what is rounded
    to are the middles between whole steps.

    Args:
        widths: integers of at least 2.
        device: of the result. Default None: the CPU.
        four_levels: whether 2 bits have four levels. Default False.
    """
    found = [float(2 ** (width - 1) - 1) for width in widths]
    if four_levels:
        found = [1.5 if width == FOUR_LEVEL_BITS else steps for width, steps in zip(widths, found, strict=True)]
    return torch.tensor(found, device=device)


# --- the pure functions -----------------------------------------------------------------------------------------------


def mix(weight: Tensor, shares: Tensor, clips: Tensor, levels: Tensor) -> Tensor:
    """Return Σ_p θ_p Q_p(W), in the shape and dtype of W.

    Args:
        weight: shape (a, b).
        shares, clips: shape (widths, …), each part of which broadcasts against W.
        levels: shape (widths,).
    """
    w = weight.float()
    total = torch.zeros_like(w)
    for number in range(shares.shape[0]):
        total = total + shares[number] * _rounded(w, clips[number], levels[number])
    return total.to(weight.dtype)


def mix_gradients(grad: Tensor, weight: Tensor, shares: Tensor, clips: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of W and of θ.

    - ∂/∂W = g Σ_p θ_p [|W| <= c_p]
    - ∂/∂θ_p = Σ g Q_p(W), over all dims that θ_p is broadcast along

    Args:
        grad: gradient with respect to the mixture, shape of `weight`.
        weight, shares, clips, levels: as in `mix`.
    """
    w = weight.float()
    g = grad.float()
    factor = torch.zeros_like(w)
    of_shares = []
    for number in range(shares.shape[0]):
        clip = clips[number]
        factor = factor + torch.where(w.abs() <= clip, shares[number], 0.0)
        of_shares.append((g * _rounded(w, clip, levels[number])).sum_to_size(shares[number].shape))
    return (g * factor).to(weight.dtype), torch.stack(of_shares)


def _rounded(w: Tensor, clip: Tensor, levels: Tensor) -> Tensor:
    step = clip / levels
    # Half a step where levels are the middles between steps, by arithmetic, so that one kernel serves every layer.
    shift = levels - torch.floor(levels)
    return (torch.round(torch.clamp(w, -clip, clip) / step - shift) + shift) * step


# --- by which kernel --------------------------------------------------------------------------------------------------


def _blocked_mix(weight: Tensor, shares: Tensor, clips: Tensor, levels: Tensor) -> Tensor:
    run: Mix = mix
    return torch.cat([run(*block, levels) for block in _blocks(weight, (weight,), shares, clips)])


def _blocked_gradients(
    grad: Tensor, weight: Tensor, shares: Tensor, clips: Tensor, levels: Tensor
) -> tuple[Tensor, Tensor]:
    run: Gradients = mix_gradients
    found = [run(*block, levels) for block in _blocks(weight, (grad, weight), shares, clips)]
    of_weight, of_shares = zip(*found, strict=True)
    joined = torch.cat(of_shares, dim=1) if shares.shape[1] > 1 else torch.stack(of_shares).sum(0)
    return torch.cat(of_weight), joined


def _blocks(weight: Tensor, along: Sequence[Tensor], *values: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield tensors of W's shape, and values for each width, in blocks of rows that fit the cache."""
    rows = max(1, BLOCK * len(weight) // max(1, weight.numel()))
    for start in range(0, len(weight), rows):
        part = slice(start, start + rows)
        yield *(x[part] for x in along), *(value[:, part] if value.shape[1] > 1 else value for value in values)


@cache
def _functions(name: str) -> tuple[Mix, Gradients]:
    """Return `mix` and `mix_gradients` as a kernel of this name runs them."""
    if name in ("compiled", "triton"):  # the compiler writes Triton where there is a GPU
        return Attempt(mix, _blocked_mix), Attempt(mix_gradients, _blocked_gradients)
    return (_blocked_mix, _blocked_gradients) if name == "blocked" else (mix, mix_gradients)


def _choose(weight: Tensor) -> tuple[Mix, Gradients]:
    return _functions(choose(weight, EAGER).name)


# --- layers -----------------------------------------------------------------------------------------------------------


class _MixedWeight(torch.autograd.Function):
    """Save W alone: it is the parameter itself, so this costs no memory, and the widths are computed again."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, shares: Tensor, clips: Tensor, levels: Tensor, *untrained: Tensor) -> Tensor:
        functions = _choose(weight)
        ctx.save_for_backward(weight, shares, clips, levels, *untrained)
        ctx.gradients = functions[1]
        return functions[0](weight.flatten(1), shares, clips, levels).view(weight.shape).data

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, shares, clips, levels, *untrained = ctx.saved_tensors
        of_weight, of_shares = ctx.gradients(grads[0].flatten(1), weight.flatten(1), shares, clips, levels)
        return of_weight.view(weight.shape), of_shares, None, None, *(torch.zeros_like(value) for value in untrained)


class _MixedLinear(torch.autograd.Function):
    """Save the input and W, and compute the mixture again in backward, as `linear._QuantizedLinear` does."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        shares: Tensor,
        clips: Tensor,
        levels: Tensor,
        inputs: Tensor | None,
        transposed: bool,
        *untrained: Tensor,
    ) -> Tensor:
        functions = _choose(weight)
        mixed = functions[0](weight, shares, clips, levels)
        out = F.linear(_scaled(x, inputs), mixed.t() if transposed else mixed, bias)
        ctx.save_for_backward(x.to(out.dtype), weight, shares, clips, levels, inputs, *untrained)
        ctx.functions, ctx.transposed = functions, transposed
        return out.data

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, shares, clips, levels, inputs, *untrained = ctx.saved_tensors
        run_mix, run_gradients = ctx.functions
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        grad_x = grad_bias = grad_weight = grad_shares = grad_inputs = None
        flat = x.reshape(-1, x.shape[-1])
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[6]:
            mixed = run_mix(weight, shares, clips, levels).to(grad.dtype)
            of_scaled = grad @ (mixed.t() if ctx.transposed else mixed)
            grad_x = _scaled(of_scaled, inputs).view(x.shape)
            if inputs is not None:
                grad_inputs = (of_scaled.float() * flat).sum(0)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[3]:
            used = _scaled(flat, inputs)
            of_mixed = used.t() @ grad if ctx.transposed else grad.t() @ used
            grad_weight, grad_shares = run_gradients(of_mixed, weight, shares, clips, levels)
        zeros = [torch.zeros_like(value) for value in untrained]
        return grad_x, grad_weight, grad_bias, grad_shares, None, None, grad_inputs, None, *zeros


def _scaled(x: Tensor, factors: Tensor | None, channel_dim: int = -1) -> Tensor:
    if factors is None:
        return x
    shape = [1] * x.dim()
    shape[channel_dim] = -1
    return x * factors.to(x.dtype).view(shape)


def mixed_weight(weight: Tensor, mixture: Mixture, untrained: Sequence[Tensor] = ()) -> Tensor:
    """Return the mixture of a weight of any number of dims, differentiable in it and in the shares.

    Args:
        weight: output channels first.
        mixture: with θ and clipping values.
        untrained: parameters that have no part in it, but are to have a gradient of zero: data parallel training waits
            for one of every trained parameter.
    """
    if must_stay_plain(weight):
        return _plain_mix(weight.flatten(1), mixture).view(weight.shape)
    return _MixedWeight.apply(weight, mixture.shares, mixture.clips, mixture.levels, *untrained)


def mixed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mixture: Mixture,
    transposed: bool = False,
    untrained: Sequence[Tensor] = (),
) -> Tensor:
    """Return a linear layer on a mixture, which is computed again in backward: no copy of the weight is kept.

    Args:
        x: (…, in).
        weight: (out, in), or (in, out) where `transposed`.
        bias: (out,) or None.
        mixture: with θ, clipping values and factors.
        transposed: see `weight`. Default False.
        untrained: as in `mixed_weight`.

    Returns:
        (…, out).
    """
    if must_stay_plain(x, weight):
        mixed = _plain_mix(weight, mixture)
        out = F.linear(mixture.scaled_inputs(x), mixed.t() if transposed else mixed, bias)
    else:
        own = mixture
        out = _MixedLinear.apply(x, weight, bias, own.shares, own.clips, own.levels, own.inputs, transposed, *untrained)
    return mixture.scaled_outputs(out)


def _plain_mix(weight: Tensor, mixture: Mixture) -> Tensor:
    """Return the mixture by ordinary operators, with the same gradients."""
    total = torch.zeros_like(weight, dtype=torch.float32)
    w = weight.float()
    for number, share in enumerate(mixture.shares):
        clip = mixture.clips[number]
        clipped = torch.clamp(w, -clip, clip)
        rounded = clipped + (_rounded(w, clip, mixture.levels[number]) - clipped).detach()
        total = total + share * rounded
    return total.to(weight.dtype)
