"""A second method on the seam: groups of least magnitude are removed at one step, and weights have fixed bits."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from geta_hf.config import CONFIG_CLASSES, CompressionConfig, GETAConfig, at_least, read_config, setting
from geta_hf.costs.selection import Limits, find_chunks
from geta_hf.costs.targets import take_due
from geta_hf.errors import GETAError
from geta_hf.methods import METHODS, CompressionResult, Method, Run, StepMemory, make_method
from geta_hf.methods.qasso.slices import build_slices, group_sums, zero_slices
from geta_hf.qadg.group_labels import family_of_group, family_starts
from geta_hf.quantization import attach_quantizers, quantized_layers
from tests.methods.loop import prepare, train
from tests.methods.qasso.toy import STEPS, toy_space


@dataclass
class MagnitudeConfig(CompressionConfig):
    """The limits, of which `bits` gives the fixed width by its upper end, and one rule."""

    method: ClassVar[str] = "magnitude"

    prune_at: int = setting(3, "The step after which groups are removed.", at_least(1), section="Rules")


class MagnitudeOptimizer(torch.optim.Optimizer):
    """A base optimizer that removes groups after one of its steps. Its state is two entries of `param_groups[0]`."""

    def __init__(self, base: torch.optim.Optimizer, names: dict, run: Run, config: MagnitudeConfig) -> None:
        super().__init__(base.param_groups, {})
        self.base, self.run, self.config = base, run, config
        self.param_groups, self.state = base.param_groups, base.state
        for group in self.param_groups:
            group["param_names"] = [names[parameter] for parameter in group["params"]]
        self.param_groups[0].update(magnitude_step=0, magnitude_removed=[])

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = self.base.step(closure)
        own = self.param_groups[0]
        own["magnitude_step"] += 1
        pairs = [zip(group["param_names"], group["params"], strict=True) for group in self.param_groups]
        named = {name: parameter for group in pairs for name, parameter in group}
        families, ledger = self.run.space.trainable, self.run.ledger
        if own["magnitude_step"] == self.config.prune_at:
            scores = group_sums(ledger.labels, named, ledger.groups, lambda x, g: x * x).cpu()
            chunks = find_chunks(families, scores, ledger.nothing, Limits.of(self.config))
            own["magnitude_removed"] = take_due(self.run.target, ledger, chunks, ledger.nothing, 1, 1).tolist()
        if own["magnitude_removed"]:
            zero_slices(build_slices(ledger.labels, self.removed, family_of_group(families), named), named)
        return loss

    @property
    def removed(self) -> torch.Tensor:
        mask = self.run.ledger.nothing
        mask[self.param_groups[0]["magnitude_removed"]] = True
        return mask

    def state_dict(self) -> dict[str, Any]:
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.base.load_state_dict(state_dict)
        self.param_groups, self.state = self.base.param_groups, self.base.state


class MagnitudeMethod(Method):
    """Magnitude pruning at one step, and fixed bits."""

    stages = ("dense", "pruned")
    optimizer: MagnitudeOptimizer | None = None

    def attach(self, model: nn.Module, batches: Any) -> None:
        bits = self.config.bits[1]
        attach_quantizers(model, initial_bits=bits, target_bits=bits, clipping=self.config.clipping)
        self.names = list(quantized_layers(model))
        for layer in quantized_layers(model).values():
            layer.weight_quantizer.requires_grad_(False)

    def wrap_optimizer(self, base: Any, names: Any, model: nn.Module, run: Run) -> torch.optim.Optimizer:
        self.optimizer = MagnitudeOptimizer(base, names, run, self.config)
        return self.optimizer

    @property
    def step_count(self) -> int:
        return self.optimizer.param_groups[0]["magnitude_step"] if self.optimizer else 0

    @property
    def finished(self) -> bool:
        return self.step_count >= self.config.prune_at

    @property
    def stage(self) -> str:
        return self.stages[self.finished]

    def metrics(self) -> dict[str, float]:
        return {**super().metrics(), "removed_groups": self.removed_groups}

    def result(self) -> CompressionResult:
        if not self.finished:
            raise GETAError("groups are removed later")
        removed, families = self.optimizer.removed, self.optimizer.run.space.trainable
        starts = zip(families, family_starts(families), strict=True)
        masks = {family.name: removed[start : start + family.size] for family, start in starts}
        return CompressionResult(masks, dict.fromkeys(self.names, self.config.bits[1]))


@pytest.fixture(autouse=True)
def entered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enter the method for one test, as its module would for good."""
    monkeypatch.setitem(METHODS, MagnitudeConfig, MagnitudeMethod)


def config_of(**changes: Any) -> MagnitudeConfig:
    return MagnitudeConfig(**{"target_sparsity": 0.4, "bits": (5, 5), "prune_at": 20, **changes})


def test_its_config_chooses_it_and_is_read_back() -> None:
    assert type(make_method(config_of())) is MagnitudeMethod
    assert CONFIG_CLASSES["magnitude"] is MagnitudeConfig
    assert read_config(config_of().to_dict()) == config_of()


def test_a_plain_loop_ends_with_what_it_decided() -> None:
    model, method, optimizer = prepare(config_of())
    seen = []
    train(model, method, optimizer, watch=lambda step: seen.append(method.metrics()))
    assert [line["stage"] for line in seen] == [1] * 19 + [2] * 41
    assert [line["removed_groups"] for line in seen] == [0] * 19 + [4] * 41
    found = method.result()
    assert found.removed_groups == 4 and set(found.weight_bits.values()) == {5}
    tensors = model.state_dict()
    for family in toy_space().families:
        for member in family.members:
            for group, removed in enumerate(found.removed[family.name].tolist()):
                piece = tensors[member.tensor].index_select(member.dim, member.index[group])
                assert bool((piece == 0).all()) == removed
    for name, layer in quantized_layers(model).items():
        assert float(layer.weight_quantizer.bits()) == pytest.approx(found.weight_bits[name], abs=1e-4)


def test_groups_of_least_magnitude_are_removed() -> None:
    model, method, optimizer = prepare(config_of(target_sparsity=0.1, prune_at=1))
    with torch.no_grad():
        model.layers[2].weight[4] = model.layers[2].bias[4] = 0
        model.layers[3].weight[:, 4] = 0
    train(model, method, optimizer, steps=1)
    assert method.result().removed["layers:channels"].nonzero().tolist() == [[4]]


@pytest.mark.parametrize("stop", [10, 40])
def test_a_resumed_loop_ends_the_same(stop: int) -> None:
    whole, method, optimizer = prepare(config_of())
    train(whole, method, optimizer)
    model, method, optimizer = prepare(config_of())
    train(model, method, optimizer, steps=stop)
    saved = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, saved)
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    fresh, method, optimizer = prepare(config_of())
    fresh.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    train(fresh, method, optimizer)
    assert method.step_count == STEPS and method.removed_groups == 4
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), whole.parameters(), strict=True))


def test_what_a_method_does_not_offer_is_refused_or_does_nothing() -> None:
    model, method, _ = prepare(config_of())
    with pytest.raises(GETAError, match="MagnitudeMethod needs trained weights"):
        method.check(frozen_weights=True)
    with pytest.raises(GETAError, match="removed later"):
        method.result()
    assert method.removed_groups == 0 and method.extra_loss(model) is None
    assert method.memory(model, toy_space(), 4) == StepMemory(kept=0, temporary=0)


def test_a_config_that_could_not_be_read_back_is_refused() -> None:
    @dataclass
    class Unnamed(GETAConfig):
        extra: int = setting(1, "A setting of its own.", section="Rules")

    with pytest.raises(GETAError, match=r"Unnamed could not be read back .* declare a name of its own"):
        make_method(Unnamed())
    with pytest.raises(GETAError, match="CompressionConfig could not be read back"):
        make_method(CompressionConfig())


def test_a_config_with_other_defaults_alone_needs_no_name() -> None:
    @dataclass
    class Longer(GETAConfig):
        warmup: float = 0.2

    method = make_method(Longer())
    assert type(method).__name__ == "QASSOMethod" and method.config.warmup == 0.2
