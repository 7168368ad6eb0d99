"""Write a folder that vLLM loads by its own model classes, and prove what is in it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from geta_hf.errors import GETAError
from geta_hf.export.formats.compressed_tensors import (
    Packing,
    check_package,
    own_packing,
    pack_state,
    packable,
    packed_config,
    save_packed,
    unpacked,
)
from geta_hf.export.formats.layer_sizes import LayerSizes, sizes_of_llama
from geta_hf.export.formats.vanilla import write_plain
from geta_hf.export.formats.vllm import configuration_decilm
from geta_hf.export.formats.vllm.architectures import PER_LAYER, check_vllm, per_layer_problem, served_class
from geta_hf.serialization.encode import activation_bits, dense_weight
from geta_hf.serialization.packed_layers import PackedLayer, packed_layers

_CONTAINERS = (4, 8)
"""The bit widths that vLLM's fastest kernel (Marlin) reads. Narrower codes are stored in the next of them."""

_FUSED = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})
"""Layers that vLLM joins to one, and which must be stored alike."""

_CONFIG_KEYS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "rope_parameters",
)
"""What a Llama's configuration keeps of another's."""


def write_vllm(model: PreTrainedModel, folder: Path, batch: Mapping[str, Tensor]) -> None:
    """Write a compressed model as vLLM loads it without code of ours.

    Where layers are alike, the folder is an ordinary one of the model's class. Where they differ, it is one for vLLM's
    `DeciLMForCausalLM`, a Llama that takes the channels of every layer, with the configuration class that transformers
    lacks: vLLM loads it with `--trust-remote-code`. Either way, linear weights of 2 to 8 bits are packed in
    compressed-tensors' format, at 4 or 8 bits: codes are stored as they are, and layers that vLLM joins (queries, keys
    and values; gate and up) at the same width. All else is dense.

    Codes are exact. Scales have the model's dtype; vLLM computes in half precision, and rounds them to it.
    config.json (`exported_as`) and README.md say by how much. An ordinary folder is proved by reloading it in
    transformers, the other by decoding every tensor. vLLM itself is not run.

    Args:
        model: compressed, or plain; left unchanged.
        folder: an existing empty folder.
        batch: what the proof runs on.

    Raises:
        GETAError: a class that vLLM does not have, layers that differ where it has one number for all, rounded
            activations, the package compressed-tensors is missing, or a folder that holds something else.
    """
    check_vllm(model)
    _check_activations(model)
    layers = _servable_layers(model)
    packings = _alike(layers)
    if packings:
        check_package()
    sizes = _sizes_of(model)
    if _is_ordinary(model, sizes):
        write_plain(model, folder, batch, lambda plain: save_packed(plain, folder, layers, packings), "vllm")
        _check_heads(model, folder)
    else:
        assert sizes is not None
        _write_per_layer(model, folder, sizes, layers, packings)
    _describe(model, folder, layers, packings)


def _check_activations(model: PreTrainedModel) -> None:
    if rounded := activation_bits(model):
        raise GETAError(
            f"the vllm format has no place for rounded activations, which {len(rounded)} layers have (the first is "
            f"{next(iter(rounded))}); export in the geta format, or train on float activations"
        )


# --- what is packed -----------------------------------------------------------------------------------------------


def _servable_layers(model: PreTrainedModel) -> dict[str, PackedLayer]:
    """Return the layers to pack: of those that vLLM joins, all or none."""
    found = packable(model)
    whole = {}
    for name, layer in found.items():
        parts = _joined(name)
        kinds = {found[part].in_blocks for part in parts if part in found}
        if all(part in found for part in parts) and len(kinds) == 1:
            whole[name] = layer
    return whole


def _joined(name: str) -> list[str]:
    """Return the paths of the layers that vLLM joins with one, itself included."""
    parent, _, leaf = name.rpartition(".")
    together = next((sorted(leaves) for leaves in _FUSED if leaf in leaves), [leaf])
    return [f"{parent}.{other}" if parent else other for other in together]


def _alike(layers: Mapping[str, PackedLayer]) -> dict[str, Packing]:
    packings = {}
    for name, layer in layers.items():
        bits = max(layers[part].integer_bits for part in _joined(name))
        container = next(width for width in _CONTAINERS if bits <= width)
        # vLLM has no scale for an entire tensor; one for each channel says the same.
        strategy = "group" if own_packing(layer).strategy == "group" else "channel"
        packings[name] = Packing(container, strategy)
    return packings


# --- layers that differ -------------------------------------------------------------------------------------------


def _sizes_of(model: PreTrainedModel) -> LayerSizes | None:
    """Return the sizes of a model that `DeciLMForCausalLM` computes; None of others."""
    return None if per_layer_problem(model) else sizes_of_llama(model)


def _is_ordinary(model: PreTrainedModel, sizes: LayerSizes | None) -> bool:
    if sizes is None:
        return True  # there is no other way, and `write_plain` says what prevents it
    full = sizes.heads[0] * sizes.head_dim == model.config.hidden_size
    return sizes.uniform and (full or served_class(model).head_dim)


def _check_heads(model: PreTrainedModel, folder: Path) -> None:
    """Raise GETAError for fewer heads in a class of vLLM that derives their width from the residual stream."""
    config = json.loads((folder / "config.json").read_text())
    width = config.get("head_dim", 0) * config.get("num_attention_heads", 0)
    if not served_class(model).head_dim and width and width != config["hidden_size"]:
        raise GETAError(
            f"vLLM's {type(model).__name__} has no place for removed heads, and {per_layer_problem(model)}; keep all "
            f"heads (keep=['heads'] in GETAConfig), or export in another format"
        )


def _write_per_layer(
    model: PreTrainedModel,
    folder: Path,
    sizes: LayerSizes,
    layers: Mapping[str, PackedLayer],
    packings: Mapping[str, Packing],
) -> None:
    config = _per_layer_config(model, sizes)
    if packings:
        config["quantization_config"] = packed_config(packings, model.base_model_prefix)
    state = _dense_state(model)
    pack_state(state, layers, packings, model.dtype)
    save_torch_state_dict({name: tensor.contiguous() for name, tensor in state.items()}, folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shutil.copy(configuration_decilm.__file__, folder / "configuration_decilm.py")
    model.generation_config.save_pretrained(folder)
    _prove_tensors(model, folder, packings)


def _dense_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return decoded weights by the names of a Llama, without a head that is tied."""
    state = dict(model.state_dict())
    for name, layer in packed_layers(model).items():
        for leaf in [key for key in state if key.startswith(f"{name}.") and not key.endswith(".bias")]:
            del state[leaf]
        state[f"{name}.weight"] = dense_weight(layer)
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    return {name: tensor.detach().cpu() for name, tensor in state.items()}


def _per_layer_config(model: PreTrainedModel, sizes: LayerSizes) -> dict[str, Any]:
    """Build config.json, whose `block_configs` have the sizes of every layer.

    Raises:
        GETAError: layers of different numbers of heads, or heads that are no multiple of those that they share.
    """
    if len(set(sizes.heads)) > 1:
        raise GETAError(
            f"layers kept {', '.join(map(str, sizes.heads[:6]))} heads, and vLLM's {PER_LAYER} has one number for all; "
            f"train with serve='vllm' in GETAConfig, or export in another format"
        )
    heads = sizes.heads[0]
    for number, shared in enumerate(sizes.kv_heads):
        if not shared or heads % shared:
            raise GETAError(
                f"layer {number} has {heads} heads over {shared} of keys and values, which do not divide them; export "
                f"in another format"
            )
    stored = model.config.to_dict()
    config = {name: stored[name] for name in _CONFIG_KEYS if name in stored}
    biases = {name.rpartition(".")[0].rpartition(".")[2] for name, _ in model.named_parameters() if "bias" in name}
    config |= {
        "architectures": [PER_LAYER],
        "model_type": configuration_decilm.DeciLMConfig.model_type,
        "auto_map": {"AutoConfig": "configuration_decilm.DeciLMConfig"},
        "dtype": str(model.dtype).removeprefix("torch."),
        "num_attention_heads": heads,
        "num_key_value_heads": max(sizes.kv_heads),
        "head_dim": sizes.head_dim,
        "intermediate_size": max(sizes.channels),
        "attention_bias": "o_proj" in biases,
        "mlp_bias": "down_proj" in biases,
        "block_configs": [
            {
                "attention": {"no_op": False, "n_heads_in_group": heads // shared},
                "ffn": {"no_op": False, "intermediate_size": channels},
            }
            for shared, channels in zip(sizes.kv_heads, sizes.channels, strict=True)
        ],
    }
    if ("q_proj" in biases) != ("o_proj" in biases):
        config["qkv_bias"] = "q_proj" in biases  # of Qwen2, whose outputs have none
    return config


# --- proof and description ----------------------------------------------------------------------------------------


def _prove_tensors(model: PreTrainedModel, folder: Path, packings: Mapping[str, Packing]) -> None:
    """Decode every tensor of a folder, and compare it with the model's.

    Raises:
        GETAError: one is missing, is too many, or differs by more than its dtype explains.
    """
    stored = _read(folder)
    for name, expected in _dense_state(model).items():
        path = name.removesuffix(".weight")
        if path in packings and name.endswith(".weight"):
            own = [key for key in stored if key.startswith(f"{path}.weight_")]
            found = unpacked(packings[path], {key.removeprefix(f"{path}."): stored.pop(key) for key in own})
        elif name in stored:
            found = stored.pop(name)
        else:
            raise GETAError(f"the vllm folder holds no {name}; export in the geta format")
        allowed = 2 * torch.finfo(model.dtype).eps * expected.float().abs()
        if found.shape != expected.shape or bool(((found.float() - expected.float()).abs() > allowed).any()):
            raise GETAError(f"{name} in the vllm folder is not the model's; export in the geta format")
    if stored:
        raise GETAError(f"the vllm folder holds {next(iter(stored))}, which the model does not have")


def _read(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            found |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    return found


def _describe(
    model: PreTrainedModel, folder: Path, layers: Mapping[str, PackedLayer], packings: Mapping[str, Packing]
) -> None:
    """Say in config.json and README.md what the folder is, how it is loaded, and what is not exact."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    code = "auto_map" in config
    load = "vllm serve FOLDER" + (" --trust-remote-code" if code else "")
    dense = [name for name, layer in packed_layers(model).items() if name not in packings]
    notes = []
    if dense:
        notes.append(f"dense, with their rounded values: {', '.join(dense[:4])}" + (", ..." if len(dense) > 4 else ""))
    if code:
        notes.append("the configuration class is in configuration_decilm.py, since transformers has none")
    found = {
        "format": "vllm",
        "load": load,
        "architecture": config["architectures"][0],
        "packed": {f"{p.bits} bits, a scale per {p.strategy}": n for p, n in _counted(packings)},
        "scale_error": {name: _scale_error(layers, dtype) for name, dtype in _HALVES.items()} if packings else {},
        "ran": False,
        "notes": notes,
    }
    config["exported_as"] = found
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_card(found), encoding="utf-8")


_HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def _counted(packings: Mapping[str, Packing]) -> list[tuple[Packing, int]]:
    kinds = list(packings.values())
    return [(kind, kinds.count(kind)) for kind in sorted(set(kinds))]


def _scale_error(layers: Mapping[str, PackedLayer], dtype: torch.dtype) -> float:
    """Return the largest share by which a dtype changes a scale."""
    scales = torch.cat([layer.step_size.detach().float().flatten().cpu() for layer in layers.values()])
    return float(((scales.to(dtype).float() - scales).abs() / scales).max())


def _card(found: Mapping[str, Any]) -> str:
    packed = ", ".join(f"{count} at {kind}" for kind, count in found["packed"].items()) or "none"
    lines = [
        "# A model for vLLM",
        "",
        f"A compressed model for vLLM's own `{found['architecture']}`. Packed linear weights: {packed}.",
        "",
        "```bash",
        f"{found['load'].replace('FOLDER', '.')}",
        "```",
        "",
    ]
    if found["scale_error"]:
        errors = " and ".join(f"{error:.2g} in {name}" for name, error in found["scale_error"].items())
        lines += [f"Codes are exactly the trained ones. Scales change by a share of at most {errors}.", ""]
    lines += ["Not run: vLLM. Every tensor of the folder was read back and compared.", ""]
    lines += [f"- {note}" for note in found["notes"]]
    return "\n".join(lines) + "\n"
