"""Store a checksum of every tensor in the files of weights, and verify them while a model is loaded.

A flipped bit mostly turns one legal code into another, which no check of types and sizes can see. The checksums are in
the `quantization_config` of config.json: the metadata of a safetensors file have no order, and a second entry there
would make files differ that hold the same. Folders without checksums, which earlier releases wrote, are not verified.

A CRC of every byte would take a sixth of a load. So the bytes are taken as a grid of 64-bit integers, whose columns and
rows are summed at the speed of memory. The checksum is the CRC-32 of the sums of columns and that of the sums of rows.
A bit that flips changes one sum of each by a power of two, so by carries a run of adjacent bits; a CRC-32 misses no run
of up to 64 bits. Two flips, or two integers that change places, alter the sums of columns or those of rows, wherever
they are. A CRC-32 of altered sums is the same with a probability of 2^-32, and mostly both are altered.

The files are read a second time, in a thread, through a mapping: torch releases Python's lock, and nothing is copied.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geta_hf.errors import GETAError

WIDTH = 1021
"""Integers in a row. Prime, so that damage at distances of a power of two does not meet in one column."""

HEIGHT = 64
"""Rows of which the columns are summed together. So many fit into a processor's cache, where they are read twice."""

_CRC_DIGITS = 8
DIGITS = (_CRC_DIGITS, 2 * _CRC_DIGITS)
"""Lengths of a checksum: the first is the CRC-32 of all bytes, which folders held at first."""


def checksum(tensor: Tensor) -> str:
    """Return the checksum of a tensor's bytes, as a safetensors file holds them: 16 hexadecimal digits."""
    return _grid_checksum(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8))


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return tensor name -> checksum."""
    return {name: checksum(tensor) for name, tensor in tensors.items()}


def verify_files(files: Iterable[str], expected: Mapping[str, str]) -> None:
    """Compare the tensors in safetensors files with their checksums.

    Args:
        files: paths; their headers have been read before, so they are known to be consistent.
        expected: tensor name -> checksum, of either length; other tensors are not verified.

    Raises:
        GETAError: a tensor has changed since it was written; the message names file and tensor.
    """
    for path in files if expected else ():
        # Explicitly on the CPU, for a process that has another default device.
        size = Path(path).stat().st_size
        data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8, device="cpu")
        first = 8 + int.from_bytes(data[:8].numpy().tobytes(), "little")
        header: dict[str, Any] = json.loads(data[8:first].numpy().tobytes())
        for name in header.keys() & expected.keys():
            start, end = header[name]["data_offsets"]
            tensor = data[first + start : first + end]
            former = len(str(expected[name])) == _CRC_DIGITS
            found = f"{zlib.crc32(tensor.numpy().data):08x}" if former else _grid_checksum(tensor)
            if found != expected[name]:
                raise GETAError(
                    f"{path}: {name} has changed since it was written (its checksum is {found}, not "
                    f"{expected[name]}); copy or export the folder again"
                )


def _grid_checksum(data: Tensor) -> str:
    """Return the CRC-32 of the sums of columns, continued over the last bytes, and that of the sums of rows.

    Args:
        data: uint8, shape (bytes,), on the CPU.
    """
    columns = rows = 0
    # numpy sums integers more than twice as fast as torch, and releases Python's lock as well.
    values = data.numpy()
    row = 8 * WIDTH
    whole = values.size // row * row
    for start in range(0, whole, HEIGHT * row):
        block = values[start : min(start + HEIGHT * row, whole)]
        if block.ctypes.data % 8:
            block = block.copy()
        # Sums of int64 wrap around, so they are exact in any order.
        grid = block.view(np.int64).reshape(-1, WIDTH)
        columns = zlib.crc32(np.add.reduce(grid, axis=0).data, columns)
        rows = zlib.crc32(np.add.reduce(grid, axis=1).data, rows)
    columns = zlib.crc32(values[whole:].data, columns)
    return f"{columns:08x}{rows:08x}"


class Verification:
    """Verify files in a thread.

    Args:
        files: as in `verify_files`.
        expected: as there.
    """

    def __init__(self, files: Sequence[str], expected: Mapping[str, str]) -> None:
        self._files, self._expected = files, expected
        self._error: Exception | None = None
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            verify_files(self._files, self._expected)
        except (GETAError, OSError) as error:
            self._error = error

    def finish(self) -> None:
        """Wait for the end. Raise GETAError for a tensor that has changed."""
        self._thread.join()
        if self._error is not None:
            raise self._error
