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


def crc(data: bytes) -> str:
    """Returns what folders held at first."""
    return f"{zlib.crc32(data):08x}"


def grid(data: bytes) -> str:
    """Returns the checksum as docs/folder_format.md words it, in integers of Python."""
    sums = {"columns": b"", "rows": b""}
    rows = [struct.unpack("<1021Q", data[at : at + 8168]) for at in range(0, len(data) - 8167, 8168)]
    for start in range(0, len(rows), 64):
        block = rows[start : start + 64]
        sums["columns"] += b"".join((sum(column) % 2**64).to_bytes(8, "little") for column in zip(*block, strict=True))
        sums["rows"] += b"".join((sum(row) % 2**64).to_bytes(8, "little") for row in block)
    return crc(sums["columns"] + data[8168 * len(rows) :]) + crc(sums["rows"])


def test_the_config_holds_the_checksum_of_every_tensor(exported: Path) -> None:
    stored, values = stored_checksums(exported), load_file(exported / "model.safetensors")
    assert stored == {name: grid(tensor.contiguous().numpy().tobytes()) for name, tensor in values.items()}
    verify_files([str(exported / "model.safetensors")], stored)


def test_folders_with_the_crc_of_all_bytes_are_verified_too(exported: Path) -> None:
    values = load_file(exported / "model.safetensors")
    change_config(exported, {name: crc(tensor.contiguous().numpy().tobytes()) for name, tensor in values.items()})
    AutoModelForQuestionAnswering.from_pretrained(exported)
    flip(exported, NORM)
    with pytest.raises(GETAError, match=f"{NORM} has changed"):
        AutoModelForQuestionAnswering.from_pretrained(exported)
    with pytest.raises(GETAError, match=f"{NORM} has changed"):
        files_to_push(exported)


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


ROW, BLOCK = 8 * 1021, 64 * 8 * 1021


def bytes_of(size: int) -> torch.Tensor:
    torch.manual_seed(size)
    return torch.randint(256, (size,), dtype=torch.uint8)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.0),
        torch.zeros(0),
        torch.arange(12).view(3, 4).T,
        torch.ones(3, dtype=torch.bfloat16),
        *(bytes_of(size) for size in (ROW - 1, ROW, ROW + 3, BLOCK, BLOCK + 2 * ROW + 5)),
        torch.randn(3, 4000)[:, 1:],
    ],
)
def test_a_checksum_is_that_of_the_bytes_in_the_file(tmp_path: Path, tensor: torch.Tensor) -> None:
    # Behind a byte, so that no integer of the second tensor lies at a multiple of 8 bytes.
    save_file({"a": torch.ones(1, dtype=torch.uint8), "b": tensor.contiguous()}, tmp_path / "x.safetensors")
    data = (tmp_path / "x.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    start, end = json.loads(data[8 : 8 + length])["b"]["data_offsets"]
    assert checksum(tensor) == grid(data[8 + length + start : 8 + length + end])
    verify_files([str(tmp_path / "x.safetensors")], checksums({"b": tensor}))


def test_integers_that_lie_at_odd_addresses_have_the_same_checksum() -> None:
    data = bytes_of(2 * ROW)
    for shift in (1, 4, 8):
        moved = torch.cat([torch.zeros(shift, dtype=torch.uint8), data])
        assert checksum(moved[shift:]) == checksum(data)


@pytest.mark.parametrize("fill", ["random", "zeros", "ones"])
def test_no_flipped_bit_is_missed(fill: str) -> None:
    """Wherever carries go: in a sum of zeros a bit is set alone, among ones it runs to the last."""
    data = {"random": bytes_of(3 * ROW + 9), "zeros": torch.zeros(3 * ROW + 9, dtype=torch.uint8)}
    data["ones"] = ~data["zeros"]
    tensor, generator = data[fill], torch.Generator().manual_seed(0)
    expected = checksum(tensor)
    for place in [*range(64), *torch.randint(8 * tensor.numel(), (200,), generator=generator).tolist()]:
        tensor[place // 8] ^= 1 << place % 8
        assert checksum(tensor) != expected
        tensor[place // 8] ^= 1 << place % 8


def damaged(data: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns other damage: pairs that a sum alone would miss, and what a disk or a network does."""
    found = {name: data.clone() for name in ("highest bits", "one column", "one row", "page", "words", "rows", "pages")}
    for name, places in {"highest bits": (7, 8 * 500 + 7), "one column": (7, ROW + 7), "one row": (0, 8)}.items():
        for place in places:
            found[name][place] ^= 128
    found["page"][4096:8192] = 0
    for name, size, distance in (("words", 8, ROW), ("rows", ROW, 2 * ROW), ("pages", 4096, 8192)):
        found[name][:size], found[name][distance : distance + size] = data[distance : distance + size], data[:size]
    return {**found, "shifted": data.roll(1), "shifted by a word": data.roll(8), "shifted by a row": data.roll(ROW)}


def test_other_damage_is_seen() -> None:
    data = bytes_of(5 * ROW + 100)
    for name, changed in damaged(data).items():
        assert not torch.equal(changed, data) and checksum(changed) != checksum(data), name


def test_files_are_verified_where_another_device_is_the_default(tmp_path: Path) -> None:
    save_file({"x": torch.ones(3)}, tmp_path / "x.safetensors")
    stored = checksums({"x": torch.ones(3)})
    with torch.device("meta"):
        verify_files([str(tmp_path / "x.safetensors")], stored)


def test_a_tensor_of_several_blocks_is_read_to_its_end(tmp_path: Path) -> None:
    values = {"x": bytes_of(2 * BLOCK + ROW + 7), "y": torch.ones(3)}
    stored = checksums(values)
    save_file(values, tmp_path / "x.safetensors")
    verify_files([str(tmp_path / "x.safetensors")], stored)
    for byte in (BLOCK - 1, BLOCK, 2 * BLOCK, 2 * BLOCK + ROW + 6):
        flip(tmp_path, "x", byte=byte)
        with pytest.raises(GETAError, match="x has changed"):
            verify_files([str(tmp_path / "x.safetensors")], stored)
        flip(tmp_path, "x", byte=byte)
