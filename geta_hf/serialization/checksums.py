"""Store a CRC-32 of every tensor in the files of weights, and verify them while a model is loaded.

A flipped bit mostly turns one legal code into another, which no check of types and sizes can see. The checksums are in
the `quantization_config` of config.json: the metadata of a safetensors file have no order, and a second entry there
would make files differ that hold the same. Folders without checksums, which earlier releases wrote, are not verified.

The files are read a second time, in a thread: zlib releases Python's lock, so on a machine with a core to spare loading
takes no longer. What is read is not kept, so no memory is needed beyond one block.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from threading import Thread
from typing import Any, BinaryIO

import torch
from torch import Tensor

from geta_hf.errors import GETAError

_BLOCK = 2**20


def checksum(tensor: Tensor) -> str:
    """Return the CRC-32 of a tensor's bytes, as a safetensors file holds them, in hexadecimal."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return f"{zlib.crc32(data.numpy().data):08x}"


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return tensor name -> checksum."""
    return {name: checksum(tensor) for name, tensor in tensors.items()}


def verify_files(files: Iterable[str], expected: Mapping[str, str]) -> None:
    """Compare the tensors in safetensors files with their checksums.

    Args:
        files: paths; their headers have been read before, so they are known to be consistent.
        expected: tensor name -> checksum; other tensors are not verified.

    Raises:
        GETAError: a tensor has changed since it was written; the message names file and tensor.
    """
    for path in files if expected else ():
        with Path(path).open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header: dict[str, Any] = json.loads(file.read(length))
            for name in header.keys() & expected.keys():
                start, end = header[name]["data_offsets"]
                file.seek(8 + length + start)
                found = _read_checksum(file, end - start)
                if found != expected[name]:
                    raise GETAError(
                        f"{path}: {name} has changed since it was written (its checksum is {found}, not "
                        f"{expected[name]}); copy or export the folder again"
                    )


def _read_checksum(file: BinaryIO, size: int) -> str:
    found = 0
    while size > 0 and (block := file.read(min(size, _BLOCK))):
        found = zlib.crc32(block, found)
        size -= len(block)
    return f"{found:08x}"


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
