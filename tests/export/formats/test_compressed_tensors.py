"""Packed weights in the format of another package: exact, small, and read without geta_hf."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from geta_hf.errors import GETAError
from geta_hf.export.export import compress
from geta_hf.export.formats import compressed_tensors as writer
from geta_hf.export.formats.compressed_tensors import write_compressed_tensors
from geta_hf.export.formats.vanilla import write_vanilla
from geta_hf.qadg import PruningSpace
from geta_hf.quantization import attach_quantizers, quantized_layers, step_size
from geta_hf.serialization.embeddings import rounded_embedding
from geta_hf.serialization.encode import dense_weight, layer_codes
from geta_hf.serialization.packed_layers import packed_layers
from tests.architectures import build
from tests.elsewhere import run_elsewhere
from tests.export.formats.uniform import compressed, cut, logits, prepared, tiny
from tests.export.test_activations import rounding
from tests.export.tiny_encoders import some_batch, tiny_model, train_by_hand
from tests.spaces import build_space

pytest.importorskip("compressed_tensors")

KINDS = ("llama", "qwen2", "phi3", "gemma2")
PER_CHANNEL = "qwen2"

Made = tuple[PreTrainedModel, PreTrainedModel, dict[str, Tensor], Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Made]]:
    """By kind: the masked model, its compressed copy, the batch and the folder."""
    home, found = tmp_path_factory.mktemp("packed"), {}
    for name in KINDS:
        model, small, batch = prepared(name)
        if name == PER_CHANNEL:
            model, batch = tiny(name)
            small = cut(model, batch, per_channel=True)
        (home / name).mkdir()
        write_compressed_tensors(small, home / name, batch)
        found[name] = (model, small, batch, home / name)
    yield found


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_exact_and_outputs_equal(kind: str, made: dict[str, Made]) -> None:
    model, small, batch, folder = made[kind]
    reloaded = AutoModelForCausalLM.from_pretrained(folder)
    assert (logits(reloaded, batch) - logits(model, batch)).abs().max() <= 1e-5
    layers = packed_layers(small)
    assert {layer.bits for layer in layers.values()} == {2, 3, 4, 5, 6, 7, 8}
    for name, layer in layers.items():
        assert torch.equal(reloaded.get_submodule(name).weight, layer.weight)


def test_blocks_of_32_inputs_are_groups(tmp_path: Path) -> None:
    model, batch = tiny("llama")
    small = cut(model, batch, grid="block32")
    write_compressed_tensors(small, tmp_path, batch)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (logits(reloaded, batch) - logits(model, batch)).abs().max() <= 1e-5
    stored = load_file(tmp_path / "model.safetensors")
    packed = set()
    for name, layer in packed_layers(small).items():
        # A last block that is shorter has no name there, so such a layer is dense.
        fits = layer.weight.shape[1] % 32 == 0
        packed.add(fits)
        assert (f"{name}.weight_packed" in stored) == fits and (f"{name}.weight" in stored) != fits
        assert torch.equal(reloaded.get_submodule(name).weight, layer.weight)
    assert packed == {False, True}
    groups = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["config_groups"]
    assert {(group["weights"]["strategy"], group["weights"]["group_size"]) for group in groups.values()} == {
        ("group", 32)
    }


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_has_its_own_bits(kind: str, made: dict[str, Made]) -> None:
    _, small, _, folder = made[kind]
    stored = load_file(folder / "model.safetensors")
    for name, layer in packed_layers(small).items():
        rows, columns = layer.weight.shape
        assert stored[f"{name}.weight_packed"].shape == (rows, math.ceil(columns * layer.bits / 32))
        assert stored[f"{name}.weight_scale"].numel() == layer.step_size.numel()
        assert f"{name}.weight" not in stored
    saved = json.loads((folder / "config.json").read_text())
    assert saved["quantization_config"]["quant_method"] == "compressed-tensors"
    assert "geta" not in json.dumps(saved)


def test_read_and_run_without_geta(made: dict[str, Made], tmp_path: Path) -> None:
    for name, (_, _, batch, _) in made.items():
        save_file({key: tensor.contiguous() for key, tensor in batch.items()}, tmp_path / f"{name}.in")
    home = made["llama"][3].parent
    run_elsewhere(
        f"""
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
for name in {KINDS!r}:
    model = AutoModelForCausalLM.from_pretrained({str(home)!r} + "/" + name)
    batch = load_file(name + ".in")
    with torch.no_grad():
        tokens = model.generate(batch["input_ids"], max_new_tokens=4, do_sample=False)
        save_file({{"logits": model(**batch).logits, "tokens": tokens}}, name + ".out")
""",
        tmp_path,
    )
    for name, (model, _, batch, _) in made.items():
        found = load_file(tmp_path / f"{name}.out")
        assert (found["logits"] - logits(model, batch)).abs().max() <= 1e-5
        assert torch.equal(found["tokens"], model.generate(batch["input_ids"], max_new_tokens=4, do_sample=False))


def test_the_base_class_reads_it_too(made: dict[str, Made]) -> None:
    model, _, batch, folder = made["llama"]
    base = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        gap = base.eval()(**batch).last_hidden_state - model.model.eval()(**batch).last_hidden_state
    assert gap.abs().max() <= 1e-5


def test_the_file_is_really_smaller(tmp_path: Path) -> None:
    """Bits of all codes and whole rows of words, a scale and a shape for each layer, everything else as it was."""
    model = tiny_model(hidden=128)
    small = cut(model, some_batch(), kinds=("channels",), bits=(2, 3, 4))
    sizes = {}
    for write, name in ((write_compressed_tensors, "packed"), (write_vanilla, "vanilla")):
        (tmp_path / name).mkdir()
        write(small, tmp_path / name, some_batch())
        tensors = load_file(tmp_path / name / "model.safetensors")
        sizes[name] = sum(tensor.nbytes for tensor in tensors.values())
    layers = packed_layers(small).values()
    dense = sum(4 * layer.weight.numel() for layer in layers)
    codes = sum(4 * layer.weight.shape[0] * math.ceil(layer.weight.shape[1] * layer.bits / 32) for layer in layers)
    assert sizes["packed"] == sizes["vanilla"] - dense + codes + len(layers) * (4 + 16)
    assert codes <= dense / 10
    assert sizes["packed"] < 0.25 * sizes["vanilla"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    """Codes stay exact; a step size is rounded to the type that the package computes in."""
    model, batch = tiny("llama", dtype)
    small = cut(model, batch)
    write_compressed_tensors(small, tmp_path, batch)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    logits(reloaded, batch)
    for name, layer in packed_layers(small).items():
        scale = layer.step_size.to(dtype)
        assert torch.equal(reloaded.get_submodule(name).weight, layer_codes(name, layer).to(dtype) * scale)


def test_wide_layers_stay_dense(tmp_path: Path) -> None:
    model, batch = tiny("llama")
    small = cut(model, batch, bits=(4, 9, 16))
    write_compressed_tensors(small, tmp_path, batch)
    stored = load_file(tmp_path / "model.safetensors")
    for name, layer in packed_layers(small).items():
        assert (f"{name}.weight_packed" in stored) == (layer.bits == 4)
        assert layer.bits == 4 or torch.equal(stored[f"{name}.weight"], layer.weight)


@pytest.mark.parametrize("kind", ["bert", "llama-bias"])
def test_rounded_embeddings_stay_dense(kind: str, tmp_path: Path) -> None:
    """One of an encoder, and one that is tied to the last layer."""
    model, batch = tiny(kind)
    with torch.no_grad():
        attach_quantizers(model)
        for layer in quantized_layers(model).values():
            layer.weight_quantizer.d.copy_(step_size(4.0, layer.weight_quantizer.q_m, layer.weight_quantizer.t))
    with rounded_embedding(model, 4) as embedding:
        small = compress(model, PruningSpace(()), {}, batch, embedding)
    write_compressed_tensors(small, tmp_path, batch)
    stored, name = load_file(tmp_path / "model.safetensors"), embedding.name
    assert torch.equal(stored[f"{name}.weight"], dense_weight(small.get_submodule(name)))
    assert sum("weight_packed" in key for key in stored) == len(packed_layers(small)) - 1


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_nothing_to_pack_is_an_error(kind: str, tmp_path: Path) -> None:
    """Conv1D, or no quantizers at all."""
    model, batch = tiny(kind)
    small = cut(model, batch, kinds=("channels",), bits=(4,) if kind == "gpt2" else None)
    with pytest.raises(GETAError, match=f"nothing to pack: {type(model).__name__} has no untied linear layer"):
        write_compressed_tensors(small, tmp_path, batch)
    assert list(tmp_path.iterdir()) == []


def test_layers_that_differ_are_refused(tmp_path: Path) -> None:
    model, batch = tiny("llama")
    space = build_space(model, batch)
    mlps = [family for family in space.prunable if family.kind == "channels"]
    removal = {family.name: torch.arange(family.size) < 8 * (place + 1) for place, family in enumerate(mlps)}
    with pytest.raises(GETAError, match="uniform=True"):
        write_compressed_tensors(compressed(model, batch, space, removal), tmp_path, batch)
    assert list(tmp_path.iterdir()) == []


def test_rounded_activations_are_refused(tmp_path: Path) -> None:
    model, batch = build("llama")
    space = build_space(model, batch)
    train_by_hand(model, space)
    rounding(model, batch)
    with pytest.raises(GETAError, match="the compressed-tensors format has no place for rounded activations"):
        write_compressed_tensors(compressed(model, batch, space, {}, bits=None), tmp_path, batch)


def test_the_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    with pytest.raises(GETAError, match=r"pip install geta_hf\[compressed-tensors\]"):
        write_compressed_tensors(nn.Linear(2, 2), tmp_path, {})  # type: ignore[arg-type]


@pytest.mark.parametrize("leaf", ["weight_packed", "weight_scale"])
def test_wrong_data_is_caught(leaf: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mutation: one code or the scale of each layer is another."""
    pack = writer._packed

    def damaged(*args: Any) -> dict[str, Tensor]:
        tensors = pack(*args)
        tensors[leaf].view(-1)[0] += tensors[leaf].view(-1)[0] // 50 + 1 if leaf == "weight_packed" else 0.001
        return tensors

    monkeypatch.setattr(writer, "_packed", damaged)
    _, small, batch = prepared("llama")
    with pytest.raises(GETAError, match="the compressed-tensors model's logits"):
        write_compressed_tensors(small, tmp_path, batch)
    assert list(tmp_path.iterdir()) == []
