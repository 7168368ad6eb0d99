"""What vLLM can hold of a model: its classes, and what each reads of a configuration (vLLM 0.33)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from geta_hf.errors import GETAError

PER_LAYER = "DeciLMForCausalLM"
"""The class of vLLM that takes the channels of every layer, and its heads of keys and values."""


@dataclass(frozen=True)
class Served:
    """What vLLM does with the checkpoints of one class of transformers.

    Attributes:
        head_dim: whether its class reads `head_dim`, so that heads may be fewer than `hidden_size` has place for.
        per_layer: whether `DeciLMForCausalLM` computes the same, so that layers may differ.
    """

    head_dim: bool = True
    per_layer: bool = False


_UNIFORM = Served()

CLASSES: dict[str, Served] = {
    "LlamaForCausalLM": Served(per_layer=True),
    "MistralForCausalLM": Served(per_layer=True),
    "Qwen2ForCausalLM": Served(head_dim=False, per_layer=True),
    "Qwen3ForCausalLM": _UNIFORM,
    "Phi3ForCausalLM": _UNIFORM,
    "GemmaForCausalLM": _UNIFORM,
    "Gemma2ForCausalLM": _UNIFORM,
    "Gemma3ForCausalLM": _UNIFORM,
    "GraniteForCausalLM": _UNIFORM,
    "NemotronForCausalLM": _UNIFORM,
    "Exaone4ForCausalLM": _UNIFORM,
    "ApertusForCausalLM": _UNIFORM,
}
"""A class of transformers -> what vLLM's class of that name does."""


def served_class(model: PreTrainedModel) -> Served:
    """Return what vLLM does with a model's class.

    Raises:
        GETAError: it has none of that name, or none known here.
    """
    kind = type(model).__name__
    found = CLASSES.get(kind)
    if found is None:
        raise GETAError(
            f"vLLM has no class known here for a {kind}; known are {', '.join(CLASSES)}. Serve it by transformers, in "
            f"the geta format"
        )
    return found


def per_layer_problem(model: PreTrainedModel) -> str | None:
    """Return why `DeciLMForCausalLM` computes something else than a model does; None if it does not.

    It is a Llama: SiLU, rotary positions over the full width of each head, attention to all earlier tokens, no norms
    of queries and keys.

    Args:
        model: dense or compressed.
    """
    kind, config = type(model).__name__, model.config
    if not served_class(model).per_layer:
        return f"vLLM's {PER_LAYER} is a Llama, and {kind} none"
    return next(_differences(model, config), None)


def _differences(model: PreTrainedModel, config: Any) -> Iterator[str]:
    kind = type(model).__name__
    if config.hidden_act not in ("silu", "swish"):
        yield f"vLLM's {PER_LAYER} computes silu, {kind} {config.hidden_act}"
    names = {name.rpartition(".")[0].rpartition(".")[2] for name, _ in model.named_parameters()}
    if names & {"q_norm", "k_norm"}:
        yield f"vLLM's {PER_LAYER} has no norms of queries and keys, which {kind} has"
    rope = getattr(config, "rope_parameters", None) or {}
    share = rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    if share != 1.0:
        yield f"vLLM's {PER_LAYER} rotates all dims of a head, {kind} {share:g} of them"
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True) and window < config.max_position_embeddings:
        yield f"vLLM's {PER_LAYER} attends to all earlier tokens, {kind} to the last {window}"


def check_vllm(model: PreTrainedModel) -> None:
    """Raise GETAError for a model that vLLM has no class for; known before it is cut."""
    served_class(model)
