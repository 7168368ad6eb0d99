"""The forwards that are recorded of a model before surgery: each may read attributes that the others do not.

One forward shows only what it runs. Eager attention reads a number of heads that sdpa never asks for, a cache is made
with sizes that a plain forward does not need, and a batch whose size happens to equal a head's hides which of the two a
reshape meant. An attribute that no recording shows keeps its old value, and the cut model then fails or, worse,
computes something else.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from geta_hf.errors import GETAError
from geta_hf.qadg.propagation.element_ids import PINNED
from geta_hf.qadg.propagation.flow import Flow
from geta_hf.qadg.tracing.graph import Value
from geta_hf.qadg.tracing.record_forward import main_tensors
from geta_hf.surgery.compare_outputs import attentions, comparison_mode, set_attention
from geta_hf.surgery.size_equations import WANTED
from geta_hf.surgery.size_trace import SizeTrace, trace_sizes
from geta_hf.utils.model_io import Batch, named_outputs
from geta_hf.utils.module_state import running


@dataclass(frozen=True)
class Recordings:
    """What was recorded of one model on one batch, as plain data that is handed from step to step.

    Attributes:
        traces: the batch as it is under the model's own attention first, then its variations, in one recording or one
            each.
    """

    traces: tuple[SizeTrace, ...]

    @property
    def flow(self) -> Flow:
        """The propagated graph of the batch as it is, from which a pruning space can be built and verified."""
        return self.traces[0].flow


@dataclass(frozen=True)
class _Variation:
    """Another way to run a model: on `batch`, under an attention implementation, in one pass or token by token."""

    batch: Batch
    attention: str | None = None
    in_steps: bool = False


def record_sizes(model: PreTrainedModel, batch: Batch, first: SizeTrace | None = None) -> Recordings:
    """Record the forward on the batch, and once more with all its variations in one recording.

    The variations are another shape, the tokens but the last followed by the last with the cache (generating models),
    and the other attention implementations. They run one after the other in a single recording. Only where that fails,
    or ties together what the first recording keeps apart, is each of them recorded alone.

    Only the first recording has to succeed: whatever the others would have shown, the proof after surgery runs too.

    Args:
        model: unchanged afterwards.
        batch: one batch of real inputs.
        first: a recording of `batch` by `record_batch` that is at hand.

    Raises:
        GETAError: the model cannot run the batch.
    """
    first = record_batch(model, batch) if first is None else first
    with comparison_mode(model):
        variations = _variations(model, batch)
        together = _try(model, _joined(variations), _all_of(model, variations))
        if together and _keeps_apart(first.flow, together[0].flow):
            return Recordings((first, *together))
        return Recordings((first, *(trace for variation in variations for trace in _record_alone(model, variation))))


def record_batch(model: PreTrainedModel, batch: Batch) -> SizeTrace:
    """Record the forward on the batch as it is, under the model's own attention.

    Raises:
        GETAError: the model cannot run the batch.
    """
    with comparison_mode(model):
        return trace_sizes(model, batch, WANTED)


def _variations(model: PreTrainedModel, batch: Batch) -> list[_Variation]:
    found = [_Variation(other_shape(model, batch))]
    if model.can_generate():
        found.append(_Variation(batch, in_steps=True))
    # Last, since nothing sets the model's own implementation again before the recording ends.
    own = model.config._attn_implementation
    for attention in attentions(model):
        if attention not in ("own", own):
            found.append(_Variation(batch, attention))
    return found


def _try(model: PreTrainedModel, batch: Batch, mode: AbstractContextManager[None]) -> list[SizeTrace]:
    try:
        with mode:
            return [trace_sizes(model, batch, WANTED)]
    except GETAError:
        return []


# --- each variation alone -----------------------------------------------------------------------------------------


def _record_alone(model: PreTrainedModel, variation: _Variation) -> list[SizeTrace]:
    if variation.attention is not None:
        set_attention(model, variation.attention)
    return _try(model, variation.batch, stepping(model) if variation.in_steps else nullcontext())


# --- all of them in one recording ---------------------------------------------------------------------------------


def _joined(variations: Sequence[_Variation]) -> dict[str, Any]:
    """Return the inputs of all variations, each name prefixed with the place of its variation.

    Every variation has inputs of its own, so that sizes of one say nothing of another.
    """
    joined = {}
    for place, variation in enumerate(variations):
        for name, tensor in variation.batch.items():
            joined[f"{place}.{name}"] = tensor
    return joined


@contextmanager
def _all_of(model: PreTrainedModel, variations: Sequence[_Variation]) -> Iterator[None]:
    """Let the forward of the model run all variations, on the inputs that `_joined` gives, for a while."""
    own = model.forward

    def forward(**joined: Any) -> list[Any]:
        outputs: list[Any] = []
        for place, variation in enumerate(variations):
            prefix = f"{place}."
            inputs = {name.removeprefix(prefix): item for name, item in joined.items() if name.startswith(prefix)}
            outputs.append(_run(model, own, variation, inputs))
        return outputs

    with running(model, forward):
        yield


def _run(model: PreTrainedModel, own: Callable[..., Any], variation: _Variation, inputs: dict[str, Any]) -> Any:
    # What modules cache in evaluation mode is dropped in training mode: each variation has to compute it itself, or it
    # would show none of the attributes that go into it.
    model.train().eval()
    if variation.attention is not None:
        set_attention(model, variation.attention)
    if variation.in_steps:
        return _last_logits_in_steps(model, inputs)
    # Outputs keep their shape, so only what the model is there for may be one, as in a recording of its own.
    return main_tensors(own(**inputs))


def _keeps_apart(first: Flow, other: Flow) -> bool:
    """Return whether whatever can be removed alone by the first recording can be by the other one too.

    An operator that only one variation uses may pin what is removed, or tie it to more. Then the full recording has
    nothing to say of such a cut, and what the other variations in it would have shown is lost with it.
    """
    pairs: list[NDArray[np.int32]] = []
    theirs = {value.names[0]: place for place, value in _parameters(other)}
    for place, value in _parameters(first):
        if value.names[0] not in theirs:
            continue
        for ids, other_ids in zip(first.dims(place), other.dims(theirs[value.names[0]]), strict=True):
            if ids is None:  # nothing can be removed here anyway
                continue
            atoms = first.ids.atoms(ids)
            other_atoms = np.zeros_like(atoms) if other_ids is None else other.ids.atoms(other_ids)
            if atoms.shape != other_atoms.shape:
                return False
            pairs.append(np.stack([other_atoms.ravel(), atoms.ravel()]))
    if not pairs:
        return True
    image, source = np.unique(np.concatenate(pairs, axis=1), axis=1)
    # One atom of the other recording for two of the first ties together what the first one removes separately. Several
    # atoms for one do no harm: the first recording, which ties them, decides what is cut.
    pinned = (image == PINNED) & (source != PINNED)
    return not pinned.any() and len(np.unique(image)) == len(image)


def _parameters(flow: Flow) -> Iterator[tuple[int, Value]]:
    for place, value in enumerate(flow.graph.values):
        if value.role == "parameter" and flow.known(place):
            yield place, value


# --- the variations themselves ------------------------------------------------------------------------------------


def other_shape(model: PreTrainedModel, batch: Batch) -> dict[str, Any]:
    """Return the batch with one row more and, where its main input is a sequence of tokens, a few tokens fewer.

    A batch with a tensor that has neither as many rows nor one is returned as it is.
    """
    main = batch.get(model.main_input_name)
    lengths = [item.shape[0] for item in batch.values() if isinstance(item, Tensor) and item.dim()]
    rows = main.shape[0] if isinstance(main, Tensor) and main.dim() else max(lengths, default=0)
    # Patches of all pictures in one tensor, packed rows, the edges of a graph: what is not indexed by sample can't be
    # given a row more by index, and an offset beyond its tensor ends a process on a GPU. A length of 1 is broadcast.
    if not {rows} <= set(lengths) <= {rows, 1}:
        return dict(batch)
    tokens = isinstance(main, Tensor) and main.dim() == 2 and not main.is_floating_point() and main.shape[1] > 4

    def change(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor) or not tensor.dim() or tensor.shape[0] != rows:
            return tensor
        if tokens and main is not None and tensor.dim() > 1 and tensor.shape[1] == main.shape[1]:
            tensor = tensor[:, :-2]
        return torch.cat([tensor, tensor[:1]])

    # Two rows of 8 tokens become three of 6: a size that only happened to equal a number of the model does so no more.
    return {name: change(tensor) for name, tensor in batch.items()}


@contextmanager
def stepping(model: PreTrainedModel) -> Iterator[None]:
    """Let the forward of a generating model run all tokens but the last, and then the last alone with the cache."""

    def forward(**inputs: Any) -> Any:
        return _last_logits_in_steps(model, inputs)

    with running(model, forward):
        yield


def _last_logits_in_steps(model: PreTrainedModel, inputs: dict[str, Any]) -> Any:
    full = type(model).forward
    accepted = inspect.signature(full).parameters
    # An encoder's mask is as long as its own input, and a decoder's grows with the tokens seen.
    tokens = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
    ids = inputs.pop(tokens)
    first = dict(inputs)
    if _masks_tokens(inputs, tokens, ids):
        first["attention_mask"] = inputs["attention_mask"][:, :-1]
    past = named_outputs(full(model, **{**first, tokens: ids[:, :-1]}, use_cache=True))
    # Whatever the forward returns and takes again is its cache, by any name.
    cache = {name: value for name, value in past.items() if name in accepted and name not in inputs}
    return named_outputs(full(model, **{**inputs, **cache, tokens: ids[:, -1:]}, use_cache=True))["logits"]


def _masks_tokens(inputs: Mapping[str, Any], tokens: str, ids: Tensor) -> bool:
    return tokens == "input_ids" and "attention_mask" in inputs and inputs["attention_mask"].shape == ids.shape
