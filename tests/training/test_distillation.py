"""Distillation: the terms by hand, what is masked, what the teacher keeps out of, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from geta_hf.errors import GETAError
from geta_hf.training import distillation
from geta_hf.training.distillation import Distiller, dense_copy, kl
from tests.conftest import tiny_bert_config

VOCAB, LENGTH = 60, 10


def llama(**changes: Any) -> LlamaForCausalLM:
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, "num_attention_heads": 4, "pad_token_id": 0, **changes}))


def gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=40, bos_token_id=1, eos_token_id=2
    )
    return GPT2LMHeadModel(config).eval()


def t5() -> T5ForConditionalGeneration:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(
        T5Config(vocab_size=VOCAB, **sizes, decoder_start_token_id=0, dropout_rate=0.0, pad_token_id=0)
    )


def bart() -> BartForConditionalGeneration:
    layers = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("ffn_dim", 48))}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 40, "dropout": 0.0}
    ids = {"bos_token_id": 1, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
    return BartForConditionalGeneration(BartConfig(vocab_size=VOCAB, d_model=32, **layers, **heads, **ids))


def classifier(**changes: Any) -> BertForSequenceClassification:
    return BertForSequenceClassification(tiny_bert_config(**{"num_labels": 3, **changes}))


def qa(**changes: Any) -> BertForQuestionAnswering:
    return BertForQuestionAnswering(tiny_bert_config(**changes))


MODELS = {"qa": qa, "classifier": classifier, "llama": llama, "gpt2": gpt2, "t5": t5, "bart": bart}


def inputs_of(kind: str, *, rows: int = 4, padding: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(4, VOCAB, (rows, LENGTH), generator=generator)
    labels = {
        "qa": {"start_positions": ids[:, 0] % LENGTH, "end_positions": ids[:, 1] % LENGTH},
        "classifier": {"labels": ids[:, 0] % 3},
        "t5": {"labels": F.pad(ids[:, :6], (0, padding), value=-100)},
        "bart": {"labels": F.pad(ids[:, :6], (0, padding), value=-100)},
    }
    mask = F.pad(torch.ones_like(ids), (0, padding))
    own = labels.get(kind, {"labels": F.pad(ids, (0, padding), value=-100)})
    return {"input_ids": F.pad(ids, (0, padding), value=0), "attention_mask": mask, **own}


def pair(kind: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A student and another teacher of random weights."""
    torch.manual_seed(1)
    student = MODELS[kind]()
    torch.manual_seed(2)
    return student, MODELS[kind]()


def term(distiller: Distiller, student: nn.Module, inputs: dict[str, Tensor], **more: Any) -> Tensor:
    return distiller.loss(inputs, student(**distiller.student_inputs(inputs)), **more)


class Fixed(nn.Module):
    """A model that returns whatever it was given to return."""

    def __init__(self, returned: Any) -> None:
        super().__init__()
        self.weight, self.returned = nn.Parameter(torch.ones(1)), returned

    def forward(self, **inputs: Any) -> Any:
        return self.returned


# --- the KL -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1 << 23, 14])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl_and_its_gradient_are_those_of_torch(monkeypatch, chunk, temperature) -> None:
    monkeypatch.setattr(distillation, "CHUNK", chunk)
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 5, 7, requires_grad=True), torch.randn(3, 5, 7) * 3
    mask = torch.rand(3, 5) > 0.4
    ours = kl(student, teacher, mask, temperature)
    (gradient,) = torch.autograd.grad(3 * ours, student)
    log_q, log_p = ((z / temperature).log_softmax(-1)[mask] for z in (student, teacher))
    expected = temperature**2 * F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    (expected_gradient,) = torch.autograd.grad(3 * expected, student)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(gradient, expected_gradient)


def test_kl_by_hand() -> None:
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3.0), 0.0]])
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert kl(student, teacher, None, 1.0).item() == pytest.approx(expected, abs=1e-6)


def test_kl_is_finite_where_logits_are_huge_ruled_out_or_masked() -> None:
    student = torch.tensor([[1e4, -1e4, 0.0], [math.nan, math.inf, 0.0], [0.0, 1.0, -math.inf]], requires_grad=True)
    teacher = torch.tensor([[1e4, -1e4, 5.0], [math.nan, 0.0, 0.0], [2.0, 1.0, -math.inf]])
    value = kl(student, teacher, torch.tensor([True, False, True]), 1.0)
    (gradient,) = torch.autograd.grad(value, student)
    assert value.isfinite() and value > 0
    assert gradient.isfinite().all() and not gradient[1].any()


def test_kl_of_half_precision_is_computed_in_fp32() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 50).bfloat16().requires_grad_(), torch.randn(6, 50).bfloat16()
    value = kl(student, teacher, None, 2.0)
    value.backward()
    assert value.dtype == torch.float32 and student.grad.dtype == torch.bfloat16
    torch.testing.assert_close(value, kl(student.float(), teacher.float(), None, 2.0))


def test_kl_without_a_kept_position_is_zero() -> None:
    student = torch.randn(2, 3, requires_grad=True)
    value = kl(student, torch.randn(2, 3), torch.zeros(2, dtype=torch.bool), 1.0)
    value.backward()
    assert value == 0 and not student.grad.any()


# --- the terms on models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_a_student_like_its_teacher_has_no_loss_and_another_one_has(kind) -> None:
    student, other = pair(kind)
    inputs = inputs_of(kind, padding=3)
    same = Distiller(student, dense_copy(student), logits=1.0, hidden=1.0)
    assert term(same, student.eval(), inputs).item() == pytest.approx(0, abs=1e-6)
    differs = Distiller(student, other, logits=1.0, hidden=1.0)
    term(differs, student, inputs).backward()
    assert all(value > 1e-5 for value in differs.terms.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in student.parameters())


@pytest.mark.parametrize("kind", MODELS)
def test_padding_changes_nothing(kind) -> None:
    student, teacher = pair(kind)
    distiller = Distiller(student.eval(), teacher, logits=1.0, hidden=1.0)
    plain = term(distiller, student, inputs_of(kind))
    terms = distiller.terms
    padded = term(distiller, student, inputs_of(kind, padding=4))
    torch.testing.assert_close(padded, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(distiller.terms, terms, rtol=1e-5, atol=1e-5)


def test_question_answering_compares_positions_of_each_row() -> None:
    student, teacher = pair("qa")
    inputs = inputs_of("qa", padding=2)
    ours = term(Distiller(student.eval(), teacher, logits=0.5, temperature=3.0), student, inputs)
    expected = []
    for name in ("start_logits", "end_logits"):
        s, t = (model(**inputs)[name][:, :LENGTH] / 3.0 for model in (student, teacher.eval()))
        expected.append(9 * F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="batchmean"))
    torch.testing.assert_close(ours, 0.5 * (expected[0] + expected[1]) / 2)


def test_a_row_of_padding_alone_is_no_row() -> None:
    student, teacher = pair("qa")
    inputs = inputs_of("qa")
    distiller = Distiller(student.eval(), teacher, logits=1.0, hidden=1.0)
    without = term(distiller, student, {name: value[1:] for name, value in inputs.items()})
    inputs["attention_mask"][0] = 0
    torch.testing.assert_close(term(distiller, student, inputs), without)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_causal_model_is_compared_where_the_next_token_counts(kind) -> None:
    student, teacher = pair(kind)
    inputs = inputs_of(kind)
    inputs["labels"] = inputs["labels"].clone()
    inputs["labels"][:, :4] = -100  # a prompt
    ours = term(Distiller(student.eval(), teacher, logits=1.0, temperature=1.0), student, inputs)
    s, t = (model(**inputs).logits[:, 3:-1].reshape(-1, VOCAB) for model in (student, teacher.eval()))
    torch.testing.assert_close(ours, F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="batchmean"))
    without = {name: value for name, value in inputs.items() if name != "labels"}
    s, t = (model(**without).logits.reshape(-1, VOCAB) for model in (student, teacher))
    everywhere = term(Distiller(student, teacher, logits=1.0, temperature=1.0), student, without)
    torch.testing.assert_close(everywhere, F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="batchmean"))


def test_hidden_states_are_compared_relative_to_the_teacher() -> None:
    student, teacher = pair("llama")
    inputs = inputs_of("llama", padding=2)
    ours = term(Distiller(student, teacher, hidden=2.0), student, inputs)
    states = [model(**inputs, output_hidden_states=True).hidden_states for model in (student, teacher)]
    errors = [
        ((s - t).square().mean(-1) / t.square().mean(-1))[:, :LENGTH].mean() for s, t in zip(*states, strict=True)
    ]
    assert len(errors) == 3
    torch.testing.assert_close(ours, 2.0 * torch.stack(errors).mean())
    scaled = {"logits": torch.zeros(1), "hidden_states": tuple(10 * state for state in states[0])}
    tenfold = {"hidden_states": tuple(10 * state for state in states[1])}
    torch.testing.assert_close(2.0 * distillation._hidden_term(inputs, scaled, tenfold), ours)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_both_halves_of_an_encoder_decoder_are_compared(kind) -> None:
    student, teacher = pair(kind)
    inputs = inputs_of(kind, padding=2)
    ours = term(Distiller(student.eval(), teacher, hidden=1.0), student, inputs)
    outputs = [model(**inputs, output_hidden_states=True) for model in (student, teacher)]
    errors = []
    for name, length in (("encoder_hidden_states", LENGTH), ("decoder_hidden_states", 6)):
        for s, t in zip(outputs[0][name], outputs[1][name], strict=True):
            errors.append(((s - t).square().mean(-1) / t.square().mean(-1))[:, :length].mean())
    assert len(errors) == 6
    torch.testing.assert_close(ours, torch.stack(errors).mean())


def test_a_regression_head_is_compared_by_its_squared_error() -> None:
    torch.manual_seed(0)
    student, teacher = classifier(num_labels=1), classifier(num_labels=1)
    inputs = {**inputs_of("classifier"), "labels": torch.rand(4)}
    ours = term(Distiller(student.eval(), teacher, logits=1.0), student, inputs)
    torch.testing.assert_close(ours, F.mse_loss(student(**inputs).logits, teacher(**inputs).logits))


def test_labels_that_do_not_exclude_each_other_are_compared_one_by_one() -> None:
    torch.manual_seed(0)
    student, teacher = classifier(), classifier()
    inputs = {**inputs_of("classifier"), "labels": torch.rand(4, 3).round()}
    ours = term(Distiller(student.eval(), teacher, logits=1.0, temperature=1.0), student, inputs)
    p, q = teacher(**inputs).logits.sigmoid(), student(**inputs).logits.sigmoid()
    torch.testing.assert_close(ours, (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean())


# --- the teacher --------------------------------------------------------------------------------------------------


def test_the_teacher_stays_as_it_was_and_draws_no_random_numbers() -> None:
    torch.manual_seed(0)
    student = qa(hidden_dropout_prob=0.3)
    distiller = Distiller(student, dense_copy(student.train()), logits=1.0, hidden=1.0)
    before = {name: value.clone() for name, value in distiller.teacher.state_dict().items()}
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    for _ in range(3):
        student.train()
        outputs = student(**distiller.student_inputs(inputs_of("qa")))
        state = torch.get_rng_state()
        distiller.loss(inputs_of("qa"), outputs).backward()
        assert torch.equal(state, torch.get_rng_state())
        optimizer.step()
    teacher = distiller.teacher
    assert not any(module.training for module in teacher.modules())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    torch.testing.assert_close(dict(teacher.state_dict()), before, rtol=0, atol=0)
    assert not torch.equal(student.state_dict()["qa_outputs.weight"], before["qa_outputs.weight"])


def test_a_teacher_of_another_type_runs_in_its_own_and_under_the_callers_autocast() -> None:
    student, teacher = pair("llama")
    inputs = inputs_of("llama")
    half = Distiller(student, dense_copy(teacher).bfloat16(), logits=1.0, hidden=1.0)
    exact = term(Distiller(student, teacher, logits=1.0, hidden=1.0), student, inputs)
    torch.testing.assert_close(term(half, student, inputs), exact, rtol=0.02, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert term(Distiller(student, dense_copy(student), logits=1.0, hidden=1.0), student, inputs) == 0


def test_the_teacher_makes_no_loss_no_cache_and_no_graph() -> None:
    student, teacher = pair("llama")
    returned = []
    distiller = Distiller(student, teacher, logits=1.0)
    teacher.register_forward_hook(lambda module, args, output: returned.append(output))
    inputs = inputs_of("llama")
    inputs["inputs_embeds"] = student.get_input_embeddings()(inputs.pop("input_ids"))
    term(distiller, student, inputs)
    assert inputs["inputs_embeds"].requires_grad and not returned[0].logits.requires_grad
    assert returned[0].loss is None and returned[0].past_key_values is None


# --- the loss of a step -------------------------------------------------------------------------------------------


def test_shares_of_a_step_add_up_to_the_whole_batch_however_labels_are_spread() -> None:
    student, teacher = pair("llama")
    inputs = inputs_of("llama")
    inputs["labels"] = inputs["labels"].clone()
    inputs["labels"][0, :7] = -100
    distiller = Distiller(student, teacher, logits=1.0)
    whole = term(distiller, student, inputs)
    count = (inputs["labels"][:, 1:] != -100).sum()
    parts = [{name: value[rows] for name, value in inputs.items()} for rows in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(sum(term(distiller, student, part, num_items=count) for part in parts), whole)


class DistillingTrainer(Trainer):
    """The term in a Trainer, as a trainer is to add it; without the task's own loss, to see the term alone."""

    distiller: Distiller

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        asked = self.distiller.student_inputs(inputs)
        _, outputs = super().compute_loss(model, asked, True, num_items_in_batch)
        with self.accelerator.autocast():
            loss = self.distiller.loss(inputs, outputs, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize(
    ("kind", "smoothing"), [("qa", 0.0), ("classifier", 0.0), ("llama", 0.0), ("t5", 0.0), ("llama", 0.1), ("t5", 0.1)]
)
def test_accumulated_steps_equal_a_batch_of_double_size(tmp_path: Path, kind, smoothing) -> None:
    data = inputs_of(kind, rows=8)
    rows = [{name: value[row] for name, value in data.items()} for row in range(8)]
    if smoothing and kind == "t5":  # Trainer takes the labels, of which the model would make these
        rows = [{**row, "decoder_input_ids": row["labels"]} for row in rows]
    steps = []
    for size, accumulation in ((8, 1), (4, 2)):
        student, teacher = pair(kind)
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            optim="sgd",
            learning_rate=1.0,
            lr_scheduler_type="constant",
            label_smoothing_factor=smoothing,
            max_grad_norm=0.0,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            logging_strategy="no",
        )
        trainer = DistillingTrainer(student, arguments, train_dataset=rows)
        trainer.distiller = Distiller(student, teacher, logits=1.0, hidden=0.5, device=arguments.device)
        before = {name: value.clone() for name, value in student.state_dict().items()}
        trainer.train()
        steps.append({name: value - before[name] for name, value in student.state_dict().items()})
    assert max(step.abs().max() for step in steps[0].values()) > 1e-2
    torch.testing.assert_close(steps[1], steps[0], rtol=1e-4, atol=1e-6)


class NoWaiting(TorchDispatchMode):
    """Refuses the operators that wait for a device: a value read by Python, a size that depends on data."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert torch.Tag.data_dependent_output not in func.tags and torch.Tag.dynamic_output_shape not in func.tags
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device() -> None:
    labels = torch.full((2, 3), -100)
    inputs = {"labels": labels, "attention_mask": torch.ones(2, 3, dtype=torch.long)}
    taught = {
        "logits": torch.randn(2, 3, 7),
        "start_logits": torch.randn(2, 3),
        "hidden_states": (torch.ones(2, 3, 4),),
    }
    ours = {**taught, "logits": torch.randn(2, 3, 7, requires_grad=True)}
    ours["start_logits"] = torch.randn(2, 3, requires_grad=True)
    distiller = Distiller(Fixed(ours), Fixed(taught), logits=1.0, hidden=1.0)
    with NoWaiting():
        distiller.loss(inputs, ours, torch.tensor(4)).backward()
    with pytest.raises(AssertionError), NoWaiting():
        torch.ones(1).item()


# --- bad input ----------------------------------------------------------------------------------------------------


class Deaf(nn.Module):
    def forward(self, input_ids: Tensor) -> Tensor:
        return input_ids


@pytest.mark.parametrize(
    ("student", "teacher", "weights", "message"),
    [
        (qa, qa, {"logits": -1.0}, "distill_logits = -1.0"),
        (qa, qa, {"hidden": math.nan}, "distill_hidden = nan"),
        (qa, qa, {}, "nothing to distill"),
        (qa, qa, {"logits": 1.0, "temperature": 0.0}, "distill_temperature = 0.0"),
        (qa, lambda: qa(vocab_size=61), {"logits": 1.0}, "BertForQuestionAnswering has vocab_size 61, .* has 60"),
        (classifier, lambda: classifier(num_labels=4), {"logits": 1.0}, "num_labels 4, .* has 3"),
        (
            lambda: classifier(num_labels=2, id2label={0: "yes", 1: "no"}),
            lambda: classifier(num_labels=2, id2label={0: "no", 1: "yes"}),
            {"logits": 1.0},
            "one order",
        ),
        (qa, lambda: qa(hidden_size=64), {"hidden": 1.0}, "hidden_size 64, .* has 32; set distill_hidden to 0"),
        (qa, lambda: qa(num_hidden_layers=3), {"hidden": 1.0}, "num_hidden_layers 3, .* has 2"),
        (qa, lambda: qa().to("meta"), {"logits": 1.0}, "on meta"),
        (qa, Deaf, {"hidden": 1.0}, "Deaf.forward takes no output_hidden_states"),
    ],
)
def test_what_can_not_work_is_refused_at_once(student, teacher, weights, message) -> None:
    with pytest.raises(GETAError, match=message):
        Distiller(student(), teacher(), **weights)


def test_a_teacher_that_would_train_is_refused() -> None:
    student, teacher = qa(), qa()
    with pytest.raises(GETAError, match=r"would train too"):
        Distiller(student, student, logits=1.0)
    teacher.bert.embeddings = student.bert.embeddings
    with pytest.raises(GETAError, match=r"embeddings\.\w+\.weight is the student's"):
        Distiller(student, teacher, logits=1.0)
    assert all(p.requires_grad for p in student.parameters())


def test_other_sizes_are_no_matter_for_logits_alone() -> None:
    student, teacher = qa(), qa(hidden_size=64, num_hidden_layers=3)
    assert term(Distiller(student, teacher, logits=1.0), student, inputs_of("qa")) > 0


STATES = (torch.ones(2, 3, 4),)


@pytest.mark.parametrize(
    ("ours", "theirs", "weights", "message"),
    [
        ((torch.ones(2, 3),), {}, {"logits": 1.0}, "the student returns tuple"),
        ({"logits": torch.ones(2, 3)}, (1,), {"logits": 1.0}, "the teacher returns tuple"),
        ({"pooled": torch.ones(2)}, {}, {"logits": 1.0}, r"returns \['pooled'\], none of logits"),
        ({"logits": torch.ones(2, 3)}, {"pooled": 1}, {"logits": 1.0}, "the teacher returns no logits"),
        (
            {"logits": torch.ones(2, 3)},
            {"logits": torch.ones(2, 4)},
            {"logits": 1.0},
            r"\(2, 3\), the teacher's \(2, 4",
        ),
        ({"logits": torch.ones(2, 3, 4, 4)}, {"logits": torch.ones(2, 3, 4, 4)}, {"logits": 1.0}, "neither"),
        ({"logits": 1}, {"logits": 1}, {"hidden": 1.0}, "none of hidden_states"),
        ({"hidden_states": STATES}, {"logits": 1}, {"hidden": 1.0}, "the teacher returns no hidden_states"),
        ({"hidden_states": STATES}, {"hidden_states": STATES * 2}, {"hidden": 1.0}, "are 1 up to .* 2 up to"),
    ],
)
def test_outputs_that_can_not_be_compared_are_refused(ours, theirs, weights, message) -> None:
    distiller = Distiller(Fixed(ours), Fixed(theirs), **weights)
    with pytest.raises(GETAError, match=message):
        distiller.loss({}, ours)


def test_a_count_of_labels_without_labels_is_refused() -> None:
    student, teacher = pair("qa")
    with pytest.raises(GETAError, match="the inputs hold none"):
        term(Distiller(student, teacher, logits=1.0), student, inputs_of("qa"), num_items=8)
