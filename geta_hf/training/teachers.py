"""Check a teacher before the first step."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence

from torch import nn
from transformers import PreTrainedModel

from geta_hf.errors import GETAError


def check_numbers(logits: float, hidden: float, temperature: float) -> None:
    """Raise GETAError unless the weights are finite and one is above 0, and the temperature is above 0."""
    for name, weight in (("distill_logits", logits), ("distill_hidden", hidden)):
        if not 0 <= weight < math.inf:
            raise GETAError(f"{name} = {weight} must be a finite weight of at least 0")
    if not (logits or hidden):
        raise GETAError("distill_logits and distill_hidden are both 0: nothing to distill; set one above 0")
    if not 0 < temperature < math.inf:
        raise GETAError(f"distill_temperature = {temperature} must be finite and above 0")


def check_tensors(student: nn.Module, teacher: nn.Module) -> None:
    """Raise GETAError where the teacher has no data, or shares a parameter with the student."""
    for name, tensor in (*teacher.named_parameters(), *teacher.named_buffers()):
        if tensor.is_meta:
            raise GETAError(f"the teacher's {name} is on meta, without data; load the teacher with its weights")
    trained = {id(parameter): name for name, parameter in student.named_parameters()}
    for name, parameter in teacher.named_parameters():
        if id(parameter) in trained:
            raise GETAError(
                f"the teacher's {name} is the student's {trained[id(parameter)]}, so the teacher would train too; "
                f"give another model, or none for a copy of the dense one"
            )


def layers_of(kept: Mapping[str, Sequence[int]], hidden: bool) -> Sequence[int]:
    """Return the teacher's layers that a student kept, of the one list that lost some; () where none did.

    Raises:
        GETAError: hidden states are compared, and several lists lost layers.
    """
    if hidden and len(kept) > 1:
        raise GETAError(
            f"distill_hidden can't match layers of {' and '.join(kept)}, which both lost some; set it to 0 to compare "
            f"logits alone, or drop layers of one"
        )
    return next(iter(kept.values()), ())


def check_configs(student: PreTrainedModel, teacher: PreTrainedModel, hidden: bool, kept: Sequence[int]) -> None:
    """Check that text models share the vocabulary, heads the label count, and hidden states size and number.

    Args:
        hidden: whether hidden states are compared.
        kept: the teacher's layers that a student with fewer still has; () where it lost none.
    """
    _check_equal(student, teacher, "vocab_size", "a teacher of the same tokenizer reads and predicts the same tokens")
    if not student.can_generate():  # a language model's label count is a default that nothing uses
        _check_equal(student, teacher, "num_labels", "give a teacher trained for the same labels")
        # Logits are compared by position, so the same labels in another order would teach the wrong ones.
        ours, theirs = (dict(model.config.id2label or {}) for model in (student, teacher))
        if ours != theirs and set(ours.values()) == set(theirs.values()):
            raise GETAError(f"the teacher's labels are {theirs}, the student's {ours}; bring them into one order")
    if hidden:
        # Where layers were dropped the teacher has more of them by intention.
        deeper = kept and getattr(teacher.config, "num_hidden_layers", 0) > kept[-1]
        sizes = ["hidden_size"] if deeper else ["hidden_size", "num_hidden_layers"]
        for size in sizes:
            _check_equal(student, teacher, size, "set distill_hidden to 0 to compare logits alone")


def _check_equal(student: PreTrainedModel, teacher: PreTrainedModel, field: str, remedy: str) -> None:
    # Not every config has every field (vision models have no vocabulary); shapes are compared in every step.
    ours, theirs = (getattr(model.config, field, None) for model in (student, teacher))
    if ours != theirs:
        raise GETAError(
            f"the teacher {type(teacher).__name__} has {field} {theirs}, the student {type(student).__name__} has "
            f"{ours}; {remedy}"
        )


def check_asks_hidden_states(*models: nn.Module) -> None:
    """Raise GETAError for a model that cannot be asked for its hidden states."""
    for model in models:
        known = inspect.signature(model.forward).parameters
        free = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known.values())
        if not free and "output_hidden_states" not in known:
            raise GETAError(f"{type(model).__name__}.forward takes no output_hidden_states; set distill_hidden to 0")
