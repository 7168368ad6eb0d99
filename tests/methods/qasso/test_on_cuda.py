"""QASSO on a pretended card, in every stage: no mixed devices, and no waiting for the card inside a period."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from geta_hf.config import GETAConfig
from geta_hf.errors import GETAError
from geta_hf.methods.qasso.optimizer import QASSO
from geta_hf.methods.qasso.schedule import COOLDOWN, JOINT, PROJECTION, WARMUP, Schedule
from geta_hf.quantization import attach_quantizers, quantizer_prefixes
from tests.methods.qasso.toy import Toy, adamw, batch_at, toy_space
from tests.pretend_cuda import CARD, Card, Read, pretend_cuda

STEPS = 19


def make(*on_card: int, **rules: object) -> tuple[Toy, QASSO]:
    """Return the toy network, of which some layers are on the card, and its optimizer for two periods of each kind."""
    stages: dict = {"warmup": 3, "projection": 6, "projection_periods": 2, "joint": 6, "pruning_periods": 2}
    config = GETAConfig(**{**stages, **rules})
    torch.manual_seed(0)
    model = Toy()
    attach_quantizers(
        model, initial_bits=config.initial_bits, target_bits=config.bits[1], learn_t=config.learn_exponent
    )
    for position in on_card:
        model.layers[position].to("cuda")
    trained = dict(model.named_parameters())
    weights = [p for name, p in trained.items() if "quantizer" not in name]
    scales = [p for name, p in trained.items() if "quantizer" in name]
    base = adamw([{"params": weights}, {"params": scales, "lr": 3e-3, "weight_decay": 0.0}])
    names = {p: name for name, p in trained.items()}
    schedule = Schedule.from_config(config, STEPS, STEPS)
    return model, QASSO(base, names, toy_space(), quantizer_prefixes(model), schedule, config)


@pytest.fixture
def card() -> Iterator[Card]:
    with pretend_cuda() as made:
        yield made


def waits(model: Toy, optimizer: QASSO, card: Card) -> dict[str, list[Read]]:
    """Train to the end, and return by stage when a step inside a period made the host wait."""
    found: dict[str, list[Read]] = {stage: [] for stage in (WARMUP, PROJECTION, JOINT, COOLDOWN)}
    for step in range(STEPS):
        x, y = (tensor.to("cuda") for tensor in batch_at(step))
        phase, before = optimizer.phase, len(card.reads)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        if not phase.starts and not phase.ends:
            found[phase.stage] += card.reads[before:]
    return found


# At period boundaries, too: scores and rounding errors are read there, but positions come from labels on the CPU.
MADE_ON_THE_CPU = ("geta_hf/methods/qasso/slices.py", "geta_hf/methods/qasso/joint_step.py", "geta_hf/utils/")

RULES = {
    "default": {},
    "paper": {"saliency": "taylor", "bit_rule": "paper", "forgetting": "paper"},
    "hesso": {"saliency": "hesso", "bit_rule": "ppsg"},
    "exponent": {"learn_exponent": True},
    "at once": {"joint": 0},
}


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.filterwarnings("ignore:.*joint")
def test_no_step_inside_a_period_waits_for_the_card(card: Card, rules: dict) -> None:
    model, optimizer = make(**rules)
    model.to("cuda")
    assert waits(model, optimizer, card) == {WARMUP: [], PROJECTION: [], JOINT: [], COOLDOWN: []}
    assert optimizer.finished and optimizer.removed_groups > 0
    made = [read for read in card.reads if read.where.startswith(MADE_ON_THE_CPU)]
    assert not made
    held = [*model.parameters(), *(v for state in optimizer.state.values() for v in state.values() if v.dim())]
    assert {tensor.device for tensor in held} == {CARD}


def test_a_run_on_the_card_equals_one_on_the_cpu(card: Card) -> None:
    here, there = make(), make()
    there[0].to("cuda")
    for step in range(STEPS):
        for model, optimizer in (here, there):
            x, y = (tensor.to(model.head.weight.device) for tensor in batch_at(step))
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
    for ours, theirs in zip(here[0].parameters(), there[0].parameters(), strict=True):
        torch.testing.assert_close(theirs.cpu(), ours, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("stage", "fault"),
    [
        (WARMUP, lambda grad: grad.sum().item()),
        (PROJECTION, lambda grad: grad[grad > 0]),
        (JOINT, lambda grad: torch.tensor(1.0, device=grad.device)),
        (COOLDOWN, lambda grad: grad.cpu()),
    ],
    ids=[WARMUP, PROJECTION, JOINT, COOLDOWN],
)
def test_a_wait_in_any_stage_would_be_seen(card: Card, monkeypatch, stage: str, fault) -> None:
    name = {WARMUP: "_warm_up_step", PROJECTION: "_projection_step", JOINT: "_joint_step", COOLDOWN: "_cool_down_step"}
    original = getattr(QASSO, name[stage])

    def step(self, phase, named):
        fault(named["head.weight"].grad)
        original(self, phase, named)

    monkeypatch.setattr(QASSO, name[stage], step)
    model, optimizer = make()
    model.to("cuda")
    found = waits(model, optimizer, card)
    assert [where for where, reads in found.items() if reads] == [stage]
    assert all("test_on_cuda.py" in read.where for read in found[stage])


def test_a_vector_that_remained_on_the_cpu_would_be_refused(card: Card) -> None:
    model, optimizer = make(saliency="fisher")
    model.to("cuda")
    optimizer.qasso_state.to = lambda device: None  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="same device"):
        waits(model, optimizer, card)


def test_a_model_that_is_split_over_devices_is_refused_before_training(card: Card) -> None:
    """As by device_map="auto", after which Trainer counts one GPU."""
    assert card
    with pytest.raises(GETAError, match=r"weight is on cpu and layers.0.weight on cuda:0.*without device_map"):
        make(0, 1)
