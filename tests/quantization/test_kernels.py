"""Every CPU kernel equals the pure functions; the right one is chosen; failures fall back."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from geta_hf.errors import GETAError
from geta_hf.quantization import kernels
from geta_hf.quantization.functional import EAGER, fake_quantize
from geta_hf.quantization.kernels import blocked, choice, compiled
from tests.quantization.kernel_cases import DTYPES, LAYOUTS, assert_kernel_is_exact, assert_nan_is_noticed, make_case


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 64 elements, so that small tensors are cut into many."""
    monkeypatch.setattr(blocked, "BLOCK", 64)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("nonlinear", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_equal_the_whole(layout: tuple, dtype: torch.dtype, nonlinear: bool) -> None:
    assert_kernel_is_exact(blocked.blocked(EAGER), make_case(layout, dtype, nonlinear))


@pytest.mark.usefixtures("small_blocks")
def test_blocks_of_what_is_not_contiguous() -> None:
    case = make_case(((65, 33), (1,), (1,)))
    case.x, case.grad = case.x.t(), case.grad.contiguous().t()
    assert not case.x.is_contiguous()
    assert_kernel_is_exact(blocked.blocked(EAGER), case)


@pytest.mark.usefixtures("small_blocks")
def test_blocks_notice_nan() -> None:
    assert_nan_is_noticed(blocked.blocked(EAGER), make_case())
    assert_nan_is_noticed(blocked.blocked(EAGER), make_case(LAYOUTS[2], nonlinear=True))


@pytest.fixture(scope="module")
def compiled_kernel() -> Iterator[kernels.Kernel]:
    """The compiled kernel, not allowed to fall back."""
    yield compiled.compiled(EAGER, otherwise=EAGER)
    assert not compiled.Attempt.broken


def test_compiled_equals_the_pure_functions(compiled_kernel: kernels.Kernel) -> None:
    """Twice, since the first call also computes the pure functions to compare with."""
    for _ in range(2):
        assert_kernel_is_exact(compiled_kernel, make_case(((64, 257), (1,), (1,))))
    assert_nan_is_noticed(compiled_kernel, make_case())


@pytest.mark.slow
@pytest.mark.parametrize("nonlinear", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [LAYOUTS[1], LAYOUTS[2], LAYOUTS[4], LAYOUTS[6]])
def test_compiled_in_every_layout(
    compiled_kernel: kernels.Kernel, layout: tuple, dtype: torch.dtype, nonlinear: bool
) -> None:
    for _ in range(2):
        assert_kernel_is_exact(compiled_kernel, make_case(layout, dtype, nonlinear))


def test_what_does_not_compile_falls_back_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise RuntimeError("no C++ compiler\nsecond line")

    monkeypatch.setattr(torch, "compile", lambda function, dynamic: refuse)
    monkeypatch.setattr(compiled.Attempt, "broken", False)
    case = make_case()
    kernel = compiled.compiled(EAGER, otherwise=EAGER)
    with pytest.warns(UserWarning, match=r"torch.compile failed \(no C\+\+ compiler\)"):
        kernel.quantize(case.x, case.d, case.q_m, case.t)
    assert_kernel_is_exact(kernel, case)  # a second warning would be an error


# --- the choice -------------------------------------------------------------------------------------------------------


def chosen(x: torch.Tensor) -> str:
    return kernels.choose(x, EAGER).name


def test_the_size_decides_on_a_cpu() -> None:
    assert chosen(torch.zeros(blocked.BLOCK)) == "eager"
    assert chosen(torch.zeros(blocked.BLOCK + 1)) == "blocked"
    assert chosen(nn.Parameter(torch.zeros(choice.COMPILE_FROM))) == "compiled"


class Recorder(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


def test_captures_and_subclasses_see_the_pure_functions() -> None:
    big = torch.zeros(choice.COMPILE_FROM)
    with Recorder():
        assert chosen(big) == "eager"
    assert chosen(big.to("meta")) == "eager"
    assert chosen(big.as_subclass(Subclass)) == "eager"
    with kernels.using("blocked"):
        assert chosen(big.to("meta")) == "eager"


def test_a_kernel_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(3)
    monkeypatch.setenv("GETA_KERNEL", "blocked")
    assert chosen(x) == "blocked"
    with kernels.using("eager"):
        assert chosen(x) == "eager"
    monkeypatch.setenv("GETA_KERNEL", "fastest")
    with pytest.raises(GETAError, match="no kernel 'fastest'"):
        chosen(x)
    with pytest.raises(GETAError, match="choose one of eager, blocked"), kernels.using("cuda"):
        pass


def test_backward_uses_the_kernel_of_its_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_make", lambda name, eager: blocked.blocked(eager))
    case = make_case()
    x = case.x.requires_grad_()
    with kernels.using("blocked"):
        out = fake_quantize(x, case.d.requires_grad_(), case.q_m)
    assert out.grad_fn.kernel.name == "blocked"
    out.backward(case.grad)
    assert torch.equal(x.grad, EAGER.straight_through(case.grad, case.x, case.q_m))


# --- inside a model ---------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        case = make_case(((16, 12), (16, 1), (1,)))
        self.weight, self.d, self.q_m = nn.Parameter(case.x), nn.Parameter(case.d), nn.Parameter(case.q_m)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, fake_quantize(self.weight, self.d, self.q_m))


def gradients_of(layer: nn.Module, run: object) -> list[torch.Tensor]:
    run(torch.ones(2, 12, requires_grad=True)).square().sum().backward()  # type: ignore[operator]
    return [parameter.grad for parameter in layer.parameters()]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile, inside torch
@pytest.mark.parametrize("how", ["compile", "reentrant", "checkpoint"])
def test_a_compiled_or_checkpointed_model_has_the_same_gradients(how: str) -> None:
    plain = Layer()
    other = copy.deepcopy(plain)
    runs = {
        "compile": torch.compile(other, backend="aot_eager", fullgraph=True),
        "reentrant": lambda x: checkpoint(other, x, use_reentrant=True),
        "checkpoint": lambda x: checkpoint(other, x, use_reentrant=False),
    }
    with kernels.using("blocked"):
        found = gradients_of(other, runs[how])
    for ours, expected in zip(found, gradients_of(plain, plain), strict=True):
        assert torch.allclose(ours, expected, rtol=1e-5, atol=1e-6)
