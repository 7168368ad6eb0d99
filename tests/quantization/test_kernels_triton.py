"""The Triton kernels equal the pure functions: on a GPU where there is one, else interpreted in another process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from geta_hf.quantization.functional import EAGER, EAGER_FOUR_LEVELS, fake_quantize
from geta_hf.quantization.kernels import Kernel, choose, using
from tests.quantization.kernel_cases import (
    DTYPES,
    LAYOUTS,
    Case,
    assert_kernel_is_exact,
    assert_nan_is_noticed,
    make_case,
)

triton = pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
runs_kernels = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU or Triton's interpreter")
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


def kernel_and(case: Case, eager: Kernel = EAGER) -> tuple:
    case = Case(*(None if value is None else value.to(DEVICE) for value in vars(case).values()))
    with using("triton"):
        return choose(case.x, eager), case


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the tests below run by themselves")
def test_interpreted() -> None:
    """Everything below that the interpreter can run, where there is no GPU."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@runs_kernels
@pytest.mark.parametrize("nonlinear", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_triton_equals_the_pure_functions(layout: tuple, dtype: torch.dtype, nonlinear: bool) -> None:
    # The interpreter cuts bits off where a GPU rounds to bfloat16.
    rounded = dtype != torch.bfloat16 or DEVICE == "cuda"
    assert_kernel_is_exact(*kernel_and(make_case(layout, dtype, nonlinear)), bf16_is_rounded=rounded)


@runs_kernels
@pytest.mark.parametrize("bits", [16, 23.5, 24.5, 26])
def test_large_quotients_are_rounded_right(bits: float) -> None:
    """Rounding by adding 2^23 works below 2^23 only, and above there is nothing to round."""
    kernel, case = kernel_and(make_case(bits=bits))
    assert_kernel_is_exact(kernel, case)


@runs_kernels
@pytest.mark.parametrize("nonlinear", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_triton_rounds_to_four_levels(layout: tuple, dtype: torch.dtype, nonlinear: bool) -> None:
    kernel, case = kernel_and(make_case(layout, dtype, nonlinear, bits=2), EAGER_FOUR_LEVELS)
    assert_kernel_is_exact(kernel, case, eager=EAGER_FOUR_LEVELS)


@runs_kernels
def test_triton_notices_nan() -> None:
    assert_nan_is_noticed(*kernel_and(make_case()))
    assert_nan_is_noticed(*kernel_and(make_case(LAYOUTS[2], nonlinear=True)))
    assert_nan_is_noticed(*kernel_and(make_case(bits=2), EAGER_FOUR_LEVELS))


@runs_kernels
def test_triton_of_what_is_not_contiguous() -> None:
    kernel, case = kernel_and(make_case(((65, 33), (1,), (1,))))
    case.x, case.grad = case.x.t(), case.grad.t()
    assert_kernel_is_exact(kernel, case)


@on_gpu
def test_a_gpu_gets_triton_and_repeats_itself_bit_for_bit() -> None:
    _, case = kernel_and(make_case(((1000, 3001), (1,), (1,)), nonlinear=True))
    assert choose(case.x, EAGER).name == "triton"
    runs = []
    for _ in range(3):
        leaves = [value.clone().requires_grad_() for value in (case.x, case.d, case.q_m, case.t)]
        fake_quantize(*leaves).backward(case.grad)
        runs.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@pytest.mark.skipif(INTERPRETED, reason="interpreted functions are not compiled")
@pytest.mark.parametrize("nonlinear", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [(1, 1), (64, 1), (1, 96)])
@pytest.mark.parametrize("architecture", [80, 90])
def test_every_variant_fits_the_registers_and_loads_16_bytes(
    architecture: int, scale: tuple[int, int], dtype: torch.dtype, nonlinear: bool
) -> None:
    """On NVIDIA GPUs that are not here: for one quantizer, for one a row and for one a column."""
    found = compile_all((64, 96), scale, dtype, nonlinear, architecture)
    assert len(found) == 3
    for launch in found:
        assert launch.stack == 0 and launch.registers <= 128 and launch.wide_loads
        assert not (dtype != torch.float32 and launch.narrow_loads(16))


@pytest.mark.skipif(INTERPRETED, reason="interpreted functions are not compiled")
@pytest.mark.parametrize("scale", [(1, 1), (63, 1), (1, 97)])
def test_odd_sizes_spill_nothing(scale: tuple[int, int]) -> None:
    """Their rows begin anywhere, so elements are read one by one, by neighboring threads."""
    assert all(launch.stack == 0 for launch in compile_all((63, 97), scale, torch.bfloat16, True, 90))


@pytest.mark.skipif(INTERPRETED, reason="interpreted functions are not compiled")
@pytest.mark.parametrize("cols", [2**31 - 16, 2**31 + 16])
def test_positions_in_a_tensor_of_2_to_the_31_elements_do_not_overflow(cols: int) -> None:
    """The last tile of the smaller one ends beyond 2^31."""
    from geta_hf.quantization.kernels.triton_quantizer import _forward
    from tests.compiled_kernels import compiled_for

    x, scale = torch.zeros(16), torch.ones(1)
    with compiled_for(90) as found:
        _forward[(1,)](x, scale, scale, scale, x, 1, cols, False, True, False, 1, 2048, enable_fp_fusion=False)
    # A comparison of positions with the size in 32 bits would let those that overflowed pass as negative ones.
    assert "setp.lt.s64" in found[0].ptx


def compile_all(
    shape: tuple[int, int], scale: tuple[int, int], dtype: torch.dtype, nonlinear: bool, architecture: int
) -> list:
    from tests.compiled_kernels import compiled_for

    x, d = torch.zeros(shape, dtype=dtype), torch.ones(scale)
    t = torch.ones(1) if nonlinear else None
    with using("triton"):
        kernel = choose(x, EAGER)
    with compiled_for(architecture) as found:
        kernel.quantize(x, d, d, t)
        kernel.gradients(x, x, d, d, t)
        kernel.straight_through(x, x, d)
    return found
