"""What stands where elements leave: a number where the operators before allow to tell, else nothing is said."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from geta_hf.qadg.propagation.propagate import record_and_propagate
from geta_hf.qadg.propagation.rules_zeros import where_removed

from .cuts import linears

NUMBERS: dict[str, tuple[Callable[[Tensor], Tensor], float | None]] = {
    "a linear layer": (lambda h: h.clone(), 0.0),
    "an activation": (lambda h: nn.functional.gelu(h) * 3, 0.0),
    "sigmoid": (lambda h: h.sigmoid(), 0.5),
    "exp": (lambda h: h.exp(), 1.0),
    "a constant added": (lambda h: h + 2, 2.0),
    "a shift in place": (lambda h: h.clone().add_(2), 2.0),
    "zero times anything": (lambda h: h * torch.arange(8.0), 0.0),
    "anything added": (lambda h: h + torch.arange(8.0), None),
    "a scale per token": (lambda h: h / h.abs().amax(-2, keepdim=True).sum(-1, keepdim=True), 0.0),
    "a shift per token": (lambda h: h - h.amax(-2, keepdim=True).sum(-1, keepdim=True), None),
    "unknown over unknown": (lambda h: (h + torch.arange(8.0)) / (h + torch.rand(8)), None),
    "unknown less itself": (lambda h: (h + torch.arange(8.0)).sub(h + torch.arange(8.0)), None),
    "zero over zero": (lambda h: h / h, None),
    "a comparison": (lambda h: h > 0, 0.0),
    "a comparison that zero passes": (lambda h: h >= 0, 1.0),
    "a choice": (lambda h: torch.where(h > 0, h, h * 0.1), 0.0),
    "views and copies": (lambda h: torch.cat([h.unflatten(-1, (2, 4)).mT.flatten(-2)] * 2), 0.0),
    "a stretched dim": (lambda h: h[..., None].expand(2, 4, 8, 3), None),
    "softmax": (lambda h: h.softmax(-2), None),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_the_number_is_what_zero_parameters_give(name: str) -> None:
    operator, expected = NUMBERS[name]
    model, batch = linears(lambda h: h + 0 * operator(h).sum())
    flow = record_and_propagate(model, batch)
    (total,) = [node for node in flow.graph.nodes if node.op == "sum" and node.inputs.get("dim") is None]
    assert where_removed(flow, total.inputs["self"].value, total) == expected
