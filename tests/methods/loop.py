"""A training loop without Trainer: the calls of a `Method` in their order, on the toy network."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from geta_hf.config import CompressionConfig
from geta_hf.costs.ledger import LayerEntry, Ledger
from geta_hf.costs.targets import solve_target
from geta_hf.methods import Method, Run, make_method
from geta_hf.qadg.space import PruningSpace
from geta_hf.quantization import quantized_layers
from tests.methods.qasso.toy import STEPS, Toy, batch_at, toy_space


def calibration(count: int) -> list[dict[str, torch.Tensor]]:
    return [{"x": batch_at(1000 + position)[0]} for position in range(count)]


def prepare(
    config: CompressionConfig, model: nn.Module | None = None, space: PruningSpace | None = None, steps: int = STEPS
) -> tuple[nn.Module, Method, torch.optim.Optimizer]:
    """Do what a trainer does before the first step."""
    torch.manual_seed(0)
    model, space = model or Toy(), space or toy_space()
    method = make_method(config)
    method.check(frozen_weights=False)
    method.check_stages(steps, steps)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    method.prepare(space)
    method.attach(model, calibration)
    layers = [
        LayerEntry(f"{name}.weight", channel_dim=layer.weight_quantizer.channel_dim)
        for name, layer in quantized_layers(model).items()
        if f"{name}.weight" in shapes
    ]
    ledger = Ledger.of(space.trainable, shapes, layers, dict.fromkeys(shapes, 4))
    target = solve_target(config, space.trainable, ledger)
    trained = [p for p in model.parameters() if p.requires_grad]
    base = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    names = {parameter: name for name, parameter in model.named_parameters()}
    optimizer = method.wrap_optimizer(base, names, model, Run(space, ledger, target, steps, steps))
    return model, method, optimizer


def train(
    model: nn.Module,
    method: Method,
    optimizer: torch.optim.Optimizer,
    steps: int = STEPS,
    watch: Callable[[int], None] = lambda step: None,
) -> None:
    """Do the remaining steps."""
    for step in range(method.step_count, steps):
        method.before_backward(model)
        optimizer.zero_grad()
        x, y = batch_at(step)
        loss = (model(x) - y).square().mean()
        extra = method.extra_loss(model)
        if extra is not None:
            loss = loss + extra
        loss.backward()
        optimizer.step()
        method.check_finite()
        watch(step)
