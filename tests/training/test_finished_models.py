"""What changes a model after its last step, and what chooses among models: only finished ones count."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import BertForQuestionAnswering, EarlyStoppingCallback, TrainerCallback

from geta_hf import GETAConfig, GETATrainer
from geta_hf.errors import GETAError
from geta_hf.qadg import zero_groups
from geta_hf.quantization import quantized_layers
from tests.conftest import tiny_bert_config
from tests.training.test_trainer import SMALL, STEPS, arguments, rows


class Average(TrainerCallback):
    """An average of all parameters over the run, quantizers included, which replaces them at the end."""

    def on_train_begin(self, args, state, control, model: nn.Module, **kwargs: Any) -> None:
        self.average = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def on_step_end(self, args, state, control, model: nn.Module, **kwargs: Any) -> None:
        for name, parameter in model.named_parameters():
            self.average[name].lerp_(parameter.detach(), 0.2)

    @torch.no_grad()
    def on_train_end(self, args, state, control, model: nn.Module, **kwargs: Any) -> None:
        for name, parameter in model.named_parameters():
            parameter.copy_(self.average[name])


def make(folder: Path, callbacks: list[TrainerCallback], **changes: Any) -> GETATrainer:
    torch.manual_seed(0)
    model = BertForQuestionAnswering(tiny_bert_config())
    data = {"train_dataset": rows(), "eval_dataset": rows(4)}
    args = arguments(folder, **{"save_strategy": "no", "logging_steps": 50, **changes})
    return GETATrainer(model, args, geta_config=GETAConfig(**SMALL), callbacks=callbacks, **data)


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> GETATrainer:
    made = make(tmp_path_factory.mktemp("run"), [Average()])
    made.train()
    return made


def test_averaged_weights_are_refused_with_the_remedy_and_exported_with_their_zeros(averaged, tmp_path) -> None:
    with pytest.raises(GETAError, match=r"are not zero \(\d+ such groups\).*changed the model.*restore_compression"):
        averaged.export_model(tmp_path / "small")
    model = averaged.model
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    averaged.restore_compression()
    result = averaged.method.result()
    zero = zero_groups(model, averaged.space)
    assert all(bool((zero[name] | ~mask).all()) for name, mask in result.removed.items())
    for name, layer in quantized_layers(model).items():
        assert float(layer.weight_quantizer.bits()) == pytest.approx(result.weight_bits[name], abs=1e-4)
    for name, parameter in model.named_parameters():
        changed = parameter != before[name]
        assert "quantizer" in name or not parameter[changed].any()  # nothing but removed groups and quantizers
    report = averaged.export_model(tmp_path / "small")
    assert report is not None and sum(kept for kept, _ in report.kept.values()) == 52


def test_widths_alone_that_changed_are_refused_with_the_remedy(averaged, tmp_path) -> None:
    averaged.restore_compression()
    layer = next(iter(quantized_layers(averaged.model).values()))
    with torch.no_grad():
        layer.weight_quantizer.d.mul_(1.3)
        layer.weight_quantizer.t.add_(0.1)  # not learned, so not in the optimizer
    with pytest.raises(GETAError, match=r"not an integer.*restore_compression"):
        averaged.export_model(tmp_path / "small")
    averaged.restore_compression()
    averaged.export_model(tmp_path / "small")


def test_ddp_goes_on_averaging_gradients_after_an_export_within_training(averaged, tmp_path, monkeypatch) -> None:
    """An export on a GPU moves parameters for a while, after which DDP would wait for their gradients in vain."""

    def moved_and_back(model: nn.Module, *args: Any, **kwargs: Any) -> None:
        for parameter in model.parameters():
            data = parameter.data
            parameter.data = data.double()
            parameter.data = data

    def averaging(seen, bucket):  # torch refuses annotations that are strings
        seen.append(bucket.index())
        found = torch.futures.Future()
        found.set_result(bucket.buffer())
        return found

    averaged.restore_compression()
    monkeypatch.setattr("geta_hf.training.trainer.export", moved_and_back)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(averaged.model, find_unused_parameters=True)
        seen: list[int] = []
        wrapped.register_comm_hook(seen, averaging)
        monkeypatch.setattr(averaged, "model_wrapped", wrapped)
        monkeypatch.setattr(averaged, "is_in_train", True)
        averaged.export_model(tmp_path / "small")
        wrapped.train()
        wrapped(**averaged.data_collator(rows(2))).loss.backward()
    finally:
        averaged.model.zero_grad()
        dist.destroy_process_group()
    assert seen


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_quantizers_without_a_width_are_refused_with_the_remedy(averaged, tmp_path, value: float) -> None:
    averaged.restore_compression()
    layer = next(iter(quantized_layers(averaged.model).values()))
    with torch.no_grad():
        layer.weight_quantizer.q_m.fill_(value)
    with pytest.raises(GETAError, match=r"weight_quantizer has a width of (nan|inf) bits.*restore_compression"):
        averaged.export_model(tmp_path / "small")
    averaged.restore_compression()
    averaged.export_model(tmp_path / "small")


def test_a_run_that_was_resumed_at_its_end_is_restored_too(averaged, tmp_path) -> None:
    """No step follows in which anything could be noted."""
    averaged.restore_compression()
    optimizer = averaged.method.optimizer
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with torch.no_grad():
        for parameter in averaged.model.parameters():
            parameter.mul_(1.01).add_(1e-3)
    averaged.restore_compression()
    averaged.export_model(tmp_path / "small")


def test_restoring_before_the_end_is_refused(tmp_path) -> None:
    with pytest.raises(GETAError, match="before the end of the joint stage"):
        make(tmp_path, []).restore_compression()


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self.step


class Scores(GETATrainer):
    """Evaluates to given scores, so that the best step is known."""

    scores: dict[int, float]

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = {"eval_loss": self.scores.get(self.state.global_step, 9.0)}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def chosen(folder: Path, scores: dict[int, float], callbacks: list[TrainerCallback], **changes: Any) -> Scores:
    torch.manual_seed(0)
    best = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    best |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "logging_steps": 50}
    made = Scores(
        BertForQuestionAnswering(tiny_bert_config()),
        arguments(folder, **{**best, "save_total_limit": 2, **changes}),
        geta_config=GETAConfig(**SMALL),
        train_dataset=rows(),
        eval_dataset=rows(4),
        callbacks=callbacks,
    )
    made.scores = scores
    made.train()
    return made


def test_the_best_model_is_one_from_the_cool_down_and_early_stopping_waits_for_it(tmp_path) -> None:
    """Step 2 scores best of all, and gets worse from then on: of finished models, that of step 20 is the best."""
    scores = {2: 0.1, **{step: 1.0 + step for step in range(4, 20, 2)}, 20: 0.5, 22: 0.7, 24: 0.8}
    made = chosen(tmp_path / "run", scores, [EarlyStoppingCallback(early_stopping_patience=1)])
    assert made.state.global_step == 22 and made.state.best_global_step == 20
    report = made.export_model(tmp_path / "small")
    assert report is not None and sum(kept for kept, _ in report.kept.values()) == 52


@pytest.mark.slow
def test_no_evaluation_of_a_finished_model_is_said(tmp_path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        made = chosen(tmp_path, {}, [StopAt(19)], eval_steps=16, save_steps=16)
    assert "load_best_model_at_end found no checkpoint" in caplog.text and made.state.best_model_checkpoint is None


def test_a_callback_that_stops_in_the_joint_stage_is_named(tmp_path, caplog: pytest.LogCaptureFixture) -> None:
    made = make(tmp_path, [StopAt(9)])
    with caplog.at_level(logging.WARNING):
        made.train()
    assert f"training ended at step 9 of {STEPS}, before the compression was finished" in caplog.text
    with pytest.raises(GETAError, match=r"at step 9, before the end.*wait until trainer.method.finished is true"):
        made.export_model(tmp_path / "small")
