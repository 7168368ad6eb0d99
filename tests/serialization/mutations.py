"""Seeded damage to an exported folder: values, keys, bytes and headers, and what people would try on purpose."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

Mutation = tuple[str, Callable[[Path], None]]

JSON_FILES = ("config.json", "geta_structure.json", "geta_config.json", "geta_metrics.json")
VALUES: tuple[Any, ...] = (
    *(0, -1, 1, 3, 10**9, 10**12, 2**63, 10**400, 0.5, float("inf"), float("nan")),
    *(None, True, "", "geta", "../x", [], {}, [[]], [10**9], {"a": 1}, "x" * 1000),
)
"""What takes the place of a value in a JSON file."""


def _doubled(before: str, name: str) -> str:
    """Return a line of YAML whose value is that of another line, nine times."""
    return f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n"


CARDS = {
    "aliases": "a: &a [x, x, x, x, x, x, x, x, x]\n"
    + "".join(_doubled("abcdefgh"[n], "bcdefghi"[n]) for n in range(8)),
    "depth": "a: " + "[" * 5000,
    "an alias of itself": "a: &a [*a]",
    "a month": "date: 2020-13-45",
    "a number": "base_model: 0x" + "f" * 5000,
    "a tag": "a: !!python/object/apply:os.system ['true']",
    "a list of results": "model-index: 3\ntags: {a: 1}\npipeline_tag: [1]",
    "keys": "? [a, b]\n: 1",
    "half a character": 'a: "\\ud800"',
}


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all values in parsed JSON, but those in long lists."""
    inner: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        inner = list(value.items())
    elif isinstance(value, list):
        inner = list(enumerate(value[:3]))
    return [path, *(place for key, part in inner for place in _places(part, (*path, key)))]


def _replace(stored: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    holder = stored
    for key in path[:-1]:
        holder = holder[key]
    if value is ...:
        del holder[path[-1]]
    else:
        holder[path[-1]] = value
    return stored


def _edit_json(name: str, path: tuple[Any, ...], value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        stored = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(_replace(stored, path, value)))

    return change


def _edit_bytes(name: str, edit: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(edit((folder / name).read_bytes()))

    return change


def _edit_header(path: tuple[Any, ...], value: Any) -> Callable[[Path], None]:
    def edit(data: bytes) -> bytes:
        (length,) = struct.unpack("<Q", data[:8])
        text = json.dumps(_replace(json.loads(data[8 : 8 + length]), path, value)).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    return _edit_bytes("model.safetensors", edit)


def _flip(data: bytes, bit: int) -> bytes:
    place = bit // 8 % len(data)
    return data[:place] + bytes([data[place] ^ 1 << bit % 8]) + data[place + 1 :]


def _card(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "README.md").write_text(f"---\n{text}\n---\n", encoding="utf-8") and None


def on_purpose() -> list[Mutation]:
    """Return damage that somebody would do on purpose."""
    deep = _edit_bytes("config.json", lambda data: b'{"a": ' + b"[" * 10**5)
    config = {
        "layers without end": (("num_hidden_layers",), 10**9),
        "layers as a float": (("num_hidden_layers",), 1e9),
        "wide": (("hidden_size",), 10**9),
        "a vocabulary without end": (("vocab_size",), 10**12),
        "positions without end": (("max_position_embeddings",), 10**9),
        "labels without end": (("num_labels",), 10**9),
        "an unknown activation": (("hidden_act",), "no such"),
        "a quantization that is text": (("quantization_config",), "geta"),
        "bits of an unknown module": (("quantization_config", "bits", "bert.nobody"), 4),
        "a class that is none": (("architectures",), ["os"]),
        "a class of another kind": (("architectures",), ["AutoConfig"]),
        "a type of another model": (("model_type",), "llama"),
    }
    metrics = {
        "one-sided": {"latency_ms": {"dense": 1.0}},
        "no time": {"latency_ms": {"dense": 1.0, "compressed": 0}},
        "huge": {"compressed": {"em": 10**400}},
        "text": {"compressed": {"em": "1"}},
    }
    structure = {
        "bits of an unknown module": (("bits", "bert.nobody"), 4),
        "bits of zero": (("bits", "bert.encoder.layer.0.output.dense"), 0),
        "negative bits": (("bits", "bert.encoder.layer.0.output.dense"), -4),
        "endless bits": (("bits", "bert.encoder.layer.0.output.dense"), float("inf")),
    }
    return [
        ("deep nesting", deep),
        *((f"config: {name}", _edit_json("config.json", *edit)) for name, edit in config.items()),
        *((f"metrics: {name}", _edit_json("geta_metrics.json", (), values)) for name, values in metrics.items()),
        *((f"structure: {name}", _edit_json("geta_structure.json", *edit)) for name, edit in structure.items()),
        *((f"card: {name}", _card(text)) for name, text in CARDS.items()),
        ("a header of hostile length", _edit_bytes("model.safetensors", lambda d: struct.pack("<Q", 2**60) + d[8:])),
        ("a file that is empty", _edit_bytes("model.safetensors", lambda data: b"")),
    ]


def at_random(folder: Path, count: int, seed: int) -> list[Mutation]:
    """Return mutations of any kind, the same for every seed.

    Args:
        folder: whole; it is only read.
        count: how many.
        seed: of the random choices.
    """
    dice = random.Random(seed)
    places = {name: _places(json.loads((folder / name).read_text()))[1:] for name in JSON_FILES}
    data = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = _places(json.loads(data[8 : 8 + length]))[1:]
    found: list[Mutation] = []
    for _ in range(count):
        kind = dice.choice(("value", "value", "value", "key", "header", "flip", "cut", "flip a header"))
        name = dice.choice(("config.json", "config.json", *JSON_FILES))
        path, value, bit = dice.choice(places[name]), dice.choice(VALUES), dice.getrandbits(40)
        file = dice.choice((name, "model.safetensors"))
        if kind == "value":
            found.append((f"{name}: {path} = {str(value)[:20]!r}", _edit_json(name, path, value)))
        elif kind == "key":
            found.append((f"{name}: {path} is missing", _edit_json(name, path, ...)))
        elif kind == "header":
            place = dice.choice(header)
            found.append((f"header: {place} = {str(value)[:20]!r}", _edit_header(place, value)))
        elif kind == "cut":
            found.append((f"{file} cut at {bit}", _edit_bytes(file, lambda d, at=bit: d[: at % len(d)])))
        elif kind == "flip a header":
            bits = bit % (8 * (8 + length))
            found.append((f"header: bit {bits}", _edit_bytes("model.safetensors", lambda d, at=bits: _flip(d, at))))
        else:
            found.append((f"{file}: bit {bit}", _edit_bytes(file, lambda d, at=bit: _flip(d, at % (8 * len(d))))))
    return found
