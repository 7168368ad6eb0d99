"""What GGUF calls a model: its architecture, its metadata, and a name and an order of rows for every tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from geta_hf.errors import GETAError
from geta_hf.export.formats.gguf.blocks import Values
from geta_hf.serialization.bitpack import BYTE_BITS
from geta_hf.serialization.encode import layer_codes
from geta_hf.serialization.packed_layers import PackedLayer, packed_layers

_SILU, _GELU_TANH = ("silu", "swish"), ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp does under one name.

    Attributes:
        name: of the architecture in the file.
        activations: names of the activation that it computes.
        interleaved: whether rotary pairs lie next to each other, so that rows of queries and keys change their order.
        norm_shift: what is added to the weights of norms.
        full_heads: whether all heads together must be as wide as the residual stream.
        per_layer: name under which layers may differ and heads be fewer; None where there is none.
        partial_rotary: whether a part of each head may be without rotation.
        windows: whether the file has a place for a sliding window.
    """

    name: str
    activations: tuple[str, ...] = _SILU
    interleaved: bool = False
    norm_shift: float = 0.0
    full_heads: bool = False
    per_layer: str | None = None
    partial_rotary: bool = False
    windows: bool = False


_LLAMA = Architecture("llama", interleaved=True, per_layer="deci")

ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Architecture("qwen2", full_heads=True, per_layer="deci"),
    "qwen3": Architecture("qwen3"),
    "phi3": Architecture("phi3", full_heads=True, partial_rotary=True, windows=True),
    "phi": Architecture("phi2", _GELU_TANH, full_heads=True, partial_rotary=True),
    "gemma3_text": Architecture("gemma3", _GELU_TANH, norm_shift=1.0, windows=True),
}
"""`model_type` of a configuration -> what llama.cpp computes for it."""


@dataclass(frozen=True)
class Layout:
    """A model as GGUF sees it.

    Attributes:
        architecture: as the file names it.
        blocks: number of blocks.
        hidden: width of the residual stream.
        vocabulary: rows of the embedding.
        head_dim: width of a head.
        rotary: width of the part of a head that is rotated.
        heads, kv_heads, channels: of each block.
        notes: where llama.cpp does not do what the model does, in sentences.
    """

    architecture: Architecture
    blocks: int
    hidden: int
    vocabulary: int
    head_dim: int
    rotary: int
    heads: list[int]
    kv_heads: list[int]
    channels: list[int]
    notes: tuple[str, ...] = ()


def architecture_of(model: PreTrainedModel) -> Architecture:
    """Return what llama.cpp computes for a model. Raise GETAError if GGUF has no name for it."""
    kind, config = type(model).__name__, model.config
    found = ARCHITECTURES.get(config.model_type)
    # A base model or a classifier of a known type has no head for the next token.
    if found is None or not model.can_generate() or model.get_output_embeddings() is None:
        raise GETAError(
            f"GGUF has no architecture for {kind} ({config.model_type}) here; known are causal language models of type "
            f"{', '.join(ARCHITECTURES)}. Export in another format"
        )
    activation = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    if activation not in found.activations:
        raise GETAError(
            f"{kind} computes {activation}, but llama.cpp's {found.name} {found.activations[0]}; export in another "
            f"format"
        )
    return found


def layout_of(model: PreTrainedModel) -> Layout:
    """Return the sizes of a model, read from its tensors.

    Raises:
        GETAError: GGUF has no name for the architecture or for one of its tensors, or no place for what was cut.
    """
    config, kind = model.config, type(model).__name__
    found = architecture_of(model)
    shapes = {name: tensor.shape for name, tensor in _named(model, found.name)}
    blocks = len({name.split(".")[1] for name in shapes if name.startswith("blk.")})
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotary = 2 * _frequencies(model).numel()
    _check_head_dim(model, head_dim)
    heads, kv_heads, channels = [], [], []
    for block in range(blocks):
        heads.append(shapes[f"blk.{block}.attn_output.weight"][1] // head_dim)
        fused = shapes.get(f"blk.{block}.attn_qkv.weight")
        if fused is None:
            kv_heads.append(shapes[f"blk.{block}.attn_k.weight"][0] // head_dim)
        else:
            kv_heads.append((fused[0] // head_dim - heads[-1]) // 2)
        channels.append(shapes[f"blk.{block}.ffn_down.weight"][1])
    vocabulary, hidden = shapes["token_embd.weight"]
    layout = Layout(found, blocks, hidden, vocabulary, head_dim, rotary, heads, kv_heads, channels)
    if found.per_layer is None:
        _check_uniform(model, layout)
    elif not _uniform(layout) or _lacks_heads(layout):
        # A llama that takes a count for every layer, and any biases.
        layout = replace(layout, architecture=replace(_LLAMA, name=found.per_layer))
    if rotary != head_dim and not layout.architecture.partial_rotary:
        raise GETAError(
            f"{kind} rotates {rotary} of the {head_dim} dims of a head, and llama.cpp's {layout.architecture.name} all "
            f"of them; export in another format"
        )
    return replace(layout, notes=tuple(_check_attention(model, layout)))


def _check_head_dim(model: PreTrainedModel, head_dim: int) -> None:
    for name, module in model.named_modules():
        found = vars(module).get("head_dim", head_dim)
        if found != head_dim:
            raise GETAError(
                f"{name} has heads of {found} dims, of {head_dim} before the cut, and rotary positions go by all of "
                f"them; remove heads instead, or export in another format"
            )


def _uniform(layout: Layout) -> bool:
    return all(len(set(counts)) == 1 for counts in (layout.heads, layout.kv_heads, layout.channels))


def _lacks_heads(layout: Layout) -> bool:
    return layout.architecture.full_heads and layout.heads[0] * layout.head_dim != layout.hidden


def _check_uniform(model: PreTrainedModel, layout: Layout) -> None:
    """Raise GETAError for layers that differ, or too few heads."""
    name = layout.architecture.name
    if not _uniform(layout):
        raise GETAError(
            f"the layers of {type(model).__name__} differ (heads {_few(layout.heads)}, channels "
            f"{_few(layout.channels)}), and llama.cpp's {name} has one number for all; train with uniform=True in "
            f"GETAConfig, or export in another format"
        )
    if _lacks_heads(layout):
        raise GETAError(
            f"llama.cpp's {name} has no place for removed heads: {layout.heads[0]} of {layout.head_dim} remain in a "
            f"model of width {layout.hidden}; keep all heads (keep=['heads'] in GETAConfig), or export in another "
            f"format"
        )


def _few(counts: list[int]) -> str:
    return ", ".join(map(str, counts[:6])) + (", ..." if len(counts) > 6 else "")


def _check_attention(model: PreTrainedModel, layout: Layout) -> Iterator[str]:
    """Yield notes about attention; raise GETAError for what llama.cpp would compute in another way."""
    config, name = model.config, layout.architecture.name
    for block, (heads, kv_heads) in enumerate(zip(layout.heads, layout.kv_heads, strict=True)):
        if not kv_heads or heads % kv_heads:
            raise GETAError(
                f"layer {block} has {heads} heads over {kv_heads} of keys and values, which do not divide them; export "
                f"in another format"
            )
    kind = _rope(config).get("rope_type", "default")
    # Two sets of factors are read for one architecture alone.
    if kind not in _ROPE or (kind == "longrope" and name != "phi3"):
        raise GETAError(
            f"{type(model).__name__} has rotary positions of type {kind}, which llama.cpp's {name} lacks; export in "
            f"another format"
        )
    if name == "gemma3":
        pattern = ["full_attention" if (block + 1) % 6 == 0 else "sliding_attention" for block in range(layout.blocks)]
        if list(config.layer_types) != pattern or config.query_pre_attn_scalar != layout.head_dim:
            raise GETAError(
                "llama.cpp's gemma3 has a full layer after every five with a window, and queries scaled by the width "
                "of a head; this model has others. Drop no layers, or export in another format"
            )
    if (alike := longest_alike(config)) < config.max_position_embeddings:
        yield (
            f"with a context above {alike} tokens llama.cpp rotates all texts by the long factors, the model only "
            f"longer ones: run short texts with a context of at most {alike}"
        )
    window = getattr(config, "sliding_window", None)
    if window and window < config.max_position_embeddings and name != "gemma3":
        yield (
            f"llama.cpp attends to all earlier tokens, the model to the last {window}: outputs differ in longer texts"
        )


# --- tensors ------------------------------------------------------------------------------------------------------


def _named(model: PreTrainedModel, architecture: str) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor once, with its name in the file.

    Raises:
        GETAError: the architecture has no name for it.
    """
    import gguf

    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    seen = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        # A trained model has quantizers still. Of tied tensors the first counts: llama.cpp takes the embedding where
        # there is no head.
        if id(tensor) in seen or "_quantizer." in name:
            continue
        seen.add(id(tensor))
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise GETAError(f"GGUF's {architecture} has no name for {name}; export in another format")
        yield found, tensor


def tensors(model: PreTrainedModel, layout: Layout) -> Iterator[tuple[str, Callable[[], Values]]]:
    """Yield the name of every tensor in the file, with a function that computes its values."""
    layers = {id(layer.weight): (name, layer) for name, layer in packed_layers(model).items()}
    for name, tensor in _named(model, layout.architecture.name):
        yield name, partial(_stored, name, tensor, layers.get(id(tensor)), layout)
    for name, factors in _frequency_factors(model, layout).items():
        yield name, partial(Values, factors)


def _stored(name: str, tensor: Tensor, packed: tuple[str, PackedLayer] | None, layout: Layout) -> Values:
    return _ordered(name, _values(tensor, packed), layout)


def _values(tensor: Tensor, packed: tuple[str, PackedLayer] | None) -> Values:
    if packed is None:
        return Values(tensor.detach().float().cpu())
    name, layer = packed
    # One step size for each row is that of a linear layer's output, or of a row of an embedding.
    codes = layer_codes(name, layer).cpu()
    floats = layer.decoded(codes)
    if layer.bits > BYTE_BITS or layer.scales_inputs:
        return Values(floats)  # a block of the file has its step size for 32 inputs of one row
    # Rows of four levels next to wider ones have the codes of 3 bits, as all types of the file but the narrowest hold.
    four_levels = layer.four_levels and layer.widths is None
    return Values(floats, codes.to(torch.int8), layer.step_size.float(), layer.bits, four_levels)


def _ordered(name: str, values: Values, layout: Layout) -> Values:
    """Return values as llama.cpp expects them: shifted norms, rows of queries and keys in rotary pairs."""
    parts = name.split(".")
    if layout.architecture.norm_shift and parts[-2].endswith("norm"):
        return Values(values.floats + layout.architecture.norm_shift)
    if layout.architecture.interleaved and parts[-2] in ("attn_q", "attn_k"):
        counts = layout.heads if parts[-2] == "attn_q" else layout.kv_heads
        return values.rows(_interleaved(counts[int(parts[1])], layout.head_dim))
    return values


def _interleaved(heads: int, head_dim: int) -> Tensor:
    """Return the rows in the order 0, half, 1, half + 1, and so on, within each head."""
    pairs = torch.arange(heads * head_dim).view(heads, 2, head_dim // 2)
    return pairs.transpose(1, 2).reshape(-1)


# --- metadata -----------------------------------------------------------------------------------------------------

_ROPE = ("default", "linear", "llama3", "yarn", "longrope")


def _rope(config: Any) -> Mapping[str, Any]:
    found: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    return found.get("full_attention", found)


def _original_length(config: Any) -> int:
    """Return the length of texts before rotary positions were stretched."""
    given = _rope(config).get("original_max_position_embeddings")
    return int(given or getattr(config, "original_max_position_embeddings", config.max_position_embeddings))


def longest_alike(config: Any) -> int:
    """Return up to which length of texts a model and llama.cpp rotate alike, with a context of that length."""
    stretched = _rope(config).get("rope_type") == "longrope"
    return (
        min(config.max_position_embeddings, _original_length(config)) if stretched else config.max_position_embeddings
    )


def _frequency_factors(model: PreTrainedModel, layout: Layout) -> dict[str, Tensor]:
    """Return by how much rotary frequencies are divided, by the name of the tensor, where a number does not say it."""
    rope = _rope(model.config)
    kind = rope.get("rope_type")
    if kind == "longrope":
        parts = {part: torch.tensor(rope[f"{part}_factor"], dtype=torch.float32) for part in ("long", "short")}
        return {f"rope_factors_{part}.weight": factors for part, factors in parts.items()}
    if kind != "llama3":
        return {}
    places = torch.arange(0, layout.rotary, 2, dtype=torch.float32) / layout.rotary
    factors = (1.0 / rope["rope_theta"] ** places) / _frequencies(model).float().cpu()
    return {"rope_freqs.weight": factors}


def _frequencies(model: PreTrainedModel) -> Tensor:
    """Return the frequencies by which the model itself rotates, in full layers where there are several kinds."""
    found = {name: tensor for name, tensor in model.named_buffers() if name.endswith("inv_freq")}
    return next((tensor for name, tensor in found.items() if "full" in name), next(iter(found.values())))


def write_metadata(writer: Any, model: PreTrainedModel, layout: Layout) -> None:
    """Add all that describes a model, but its tokenizer, to a `gguf.GGUFWriter`."""
    config, name = model.config, layout.architecture.name
    same = name != "deci"

    def counts(values: list[int]) -> int | list[int]:
        return values[0] if same else values

    writer.add_block_count(layout.blocks)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(layout.hidden)
    writer.add_feed_forward_length(counts(layout.channels))
    writer.add_head_count(counts(layout.heads))
    writer.add_head_count_kv(counts(layout.kv_heads))
    writer.add_vocab_size(layout.vocabulary)
    writer.add_key_length(layout.head_dim)
    writer.add_value_length(layout.head_dim)
    writer.add_rope_dimension_count(layout.rotary)
    if (epsilon := getattr(config, "rms_norm_eps", None)) is not None:
        writer.add_layer_norm_rms_eps(epsilon)
    if (epsilon := getattr(config, "layer_norm_eps", None)) is not None:
        writer.add_layer_norm_eps(epsilon)
    if layout.architecture.windows:
        writer.add_sliding_window(getattr(config, "sliding_window", None) or 0)
    if softcap := getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(softcap)
    _write_rope(writer, model, name)


def _write_rope(writer: Any, model: PreTrainedModel, name: str) -> None:
    import gguf

    config, rope = model.config, _rope(model.config)
    writer.add_rope_freq_base(rope["rope_theta"])
    local = (getattr(config, "rope_parameters", None) or {}).get("sliding_attention")
    if local is not None:
        writer.add_rope_freq_base_swa(local["rope_theta"])
    kind = rope.get("rope_type", "default")
    original = _original_length(config)
    if name == "phi3":
        writer.add_rope_scaling_orig_ctx_len(original)
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "longrope":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        scaling = next(module.attention_scaling for module in model.modules() if hasattr(module, "attention_scaling"))
        writer.add_rope_scaling_attn_factors(scaling)
    if kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(original)
        for key, add in (
            ("attention_factor", writer.add_rope_scaling_yarn_attn_factor),
            ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
            ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
        ):
            if rope.get(key) is not None:
                add(rope[key])
