"""Find model classes by their names."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import transformers
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto


def find_model_class(name: str) -> type[PreTrainedModel] | None:
    """Return the model class of a name, as `architectures` in config.json has it; None if there is none.

    It is one of transformers, or one that was registered with its auto classes, as those of the recipes are. A class
    that lacks a package it needs counts as none.
    """
    found = getattr(transformers, name, None)
    if isinstance(found, type) and issubclass(found, PreTrainedModel):
        return found
    return next((kind for kind in _registered() if kind.__name__ == name), None)


def registered_classes(auto: Any) -> list[type[PreTrainedModel]]:
    """Return the model classes that were registered with an auto class, beyond those of transformers."""
    found: list[type[PreTrainedModel]] = []
    for classes in auto._model_mapping._extra_content.values():
        found += classes if isinstance(classes, tuple) else (classes,)
    return found


def _registered() -> Iterator[type[PreTrainedModel]]:
    for name, auto in inspect.getmembers(modeling_auto, inspect.isclass):
        if name.startswith("AutoModel") and getattr(auto, "_model_mapping", None) is not None:
            yield from registered_classes(auto)
