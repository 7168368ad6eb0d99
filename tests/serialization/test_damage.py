"""Folders that are damaged or hostile: each gives an error that names the file and the key, and costs no memory."""

from __future__ import annotations

import json
import pickle
import resource
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForQuestionAnswering

from geta_hf import export
from geta_hf.quantization import attach_input_quantizers
from tests.export.tiny_encoders import some_batch, tiny_model, train_by_hand
from tests.spaces import build_space

QUERY = "bert.encoder.layer.0.attention.self.query"
DENSE = "bert.encoder.layer.0.attention.output.dense"
WORDS = "bert.embeddings.word_embeddings"
NORM = "bert.embeddings.LayerNorm.weight"
MEGABYTES = 300
"""How much memory all of these may take together; the least hostile size below is a hundred times as large."""

Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "out"
    model = tiny_model()
    space = build_space(model, some_batch())
    train_by_hand(model, space)
    attach_input_quantizers(model, [some_batch()], initial_bits=8, target_bits=8)
    export(model, folder, space=space, batch=some_batch(), embedding_bits=4)
    return folder


@pytest.fixture(scope="module", autouse=True)
def memory(exported: Path) -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEGABYTES * 1024


def config(*path: str | int, value: Any) -> Change:
    """Sets what lies under these keys of config.json; a value of `...` removes it."""

    def change(folder: Path) -> None:
        file = folder / "config.json"
        stored = json.loads(file.read_text())
        place = stored
        for key in path[:-1]:
            place = place[key]
        if value is ...:
            del place[path[-1]]
        else:
            place[path[-1]] = value
        file.write_text(json.dumps(stored))

    return change


def quantization(*path: str | int, value: Any) -> Change:
    return config("quantization_config", *path, value=value)


def tensor(name: str, value: Any) -> Change:
    """Replaces a tensor of model.safetensors by what a function makes of it; None removes it."""

    def change(folder: Path) -> None:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value(tensors[name]).contiguous()
        save_file(tensors, file, {"format": "pt"})

    return change


def content(name: str, value: Callable[[bytes], bytes]) -> Change:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(value((folder / name).read_bytes()))

    return change


def header(edit: Callable[[dict[str, Any]], Any]) -> Change:
    """Changes the header of model.safetensors and leaves the data as they are."""

    def change(folder: Path) -> None:
        file = folder / "model.safetensors"
        whole = file.read_bytes()
        (length,) = struct.unpack("<Q", whole[:8])
        stored = json.loads(whole[8 : 8 + length])
        edit(stored)
        text = json.dumps(stored).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + length :])

    return change


def shards(edit: Callable[[Path, dict[str, str]], Any]) -> Change:
    """The folder in shards, with its index changed."""

    def change(folder: Path) -> None:
        AutoModelForQuestionAnswering.from_pretrained(folder).save_pretrained(folder, max_shard_size="8KB")
        (folder / "model.safetensors").unlink()
        file = folder / "model.safetensors.index.json"
        stored = json.loads(file.read_text())
        edit(folder, stored["weight_map"])
        file.write_text(json.dumps(stored))

    return change


def first_shard(folder: Path) -> Path:
    return min(folder.glob("model-*.safetensors"))


def _copy_out(folder: Path, index: dict[str, str]) -> None:
    shutil.copyfile(folder / index[NORM], folder.parent / "elsewhere.safetensors")
    index[NORM] = "../elsewhere.safetensors"


HUGE = 10**12
FIXES = ("fixes", "shapes")
DAMAGED: dict[str, tuple[Change, str]] = {
    # quantization_config
    "version of tomorrow": (quantization("format_version", value=3), "format_version is 3"),
    "version that is text": (quantization("format_version", value="1"), "format_version is '1'"),
    "unknown key": (quantization("surprise", value=1), "unknown keys .*surprise"),
    "bits that are a list": (quantization("bits", value=[4]), "bits must be an object"),
    "bits of zero": (quantization("bits", QUERY, value=0), rf"bits\['{QUERY}'\] is 0"),
    "bits of seventeen": (quantization("bits", QUERY, value=17), rf"bits\['{QUERY}'\] is 17"),
    "bits that are true": (quantization("bits", QUERY, value=True), rf"bits\['{QUERY}'\] is True"),
    "bits that are huge": (quantization("bits", QUERY, value=HUGE), rf"bits\['{QUERY}'\] is {HUGE}"),
    "bits that are a fraction": (quantization("bits", QUERY, value=4.5), rf"bits\['{QUERY}'\] is 4\.5"),
    "bits that are wrong": (quantization("bits", QUERY, value=9), rf"{QUERY}\.weight: .* of 9 bits are a uint8 stream"),
    "bits of four levels": (quantization("bits", DENSE, value=9), f"four_levels names '{DENSE}', whose .* is 9"),
    "four levels of nobody": (quantization("four_levels", value=["nobody"]), "four_levels names 'nobody'"),
    "bits of an unknown module": (quantization("bits", "bert.nobody", value=4), "bert.nobody.*absent"),
    "bits of a norm": (quantization("bits", "bert.embeddings.LayerNorm", value=4), "LayerNorm is a LayerNorm"),
    "bits of the whole model": (quantization("bits", "", value=4), "the model is a BertForQuestionAnswering"),
    "bits that lack a layer": (quantization("bits", QUERY, value=...), QUERY),
    "bits that lack the embedding": (quantization("bits", WORDS, value=...), WORDS),
    "input bits of one": (quantization("activation_bits", QUERY, value=1), rf"activation_bits\['{QUERY}'\] is 1"),
    "input bits of a float layer": (
        quantization("activation_bits", "qa_outputs", value=8),
        "activation_bits.*qa_outputs",
    ),
    "input bits that lack a layer": (quantization("activation_bits", QUERY, value=...), rf"lacks .*{QUERY}"),
    "fixes that are a list": (quantization("fixes", value=[]), "fixes must hold"),
    "fixes of tomorrow": (quantization("fixes", "version", value=3), "fixes.version is 3"),
    "fixes without a part": (quantization("fixes", "attrs", value=...), "fixes must hold"),
    "a shape that is text": (quantization(*FIXES, f"{QUERY}.weight", value="2"), "shapes.*query.weight"),
    "a shape that is negative": (quantization(*FIXES, f"{QUERY}.weight", value=[-1, 32]), "shapes.*query.weight"),
    "a shape that grows": (
        quantization(*FIXES, f"{QUERY}.weight", value=[HUGE, HUGE]),
        rf"{QUERY}.weight the shape .* no cut of",
    ),
    "a shape of another rank": (quantization(*FIXES, f"{QUERY}.weight", value=[8]), "query.weight"),
    "a shape of nothing": (quantization(*FIXES, "bert.nobody.weight", value=[8]), "bert.nobody"),
    "a shape that is missing": (quantization(*FIXES, f"{QUERY}.bias", value=...), "query"),
    "an attribute that grows": (
        quantization("fixes", "attrs", value={"qa_outputs": {"out_features": HUGE}}),
        "out_features",
    ),
    "an attribute that is no size": (
        quantization("fixes", "attrs", value={"qa_outputs": {"__class__": 1}}),
        "__class__",
    ),
    "an attribute that is code": (
        quantization("fixes", "attrs", value={"qa_outputs": {"forward": "os.system"}}),
        "forward",
    ),
    "a buffer kept beyond its size": (
        quantization("fixes", "keep", value={"bert.embeddings.position_ids": {"1": [HUGE]}}),
        "position_ids",
    ),
    "a buffer kept out of order": (
        quantization("fixes", "keep", value={"bert.embeddings.position_ids": {"1": [3, 2]}}),
        "position_ids",
    ),
    # the rest of config.json
    "a config that is cut short": (content("config.json", lambda data: data[:99]), "config.json"),
    "a config of another width": (config("type_vocab_size", value=3), "token_type_embeddings"),
    "a hostile vocabulary": (config("vocab_size", value=HUGE // 1000), WORDS),
    "hostile positions": (config("max_position_embeddings", value=HUGE // 1000), "position_embeddings"),
    "a config of more layers": (config("num_hidden_layers", value=3), r"layer\.2"),
    "a config of fewer layers": (config("num_hidden_layers", value=1), r"layer\.1"),
    # model.safetensors
    "a file that is cut short": (
        content("model.safetensors", lambda data: data[:-100]),
        "model.safetensors is damaged",
    ),
    "a file that is a header": (content("model.safetensors", lambda data: data[:64]), "model.safetensors is damaged"),
    "a file that is empty": (content("model.safetensors", lambda data: b""), "model.safetensors is damaged"),
    "a header of hostile length": (
        content("model.safetensors", lambda data: struct.pack("<Q", 2**60) + data[8:]),
        "model.safetensors is damaged",
    ),
    "a header that is no JSON": (
        content("model.safetensors", lambda data: data[:8] + b"x" + data[9:]),
        "model.safetensors is damaged",
    ),
    "a header of hostile shape": (header(lambda h: h[NORM].update(shape=[HUGE])), "model.safetensors is damaged"),
    "a header of hostile place": (
        header(lambda h: h[NORM].update(data_offsets=[HUGE, HUGE + 128])),
        "model.safetensors is damaged",
    ),
    "a stream cut short": (tensor(f"{QUERY}.weight", lambda t: t[:-1]), rf"model.safetensors: {QUERY}\.weight"),
    "a stream of floats": (tensor(f"{QUERY}.weight", lambda t: t.float()), rf"model.safetensors: {QUERY}\.weight"),
    "a stream of zeros": (tensor(f"{QUERY}.weight", torch.zeros_like), rf"{QUERY}\.weight: .* damaged"),
    "an embedding cut short": (tensor(f"{WORDS}.weight", lambda t: t[:-1]), rf"model.safetensors: {WORDS}\.weight"),
    "a scale for every other row": (tensor(f"{WORDS}.weight_scale", lambda t: t[::2]), rf"{WORDS}\.weight_scale"),
    "a scale that is NaN": (tensor(f"{QUERY}.weight_scale", lambda t: t * torch.nan), rf"{QUERY}\.weight_scale is nan"),
    "a scale of zero": (tensor(f"{QUERY}.weight_scale", torch.zeros_like), rf"{QUERY}\.weight_scale is 0"),
    "an input's scale that is missing": (tensor(f"{QUERY}.input_scale", None), rf"no tensor {QUERY}\.input_scale"),
    "a weight that is missing": (tensor(f"{QUERY}.weight", None), rf"no tensor {QUERY}\.weight"),
    "a plain tensor that is missing": (tensor(NORM, None), f"no tensor {NORM}"),
    "a plain tensor that is longer": (tensor(NORM, lambda t: t.repeat(2)), NORM),
    "a plain tensor of bytes": (tensor(NORM, lambda t: t.byte()), NORM),
    # shards
    "a shard that is missing": (shards(lambda folder, index: first_shard(folder).unlink()), "model-00001-of"),
    "a shard that is cut short": (
        shards(lambda folder, index: first_shard(folder).write_bytes(b"12345678")),
        "model-00001-of.* is damaged",
    ),
    "an index that leads elsewhere": (
        shards(lambda folder, index: _copy_out(folder, index)),
        "elsewhere.safetensors lies outside",
    ),
    "an index that lacks a shard": (
        shards(lambda folder, index: [index.pop(name) for name in list(index) if "00001-of" in index[name]]),
        "no tensor",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_named(exported: Path, tmp_path: Path, name: str) -> None:
    change, message = DAMAGED[name]
    folder = tmp_path / "copy"
    shutil.copytree(exported, folder)
    change(folder)
    with pytest.raises((ValueError, OSError, TypeError, AttributeError), match=message) as caught:
        AutoModelForQuestionAnswering.from_pretrained(folder)
    assert not isinstance(caught.value, MemoryError)


class _Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("options", [{}, {"dtype": "auto"}, {"use_safetensors": False}])
def test_nothing_is_unpickled(exported: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    folder, mark = tmp_path / "copy", tmp_path / "mark"
    shutil.copytree(exported, folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({QUERY: _Touch(mark)}))
    with pytest.raises((ValueError, OSError, pickle.UnpicklingError)):
        AutoModelForQuestionAnswering.from_pretrained(folder, **options)
    assert not mark.exists()


def test_there_are_fifty() -> None:
    assert len(DAMAGED) >= 50
