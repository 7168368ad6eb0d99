"""Add what distillation and the method ask for to the loss, whoever computes it.

A trainer's `compute_loss` may be overridden by a subclass or a mix-in that never calls the one it overrides. So the
terms are added around it: the model's calls within it are watched, and the teacher is asked for the same inputs.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from geta_hf.errors import GETAError
from geta_hf.methods import Method
from geta_hf.training.distillation import Distiller

Compute = Callable[..., Any]


@dataclass(frozen=True)
class Scale:
    """Describe how the loss of one micro-batch adds up to that of a step.

    Attributes:
        micro_batches: how many there are in this step.
        divided: whether the loss is divided by that number after it was computed.
        processes: how many processes `num_items_in_batch` counts the labels of.
    """

    micro_batches: int = 1
    divided: bool = True
    processes: int = 1


class LossTerms:
    """The terms of distillation and of a method.

    Args:
        distiller: None where nothing is distilled.
        method: None where only distillation is of interest.
        autocast: makes the context in which the teacher runs.

    Attributes:
        used: whether terms were added to any loss yet.
    """

    def __init__(
        self,
        distiller: Distiller | None,
        method: Method | None,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.distiller = distiller
        self.method = method
        self.used = False
        self._autocast = autocast
        own = None if method is None else type(method).extra_loss
        self._method_adds = own is not None and own is not Method.extra_loss

    @property
    def any(self) -> bool:
        """Return whether there is anything to add."""
        return self.distiller is not None or self._method_adds

    def around(self, compute: Compute, plain: Callable[[], nn.Module], scale: Callable[[Any], Scale]) -> Compute:
        """Return a `compute_loss` that adds the terms, in training alone, to what another one returns.

        Args:
            compute: as Trainer's `compute_loss`.
            plain: returns the model without wrappers.
            scale: takes `num_items_in_batch` and tells how losses of micro-batches add up.
        """
        if not self.any:
            return compute

        @functools.wraps(compute)
        def compute_with_terms(model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            if not model.training:
                return compute(model, inputs, *args, **kwargs)
            given = dict(inputs)  # the other one may take entries out
            with self._watching(model) as calls:
                result = compute(model, inputs, *args, **kwargs)
            items = kwargs.get("num_items_in_batch", args[1] if len(args) > 1 else None)
            term = self._term(calls, given, plain(), items, scale(items))
            self.used = True
            return (result[0] + term, *result[1:]) if isinstance(result, tuple) else result + term

        return compute_with_terms

    @contextmanager
    def _watching(self, model: nn.Module) -> Iterator[list[tuple[dict[str, Any], Any]]]:
        """Yield a list of what the model is called with and returns; ask for hidden states where they are compared."""
        calls: list[tuple[dict[str, Any], Any]] = []
        if self.distiller is None:
            yield calls
            return
        distiller = self.distiller

        def ask(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, distiller.student_inputs(kwargs)

        def note(called: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> None:
            # What runs without a graph, such as targets of a loss of one's own, is not what is trained.
            if torch.is_grad_enabled():
                calls.append((_by_name(called, args, kwargs), outputs))

        handles = (
            model.register_forward_pre_hook(ask, with_kwargs=True),
            model.register_forward_hook(note, with_kwargs=True),
        )
        try:
            yield calls
        finally:
            for handle in handles:
                handle.remove()

    def _term(
        self, calls: list[tuple[dict[str, Any], Any]], given: dict[str, Any], plain: nn.Module, items: Any, scale: Scale
    ) -> Tensor | float:
        total: Tensor | float = 0.0
        if self.distiller is not None:
            total = self._distillation(self.distiller, calls, given, items, scale)
        extra = None if self.method is None else self.method.extra_loss(plain)
        if extra is not None:
            total = total + (extra if scale.divided else extra / scale.micro_batches)
        return total

    def _distillation(
        self,
        distiller: Distiller,
        calls: list[tuple[dict[str, Any], Any]],
        given: dict[str, Any],
        items: Any,
        scale: Scale,
    ) -> Tensor:
        if not calls:
            raise GETAError(
                "compute_loss did not run the model that it was given, so there is nothing to compare with the "
                "teacher's outputs; call model(...) in it, or set distill_logits and distill_hidden to 0"
            )
        count = None if items is None else items / scale.processes
        terms = []
        with self._autocast():  # Accelerate puts autocast around the student's forward alone
            for asked, outputs in calls:
                # Labels may have been taken out for a loss outside the model, but say which positions count.
                labels = {"labels": given["labels"]} if "labels" in given else {}
                terms.append(distiller.loss({**labels, **asked}, outputs, count))
        term = torch.stack(terms).mean()
        # With a count, shares of a step add up by themselves; without one, each is a mean.
        if items is None:
            return term if scale.divided else term / scale.micro_batches
        return term * scale.micro_batches if scale.divided else term


def _by_name(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by name, without Trainer's count of labels."""
    named = dict(kwargs)
    if args:
        inner = getattr(model, "module", getattr(model, "_orig_mod", model))  # DDP's and torch.compile's wrappers
        names = inspect.signature(inner.forward).parameters
        named = {**dict(zip(names, args, strict=False)), **named}
    named.pop("num_items_in_batch", None)
    return named
