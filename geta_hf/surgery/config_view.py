"""Give a module a private view of the model's configuration: a few values of its own, everything else from the base.

A cut may change what one module must read (`config.num_attention_heads` of layer 3), while config.json keeps the
original. A copy would go stale when the model's configuration is changed later; a view does not.
"""

from __future__ import annotations

import copy
from typing import Any

from transformers import PreTrainedConfig


class ConfigView:
    """Looks like `base`, and writes go to it; only what `overrides` names reads otherwise.

    Its methods are those of the base, so whatever is saved through a view are the base's own values.

    Args:
        base: the configuration that is seen through.
        overrides: attribute -> value, or the view of a nested configuration.
    """

    __slots__ = ("_base", "_overrides")

    def __init__(self, base: PreTrainedConfig, overrides: dict[str, Any] | None = None) -> None:
        # Past __setattr__ below, which writes to the base.
        object.__setattr__(self, "_base", base)
        object.__setattr__(self, "_overrides", {} if overrides is None else overrides)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        # The model's code may ask isinstance(config, LlamaConfig), which looks at the class that an object names.
        return type(self._base)

    @property
    def __dict__(self) -> dict[str, Any]:  # type: ignore[override]
        return vars(self._base)

    def __getattr__(self, name: str) -> Any:
        # `num_attention_heads` and `n_head` of GPT-2 are one number, so an override must hold under both names.
        name = self._base.attribute_map.get(name, name)
        return self._overrides[name] if name in self._overrides else getattr(self._base, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._base, name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> ConfigView:
        return ConfigView(copy.deepcopy(self._base, memo), copy.deepcopy(self._overrides, memo))

    def __copy__(self) -> ConfigView:
        return ConfigView(self._base, dict(self._overrides))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return ConfigView, (self._base, self._overrides)

    def __repr__(self) -> str:
        return f"{self._base!r} with {self._overrides}"

    def override(self, name: str, value: Any) -> None:
        """Let `name` read as `value` in this view alone."""
        self._overrides[self._base.attribute_map.get(name, name)] = value


def is_config(value: Any) -> bool:
    """Return whether a value is a configuration or a view of one."""
    return isinstance(value, PreTrainedConfig)


def view_of(config: Any) -> ConfigView:
    """Return a private view of a configuration; of a view, one that starts with the same overrides."""
    return copy.copy(config) if type(config) is ConfigView else ConfigView(config)
