"""Small images of two kinds that a model can tell apart: level stripes, and upright ones."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 16
CLASSES = ("level", "upright")


def picture(label: int, seed: int, mode: str = "RGB") -> Image.Image:
    """Return one image of a class."""
    pixels = np.random.default_rng(seed).integers(0, 60, (SIDE, SIDE, 3), dtype=np.uint8)
    bright = np.arange(SIDE) % 4 < 2
    pixels[(slice(None), bright) if label else bright] += 150
    return Image.fromarray(pixels).convert(mode)


def write_folder(folder: Path, count: int, mode: str = "RGB") -> Path:
    """Write `count` images of each class into a folder of its name."""
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            picture(label, 100 * label + number, mode).save(folder / name / f"{number}.png")
    return folder


def write_idx(folder: Path, count: int) -> Path:
    """Write `count` grayscale images to train on and as many to evaluate on as MNIST's files."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, start in (("train", 0), ("t10k", 1000)):
        labels = bytes(number % 2 for number in range(count))
        pixels = b"".join(picture(number % 2, start + number, "L").tobytes() for number in range(count))
        images = struct.pack(">BBBB3I", 0, 0, 8, 3, count, SIDE, SIDE) + pixels
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">BBBBI", 0, 0, 8, 1, count) + labels)
    return folder
