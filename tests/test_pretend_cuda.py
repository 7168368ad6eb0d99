"""The pretended card itself: it must catch what it is there for, as each test of a room with it relies on."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import TrainingArguments

from geta_hf.inference import layers
from geta_hf.utils import gpu
from tests.pretend_cuda import CARD, CPU, Card, pretend_cuda


@pytest.fixture
def card():
    with pretend_cuda() as made:
        yield made


def test_nothing_remains_of_it() -> None:
    before = set(vars(Tensor)), torch.cuda.is_available()
    with pretend_cuda():
        assert torch.cuda.is_available() and torch.zeros(1, device="cuda").is_cuda
    assert (set(vars(Tensor)), torch.cuda.is_available()) == before
    assert not isinstance(torch.Generator(), type) and type(torch.Generator()).__name__ == "Generator"


def test_no_kernel_of_triton_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "has_triton", lambda: True)
    monkeypatch.setattr(layers, "HAS_TRITON", True)
    with pretend_cuda():
        assert not gpu.runs_triton(CARD) and not layers.HAS_TRITON
    assert gpu.has_triton() and layers.HAS_TRITON


@pytest.mark.parametrize(
    "make",
    [
        lambda x: torch.zeros(2, device="cuda"),
        lambda x: torch.zeros(2, device=x.device),
        lambda x: torch.tensor([1.0], device="cuda:0"),
        lambda x: torch.arange(3, device=0),
        lambda x: torch.randn(2, device="cuda", generator=torch.Generator("cuda")),
        lambda x: torch.zeros(2).to(x),
        lambda x: torch.zeros(2).to("cuda", torch.float64),
        lambda x: torch.zeros(2).cuda(),
        lambda x: torch.zeros_like(x),
        lambda x: x.new_zeros(4),
        lambda x: torch.empty_like(torch.empty(2, device="meta"), device="cuda"),
        lambda x: nn.Linear(2, 2, device="meta").to_empty(device="cuda").weight,
        lambda x: x.new_tensor([1.0]),
        lambda x: torch.asarray(x.detach()),
        lambda x: x.double(),
        lambda x: x[:1],
        lambda x: x.clone().data,
        lambda x: copy.deepcopy(x.detach()),
        lambda x: copy.deepcopy(nn.Parameter(x)),
        lambda x: torch.stack([x, x]),
        lambda x: nn.functional.one_hot(x.long(), 3),
        lambda x: nn.functional.layer_norm(x, (2,)),
        lambda x: nn.functional.dropout(x),
        lambda x: x * torch.tensor(2.0),
        lambda x: torch.where(x > 0, x, torch.tensor(0.0)),
        lambda x: x[torch.tensor([0])],
        lambda x: torch.zeros(2).to("cuda").copy_(torch.ones(2)),
        lambda x: torch.autograd.grad(x.sum(), x)[0],
        lambda x: torch.autograd.grad(x[[0]].sum(), x)[0],
        lambda x: nn.Linear(2, 2, device="cuda").weight,
        lambda x: nn.Linear(2, 2).to("cuda").weight,
    ],
)
def test_tensors_of_the_card_say_so(card: Card, make: Callable[[Tensor], Tensor]) -> None:
    x = torch.ones(2, device="cuda", requires_grad=True)
    made = make(x)
    assert made.device == CARD and made.is_cuda and not made.is_cpu


@pytest.mark.parametrize(
    "make",
    [
        lambda x: torch.zeros(2),
        lambda x: torch.zeros_like(x, device="cpu"),
        lambda x: x.cpu(),
        lambda x: x.to("cpu", torch.float64),
        lambda x: x.to(torch.zeros(1)),
        lambda x: torch.zeros(2).copy_(x),
        lambda x: copy.deepcopy(torch.zeros(2)),
        lambda x: torch.tensor([1.0]),
        lambda x: torch.zeros(2) + 1,
    ],
)
def test_tensors_of_the_cpu_say_so(card: Card, make: Callable[[Tensor], Tensor]) -> None:
    made = make(torch.ones(2, device="cuda"))
    assert made.device == CPU and not made.is_cuda and made.is_cpu


@pytest.mark.parametrize(
    "mix",
    [
        lambda x, y: x + y,
        lambda x, y: x @ y,
        lambda x, y: y.add_(x),
        lambda x, y: torch.tensor(0.0).add_(x.sum()),
        lambda x, y: torch.cat([x, y]),
        lambda x, y: torch.stack([x.sum(), torch.tensor(0.0)]),
        lambda x, y: nn.Linear(2, 2)(x),
        lambda x, y: x.sum() + y,
        lambda x, y: y[torch.zeros(1, dtype=torch.long, device="cuda")],
        lambda x, y: x.index_select(0, torch.tensor([0])),
        lambda x, y: x.index_add_(0, torch.tensor([0, 1]), x),
        lambda x, y: x.scatter_(0, torch.tensor([0]), 1.0),
        lambda x, y: x.index_put_((torch.tensor([0, 1]),), y),
        lambda x, y: torch._foreach_add([x, y], [y, x]),
        lambda x, y: torch.randn(2, device="cuda", generator=torch.Generator()),
        lambda x, y: nn.functional.embedding(torch.tensor([0]), x[None]),
        lambda x, y: x.masked_fill(torch.tensor([True, False]), 0.0),
    ],
)
def test_mixed_devices_are_refused(card: Card, mix: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(RuntimeError, match="device"):
        mix(torch.ones(2, device="cuda"), torch.ones(2))


READS: list[Callable[[Tensor], object]] = [
    lambda x: x[0].item(),
    lambda x: float(x[0]),
    lambda x: bool(x.any()),
    lambda x: range(x[0].int()),
    lambda x: f"{x[0]:.1f}",
    lambda x: repr(x),
    lambda x: x.tolist(),
    lambda x: x.cpu(),
    lambda x: x.to("cpu", torch.float64),
    lambda x: torch.zeros(2).copy_(x),
    lambda x: x.nonzero(),
    lambda x: torch.where(x > 0),
    lambda x: x[x > 0],
    lambda x: x.masked_select(x > 0),
    lambda x: torch.equal(x, x),
    lambda x: torch.allclose(x, x),
    lambda x: x.unique(),
    lambda x: x.repeat_interleave(x.long()),
    lambda x: x.long().bincount(),
    lambda x: torch.tensor([x[0], x[1]]),
    lambda x: torch.tensor(1.0, device="cuda"),
    lambda x: torch.zeros(1).to("cuda"),
    lambda x: x.copy_(torch.zeros(2)),
    lambda x: x[[0, 1]],
    lambda x: x.index_put_((x > 0,), x + 1),
    lambda x: x.masked_fill(x > 0, x[0]),
    lambda x: torch.cuda.synchronize(),
]


@pytest.mark.parametrize("read", READS)
def test_every_wait_is_logged_with_its_line(card: Card, read: Callable[[Tensor], object]) -> None:
    x = torch.ones(2, device="cuda")
    read(x)
    found = card.reads_in("tests")
    assert found and f"test_pretend_cuda.py:{read.__code__.co_firstlineno} " in str(found[0])
    assert not card.reads_in("geta_hf")


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: (x * 2 + torch.tensor(1.0)).sum(),
        lambda x: x.zero_().add_(1, alpha=2),
        lambda x: x.index_put_((x > 0,), torch.tensor(0.0)),
        lambda x: x.masked_fill_(x > 0, 0.0),
        lambda x: torch.zeros(1).to("cuda", non_blocking=True),
        lambda x: x.repeat_interleave(2),
        lambda x: torch.full((2,), 3.0, device="cuda"),
        lambda x: x.shape[0],
        lambda x: x.index_select(0, torch.zeros(1, dtype=torch.long, device="cuda")),
    ],
)
def test_nothing_is_logged_where_the_host_need_not_wait(card: Card, compute: Callable[[Tensor], object]) -> None:
    compute(torch.ones(2, device="cuda"))
    assert not card.reads


def test_numpy_refuses_tensors_of_the_card(card: Card) -> None:
    with pytest.raises(TypeError, match="cuda:0"):
        torch.ones(2, device="cuda").numpy()


@pytest.mark.skipif(Version(torch.__version__) < Version("2.11"), reason="torch 2.10 recomputes outside of modes")
def test_gradients_and_recomputed_forwards_are_on_the_card(card: Card) -> None:
    places: list[torch.device] = []

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            places.append(ctx.saved_tensors[0].device)
            places.extend([grad.device, torch.ones(1, device=grad.device).device])
            return 2 * grad

    def forward(x: Tensor) -> Tensor:
        places.append(torch.zeros(1, device=x.device).device)
        return Twice.apply(x)

    x = torch.ones(2, device="cuda", requires_grad=True)
    checkpoint(forward, x, use_reentrant=False).sum().backward()
    assert places == [CARD] * 5 and x.grad.device == CARD
    assert x.grad.tolist() == [2, 2]


def test_hooks_of_a_backward_pass_are_seen(card: Card) -> None:
    places: list[torch.device] = []
    x = torch.ones(2, device="cuda", requires_grad=True)
    x.register_post_accumulate_grad_hook(
        lambda tensor: places.extend(made.device for made in (tensor.grad, torch.arange(2), tensor.grad.cpu()))
    )
    (2 * x).sum().backward()
    assert places == [CARD, CPU, CPU]
    x.grad = None
    torch.autograd.backward([(2 * x).sum()])
    assert places == 2 * [CARD, CPU, CPU]


def test_a_gradient_returns_to_the_device_of_its_tensor(card: Card) -> None:
    x = torch.ones(2, requires_grad=True)
    (x.to("cuda") * 3).sum().backward()
    assert x.grad.device == CPU and x.grad.tolist() == [3, 3]


def test_bytes_are_counted_until_they_are_freed(card: Card) -> None:
    x = torch.zeros(100, device="cuda")
    view = x[:50]
    y = (x + 1).exp()
    assert card.live == 800 and card.peak == 1200 and torch.cuda.memory_allocated() == 800
    del x, y
    gc.collect()
    assert card.live == 400
    del view
    gc.collect()
    assert card.live == 0 and card.peak == 1200


def test_more_than_the_card_holds_is_an_error() -> None:
    with pretend_cuda(capacity=1000), pytest.raises(torch.OutOfMemoryError):
        torch.zeros(300, device="cuda")


def test_the_card_has_a_generator_of_its_own(card: Card) -> None:
    torch.manual_seed(0)
    host, state = torch.rand(3), torch.cuda.get_rng_state()
    torch.manual_seed(0)
    drawn = torch.rand(3, device="cuda")
    assert torch.equal(torch.rand(3), host)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3, device="cuda"), drawn)
    assert not torch.equal(torch.rand(3, device="cuda"), drawn)


def test_trainers_believe_in_one_device(card: Card, tmp_path) -> None:
    arguments = TrainingArguments(str(tmp_path), report_to="none")
    assert arguments.device == CARD and arguments.n_gpu == 1
