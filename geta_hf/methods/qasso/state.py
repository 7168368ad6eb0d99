"""QASSO's own vectors inside the base optimizer's state, where Trainer's checkpoints find and keep them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from geta_hf.errors import GETAError

_PREFIX = "qasso."


def put_vectors(packed: dict[str, Any], vectors: Mapping[str, Tensor]) -> dict[str, Any]:
    """A base optimizer's `state_dict` with the vectors in the state of its first parameter."""
    state = {position: dict(values) for position, values in packed["state"].items()}
    first = packed["param_groups"][0]["params"][0]
    state.setdefault(first, {}).update({f"{_PREFIX}{name}": value.clone() for name, value in vectors.items()})
    return {**packed, "state": state}


def take_vectors(packed: dict[str, Any], like: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The inverse of `put_vectors`: what the base optimizer loads, and the vectors.

    Args:
        packed: parameters are keyed by position, or by name as FSDP2 does.
        like: the present vectors, whose shapes, types and devices the stored ones take.

    Raises:
        GETAError: a vector is missing or of another shape.
    """
    state = {position: dict(values) for position, values in packed["state"].items()}
    first = state.get(packed["param_groups"][0]["params"][0], {})
    vectors = {}
    for name, mine in like.items():
        value = first.pop(f"{_PREFIX}{name}", None)
        if value is None or value.shape != mine.shape:
            found = "nothing" if value is None else f"{tuple(value.shape)}"
            raise GETAError(
                f"the optimizer state has {found} for qasso.{name} of shape {tuple(mine.shape)}: it is of another "
                f"model or config"
            )
        vectors[name] = value.clone().to(mine.device, mine.dtype)
    # What the base holds for the first parameter alone would look like an initialised parameter to it.
    return {**packed, "state": {position: values for position, values in state.items() if values}}, vectors
