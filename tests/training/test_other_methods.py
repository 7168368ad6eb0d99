"""Methods other than QASSO under GETATrainer: nothing outside them is changed, and all of the trainer works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForQuestionAnswering

from geta_hf import GETATrainer, convert
from geta_hf.config import read_config
from geta_hf.errors import GETAError
from geta_hf.methods import METHODS, PostTrainingConfig
from geta_hf.qadg import zero_groups
from tests.methods.test_toy_method import MagnitudeConfig, MagnitudeMethod
from tests.training.test_trainer import SMALL, STEPS, rows, trainer


@pytest.fixture(autouse=True)
def entered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enter the toy method for one test, as its module would for good."""
    monkeypatch.setitem(METHODS, MagnitudeConfig, MagnitudeMethod)


CONFIGS = {
    "magnitude": MagnitudeConfig(target_sparsity=0.5, bits=(5, 5), prune_at=10),
    "post-training": PostTrainingConfig(target_sparsity=0.5, bits=(3, 8), mean_bits=5, **SMALL),
}


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> Any:
    return CONFIGS[request.param]


def logits_of(folder: Path) -> torch.Tensor:
    model = AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    batch = {name: torch.stack([row[name] for row in rows(4)]) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        return model(**batch).start_logits


def test_a_run_ends_as_its_method_says_and_is_exported(config: Any, tmp_path: Path) -> None:
    made = trainer(tmp_path / "run", config)
    made.train()
    result = made.method.result()
    zero = zero_groups(made.model, made.space)
    assert result.removed_groups == 52 == sum(int(mask.sum()) for mask in zero.values())
    report = made.export_model(tmp_path / "small")
    assert report.bits == dict(result.weight_bits)
    assert sum(before - kept for kept, before in report.kept.values()) == 52
    made.model.eval()
    batch = {name: torch.stack([row[name] for row in rows(4)]) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = made.model(**batch).start_logits
    torch.testing.assert_close(logits_of(tmp_path / "small"), expected, atol=1e-5, rtol=1e-5)


def test_metrics_of_the_method_are_logged(config: Any, tmp_path: Path) -> None:
    made = trainer(tmp_path, config)
    made.train()
    logged = [line for line in made.state.log_history if "loss" in line]
    assert logged and all(line["stage"] >= 1 for line in logged)
    assert logged[-1]["stage"] == len(made.method.stages)


@pytest.mark.parametrize("stop", [8, 16])
def test_a_resumed_run_ends_bit_for_bit_the_same(config: Any, stop: int, tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", config)
    whole.train()
    stopped = trainer(tmp_path / "run", config, save_steps=stop)
    stopped.train()
    again = trainer(tmp_path / "again", config)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{stop}"))
    assert again.method.step_count == STEPS and again.method.removed_groups == 52
    for name, value in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name


def test_the_last_checkpoint_becomes_the_same_folder(config: Any, tmp_path: Path) -> None:
    made = trainer(tmp_path / "run", config)
    made.train()
    made.export_model(tmp_path / "small")
    checkpoint = tmp_path / "run" / f"checkpoint-{STEPS}"
    assert read_config(checkpoint / "geta_config.json") == config
    convert(checkpoint, tmp_path / "converted")
    assert torch.equal(logits_of(tmp_path / "converted"), logits_of(tmp_path / "small"))


def test_a_checkpoint_of_another_method_is_refused(tmp_path: Path) -> None:
    made = trainer(tmp_path / "run", CONFIGS["magnitude"])
    made.train()
    other = trainer(tmp_path / "other")
    with pytest.raises(GETAError, match="method: 'magnitude' there, 'qasso' here"):
        other.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{STEPS}"))


def test_export_before_the_method_has_finished_is_refused(tmp_path: Path) -> None:
    made: GETATrainer = trainer(tmp_path, MagnitudeConfig(target_sparsity=0.5, bits=(5, 5), prune_at=STEPS + 1))
    made.train()
    with pytest.raises(GETAError, match="groups are removed later"):
        made.export_model(tmp_path / "small")
    assert not (tmp_path / "small").exists()


class DecayMethod(MagnitudeMethod):
    """Adds ½ · 0.1 · Σ w² of one weight to the loss: its gradient is 0.1 · w, once a step."""

    def extra_loss(self, model: torch.nn.Module) -> torch.Tensor:
        return 0.05 * model.qa_outputs.weight.square().sum()


@pytest.mark.parametrize("own_loss", [False, True])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_term_of_a_method_counts_once_a_step(
    own_loss: bool, accumulation: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether Trainer divides the loss by the micro-batches, or a loss of the user's own does."""

    def weight_after_a_step(method: type[MagnitudeMethod]) -> torch.Tensor:
        monkeypatch.setitem(METHODS, MagnitudeConfig, method)
        changes = {"max_steps": 1, "save_steps": 50, "per_device_train_batch_size": 8 // accumulation}
        changes |= {"gradient_accumulation_steps": accumulation, "optim": "sgd", "weight_decay": 0.0}
        made = trainer(tmp_path / method.__name__, CONFIGS["magnitude"], dropout=0.0, max_grad_norm=0.0, **changes)
        if own_loss:
            made.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: outputs.loss / accumulation
        before = made.model.qa_outputs.weight.detach().clone()
        made.train()
        rate = made.args.learning_rate
        return before, (before - made.model.qa_outputs.weight.detach()) / rate

    _, plain = weight_after_a_step(MagnitudeMethod)
    before, decayed = weight_after_a_step(DecayMethod)
    torch.testing.assert_close(decayed - plain, 0.1 * before, rtol=1e-2, atol=1e-5)
