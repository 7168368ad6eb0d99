"""Products on codes of a byte and of half a byte, by every way there is; Triton's is interpreted where no GPU is."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from geta_hf.inference.weight_only import HAS_TRITON, pack_halves, unpack_halves, weight_only_linear

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
FUSED = HAS_TRITON and (INTERPRETED or DEVICE == "cuda")
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
WAYS = [True] if INTERPRETED else [False, pytest.param(True, marks=pytest.mark.skipif(not FUSED, reason="needs a GPU"))]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# One row and several; fewer inputs than a load takes, odd ones, and more than a tile; no rows at all.
SIZES = [(1, 2, 3), (1, 16, 8), (1, 47, 4), (1, 2067, 7), (3, 200, 40), (17, 131, 33), (0, 40, 8)]


def test_halves_are_unpacked_to_what_was_packed() -> None:
    codes = torch.randint(-7, 8, (5, 12), generator=torch.Generator().manual_seed(0))
    codes[0, :2] = torch.tensor([-7, 7])
    packed = pack_halves(codes)
    assert (packed.dtype, packed.shape) == (torch.int8, (5, 6))
    assert torch.equal(unpack_halves(packed), codes.to(torch.int8))


@pytest.mark.parametrize("fused", WAYS)
@pytest.mark.parametrize("halved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), SIZES)
def test_product_is_that_of_the_decoded_weight(
    rows: int, inputs: int, outputs: int, dtype: torch.dtype, halved: bool, fused: bool
) -> None:
    # The interpreter multiplies matrices of bfloat16 as if they were integers.
    if INTERPRETED and rows > 1 and dtype == torch.bfloat16:
        return
    x, codes, steps, bias = make_case(rows, inputs, outputs, 7 if halved else 127)
    stored = F.pad(codes, (0, -inputs % (32 if halved else 16), 0, -outputs % 8))
    stored = pack_halves(stored) if halved else stored.to(torch.int8)
    for step in (steps, steps[:1]):
        for added in (None, bias):
            x, (weight, scale) = x.to(dtype), (tensor.to(DEVICE) for tensor in (stored, step))
            place = None if added is None else added.to(DEVICE, dtype)
            found = weight_only_linear(x.to(DEVICE), weight, scale, place, outputs, halved, fused)
            assert (found.dtype, found.shape) == (dtype, (rows, outputs))
            expected = F.linear(x.double(), codes * step.double().view(-1, 1))
            expected += 0.0 if added is None else added.to(dtype).double()
            close = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
            scale = expected.abs().max() if rows else 1.0
            assert ((found.cpu().double() - expected).abs() <= close * scale).all()


def make_case(rows: int, inputs: int, outputs: int, largest: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, inputs, generator=generator)
    codes = torch.randint(-largest, largest + 1, (outputs, inputs), generator=generator)
    return x, codes, torch.rand(outputs, generator=generator) + 0.1, torch.randn(outputs, generator=generator)


@needs_triton
@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the tests above ran it")
def test_interpreted() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "decoded", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="interpreted functions are not compiled")
@pytest.mark.parametrize("halved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("inputs", [199, 208])
@pytest.mark.parametrize("architecture", [80, 90])
def test_every_variant_fits_the_registers_and_loads_16_bytes(
    architecture: int, inputs: int, rows: int, dtype: torch.dtype, halved: bool
) -> None:
    """On a GPU that is not here; 199 is what pruning may leave."""
    from tests.compiled_kernels import SHARES_LAST_CODES, compiled_for

    (found,) = launches(compiled_for, architecture, rows, inputs, dtype, halved)
    assert found.stack == 0
    # 65536 registers: five programs of 128 threads on a processor, four from Triton 3.8 on (105 were seen), and two
    # where fp32 does without tensor cores.
    usual = 128 if SHARES_LAST_CODES else 96
    assert found.registers <= (usual if rows == 1 or dtype != torch.float32 else 208)
    assert found.wide_loads
    assert found.narrow_loads(8) <= (rows == 1 and SHARES_LAST_CODES)  # codes one by one


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="interpreted functions are not compiled")
@pytest.mark.parametrize("rows", [1, 5])
def test_a_gpu_without_tensor_cores_gets_smaller_tiles(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    from geta_hf.inference import triton_weight_only
    from tests.compiled_kernels import SHARES_LAST_CODES, compiled_for

    monkeypatch.setattr(triton_weight_only, "tensor_cores_take", lambda x: False)
    (found,) = launches(compiled_for, 75, rows, 199, torch.float16, True)
    assert found.stack == 0 and found.narrow_loads(8) <= (rows == 1 and SHARES_LAST_CODES)


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="interpreted functions are not compiled")
def test_a_row_of_a_small_layer_has_programs_for_every_processor() -> None:
    """132 of them on an H100. Rows of nothing are not launched at all."""
    from tests.compiled_kernels import compiled_for

    (found,) = launches(compiled_for, 90, 1, 208, torch.bfloat16, False, outputs=2048)
    assert found.grid[0] >= 3 * 132
    assert not launches(compiled_for, 90, 0, 208, torch.bfloat16, False)


def launches(
    compiled_for: Any, architecture: int, rows: int, inputs: int, dtype: torch.dtype, halved: bool, outputs: int = 40
) -> list[Any]:
    """Compile what a layer launches, whose weight is laid out as for a GPU."""
    from geta_hf.inference.triton_weight_only import launch

    x, bias = torch.zeros(rows, inputs, dtype=dtype), torch.zeros(outputs, dtype=dtype)
    weight = torch.zeros(outputs, -(-inputs // 32) * 16 if halved else -(-inputs // 16) * 16, dtype=torch.int8)
    with compiled_for(architecture) as found:
        launch(x, weight, torch.ones(outputs), bias, x.new_empty(rows, outputs), halved)
    return found
