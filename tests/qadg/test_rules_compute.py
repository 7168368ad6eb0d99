"""Elementwise operators, contractions, reductions and quantizers: exact groups, couplings, and what must stay."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from geta_hf.qadg import PruningSpace, verify_space
from geta_hf.qadg.propagation.propagate import record_and_propagate
from geta_hf.qadg.space import space_of

from .cuts import all_prunable, as_cut, channels, cuts, linears, proven, singles

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(5))


def noise(h: Tensor) -> Tensor:
    return h + 0.1 * torch.randn_like(h) + torch.rand_like(h) * torch.randn(h.shape, dtype=h.dtype)


ALONE: dict[str, Callable[[Tensor], Tensor]] = {
    "activations": lambda h: functional.gelu(h) + functional.silu(h) * torch.tanh(h) + functional.mish(h),
    "in place": lambda h: h.clone().relu_().mul_(2).add_(1).clamp_(max=3),
    "hardswish": lambda h: functional.hardswish(h) + functional.hardsigmoid(h) + functional.leaky_relu(h),
    "log sigmoid": lambda h: functional.logsigmoid(h) + functional.softplus(h) + functional.elu(h),
    "where": lambda h: torch.where(h > 0, h, torch.tensor(-1.0, dtype=h.dtype)),
    "masked fill": lambda h: h.masked_fill(h < 0, -1.0).clone().masked_fill_(torch.tensor([[True], [False]] * 2), 0.0),
    "powers": lambda h: h**2 + h.abs().sqrt() + h.abs().clamp(min=1e-2).rsqrt() + (h.exp() + 1).log(),
    "with an input": lambda h: h * torch.linspace(1, 2, 4, dtype=h.dtype)[:, None] + 1.0,
    "copy": lambda h: torch.empty(h.shape, dtype=h.dtype).copy_(h),
    "complex": lambda h: torch.complex(h, h).abs() + torch.polar(h.abs(), h).real,
    "mean of places": lambda h: h - h.mean(-2, keepdim=True),
    "deviation of places": lambda h: h / (h.std(-2, keepdim=True, correction=0) + 1),
    "largest of places": lambda h: h - h.amax(-2, keepdim=True) + h.min(-2, keepdim=True).values,
    "place of the largest": lambda h: h + h.argmax(-2, keepdim=True),
    "product of places": lambda h: h + h.prod(-2, keepdim=True),
    "log-sum-exp of places": lambda h: h - h.logsumexp(-2, keepdim=True),
    "norm of places": lambda h: h / (h.norm(dim=-2, keepdim=True) + 1),
    "any of places": lambda h: h * (h > 0).any(-2, keepdim=True),
    "gate": lambda h: h * h.sigmoid(),
    "dropout": lambda h: functional.dropout(h, 0.5, training=False),
}  # fmt: skip


@pytest.mark.parametrize("name", ALONE)
def test_every_channel_passes(name):
    assert cuts(nn.Sequential(nn.Linear(6, 8), Call(ALONE[name]), nn.Linear(8, 3)), {"input": X}) == [
        {"0.weight:0": singles(8), "0.bias:0": singles(8), "2.weight:1": singles(8)}
    ]


class Call(nn.Module):
    def __init__(self, operator: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.operator = operator

    def forward(self, x: Tensor) -> Tensor:
        return self.operator(x)


def test_random_operators_pass():

    for operator in (noise, lambda h: functional.dropout(h, 0.5, training=True)):
        model, batch = linears(operator)
        space = all_prunable(space_of(record_and_propagate(model, batch)))
        assert [as_cut(family) for family in space.families] == [channels()]
        verify_space(model, batch, space)


COUPLED: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda h: h - h.mean(-1, keepdim=True),
    "variance": lambda h: h / (h.var(-1, keepdim=True) + 1).sqrt(),
    "both": lambda h: (h - torch.var_mean(h, -1, keepdim=True)[1]) * torch.std(h, -1, keepdim=True),
    "root mean square": lambda h: h * (h.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt(),
    "length": lambda h: h / h.norm(dim=-1, keepdim=True),
    "largest size by a norm": lambda h: h / (1 + h.norm(p=math.inf, dim=-1, keepdim=True)),
    "sum of squares": lambda h: h / (h.square().sum(-1, keepdim=True) + 1),
    "functional layer norm": lambda h: functional.layer_norm(h, (8,)),
    "functional rms norm": lambda h: functional.rms_norm(h, (8,)),
}


@pytest.mark.parametrize("name", COUPLED)
def test_a_norm_or_a_mean_over_the_channels_couples_them(name):
    space = proven(*linears(COUPLED[name]))
    assert [as_cut(family) for family in space.families] == [channels()]
    assert "norm" in space.families[0].couplings


STAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "largest": lambda h: h - h.amax(-1, keepdim=True),
    "range not widened to zero": lambda h: (h - h.amin(-1, keepdim=True)) / (h.amax(-1, keepdim=True) + 9),
    "largest and place": lambda h: h - h.max(-1, keepdim=True).values,
    "smallest": lambda h: h.relu() * h.amin(-1, keepdim=True),
    "median": lambda h: h - h.median(-1, keepdim=True).values,
    "product": lambda h: h - h.prod(-1, keepdim=True),
    "log-sum-exp": lambda h: h - h.logsumexp(-1, keepdim=True),
    "place of the largest": lambda h: h + h.argmax(-1, keepdim=True),
    "k-th": lambda h: h - h.kthvalue(2, dim=-1, keepdim=True).values,
    "largest of what is one where nothing is": lambda h: h * h.exp().amax(-1, keepdim=True),
    "largest of what was shifted in place": lambda h: h * (h * 1).relu_().sub_(5).amax(-1, keepdim=True),
    "largest of what in-place steps made": lambda h: h * h.clone().relu_().add_(2).amax(-1, keepdim=True),
    "largest of a half": lambda h: h * h.sigmoid().amax(-1, keepdim=True),
    "largest of what was shifted": lambda h: h * (h + 1).relu().amax(-1, keepdim=True),
    "sum of what is one where nothing is": lambda h: h / h.exp().sum(-1, keepdim=True),
    "softmax by hand": lambda h: (h - 1).exp() / (h - 1).exp().sum(-1, keepdim=True),
    "smallest size by a norm": lambda h: h * h.norm(p=-math.inf, dim=-1, keepdim=True),
    "smallest size": lambda h: h * h.abs().amin(-1, keepdim=True),
    "whether two are different": lambda h: h * (h.cumsum(-2).cos() != h.cos()).any(-1, keepdim=True),
    "whether all are positive": lambda h: h * (h > 0).all(-1, keepdim=True),
    "whether any is not negative": lambda h: h * (h >= 0).any(-1, keepdim=True),
}


@pytest.mark.parametrize("name", STAYS)
def test_a_choice_among_the_channels_keeps_them(name):
    assert cuts(*linears(STAYS[name])) == []


ZERO_SAYS_NOTHING: dict[str, Callable[[Tensor], Tensor]] = {
    "largest size": lambda h: h * h.abs().amax(-1, keepdim=True),
    "largest of relu in place": lambda h: h * h.clone().relu_().amax(-1, keepdim=True),
    "largest of relu": lambda h: h * h.relu().amax(-1, keepdim=True),
    "largest square": lambda h: h * h.square().max(),
    "whether any is infinite": lambda h: h * torch.isinf(h).any().logical_not(),
    "whether all are finite": lambda h: h * torch.isfinite(h).all(),
    "whether any is not zero": lambda h: h * (h != 0).any(-1, keepdim=True),
}


@pytest.mark.parametrize("name", ZERO_SAYS_NOTHING)
def test_a_choice_that_zeros_say_nothing_about_lets_channels_pass(name):
    assert cuts(*linears(ZERO_SAYS_NOTHING[name])) == [channels()]


def absmax(h: Tensor) -> Tensor:
    scale = h.abs().amax(-1, keepdim=True) / 127
    return (h / scale).round().clamp(-127, 127) * scale


def minmax(h: Tensor) -> Tensor:
    low, high = h.amin(-1, keepdim=True).clamp(max=0), h.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / 255
    return ((h - low) / scale).round() * scale + low


@pytest.mark.parametrize("quantizer", [absmax, minmax])
def test_a_quantizer_that_scales_itself_lets_channels_pass(quantizer):
    assert cuts(*linears(lambda h: quantizer(h * 1.0))) == [channels()]


class Product(nn.Module):
    """Two layers, and what a function makes of both."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor], left: int = 8, right: int = 8) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, left, bias=False), nn.Linear(6, right, bias=False)
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self.a(x), self.b(x))


TOGETHER: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mm": lambda a, b: a @ b.T,
    "bmm": lambda a, b: a[None] @ b[None].mT,
    "baddbmm": lambda a, b: torch.baddbmm(torch.ones(1, 4, 4, dtype=a.dtype), a[None], b[None].mT, beta=0.5, alpha=2),
    "addmm": lambda a, b: torch.addmm(torch.ones(4, dtype=a.dtype), a, b.T),
    "einsum": lambda a, b: torch.einsum("ic,jc->ij", a, b),
    "einsum in three": lambda a, b: torch.einsum("ic,jc,kc->ijk", a, b, a),
    "mv": lambda a, b: a @ b[0],
    "dot": lambda a, b: a[0] @ b[1],
    "distance": lambda a, b: torch.cdist(a, b),
    "exact distance": lambda a, b: torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist"),
}


@pytest.mark.parametrize("name", TOGETHER)
def test_contracted_dims_leave_together(name):
    assert cuts(Product(TOGETHER[name]), {"x": X}) == [{"a.weight:0": singles(8), "b.weight:0": singles(8)}]


def test_a_sum_of_products_is_coupled_or_free_but_complete():
    assert cuts(Product(lambda a, b: (a * b).sum(-1)), {"x": X}) == [
        {"a.weight:0": singles(8), "b.weight:0": singles(8)}
    ]


def test_attention_by_hand_has_heads_and_dims():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(6, 6, bias=False) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (layer(x).unflatten(-1, (3, 2)).transpose(1, 2) for layer in (self.q, self.k, self.v))
            h = functional.scaled_dot_product_attention(q, k, v)
            return self.o(h.transpose(1, 2).flatten(2))

    heads, dims = [[0, 1], [2, 3], [4, 5]], [[0, 2, 4], [1, 3, 5]]
    space = proven(Attention(), {"x": torch.randn(2, 4, 6)})
    found = {family.kind: as_cut(family) for family in space.families}
    assert found["heads"] == {"q.weight:0": heads, "k.weight:0": heads, "v.weight:0": heads, "o.weight:1": heads}
    pairs = [as_cut(family) for family in space.families if family.kind == "head_dim"]
    assert {"q.weight:0": dims, "k.weight:0": dims} in pairs and {"v.weight:0": dims, "o.weight:1": dims} in pairs


def test_equations_stay_and_right_hand_sides_pass():
    class Solver(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.down = nn.Linear(6, 4), nn.Linear(6, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            matrix = torch.eye(4, dtype=x.dtype) + self.a(x).tril(-1)
            return self.down(torch.linalg.solve_triangular(matrix, self.b(x), upper=False))

    found = cuts(Solver(), {"x": X})
    assert found == [{"b.weight:0": singles(5), "b.bias:0": singles(5), "down.weight:1": singles(5)}]


class Quantized(nn.Linear):
    def __init__(self, *sizes: int, per_channel: bool) -> None:
        super().__init__(*sizes)
        self.register_buffer("scale", torch.full((sizes[1],) if per_channel else (1,), 0.01))
        self.register_buffer("zero", torch.zeros(sizes[1] if per_channel else 1, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        if len(self.scale) > 1:
            weight = torch.fake_quantize_per_channel_affine(self.weight, self.scale.float(), self.zero, 0, -128, 127)
        else:
            weight = torch.fake_quantize_per_tensor_affine(self.weight, self.scale.float(), self.zero, -128, 127)
        return functional.linear(x, weight, self.bias)


@pytest.mark.parametrize("per_channel", [False, True])
def test_fake_quantizers_of_torch_pass(per_channel):
    model = nn.Sequential(Quantized(6, 8, per_channel=per_channel), nn.ReLU(), nn.Linear(8, 2))
    names = ["0.weight:0", "0.bias:0", "2.weight:1"] + (["0.scale:0", "0.zero:0"] if per_channel else [])
    assert cuts(model, {"input": X}) == [dict.fromkeys(names, singles(8))]


class Ranged(nn.Linear):
    """Scales its weight by the weight's own range, over everything or row by row."""

    def __init__(self, *sizes: int, dim: tuple[int, ...]) -> None:
        super().__init__(*sizes)
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.abs().amax(self.dim, keepdim=True) / 127
        return functional.linear(x, (self.weight / scale.clamp(min=1e-9)).round() * scale, self.bias)


@pytest.mark.parametrize("dim", [(0, 1), (1,)])
def test_the_range_of_a_weight_passes(dim):
    model = nn.Sequential(Ranged(6, 8, dim=dim), nn.ReLU(), nn.Linear(8, 2))
    assert cuts(model, {"input": X}) == [dict.fromkeys(("0.weight:0", "0.bias:0", "2.weight:1"), singles(8))]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_recurrent_layers_keep_their_state_and_lose_what_feeds_them(kind, device):
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.cell, self.down = nn.Linear(6, 5), kind(5, 3, batch_first=True), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.cell(self.up(x))[0])

    model, batch = Recurrent().eval(), {"x": torch.randn(2, 4, 6)}
    if device == "cpu":
        found = cuts(model, batch)
    else:
        found = [as_cut(family) for family in space_of(record_and_propagate(model.to("meta"), batch)).families]
    assert {"up.weight:0": singles(5), "up.bias:0": singles(5), "cell.weight_ih_l0:1": singles(5)} in found


def test_a_loss_keeps_the_classes():
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return functional.cross_entropy(self.down(self.up(x)), torch.zeros(len(x), dtype=torch.long))

    assert cuts(Loss(), {"x": X}) == [channels()]


def test_macs_and_parameters_of_a_group():
    space: PruningSpace = proven(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), {"input": X})
    (family,) = space.families
    assert family.parameters == 6 + 1 + 3
    assert family.macs == math.prod((4, 6)) + math.prod((4, 3))
