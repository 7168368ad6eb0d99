"""GETATrainer on a pretended card, end to end: no mixed devices, and no waiting for the card inside a period."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForQuestionAnswering, BertForQuestionAnswering, TrainerCallback, TrainingArguments

from geta_hf import GETAConfig, GETATrainer, prepare_for_inference
from tests.conftest import tiny_bert_config
from tests.pretend_cuda import CARD, Card, Read, pretend_cuda
from tests.training.test_trainer import rows

pytestmark = pytest.mark.usefixtures("shared_spaces")

STEPS = 12
STAGES = {"warmup": 2, "projection": 2, "joint": 6, "projection_periods": 1, "pruning_periods": 2}


@pytest.fixture
def card() -> Iterator[Card]:
    with pretend_cuda() as made:
        yield made


def make(folder: Path, config: dict[str, Any], others: dict[str, Any], **changes: Any) -> GETATrainer:
    torch.manual_seed(0)
    model = BertForQuestionAnswering(tiny_bert_config(hidden_dropout_prob=0.1, num_hidden_layers=1, hidden_size=16))
    values: dict = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": STEPS,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    arguments = TrainingArguments(**{**values, **changes})
    return GETATrainer(model, arguments, geta_config=GETAConfig(**{**STAGES, **config}), train_dataset=rows(), **others)


class Watch(TrainerCallback):
    """Collect, by step, when the code of geta_hf made the host wait in forward, backward or the optimizer's step."""

    def __init__(self, trainer: GETATrainer, card: Card) -> None:
        self.trainer = trainer
        self.card = card
        self.begun = 0
        self.inside: list[Read] = []
        self.at_boundaries: list[Read] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.begun = len(self.card.reads)
        self.phase = self.trainer.qasso.phase

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        boundary = self.phase.starts or self.phase.ends
        found = self.at_boundaries if boundary else self.inside
        found += self.card.reads_in("geta_hf", self.begun)


def run(trainer: GETATrainer, card: Card) -> Watch:
    watch = Watch(trainer, card)
    trainer.add_callback(watch)
    trainer.train()
    return watch


def lora() -> dict[str, Any]:
    peft = pytest.importorskip("peft")
    return {"peft_config": peft.LoraConfig(r=2, target_modules=["query", "value", "dense"])}


def check_to_the_end(trainer: GETATrainer, card: Card, folder: Path, tolerance: float) -> None:
    """Train, evaluate, export, reload and prepare for inference, all on the card."""
    watch = run(trainer, card)
    assert not watch.inside and watch.at_boundaries
    assert {tensor.device for tensor in [*trainer.model.parameters(), *trainer.model.buffers()]} == {CARD}
    assert trainer.evaluate(rows(4))["eval_loss"] > 0
    trainer.export_model(folder)
    model = AutoModelForQuestionAnswering.from_pretrained(folder).to("cuda").eval()
    batch = {name: torch.stack([row[name] for row in rows(2)]).to("cuda") for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = trainer.model.eval()(**batch).start_logits
        reloaded = model(**batch).start_logits
    prepare_for_inference(model)
    before = len(card.reads)
    with torch.no_grad():
        prepared = model(**batch).start_logits
    assert not card.reads_in("geta_hf", before)
    assert expected.device == reloaded.device == prepared.device == CARD
    assert float((reloaded - expected).abs().max()) <= tolerance
    assert float((prepared - reloaded).abs().max()) <= tolerance


def test_a_run_to_the_prepared_model(card: Card, tmp_path: Path) -> None:
    check_to_the_end(make(tmp_path / "run", {}, {}), card, tmp_path / "small", 1e-5)


Case = tuple[dict[str, Any], Callable[[], dict[str, Any]], dict[str, Any], float]
CASES: dict[str, Case] = {
    "activations": ({"activation_bits": (4, 8)}, dict, {}, 1e-5),
    "teacher": ({"distill_logits": 0.5, "distill_hidden": 0.1}, dict, {}, 1e-5),
    "LoRA": ({}, lora, {}, 1e-5),
    "checkpointing": ({}, dict, {"gradient_checkpointing": True}, 1e-5),
    "accumulation": ({}, dict, {"gradient_accumulation_steps": 2}, 1e-5),
    "fp16": ({}, dict, {"fp16": True}, 2e-3),
    "bf16": ({}, dict, {"bf16": True}, 2e-2),
    "all": ({"activation_bits": (4, 8), "distill_logits": 0.5, "saliency": "taylor"}, lora, {"bf16": True}, 2e-2),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_other_runs_to_the_prepared_model(card: Card, tmp_path: Path, case: Case) -> None:
    config, others, changes, tolerance = case
    check_to_the_end(make(tmp_path / "run", config, others(), **changes), card, tmp_path / "small", tolerance)


# Compiled under the trainer's own file name, as if a step of it had such a line.
FAULTY_STEP = """
def training_step(self, *args, **kwargs):
    loss = step(self, *args, **kwargs)
    {fault}
    return loss
"""


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["bool(torch.isfinite(loss.detach()))", "torch.tensor(0.0).to(loss)"])
def test_a_wait_in_the_trainers_step_would_be_seen(card: Card, tmp_path: Path, monkeypatch, fault: str) -> None:
    step = GETATrainer.training_step
    names = {"step": step, "torch": torch}
    exec(compile(FAULTY_STEP.format(fault=fault), step.__code__.co_filename, "exec"), names)
    monkeypatch.setattr(GETATrainer, "training_step", names["training_step"])
    watch = run(make(tmp_path, {}, {}), card)
    assert watch.inside and all("trainer.py" in read.where for read in watch.inside)


def test_a_tensor_that_remained_on_the_cpu_would_be_refused(card: Card, tmp_path: Path) -> None:
    trainer = make(tmp_path, {}, {})

    class Forget(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            trainer._bad_loss = torch.zeros(1, dtype=torch.bool)

    trainer.add_callback(Forget())
    with pytest.raises(RuntimeError, match="same device"):
        trainer.train()
