"""The teacher and the method are asked wherever the loss is computed, and once for every forward that is trained."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

from geta_hf import GETAConfig, GETATrainer
from geta_hf.errors import GETAError
from geta_hf.methods import Method
from geta_hf.training.distillation import Distiller, dense_copy
from geta_hf.training.loss_terms import LossTerms, Scale


class Adds(Method):
    """Adds 2 to the loss."""

    def __init__(self) -> None:
        pass

    def extra_loss(self, model: nn.Module) -> Tensor:
        return torch.tensor(2.0)

    attach = wrap_optimizer = result = None
    step_count = finished = None


@pytest.fixture(scope="module")
def student() -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(vocab_size=30, **sizes, **dropouts)).train()


def batch() -> dict[str, Tensor]:
    return {"input_ids": torch.arange(1, 13).view(2, 6), "labels": torch.tensor([0, 1])}


def terms_of(student: nn.Module, hidden: float = 0.0) -> LossTerms:
    teacher = dense_copy(student)
    with torch.no_grad():
        teacher.classifier.weight.add_(0.3)
    distiller = Distiller(student, teacher, logits=1.0, hidden=hidden)
    return LossTerms(distiller, Adds.__new__(Adds), contextlib.nullcontext)


def by_keyword(model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
    outputs = model(**inputs)
    return (outputs.loss, outputs) if return_outputs else outputs.loss


def without_labels(model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
    labels = inputs.pop("labels")
    inputs.pop("weights", None)
    outputs = model(inputs["input_ids"])  # by position
    loss = F.cross_entropy(outputs.logits, labels)
    return (loss, outputs) if return_outputs else loss


def two_passes(model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
    with torch.no_grad():
        model(inputs["input_ids"].flip(0))  # a target, which is not trained
    first, second = model(**inputs), model(**inputs)
    return (first.loss + second.loss) / 2


def term(terms: LossTerms, student: nn.Module) -> Tensor:
    assert terms.distiller is not None
    outputs = student(**terms.distiller.student_inputs(batch()))
    return terms.distiller.loss(batch(), outputs) + 2


@pytest.mark.parametrize("hidden", [0.0, 0.5])
@pytest.mark.parametrize("compute", [by_keyword, without_labels, two_passes])
def test_the_terms_are_added_to_any_loss(student, compute, hidden: float) -> None:
    terms = terms_of(student, hidden)
    around = terms.around(compute, lambda: student, lambda _: Scale())
    added = around(student, {**batch(), **({"weights": torch.ones(2)} if compute is without_labels else {})})
    expected = compute(student, batch()) + term(terms, student)
    torch.testing.assert_close(added, expected)
    assert terms.used and not student._forward_hooks and not student._forward_pre_hooks


def test_evaluation_and_runs_without_terms_are_left_alone(student) -> None:
    terms = terms_of(student)
    around = terms.around(by_keyword, lambda: student, lambda _: Scale())
    student.eval()
    try:
        torch.testing.assert_close(around(student, batch()), by_keyword(student, batch()))
    finally:
        student.train()
    none = LossTerms(None, None, contextlib.nullcontext)
    assert not terms.used and not none.any and none.around(by_keyword, lambda: student, lambda _: Scale()) is by_keyword


def test_outputs_come_back_with_the_loss(student) -> None:
    around = terms_of(student).around(by_keyword, lambda: student, lambda _: Scale())
    loss, outputs = around(student, batch(), True, None)
    assert loss > outputs.loss and outputs.logits.shape == (2, 2)


@pytest.mark.parametrize("divided", [True, False])
@pytest.mark.parametrize("items", [None, 4])
def test_micro_batches_add_up_to_one_term_a_step(student, divided: bool, items: int | None) -> None:
    terms = terms_of(student)
    around = terms.around(by_keyword, lambda: student, lambda _: Scale(2, divided))
    shares = [around(student, batch(), num_items_in_batch=items) - by_keyword(student, batch()) for _ in range(2)]
    torch.testing.assert_close(sum(shares) / (2 if divided else 1), term(terms, student))


def test_a_loss_without_a_forward_is_refused(student) -> None:
    around = terms_of(student).around(lambda *_: torch.zeros(()), lambda: student, lambda _: Scale())
    with pytest.raises(GETAError, match="compute_loss did not run the model"):
        around(student, batch())


class OwnStep(GETATrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = model(**self._prepare_inputs(inputs)).loss
        self.accelerator.backward(loss)
        return loss.detach()


class OwnStepAndLoss(OwnStep):
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        self.accelerator.backward(loss)
        return loss.detach()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return by_keyword(model, inputs, return_outputs)


@pytest.mark.parametrize("kind", [OwnStep, OwnStepAndLoss])
def test_a_step_that_never_asks_the_teacher_fails_at_once(student, tmp_path: Path, kind: type[GETATrainer]) -> None:
    args = TrainingArguments(
        str(tmp_path), max_steps=2, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no"
    )
    config = GETAConfig(warmup=0, projection=1, joint=1, projection_periods=1, pruning_periods=1, distill_logits=1.0)
    rows = [{name: tensor[0] for name, tensor in batch().items()}] * 16
    made = kind(dense_copy(student), args, geta_config=config, train_dataset=rows)
    if kind is OwnStep:
        with pytest.raises(GETAError, match=r"without self.compute_loss.*call self.compute_loss in OwnStep"):
            made.train()
        assert made.state.global_step == 0
    else:
        made.train()
        assert made.distiller.terms.keys() == {"logits"}


def test_a_forward_set_on_the_student_is_not_the_teachers(student) -> None:
    original = student.forward
    student.forward = lambda *args, **kwargs: original(*args, **kwargs)  # as trainers do that fuse the loss
    try:
        teacher = dense_copy(student)
    finally:
        del student.forward
    with torch.no_grad():
        teacher.classifier.bias.add_(1.0)
        assert not torch.equal(teacher(**batch()).logits, student(**batch()).logits)
