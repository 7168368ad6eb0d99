"""Recordings in several threads succeed, and leave what holds for the process as they found it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForQuestionAnswering, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from geta_hf import build_space, export
from geta_hf.errors import GETAError
from geta_hf.qadg.tracing.dummy_inputs import empty_model
from geta_hf.qadg.tracing.record_forward import record_forward
from tests.conftest import tiny_bert_config
from tests.export.tiny_encoders import some_batch, tiny_model, train_by_hand


def state() -> tuple[object, ...]:
    """Return what recording may change for all threads."""
    switches = torch.backends.cuda
    attention = (switches.flash_sdp_enabled(), switches.mem_efficient_sdp_enabled(), switches.math_sdp_enabled())
    hooks = nn.modules.module
    return (
        torch.backends.mkldnn.set_flags(_fp32_precision=None),
        attention,
        torch.backends.mha.get_fastpath_enabled(),
        len(hooks._global_forward_hooks),
        len(hooks._global_forward_pre_hooks),
        len(hooks._global_parameter_registration_hooks),
        PreTrainedModel.init_weights,
        nn.init.normal_,
        logging.get_verbosity(),
    )


def in_threads(count: int, work: Callable[[int], object]) -> list[BaseException]:
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def aside(work: Callable[[], Any]) -> Any:
    """Return what another thread computes, while this one waits."""
    found: list[Any] = []
    errors = in_threads(1, lambda _: found.append(work()))
    assert not errors, errors
    return found[0]


def test_spaces_are_built_in_threads(batch: dict[str, Tensor]) -> None:
    before, spaces = state(), {}
    models = [BertForQuestionAnswering(tiny_bert_config()) for _ in range(3)]

    def build(number: int) -> None:
        spaces[number] = build_space(models[number], batch)

    assert in_threads(3, build) == []
    assert state() == before
    assert len({str(space.families) for space in spaces.values()}) == 1


def test_one_model_is_recorded_by_two_threads(bert: BertForQuestionAnswering, batch: dict[str, Tensor]) -> None:
    weights = {name: id(tensor) for name, tensor in bert.named_parameters()}
    assert in_threads(2, lambda _: build_space(bert, batch)) == []
    assert {name: id(tensor) for name, tensor in bert.named_parameters()} == weights


@pytest.mark.slow
def test_exports_run_in_threads(tmp_path) -> None:
    before, models = state(), []
    for _ in range(2):
        model = tiny_model()
        space = build_space(model, some_batch())
        train_by_hand(model, space)
        models.append((model, space))

    def write(number: int) -> None:
        model, space = models[number]
        export(model, tmp_path / str(number), space=space, batch=some_batch())

    assert in_threads(2, write) == []
    assert state() == before


class Fails(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        raise self.error(self.layer(x))

    error: type[BaseException] = RuntimeError


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, GETAError])
def test_a_forward_that_fails_half_way_changes_nothing(error: type[BaseException]) -> None:
    before, model = state(), Fails()
    model.error = error
    with pytest.raises((GETAError, KeyboardInterrupt)):
        record_forward(model, {"x": torch.ones(1, 4)})
    assert state() == before and not model.layer.weight.is_meta


def test_the_precision_of_onednn_stays_what_the_user_chose() -> None:
    usual = torch.backends.mkldnn.set_flags(_fp32_precision="bf16")[3]
    try:
        record_forward(nn.Linear(4, 4), {"input": torch.ones(1, 4)})
        assert torch.backends.mkldnn.set_flags(_fp32_precision=None)[3] == "bf16"
    finally:
        torch.backends.mkldnn.set_flags(_fp32_precision=usual)


class Busy(nn.Module):
    """Runs another model in another thread while it is recorded, as a training that goes on would."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.others: list[nn.Module] = [nn.Sequential(nn.Linear(4, 4), nn.ReLU())]

    def forward(self, x: Tensor) -> Tensor:
        aside(lambda: self.others[0](torch.ones(1, 4)))
        return self.layer(x)


def test_models_of_other_threads_are_not_recorded() -> None:
    graph = record_forward(Busy(), {"x": torch.ones(1, 4)})
    assert [(node.op, node.module) for node in graph.nodes] == [
        (node.op, "layer") for node in record_forward(nn.Linear(4, 4), {"input": torch.ones(1, 4)}).nodes
    ]


class Parent(PreTrainedModel):
    """Is built while another thread builds a model of its own."""

    config_class = BertConfig

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.layer = nn.Linear(4, 4)
        found = aside(lambda: BertForQuestionAnswering(tiny_bert_config()))
        weight = found.bert.encoder.layer[0].intermediate.dense.weight
        assert not weight.is_meta and 0.01 < weight.std() < 0.03  # initialized as its config says
        self.post_init()


def test_models_built_by_other_threads_get_their_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    before = state()
    monkeypatch.setattr("geta_hf.qadg.tracing.dummy_inputs._model_class", lambda config: Parent)
    model = empty_model(tiny_bert_config())
    assert all(parameter.is_meta for parameter in model.parameters())
    assert state() == before
