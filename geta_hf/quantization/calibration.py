"""Attach quantizers to the inputs of layers, with ranges measured on real batches (calibration)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from geta_hf.errors import GETAError
from geta_hf.quantization.attach import matching, quantized_layers
from geta_hf.quantization.clipping import (
    BINS,
    PER_OCTAVE,
    Histogram,
    check_clipping,
    count_magnitudes,
    largest_magnitudes,
    search_clipping,
)
from geta_hf.quantization.layers import QuantizedLayer
from geta_hf.quantization.quantizer import Quantizer
from geta_hf.utils.module_state import eval_mode
from geta_hf.utils.shards import over_processes


class _Range:
    """A histogram of magnitudes whose range doubles whenever a larger one comes.

    The activations of all batches are not kept, and their largest magnitude is known only at the end.
    """

    def __init__(self) -> None:
        self.largest = self.top = 0.0
        self.negative = False
        self.counts: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Count the elements of one more tensor, of any shape."""
        rows = x.detach().reshape(1, -1)
        largest = float(largest_magnitudes(rows)) if rows.numel() else 0.0
        self.negative = self.negative or bool((rows < 0).any())
        # max() would drop a NaN that comes second.
        self.largest = largest if math.isnan(largest) else max(self.largest, largest)
        if not 0.0 < self.largest < math.inf:
            return
        # A power of 2, so that the bins of all processes are the same ones.
        self.top = self.top or 2.0 ** math.ceil(math.log2(largest))
        # Doubling the range moves every bin by exactly one octave, so no count has to be guessed.
        self.widen(largest)
        counts = count_magnitudes(rows, torch.tensor([self.top], device=rows.device))
        self.counts = counts if self.counts is None else self.counts + counts

    def widen(self, largest: float) -> None:
        """Double the range until it reaches to a magnitude."""
        while self.top < largest:
            self.top *= 2
            if self.counts is not None:
                beyond = self.counts[:, BINS - PER_OCTAVE :].sum(dim=1)
                self.counts = torch.cat([self.counts.new_zeros(1, PER_OCTAVE), self.counts[:, :-PER_OCTAVE]], dim=1)
                self.counts[:, -1] += beyond

    def clipping_value(self, bits: int, method: str) -> float:
        """Return q_m: the largest magnitude (`max`), or that of least squared error at `bits` bits (`mse`)."""
        if method == "max":
            return self.largest
        assert self.counts is not None
        # The range may reach to twice the largest magnitude.
        return min(self.largest, float(search_clipping(self.counts, [bits])[1]) * self.top)

    def histogram(self, clipping_value: float) -> Histogram | None:
        """Return what was counted, relative to a clipping value; None where nothing was."""
        return None if self.counts is None else Histogram(self.counts[0].cpu(), self.top / clipping_value)


def attach_input_quantizers(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    initial_bits: float = 16,
    target_bits: int = 8,
    clipping: str = "mse",
    learn_t: bool = False,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    unsigned: bool = False,
) -> dict[str, QuantizedLayer]:
    """Attach a learnable quantizer to the inputs of quantized layers, in place, with ranges found on real batches.

    The model runs the batches in evaluation mode, its weights quantized at their present bit widths; its training
    flags, hooks and random state are restored afterwards. Batch norm that has seen no batch yet, as in a model with
    random weights, uses the statistics of each batch. Every layer gets a quantizer of its own, even where weights
    are tied. Where several processes train, each runs batches of its own, and ranges are those of all of them.

    Training then needs memory for one more tensor per layer: the input before it was rounded, in addition to the
    rounded one that the layer itself saves for its backward pass (paper Sec. 3).

    Args:
        model: with weight quantizers attached by `attach_quantizers`.
        batches: keyword arguments of the model's forward, one mapping per batch; moved to the model's device.
        initial_bits: bit width that sets the first d. Default 16.
        target_bits: bit width for which `clipping="mse"` chooses q_m. Default 8.
        clipping: `mse` (default) for the least squared error at `target_bits`, `max` for the largest magnitude seen.
        learn_t: train the exponent t. Default False, which means t = 1.
        include: regular expressions searched in the names of quantized layers. Default None, which selects all.
        exclude: regular expressions for layers that are not selected after all. Default none.
        unsigned: let inputs of which no batch has a negative value have no negative codes, but twice as many others.
            Default False.

    Returns:
        The layers whose input is quantized now, by name.

    Raises:
        GETAError: no batch, or one that the model cannot run; no quantized layer; a layer that quantizes its input
            already, that no batch reached, or whose input is not finite or all zero. No layer is changed then.

    Example:
        >>> import torch
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> sizes = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 32, "num_hidden_layers": 1}
        >>> model = BertForSequenceClassification(BertConfig(vocab_size=30, **sizes))
        >>> batch = {"input_ids": torch.arange(1, 9)[None]}
        >>> from geta_hf import attach_input_quantizers, attach_quantizers
        >>> _ = attach_quantizers(model)
        >>> _ = attach_input_quantizers(model, [batch], initial_bits=8)
        >>> layer = model.bert.encoder.layer[0].intermediate.dense
        >>> round(float(layer.input_quantizer.bits()), 4)
        8.0
    """
    check_clipping(clipping)
    layers = _chosen(model, include, exclude)
    ranges = _calibrate(model, layers, batches)
    _merge(list(ranges.values()))
    # After all batches, and for the width that the inputs will have: at 16 bits almost nothing would be clipped.
    # A grid without negative codes has as many steps as one of a bit more.
    positive = {name: unsigned and not found.negative for name, found in ranges.items()}
    values = {
        name: _checked(name, found).clipping_value(target_bits + positive[name], clipping)
        for name, found in ranges.items()
    }
    # Only now that nothing can fail: a model must not end with half of its layers changed.
    for name, layer in layers.items():
        device = layer.weight.device
        layer.input_quantizer = Quantizer(values[name], initial_bits, learn_t, device, unsigned=positive[name])
        layer.input_quantizer.histogram = ranges[name].histogram(values[name])
        layer.input_quantizer.train(layer.training)
    return layers


def _chosen(model: nn.Module, include: Sequence[str] | None, exclude: Sequence[str]) -> dict[str, QuantizedLayer]:
    layers = quantized_layers(model)
    chosen = layers if include is None else matching(layers, include)
    excluded = matching(layers, exclude)
    chosen = {name: layer for name, layer in chosen.items() if name not in excluded}
    if not chosen:
        raise GETAError(f"{type(model).__name__} has no quantized layer to choose from; call attach_quantizers first")
    for name, layer in chosen.items():
        if layer.input_quantizer is not None:
            raise GETAError(f"{name} quantizes its input already; call detach_quantizers first")
    return chosen


def _calibrate(
    model: nn.Module, layers: Mapping[str, QuantizedLayer], batches: Iterable[Mapping[str, Any]]
) -> dict[str, _Range]:
    """Return the ranges of what came into every layer while the model ran the batches."""
    ranges = {name: _Range() for name in layers}
    # Iterating over one batch would give the names of its tensors.
    if isinstance(batches, Mapping):
        raise GETAError("batches must be several batches, not one mapping; pass [batch]")
    ran = 0
    with ExitStack() as stack:
        stack.enter_context(eval_mode(model))
        stack.enter_context(batch_statistics(model))
        for name, layer in layers.items():
            stack.enter_context(_watching(layer, ranges[name]))
        for batch in batches:
            _run(model, batch)
            ran += 1
    if not ran:
        raise GETAError("no batch to find the range of activations on; pass at least one in batches")
    return ranges


def _merge(ranges: Sequence[_Range]) -> None:
    """Add what other processes counted, in place: each has batches of its own, and all must get the same quantizers."""
    # A NaN may be lost in a maximum; an infinite range is refused in the same way.
    own = [(math.inf if math.isnan(one.largest) else one.largest, one.top, float(one.negative)) for one in ranges]
    shared = over_processes(torch.tensor(own, dtype=torch.float64), largest=True).tolist()
    counts = torch.zeros(len(ranges), BINS)
    for position, (one, (largest, top, negative)) in enumerate(zip(ranges, shared, strict=True)):
        one.largest = one.largest if math.isnan(one.largest) else largest
        one.negative = bool(negative)
        one.top = one.top or top
        one.widen(top)
        if one.counts is not None:
            counts[position] = one.counts[0].cpu()
    counts = over_processes(counts)
    for one, total in zip(ranges, counts, strict=True):
        if bool(total.any()):
            device = total.device if one.counts is None else one.counts.device
            one.counts = total[None].to(device)


def _run(model: nn.Module, batch: Mapping[str, Any]) -> None:
    device = next(model.parameters()).device
    inputs = {name: item.to(device) if isinstance(item, Tensor) else item for name, item in batch.items()}
    try:
        model(**inputs)
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
        raise GETAError(
            f"{type(model).__name__} cannot run the calibration batch with {sorted(inputs)}: {error}"
        ) from error


def _checked(name: str, found: _Range) -> _Range:
    """Return the range; raise GETAError unless a quantizer can be made for it."""
    if not math.isfinite(found.largest):
        raise GETAError(
            f"the input of {name} reaches {found.largest} on the calibration batches; check the model and its batches"
        )
    if found.largest == 0.0:
        raise GETAError(
            f"no calibration batch reached {name} with anything but zeros; pass batches that do, or exclude the layer"
        )
    return found


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Let batch norm that has seen no batch normalize by each batch's own statistics for a while, and keep none.

    Its running statistics are still mean 0 and variance 1. By these, the signal of a network with random weights fades
    from layer to layer, and ranges found on it would clip everything once training normalizes.
    """
    unseen = [
        (module, module.momentum, module.num_batches_tracked.clone())
        for module in model.modules()
        if isinstance(module, _BatchNorm)
        and module.num_batches_tracked is not None
        and not module.num_batches_tracked.is_meta
        and not int(module.num_batches_tracked)
    ]
    try:
        for module, _, _ in unseen:
            module.training = True
            module.momentum = 0.0  # nothing of a batch enters the running statistics
        yield
    finally:
        for module, momentum, count in unseen:
            module.training = False
            module.momentum = momentum
            module.num_batches_tracked.copy_(count)  # type: ignore[union-attr]


@contextmanager
def _watching(layer: nn.Module, found: _Range) -> Iterator[None]:
    def watch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Some models pass the input by keyword.
        found.add(args[0] if args else next(iter(kwargs.values())))

    handle = layer.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
