"""Methods other than QASSO under GETATrainer: nothing outside them is changed, and all of the trainer works."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForQuestionAnswering, BertForQuestionAnswering

from geta_hf import GETATrainer, SearchConfig, convert
from geta_hf.config import read_config
from geta_hf.errors import GETAError
from geta_hf.methods import METHODS, PostTrainingConfig
from geta_hf.qadg import zero_groups
from tests.conftest import tiny_bert_config
from tests.methods.test_toy_method import MagnitudeConfig, MagnitudeMethod
from tests.training.test_trainer import SMALL, STEPS, arguments, rows, trainer

pytestmark = pytest.mark.usefixtures("shared_spaces")


@pytest.fixture(autouse=True, scope="module")
def entered() -> Iterator[None]:
    """Enter the toy method for these tests, as its module would for good."""
    METHODS[MagnitudeConfig] = MagnitudeMethod
    yield
    del METHODS[MagnitudeConfig]


CONFIGS = {
    "magnitude": MagnitudeConfig(target_sparsity=0.5, bits=(5, 5), prune_at=10),
    "search": SearchConfig(target_sparsity=0.5, bits=(3, 8), mean_bits=5, warmup=4, search=12),
    "groups": SearchConfig(target_sparsity=0.5, bits=(3, 8), mean_bits=5, warmup=4, search=12, granularity="group"),
    "post-training": PostTrainingConfig(target_sparsity=0.5, bits=(3, 8), mean_bits=5, **SMALL),
}
EVERY = 8
"""Steps between two checkpoints."""


_SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("search", "groups")]


@pytest.fixture(scope="module", params=["magnitude", "post-training", *_SLOW])
def config(request: pytest.FixtureRequest) -> Any:
    return CONFIGS[request.param]


@pytest.fixture(scope="module")
def done(config: Any, entered: None, tmp_path_factory: pytest.TempPathFactory) -> GETATrainer:
    """A run with its checkpoints, and its export in `small`."""
    folder = tmp_path_factory.mktemp("run")
    made = trainer(folder, config, save_steps=EVERY)
    made.train()
    made.export_model(folder / "small")
    return made


def logits_of(folder: Path) -> torch.Tensor:
    model = AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    batch = {name: torch.stack([row[name] for row in rows(4)]) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        return model(**batch).start_logits


def test_a_run_ends_as_its_method_says_and_is_exported(done: GETATrainer, tmp_path: Path) -> None:
    result = done.method.result()
    zero = zero_groups(done.model, done.space)
    assert result.removed_groups == 52 == sum(int(mask.sum()) for mask in zero.values())
    report = done.export_model(tmp_path / "small")
    assert report.bits == dict(result.weight_bits)
    assert sum(before - kept for kept, before in report.kept.values()) == 52
    done.model.eval()
    batch = {name: torch.stack([row[name] for row in rows(4)]) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = done.model(**batch).start_logits
    torch.testing.assert_close(logits_of(tmp_path / "small"), expected, atol=1e-5, rtol=1e-5)


def test_metrics_of_the_method_are_logged(done: GETATrainer) -> None:
    logged = [line for line in done.state.log_history if "loss" in line]
    assert logged and all(line["stage"] >= 1 for line in logged)
    assert logged[-1]["stage"] == len(done.method.stages)


@pytest.mark.parametrize("stop", [EVERY, 2 * EVERY])
def test_a_resumed_run_ends_bit_for_bit_the_same(done: GETATrainer, stop: int, tmp_path: Path) -> None:
    again = trainer(tmp_path, done.geta_config)
    again.train(resume_from_checkpoint=f"{done.args.output_dir}/checkpoint-{stop}")
    assert again.method.step_count == STEPS and again.method.removed_groups == 52
    for name, value in done.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name


def test_the_last_checkpoint_becomes_the_same_folder(done: GETATrainer, tmp_path: Path) -> None:
    run = Path(done.args.output_dir)
    assert read_config(run / f"checkpoint-{STEPS}" / "geta_config.json") == done.geta_config
    convert(run / f"checkpoint-{STEPS}", tmp_path / "converted")
    assert torch.equal(logits_of(tmp_path / "converted"), logits_of(run / "small"))


def test_a_checkpoint_of_another_method_is_refused(tmp_path: Path) -> None:
    made = trainer(tmp_path / "run", CONFIGS["magnitude"], max_steps=1, save_steps=1)
    made.train()
    other = trainer(tmp_path / "other")
    with pytest.raises(GETAError, match="method: 'magnitude' there, 'qasso' here"):
        other.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))


def test_adapters_are_refused_before_the_model_is_touched(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["query"])
    with pytest.raises(GETAError, match="SearchMethod needs trained weights; leave peft_config out"):
        model = BertForQuestionAnswering(tiny_bert_config())
        GETATrainer(model, arguments(tmp_path), geta_config=CONFIGS["search"], train_dataset=rows(), peft_config=lora)


def test_export_before_the_method_has_finished_is_refused(tmp_path: Path) -> None:
    made: GETATrainer = trainer(tmp_path, CONFIGS["magnitude"], max_steps=2)
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
