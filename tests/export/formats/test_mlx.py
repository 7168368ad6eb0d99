"""Folders for mlx-lm, decoded code by code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from geta_hf import export
from geta_hf.errors import GETAError
from geta_hf.export.formats import mlx as module
from geta_hf.export.formats import writer
from geta_hf.export.formats.mlx import write_mlx
from geta_hf.quantization import attach_quantizers
from geta_hf.serialization.encode import dense_weight
from geta_hf.serialization.packed_layers import packed_layers
from tests.export.formats.gguf import tiny
from tests.export.formats.test_vllm import cut

SIZES = {"hidden_size": 64, "intermediate_size": 192}


def write(model: PreTrainedModel, folder: Path) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    write_mlx(model, folder, tiny.batch())
    return json.loads((folder / "config.json").read_text())


def decoded(stored: dict[str, Tensor], path: str, bits: int, group_size: int) -> Tensor:
    """One code after the other, out of one long number for each row, as MLX's kernels have them in memory."""
    words, scales, offsets = (stored[f"{path}.{leaf}"] for leaf in ("weight", "scales", "biases"))
    rows = []
    for row in words.view(torch.uint8).numpy():
        number, columns = int.from_bytes(row.tobytes(), "little"), len(row) * 8 // bits
        rows.append([number >> (bits * place) & (2**bits - 1) for place in range(columns)])
    codes = torch.from_numpy(np.array(rows, dtype=np.float32))
    return codes * scales.float().repeat_interleave(group_size, 1) + offsets.float().repeat_interleave(group_size, 1)


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
def test_layers_that_are_alike_are_an_ordinary_model(kind: str, tmp_path: Path) -> None:
    small = cut(tiny.model(kind, **SIZES, head_dim=16), alike=True, bits=(4, 3, 8, 2, 6, 5, 7))
    config = write(small, tmp_path)
    assert (config["model_type"], config["num_attention_heads"], config["head_dim"]) == (kind.lower(), 2, 16)
    assert config["intermediate_size"] == 96 and config["rope_theta"] == 10000.0 and config["rope_scaling"] is None
    stored, said = load_file(tmp_path / "model.safetensors"), config["quantization"]
    for name, layer in packed_layers(small).items():
        rows, columns = layer.dense_shape
        width = 8 if layer.bits == 7 else layer.bits
        assert said[name] == {"bits": width, "group_size": {64: 64, 96: 32, 32: 32}[columns]}
        assert stored[f"{name}.weight"].dtype == torch.uint32
        assert stored[f"{name}.weight"].shape == (rows, columns * width // 32)
        assert stored[f"{name}.scales"].shape == (rows, columns // said[name]["group_size"])
        assert (decoded(stored, name, **said[name]) - dense_weight(layer)).abs().max() <= 1e-6
    assert torch.equal(stored["model.embed_tokens.weight"], small.model.embed_tokens.weight)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "mlx"}
    assert "Not run: mlx-lm." in (tmp_path / "README.md").read_text() and not config["exported_as"]["notes"]


def channels_of(config: dict[str, Any]) -> list[int]:
    """As mlx-lm's nemotron-nas derives them."""
    found = []
    for block in config["block_configs"]:
        count = int(2 * round(block["ffn"]["ffn_mult"], 6) * config["hidden_size"] / 3)
        found.append(count if count % 256 == 0 else count + 256 - count % 256)
    return found


@pytest.mark.parametrize("heads", [True, False])
def test_layers_that_differ_are_filled_up_with_zeros(heads: bool, tmp_path: Path) -> None:
    dense = tiny.model("Llama", hidden_size=64, intermediate_size=600)
    small = cut(dense, alike=False, keep=[] if heads else ["heads"])
    config = write(small, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    if heads:
        assert config["model_type"] == "llama" and "block_configs" not in config
        channels = [config["intermediate_size"]] * 2
        assert channels == [416, 416]  # of 400, as groups need them
    else:
        channels = channels_of(config)
        assert config["model_type"] == "nemotron-nas" and channels == [512, 512]
        assert [block["attention"] for block in config["block_configs"]] == [{"n_heads_in_group": 2}] * 2
    for number, (count, kept) in enumerate(zip(channels, (400, 300), strict=True)):
        for part in ("gate_proj", "up_proj", "down_proj"):
            path = f"model.layers.{number}.mlp.{part}"
            exact = dense_weight(small.get_submodule(path))
            packed = config["quantization"].get(path)
            found = stored[f"{path}.weight"] if packed is None else decoded(stored, path, **packed)
            found = found.T if part == "down_proj" else found
            exact = exact.T if part == "down_proj" else exact
            assert found.shape[0] == count and not found[kept:].any()
            assert (found[:kept] - exact).abs().max() <= 1e-6
    assert "more: train with multiple_of=256" in config["exported_as"]["notes"][-1]


def test_blocks_are_groups_and_rounded_embeddings_are_packed(tmp_path: Path) -> None:
    dense = tiny.model("Llama", **SIZES, tie_word_embeddings=True)
    attach_quantizers(dense, initial_bits=5, grid="block32")
    export(dense, tmp_path / "out", batch=tiny.batch(), format="mlx", embedding_bits=4)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization"]["model.layers.0.mlp.down_proj"] == {"bits": 5, "group_size": 32}
    assert config["quantization"]["model.embed_tokens"] == {"bits": 4, "group_size": 64}
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert "lm_head.weight" not in stored and not config["exported_as"]["not_exact"].get("model.norm.weight")


def test_rows_without_groups_and_wide_codes_are_dense(tmp_path: Path) -> None:
    small = cut(tiny.model("Llama", hidden_size=48, head_dim=16, intermediate_size=96), alike=True, bits=(4, 9))
    config = write(small, tmp_path)
    assert "dense, since rows are no multiple of 32" in config["exported_as"]["notes"][-1]
    stored = load_file(tmp_path / "model.safetensors")
    for name, layer in packed_layers(small).items():
        if name not in config.get("quantization", {}):
            rows, columns = layer.dense_shape  # what is left is filled up
            assert torch.equal(stored[f"{name}.weight"][:rows, :columns], dense_weight(layer))


def test_half_precision_scales_are_named(tmp_path: Path) -> None:
    small = cut(tiny.model("Llama", **SIZES), alike=True).to(torch.bfloat16)
    config = write(small, tmp_path)
    errors = config["exported_as"]["not_exact"]
    assert errors and max(errors.values()) <= 2**-7 and "model.norm.weight" not in errors


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("Phi", {}, "has no name for a PhiForCausalLM"),
        ("Llama", {"hidden_act": "gelu"}, "computes gelu, mlx-lm silu"),
        ("Mistral", {"sliding_window": 32}, "to the last 32"),
        ("Llama", {"rope_parameters": {**tiny.ROPE, "partial_rotary_factor": 0.5}}, "over 0.5 of each head"),
    ],
)
def test_what_mlx_computes_otherwise_is_refused_early(kind: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GETAError, match=message):
        writer("mlx", tiny.model(kind, **changes))


def test_heads_without_a_place_are_refused(tmp_path: Path) -> None:
    with pytest.raises(GETAError, match="layers kept 4, 2 heads, and mlx-lm has one number for all"):
        write(tiny.sliced(tiny.model("Llama"), layers=(1,)), tmp_path)
    with pytest.raises(GETAError, match="mlx-lm's qwen2 has no place for removed heads"):
        write(tiny.sliced(tiny.model("Qwen2")), tmp_path)


def test_rounded_activations_and_wrong_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = tiny.model("Llama")
    monkeypatch.setattr(module, "activation_bits", lambda model: {"a": 8})
    with pytest.raises(GETAError, match="no place for rounded activations"):
        write(dense, tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(
        module, "_words", lambda codes, bits: torch.zeros(len(codes), codes.shape[1] * bits // 32).to(torch.uint32)
    )
    attach_quantizers(dense, initial_bits=4)
    with pytest.raises(GETAError, match="in the mlx folder is not the model's"):
        export(dense, tmp_path / "out", batch=tiny.batch(), format="mlx")
    assert not (tmp_path / "out").exists()
