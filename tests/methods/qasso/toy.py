"""A two-layer network with two families of groups, small enough to follow by hand.

`heads`: 4 groups of 3 rows of `up.weight` and `up.bias` with 3 columns of `down.weight`; `channels`: 6 groups of one
row of `mix.weight` and `mix.bias` with one column of `out.weight`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from geta_hf.config import GETAConfig
from geta_hf.methods.qasso.optimizer import QASSO
from geta_hf.methods.qasso.schedule import Schedule
from geta_hf.qadg.group_types import Family, Member
from geta_hf.qadg.space import PruningSpace
from geta_hf.quantization import attach_quantizers, quantized_layers, quantizer_prefixes

STEPS = 60

Activation = Callable[[torch.Tensor], torch.Tensor]


class Toy(nn.Module):
    """Two blocks on a residual stream.

    Under ReLU a removed group has no gradient, so it stays zero by itself; under sigmoid, which is not 0 at 0, its
    columns have one at every step.
    """

    def __init__(self, activation: Activation = torch.relu) -> None:
        super().__init__()
        self.activation = activation
        self.layers = nn.ModuleList([nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 6), nn.Linear(6, 8)])
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up, down, mix, out = self.layers
        x = x + down(self.activation(up(x)))
        return self.head(x + out(self.activation(mix(x))))


def toy_space() -> PruningSpace:
    heads = torch.arange(12).view(4, 3).flip(0)  # not in order, so that wrong rows would show
    channels = torch.arange(6).view(6, 1)
    return PruningSpace(families=(_family("heads", 0, heads), _family("channels", 2, channels)))


def _family(kind: str, first: int, index: torch.Tensor) -> Family:
    """Rows of layer `first` with its bias, columns of the layer after it."""
    members = (
        Member(f"layers.{first}.weight", 0, index),
        Member(f"layers.{first}.bias", 0, index),
        Member(f"layers.{first + 1}.weight", 1, index),
    )
    return Family(f"layers:{kind}", kind, members, prunable=True)


def adamw(groups: list) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)


def schedule_of(config: GETAConfig, steps: int = STEPS) -> Schedule:
    return Schedule.from_config(config, steps, steps)


def small_config(**changes: object) -> GETAConfig:
    values: dict = {"warmup": 5, "projection": 8, "joint": 31, "target_sparsity": 0.5}
    return GETAConfig(**{**values, **changes})


def make(
    config: GETAConfig, base: Callable[[list], torch.optim.Optimizer] = adamw, activation: Activation = torch.relu
) -> tuple[Toy, QASSO]:
    torch.manual_seed(0)
    model = Toy(activation)
    attach_quantizers(
        model, initial_bits=config.initial_bits, target_bits=config.bits[1], learn_t=config.learn_exponent
    )
    return model, wrap(model, config, base)


def wrap(model: Toy, config: GETAConfig, base: Callable[[list], torch.optim.Optimizer] = adamw) -> QASSO:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    weights = [p for name, p in trained.items() if "quantizer" not in name]
    scales = [p for name, p in trained.items() if "quantizer" in name]
    optimizer = base([{"params": weights}, {"params": scales, "lr": 3e-3, "weight_decay": 0.0}])
    names = {p: name for name, p in trained.items()}
    return QASSO(optimizer, names, toy_space(), quantizer_prefixes(model), schedule_of(config), config)


def batch_at(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(32, 8, generator=generator)
    return x, torch.stack([x[:, :4].sum(1), (x[:, 4:] ** 2).sum(1)], 1)


def train_step(model: Toy, optimizer: torch.optim.Optimizer, step: int) -> float:
    x, y = batch_at(step)
    optimizer.zero_grad()
    loss = (model(x) - y).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


def bits_of(model: Toy) -> list[float]:
    return [float(layer.weight_quantizer.bits()) for layer in quantized_layers(model).values()]


def status_of(optimizer: QASSO) -> list[torch.Tensor]:
    """The status of every group, family by family."""
    return list(optimizer.status.split([family.size for family in optimizer.families]))
