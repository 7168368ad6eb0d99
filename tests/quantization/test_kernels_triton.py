"""The Triton kernels equal the pure functions: on a GPU where there is one, else interpreted in another process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from geta_hf.quantization.functional import EAGER, fake_quantize
from geta_hf.quantization.kernels import choose, using
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


def kernel_and(case: Case) -> tuple:
    case = Case(*(None if value is None else value.to(DEVICE) for value in vars(case).values()))
    with using("triton"):
        return choose(case.x, EAGER), case


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
def test_triton_notices_nan() -> None:
    assert_nan_is_noticed(*kernel_and(make_case()))
    assert_nan_is_noticed(*kernel_and(make_case(LAYOUTS[2], nonlinear=True)))


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
def test_every_variant_compiles_for_a_gpu_that_is_not_here() -> None:
    """To machine code of an NVIDIA GPU, without one."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from geta_hf.quantization.kernels.triton_quantizer import _backward, _forward

    fp32, bf16 = "*fp32", "*bf16"
    values = {"d": fp32, "q_m": fp32, "t": fp32, "rows": "i32", "cols": "i32"}
    target = GPUTarget("cuda", 90, 32)
    for by_row, nonlinear in ((True, False), (True, True), (False, True)):
        constants = {"NONLINEAR": nonlinear, "BY_ROW": by_row, "R": 1 if by_row else 32, "C": 2048 if by_row else 64}
        forward, backward = {"x": bf16, "out": bf16}, {"grad": bf16, "x": bf16, "grad_x": bf16, "partial": fp32}
        for function, tensors, flags in (
            (_forward, forward, {}),
            (_backward, backward, {"SUMS": True}),
            (_backward, backward, {"SUMS": False}),
        ):
            constant = {**constants, **flags}
            kinds = {**values, **tensors, **dict.fromkeys(constant, "constexpr")}
            signature = {name: kinds[name] for name in function.arg_names}
            source = ASTSource(function, signature, constant)
            assert triton.compile(source, target=target, options={"enable_fp_fusion": False}).asm["cubin"]
