"""torch.compile keeps the gradients of every autograd function of the package."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

import geta_hf
from geta_hf.quantization import attach_quantizers
from geta_hf.quantization.fixed import FixedQuantizer
from geta_hf.quantization.functional import fake_quantize

X = torch.linspace(-2, 2, 12).view(3, 4)
ONE = torch.ones(1)
STEP = (0.3 * ONE, ONE)

EXAMPLES: dict[str, tuple[Any, ...]] = {
    "_FakeQuantize": (X, *STEP, None, False, False, None, False),
    "_StraightThrough": (X, *STEP, None),
    "_QuantizedLinear": (X, X, None, *STEP, None, False, None, None, 1.0, False, None, False),
    "_MixedWeight": (X, torch.full((2, 1, 1), 0.5), torch.ones(2, 1, 1), torch.tensor([1.0, 7.0])),
    "_MixedLinear": (
        *(X, X, None),
        *(torch.full((2, 1, 1), 0.5), torch.ones(2, 1, 1), torch.tensor([1.0, 7.0])),
        *(None, False),
    ),
    "_KL": (X, X.flip(1), torch.ones(3, dtype=torch.bool), 2.0),
}


def functions() -> list[type[torch.autograd.Function]]:
    """Return all autograd functions of the package."""
    root = Path(geta_hf.__file__).parent
    for path in root.rglob("*.py"):
        if "autograd.Function" in path.read_text():
            importlib.import_module(".".join(("geta_hf", *path.relative_to(root).with_suffix("").parts)))
    return [kind for kind in torch.autograd.Function.__subclasses__() if kind.__module__.startswith("geta_hf.")]


class Unchanged(TorchFunctionMode):
    """Notes the tensors that an operator was given and returned, as a cast to a tensor's own type does."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [value for value in tree_leaves(args) if isinstance(value, Tensor)]
        self.found += [value for value in tree_leaves(out) if any(value is own for own in given)]
        return out


def test_no_function_returns_what_an_operator_was_given() -> None:
    """Of such a function torch 2.11 loses all gradients under torch.compile, without a word."""
    found = {kind.__name__: kind for kind in functions()}
    assert found.keys() == EXAMPLES.keys(), "every autograd function needs an example here"
    for name, kind in found.items():
        context = SimpleNamespace(save_for_backward=lambda *_: None)
        with torch.no_grad(), Unchanged() as unchanged:
            out = kind.forward(context, *EXAMPLES[name])
        assert not any(out is value for value in unchanged.found), f"{name}: return `.data` of the result"


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, 3),
    "conv1d": lambda: Conv1D(3, 4),
    "conv2d": lambda: nn.Conv2d(2, 3, 1),
}


def gradients(function: Callable[..., Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    return list(torch.autograd.grad(function(*leaves).square().sum(), leaves))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the compiler's own
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_gradients_are_those_of_eager(dtype: torch.dtype) -> None:
    fixed, bent = FixedQuantizer(0.1 * ONE, 4), FixedQuantizer(torch.tensor([0.1, 1.2]), 4)
    cases: list[tuple[Callable[..., Tensor], list[Tensor]]] = [
        (fake_quantize, [X.to(dtype), *STEP]),
        (fake_quantize, [X.to(dtype), *STEP, 1.2 * ONE]),
        (lambda x, d, q_m: fake_quantize(x, d, q_m, None, True), [X.to(dtype), *STEP]),
        (lambda x, d, q_m: fake_quantize(x, d, q_m, four_levels=True), [X.to(dtype), *STEP]),
        (lambda x, d, q_m: fake_quantize(x, d[:, None], q_m[:, None]), [X.to(dtype), *(s.expand(3) for s in STEP)]),
        (fixed, [X.to(dtype)]),
        (bent, [X.to(dtype)]),
    ]
    for number, (function, leaves) in enumerate(cases):
        torch.compiler.reset()
        compiled = gradients(torch.compile(function, backend="aot_eager"), leaves)
        for ours, plain in zip(compiled, gradients(function, leaves), strict=True):
            torch.testing.assert_close(ours, plain, msg=lambda text, case=number: f"case {case}: {text}")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", LAYERS)
def test_compiled_layers_train_all_that_eager_ones_do(kind: str) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"blocks": nn.ModuleList([LAYERS[kind]()])})
    attach_quantizers(model)
    layer = model["blocks"][0]
    x = torch.randn(5, 2, 3, 4) if kind == "conv2d" else torch.randn(5, 4)
    found = []
    for function in (layer, torch.compile(layer, backend="aot_eager")):
        torch.compiler.reset()
        layer.zero_grad()
        function(x).square().sum().backward()
        found.append({name: p.grad for name, p in layer.named_parameters() if p.requires_grad})
    assert found[0].keys() == found[1].keys()
    for name, expected in found[0].items():
        assert expected.any() or name.endswith("q_m")  # nothing is clipped at first
        torch.testing.assert_close(found[1][name], expected, msg=lambda text, name=name: f"{name}: {text}")
