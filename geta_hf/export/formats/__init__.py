"""The formats of an export: each is written, and proved by reading it back, by a module of its own."""

from __future__ import annotations

from collections.abc import Callable

from geta_hf.errors import GETAError
from geta_hf.export.formats.compressed_tensors import write_compressed_tensors
from geta_hf.export.formats.experimental.executorch import write_executorch
from geta_hf.export.formats.experimental.openvino import write_openvino
from geta_hf.export.formats.geta import write_geta
from geta_hf.export.formats.onnx import write_onnx
from geta_hf.export.formats.vanilla import write_vanilla

Writer = Callable[..., float | None]
"""Takes a compressed model, an empty folder and a batch to prove on; returns the largest difference, if it is absolute.

Options of a format's own are keyword arguments.
"""

OWN = "geta"
"""The format that geta_hf itself reads."""

# Listed here although their packages are optional: each writer imports them when it is called, and names the extra.
FORMATS: dict[str, Writer] = {
    OWN: write_geta,
    "vanilla": write_vanilla,
    "compressed-tensors": write_compressed_tensors,
    "onnx": write_onnx,
    "openvino": write_openvino,
    "executorch": write_executorch,
}
"""The writer of each format."""


def writer(name: str) -> Writer:
    """Return the writer of a format. Raise GETAError for an unknown one."""
    if name not in FORMATS:
        raise GETAError(f"there is no format {name!r}; choose {', '.join(FORMATS)}")
    return FORMATS[name]
