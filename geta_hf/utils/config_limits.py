"""Check the counts in a model's config before anything is built from it.

A config may come from a stranger or be damaged. A model with a billion layers costs hours and all memory, even without
weights, and so does a config class that lists the type of each of its layers. The file of weights says how many there
can be: every layer has a tensor of its own there.

Every folder carries a copy of this module.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from geta_hf.errors import GETAError

FEW_LAYERS = 128
"""So many layers are always allowed: some models run one set of weights several times."""

MANY_LAYERS = 1000
"""The most layers of a model whose weights are not at hand; so many are built within seconds."""

MANY_LABELS = 2**20

_LAYERS = re.compile(r"(?:\w+_)?(?:layers?|blocks|stages|levels|depths?|codebooks|quantizers|flows)")
_NO_COUNT = re.compile(r"(?:max|min)_depth")


def check_counts(
    config: Mapping[str, Any], tensors: int | None, where: str = "config.json", why: str | None = None
) -> None:
    """Check that a config has no more layers than there are tensors, nor an absurd number of labels.

    Args:
        config: as JSON has it; configs inside it are checked too.
        tensors: how many the folder holds; None where that is not known.
        where: how to call the config in an error.
        why: what an error says of the number of layers; by default how many tensors there are.

    Raises:
        GETAError: naming the key and the value.
    """
    if why is None:
        why = f"more than {MANY_LAYERS}" if tensors is None else f"but the folder holds {tensors} tensors"
    limit = MANY_LAYERS if tensors is None else max(FEW_LAYERS, tensors)
    inner: list[Mapping[str, Any]] = [config]
    while inner:
        for key, value in inner.pop().items():
            if isinstance(value, Mapping) and key != "quantization_config":
                inner.append(value)
            numbers = [number for number in _flat(value) if isinstance(number, int | float)]
            largest = max(numbers, default=0)
            if key == "num_labels" and largest > MANY_LABELS:
                raise GETAError(f"{where}: {key} is {largest}, which no model has; copy or export the folder again")
            if largest > limit and _LAYERS.fullmatch(str(key)) and not _NO_COUNT.fullmatch(str(key)):
                raise GETAError(f"{where}: {key} is {largest}, {why}; copy or export the folder again")


def _flat(value: Any) -> list[Any]:
    """Return a value, or the entries of a list and of the lists in it."""
    if not isinstance(value, list | tuple):
        return [value]
    return [entry for part in value for entry in (part if isinstance(part, list | tuple) else (part,))]
