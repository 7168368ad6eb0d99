"""Products on codes of a byte and of half a byte, by every way there is; Triton's is interpreted where no GPU is."""

from __future__ import annotations

import os
import subprocess
import sys

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
# The interpreter multiplies bfloat16 as if it were integers.
DTYPES = [torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])]
SIZES = [(1, 16, 8), (3, 200, 40), (17, 50, 33)]


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
    x, codes, steps, bias = make_case(rows, inputs, outputs, 7 if halved else 127)
    stored = F.pad(codes, (0, -inputs % 16, 0, -outputs % 8))
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
            assert (found.cpu().double() - expected).abs().max() <= close * expected.abs().max()


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
@pytest.mark.parametrize("kind", ["*bf16", "*fp16", "*fp32"])
def test_every_variant_compiles_for_a_gpu_that_is_not_here(kind: str) -> None:
    """To machine code of an NVIDIA GPU, without one."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from geta_hf.inference.triton_weight_only import COLUMNS, DEPTH, ROWS, _kernel

    types = {"x": kind, "weight": "*i8", "step": "*fp32", "bias": kind, "out": kind}
    types |= dict.fromkeys(("rows", "inputs", "outputs", "stored"), "i32")
    for halved in (False, True):
        constants = {"HALVED": halved, "BY_CHANNEL": halved, "BIASED": True, "R": ROWS, "C": COLUMNS, "D": DEPTH}
        kinds = types | dict.fromkeys(constants, "constexpr")
        source = ASTSource(_kernel, {name: kinds[name] for name in _kernel.arg_names}, constants)
        assert triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": True}).asm["cubin"]
