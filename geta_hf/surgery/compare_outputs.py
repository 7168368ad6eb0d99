"""Prove that two models compute the same: every export ends with it, or is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from geta_hf.errors import GETAError
from geta_hf.quantization import quantized_layers, without_quantizers
from geta_hf.utils import module_state
from geta_hf.utils.model_io import Batch, float_tensors, named_outputs, outputs_by_name, to_device
from geta_hf.utils.process_state import exclusive, full_precision, random_state_kept
from geta_hf.utils.residence import visiting

# Largest difference allowed, as a share of the largest logit (of 1 where logits are small): rounding differs with the
# sizes of the matrices, and nothing else may. Models in double precision may compute a few steps in single.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# Through tens of layers rounding may grow beyond this. In the next higher precision it is gone, and a wrong cut is not.
WIDENED = {*module_state.HALVES, torch.float32}
# What rounding in single precision may grow to. Beyond this the higher precision computes something else: quantized
# weights take their place there, which hides a model that reads its weights past the quantizers.
GROWN = 1e-3
# Masked positions hold fillers such as the lowest float. They must match, but as part of the scale they would make the
# tolerance infinite: a filler of 1e38 would allow any difference of the real logits.
_FILLER = 1e4
_PIECE = 1 << 20  # elements compared at once

Outputs = dict[str, dict[str, Tensor]]


def attention_outputs(
    model: PreTrainedModel, batch: Batch, every: bool = True, device: torch.device | None = None
) -> Outputs:
    """Return every floating-point output of the model in evaluation mode, under each attention implementation it has.

    Both are compared, since eager and sdpa attention read different sizes of the module. The model is unchanged
    afterwards.

    Args:
        model: any Hugging Face model.
        batch: keyword arguments of its forward; moved to the model's device.
        every: False to run the implementation that the model has now, and no other. Default True.
        device: to run on, where the model lies in the CPU's memory; the outputs are then on the CPU. Default None:
            the model's own.

    Returns:
        attention implementation (`eager`, `sdpa`) -> output name -> tensor.

    Raises:
        GETAError: the model cannot run the batch, or returns no tensor.
    """
    with visiting(model, device), comparison_mode(model):
        inputs = to_device(batch, model.device)
        chosen = attentions(model) if every else (_OWN,)
        outputs = {implementation: _outputs(model, inputs, implementation) for implementation in chosen}
    return outputs if device is None else to_device(outputs, "cpu")


_OWN = "own"


def attentions(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the attention implementations that a model is tried with; `own` is what each of its parts has now."""
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    # Setting an implementation for a model sets it for all its parts, so one part without sdpa rules sdpa out.
    return ("eager", "sdpa") if all(part._supports_sdpa for part in parts) else (_OWN, "eager")


def set_attention(model: PreTrainedModel, implementation: str) -> None:
    """Set one of `attentions`."""
    if implementation != _OWN:
        model.set_attn_implementation(implementation)


def _outputs(model: PreTrainedModel, inputs: Batch, implementation: str) -> dict[str, Tensor]:
    set_attention(model, implementation)
    try:
        # Some draw what they mask in evaluation, too.
        with random_state_kept(module_state.devices_of(model), seed=0):
            # The class's forward: accelerate wraps an instance's own in autocast, which the copies do not have.
            result = type(model).forward(model, **inputs)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
        raise GETAError(
            f"{type(model).__name__} cannot run the batch with {sorted(inputs)} ({implementation} attention): {error}"
        ) from error
    tensors = float_tensors(result)
    if not tensors:
        raise GETAError(f"{type(model).__name__} returns no tensor to compare, only {sorted(named_outputs(result))}")
    return tensors


@contextmanager
def comparison_mode(model: PreTrainedModel) -> Iterator[None]:
    """Enter evaluation mode without gradients, with outputs by name, in the full precision of the model's dtype.

    All flags and settings come back afterwards.

    What a module cached of its weights in evaluation mode is dropped on both sides: they may have changed before, and
    may change again. Modules drop it as they enter training mode.
    """
    configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    implementations = [(config, config._attn_implementation) for config in configs]
    # Exclusive, since the random state that comes back afterwards is that of the process.
    with exclusive(), full_precision(), module_state.eval_mode(model), outputs_by_name(model):
        model.train().eval()
        try:
            yield
        finally:
            model.train()
            for config, implementation in implementations:
                # Not by the property, whose setter would give all nested configurations this one's value.
                config._attn_implementation_internal = implementation


def prove_alike(
    first: PreTrainedModel,
    outputs: Outputs,
    second: PreTrainedModel,
    batch: Batch,
    what: str,
    found: Outputs | None = None,
    device: torch.device | None = None,
) -> float:
    """Compare two models by `prove_equal`, but do not let rounding alone decide.

    That of 16 bits is coarse enough to send a token to another expert, and that of single precision grows through tens
    of layers. What differs is therefore compared again in the next higher precision, with the same weights, where a
    wrong cut differs as well.

    Args:
        first: the reference, quantized or not.
        outputs: of `first` on the batch.
        second, what: the model under test, and how to call it in an error.
        batch: keyword arguments of both.
        found: outputs of `second` on the batch, where they are at hand.
        device: as in `attention_outputs`. The higher precision takes twice the memory, so it runs where the models are.

    Returns:
        The largest absolute difference.

    Raises:
        GETAError: an output differs by more than the tolerance.
    """
    try:
        found = attention_outputs(second, batch, device=device) if found is None else found
        return prove_equal(outputs, found, first.dtype, what)
    except GETAError as error:
        if first.dtype not in WIDENED:
            raise
        differs = error
    try:
        with widened(first):
            expected = attention_outputs(first, batch)
        with widened(second):
            computed = attention_outputs(second, batch)
    except GETAError as error:  # packed layers, for one, may not compute in double precision
        if first.dtype in module_state.HALVES:
            raise
        raise differs from error
    if first.dtype not in module_state.HALVES:
        check_same_function(outputs, expected, differs)
    return prove_equal(expected, computed, torch.float32, what)


def check_same_function(outputs: Outputs, expected: Outputs, differs: GETAError) -> None:
    """Raise `differs` where a model in single precision computes something else in double precision."""
    try:
        prove_equal(outputs, expected, torch.float32, "widened", tolerance=GROWN)
    except GETAError as error:
        raise differs from error


@contextmanager
def widened(model: PreTrainedModel) -> Iterator[None]:
    """Let a model compute in the next higher precision for a while, on the very weights that it computes with now."""
    with torch.no_grad():
        # Rounded in 16 bits: rounding in single precision would give some weights another code.
        rounded = {layer.weight: layer.quantized_weight() for layer in quantized_layers(model).values()}
    before = {weight: weight.data for weight in rounded}
    with without_quantizers(model):
        try:
            for weight, value in rounded.items():
                weight.data = value
            with module_state.in_next_precision(model):
                yield
        finally:
            for weight, data in before.items():
                weight.data = data


def prove_equal(
    reference: Outputs,
    found: Outputs,
    dtype: torch.dtype,
    what: str,
    least_scale: float = 1.0,
    tolerance: float | None = None,
) -> float:
    """Compare two models' outputs.

    Args:
        reference: of the trained model.
        found: of the model under test, on the same batch.
        dtype: the model's, which sets the tolerance.
        what: how to call the model under test in an error.
        least_scale: what an output's scale is taken as where all its values are smaller.
        tolerance: share of the scale that is allowed. Default None: that of the dtype.

    Returns:
        The largest absolute difference.

    Raises:
        GETAError: an output differs by more than the tolerance; the message names it.
    """
    largest = 0.0
    for implementation, tensors in reference.items():
        for name, expected in tensors.items():
            where = f"the {what} model's {name} ({implementation} attention)"
            actual = found[implementation].get(name)
            if actual is None or actual.shape != expected.shape:
                shape = None if actual is None else tuple(actual.shape)
                raise GETAError(f"{where} has shape {shape}, the trained model's {tuple(expected.shape)}")
            difference = _difference(expected, actual)
            allowed = (TOLERANCE[dtype] if tolerance is None else tolerance) * _scale(expected, least_scale)
            if not difference <= allowed:  # also true of NaN
                raise GETAError(
                    f"{where} differs by {difference:.3g} from the trained model's; allowed is {allowed:.3g}"
                )
            largest = max(largest, difference)
    return largest


def _difference(expected: Tensor, actual: Tensor) -> float:
    """Return the largest absolute difference, piece by piece: logits are many, and double precision doubles them."""
    pieces = zip(expected.flatten().split(_PIECE), actual.to(expected.device).flatten().split(_PIECE), strict=True)
    # Equal infinities (masked positions) differ by NaN, though they agree.
    gaps = [torch.where(a == b, 0.0, (a.double() - b.double()).abs()).max() for a, b in pieces if a.numel()]
    return float(torch.stack(gaps).max()) if gaps else 0.0


def _scale(expected: Tensor, least: float) -> float:
    sizes = (piece.abs() for piece in expected.flatten().split(_PIECE) if piece.numel())
    largest = [torch.where(size < _FILLER, size, 0.0).max() for size in sizes]
    return max(least, float(torch.stack(largest).max())) if largest else least
