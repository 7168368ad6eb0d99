"""Compile Triton kernels for an NVIDIA GPU that is not here, by the launches that the code makes itself."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from packaging.version import Version
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# From this version on threads share the 16 codes after the loop over a single row, and each loads one of them.
SHARES_LAST_CODES = Version(triton.__version__) >= Version("3.8")
_WIDE = re.compile(r"ld\.global[.\w:]*\.v4\.b32|cp\.async\.cg\.shared\.global")  # 16 bytes each


@dataclass
class Launch:
    """A kernel as the GPU would have got it."""

    grid: tuple[int, ...]
    ptx: str
    registers: int  # of a thread
    stack: int  # bytes of a thread in slow memory; 0 where nothing was spilled

    @property
    def wide_loads(self) -> int:
        """How many instructions load 16 bytes."""
        return len(_WIDE.findall(self.ptx))

    def narrow_loads(self, size: int) -> int:
        """Return how many instructions load a single element of `size` bits from global memory."""
        return len(re.findall(rf"ld\.global[.\w:]*(?<!v2)(?<!v4)\.b{size}\b", self.ptx))


class _Driver:
    """What Triton asks of a GPU before it launches; every architecture is a device of its own and shares no cache."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)


@contextmanager
def compiled_for(architecture: int) -> Iterator[list[Launch]]:
    """Compile what is launched inside, with the arguments of the launch, for sm_`architecture`, and run nothing."""
    launches: list[Launch] = []
    run, active = JITFunction.run, driver._active

    def compile_only(self: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        launches.append(Launch(grid, kernel.asm["ptx"], *_resources(kernel.asm["cubin"])))

    driver.set_active(_Driver(architecture))
    JITFunction.run = compile_only
    try:
        yield launches
    finally:
        JITFunction.run, driver._active = run, active


def _resources(cubin: bytes) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK):(\d+)", text))
    return int(found["REG"]), int(found["STACK"])
