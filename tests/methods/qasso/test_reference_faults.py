"""Faults of the published reference that no other test is about: layers found by a part of their name, and heads that
never compete. The other faults are listed with their tests in `docs/paper_index.md`."""

from __future__ import annotations

import torch
from torch import nn

from geta_hf.config import GETAConfig
from geta_hf.methods.qasso.optimizer import QASSO
from geta_hf.methods.qasso.schedule import Schedule
from geta_hf.qadg.group_types import Family, Member
from geta_hf.qadg.space import PruningSpace
from geta_hf.quantization import attach_quantizers, quantizer_prefixes


class Deep(nn.Module):
    """Twelve layers, so that the name of layer 1 is a part of those of layers 10 and 11."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleList(nn.Linear(6, 6) for _ in range(12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.net:
            x = x + torch.relu(layer(x))
        return x


def only_layer_one() -> PruningSpace:
    rows = torch.arange(6)[:, None]
    members = (Member("net.1.weight", 0, rows), Member("net.1.bias", 0, rows))
    return PruningSpace(families=(Family("net.1", "channels", members, prunable=True),))


def test_a_name_that_is_part_of_another_is_not_taken_for_it() -> None:
    """`net.1` loses its rows and its bits by Eq. 14; `net.10` and `net.11` keep theirs."""
    torch.manual_seed(0)
    model = Deep()
    config = GETAConfig.paper(warmup=2, projection=4, joint=10, target_sparsity=0.5)
    attach_quantizers(model, learn_t=True)
    names = {p: name for name, p in model.named_parameters() if p.requires_grad}
    base = torch.optim.SGD(list(names), lr=1e-3)
    schedule = Schedule.from_config(config, 20, 20)
    optimizer = QASSO(base, names, only_layer_one(), quantizer_prefixes(model), schedule, config)
    lowest = [8.0] * 12
    for _ in range(20):
        optimizer.zero_grad()
        model(torch.randn(16, 6)).square().mean().backward()
        optimizer.step()
        for position, layer in enumerate(model.net):
            lowest[position] = min(lowest[position], layer.weight_quantizer.bits().item())
    assert [int((layer.weight == 0).all(1).sum()) for layer in model.net] == [0, 3, *[0] * 10]
    assert lowest[1] < 5 and min(lowest[:1] + lowest[2:]) > 7.5


def test_heads_and_channels_compete_in_one_ranking() -> None:
    """A head that matters as little, for its size, as the least channel goes with it at 50 %."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"heads": nn.Linear(8, 8), "channels": nn.Linear(8, 12)})
    index = {"heads": torch.arange(8).view(4, 2), "channels": torch.arange(12)[:, None]}
    families = tuple(
        Family(f"{name}:{name}", name, (Member(f"{name}.weight", 0, rows),), prunable=True)
        for name, rows in index.items()
    )
    config = GETAConfig(warmup=0, projection=4, joint=4, projection_periods=1, pruning_periods=1)
    names = {p: name for name, p in model.named_parameters()}
    base = torch.optim.SGD(list(names), lr=0.0)
    schedule = Schedule.from_config(config, 10, 10)
    optimizer = QASSO(base, names, PruningSpace(families=families), {}, schedule, config)
    for _ in range(10):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        model["heads"].weight.grad[:4] *= 1e-3  # heads 0 and 1
        model["channels"].weight.grad[:6] *= 1e-3
        optimizer.step()
    gone = {name: mask.tolist() for name, mask in optimizer.removed.items()}
    assert gone["heads:heads"] == [True, True, False, False]
    assert sum(gone["channels:channels"]) == 6 == sum(gone["channels:channels"][:6])
