"""A changed bit anywhere in a folder's tensors is an error that names the tensor, however the folder is loaded."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForQuestionAnswering, BertModel

from geta_hf import GETAError
from geta_hf.inference import load_for_inference
from geta_hf.reporting.hub import files_to_push
from geta_hf.serialization.checksums import checksum, checksums, verify_files

NORM = "bert.encoder.layer.1.output.LayerNorm.weight"
QUERY = "bert.encoder.layer.0.attention.self.query"
WORDS = "bert.embeddings.word_embeddings.weight"
NAMES = [NORM, f"{QUERY}.weight", f"{QUERY}.weight_scale", WORDS, "qa_outputs.bias"]


def file_of(folder: Path, name: str) -> Path:
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            if name in tensors.keys():  # noqa: SIM118
                return file
    raise AssertionError(name)


def flip(folder: Path, name: str, byte: int = 0, bit: int = 3) -> None:
    """Flips one bit of a tensor in its file."""
    file = file_of(folder, name)
    data = bytearray(file.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    start = json.loads(data[8 : 8 + length])[name]["data_offsets"][0]
    data[8 + length + start + byte] ^= 1 << bit
    file.write_bytes(bytes(data))


def stored_checksums(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())["quantization_config"]["checksums"]


def test_the_config_holds_the_crc_of_every_tensor(exported: Path) -> None:
    stored, values = stored_checksums(exported), load_file(exported / "model.safetensors")
    expected = {name: zlib.crc32(tensor.contiguous().numpy().tobytes()) for name, tensor in values.items()}
    assert {name: int(text, 16) for name, text in stored.items()} == expected
    verify_files([str(exported / "model.safetensors")], stored)


@pytest.mark.parametrize("name", NAMES)
def test_a_flipped_bit_is_an_error_that_names_the_tensor(exported: Path, name: str) -> None:
    flip(exported, name)
    # Where the bit makes a code that is never written, decoding is the first to see it.
    with pytest.raises(GETAError, match=rf"{name}(:.*the data is damaged| has changed since it was written)"):
        AutoModelForQuestionAnswering.from_pretrained(exported)
    with pytest.raises(GETAError, match=f"{name} has changed"):
        files_to_push(exported)


@pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"device_map": "cpu"}, {"low_cpu_mem_usage": True}])
def test_however_it_is_loaded(exported: Path, options: dict[str, Any]) -> None:
    AutoModelForQuestionAnswering.from_pretrained(exported, **options)
    flip(exported, NORM)
    with pytest.raises(GETAError, match=f"{NORM} has changed"):
        AutoModelForQuestionAnswering.from_pretrained(exported, **options)


def test_as_another_class_offloaded_and_for_inference(exported: Path, tmp_path: Path) -> None:
    devices = {"bert.embeddings": "cpu", "bert.encoder": "disk", "qa_outputs": "cpu"}
    options = {"device_map": devices, "offload_folder": str(tmp_path / "off")}
    AutoModelForQuestionAnswering.from_pretrained(exported, **options)
    flip(exported, NORM)
    for load in (
        lambda: AutoModelForQuestionAnswering.from_pretrained(exported, **options),
        lambda: BertModel.from_pretrained(exported),
        lambda: load_for_inference(AutoModelForQuestionAnswering, exported),
    ):
        with pytest.raises(GETAError, match=f"{NORM} has changed"):
            load()


def test_shards_are_verified_too(exported: Path) -> None:
    AutoModelForQuestionAnswering.from_pretrained(exported).save_pretrained(exported, max_shard_size="8KB")
    (exported / "model.safetensors").unlink()
    AutoModelForQuestionAnswering.from_pretrained(exported)
    flip(exported, NORM)
    with pytest.raises(GETAError, match=f"model-0000.*: {NORM} has changed"):
        AutoModelForQuestionAnswering.from_pretrained(exported)


def change_config(folder: Path, value: Any) -> None:
    """Sets the checksums; `...` removes them."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].pop("checksums")
    if value is not ...:
        config["quantization_config"]["checksums"] = value
    (folder / "config.json").write_text(json.dumps(config))


def test_folders_without_checksums_load_as_before(exported: Path) -> None:
    """So do tensors of which none is known."""
    stored = stored_checksums(exported)
    flip(exported, NORM, byte=1)
    change_config(exported, {name: text for name, text in stored.items() if name != NORM})
    AutoModelForQuestionAnswering.from_pretrained(exported)
    change_config(exported, ...)
    AutoModelForQuestionAnswering.from_pretrained(exported)


def test_what_is_changed_and_saved_again_has_new_checksums(exported: Path) -> None:
    model = AutoModelForQuestionAnswering.from_pretrained(exported)
    before = stored_checksums(exported)
    with torch.no_grad():
        model.qa_outputs.bias += 1
    model.save_pretrained(exported)
    after = stored_checksums(exported)
    assert {name for name in after if after[name] != before[name]} == {"qa_outputs.bias"}
    assert torch.equal(AutoModelForQuestionAnswering.from_pretrained(exported).qa_outputs.bias, model.qa_outputs.bias)


@pytest.mark.parametrize("value", ["", [], 7, {NORM: None}, {NORM: 7}, {NORM: "9" * 500}, {NORM: "zzzzzzzz"}])
def test_checksums_that_are_damaged_are_one_sentence(exported: Path, value: Any) -> None:
    change_config(exported, value)
    with pytest.raises(GETAError, match="checksum") as caught:
        AutoModelForQuestionAnswering.from_pretrained(exported)
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "tensor", [torch.tensor(3.0), torch.zeros(0), torch.arange(12).view(3, 4).T, torch.ones(3, dtype=torch.bfloat16)]
)
def test_a_checksum_is_that_of_the_bytes_in_the_file(tmp_path: Path, tensor: torch.Tensor) -> None:
    save_file({"x": tensor.contiguous()}, tmp_path / "x.safetensors")
    data = (tmp_path / "x.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    assert int(checksum(tensor), 16) == zlib.crc32(data[8 + length :])


def test_a_tensor_of_several_blocks_is_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geta_hf.serialization.checksums._BLOCK", 7)
    values = {"x": torch.arange(50.0), "y": torch.ones(3)}
    stored = checksums(values)
    save_file(values, tmp_path / "x.safetensors")
    verify_files([str(tmp_path / "x.safetensors")], stored)
    flip(tmp_path, "x", byte=199)
    with pytest.raises(GETAError, match="x has changed"):
        verify_files([str(tmp_path / "x.safetensors")], stored)
