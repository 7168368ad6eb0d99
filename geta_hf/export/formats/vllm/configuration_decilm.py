"""The configuration of a Llama whose layers differ, as vLLM's DeciLMForCausalLM reads it."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig


class Part(dict):
    """A part of a block's configuration, whose entries are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class DeciLMConfig(LlamaConfig):
    """`block_configs` has the heads that share a key, and the channels, of every layer."""

    model_type = "nemotron-nas"

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "block_configs":
            value = [Part({part: Part(entries) for part, entries in block.items()}) for block in value]
        super().__setattr__(name, value)
