"""What an export would refuse is refused when the trainer is made; what holds no computation is no obstacle."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from transformers import BertConfig, BertForQuestionAnswering, LlamaConfig, LlamaForSequenceClassification

from geta_hf import GETAConfig, GETATrainer
from geta_hf.errors import GETAError
from geta_hf.export.export import export
from geta_hf.recipes.cifar_models import CifarResNetConfig, CifarResNetForImageClassification
from tests.conftest import tiny_bert_config
from tests.tiny_tasks import byte_tokenizer
from tests.training.test_trainer import SMALL, arguments, rows

Change = Callable[[BertForQuestionAnswering], Any]


def make(folder: Path, model: Any, **changes: Any) -> GETATrainer:
    return GETATrainer(model, arguments(folder, **changes), geta_config=GETAConfig(**SMALL), train_dataset=rows())


class Sign(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 1.0


def dense(model: BertForQuestionAnswering) -> nn.Linear:
    return model.bert.encoder.layer[0].intermediate.dense


def filled(name: str, value: float) -> Change:
    return lambda model: model.get_parameter(name).data.view(-1)[3:4].fill_(value)


DENSE = "bert.encoder.layer.0.intermediate.dense"
REFUSED: dict[str, tuple[Change, str]] = {
    "a hook": (
        lambda model: model.register_forward_hook(lambda module, args, output: output[:1]),
        "the forward hook .*<lambda> on the BertForQuestionAnswering",
    ),
    "a head by hand": (lambda model: setattr(model, "qa_outputs", nn.Linear(32, 3)), "num_labels=3"),
    "weight norm": (
        lambda model: parametrizations.weight_norm(dense(model)),
        rf"{DENSE}.weight is computed by _WeightNorm.*remove_parametrizations\(model.get_submodule.*'weight'\)",
    ),
    "old spectral norm": (
        lambda model: torch.nn.utils.spectral_norm(dense(model)),
        rf"{DENSE}.weight is computed by spectral_norm.*remove_spectral_norm\(model.get_submodule.*'weight'\)",
    ),
    "masks": (
        lambda model: prune.random_unstructured(dense(model), "weight", 0.5),
        rf"{DENSE}.weight is computed by torch.nn.utils.prune.*prune.remove\(model.get_submodule.*'weight'\)",
    ),
    "a parametrization": (
        lambda model: parametrize.register_parametrization(dense(model), "weight", Sign()),
        f"{DENSE}.weight is computed by Sign",
    ),
    "NaN": (filled("qa_outputs.weight", float("nan")), "qa_outputs.weight holds nan before training"),
    "infinity": (filled(f"{DENSE}.bias", float("-inf")), f"{DENSE}.bias holds inf before training"),
    "an infinite weight": (filled(f"{DENSE}.weight", float("inf")), rf"{DENSE}.weight holds inf before training"),
    "subnormal": (
        lambda model: dense(model).weight.data.mul_(1e-39),
        rf"{DENSE}.weight: max\|W\| is .*scale it up.*exclude the layer",
    ),
    "double precision": (lambda model: model.double(), r"word_embeddings.weight is torch.float64.*model.float\(\)"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_an_export_would_refuse_is_refused_before_training(tmp_path: Path, kind: str) -> None:
    model = BertForQuestionAnswering(tiny_bert_config(num_hidden_layers=1))
    change, message = REFUSED[kind]
    change(model)
    with pytest.raises(GETAError, match=f"(?s){message}"):
        make(tmp_path, model)


def test_infinity_in_a_buffer_is_a_mask(tmp_path: Path) -> None:
    model = BertForQuestionAnswering(tiny_bert_config(num_hidden_layers=1))
    model.register_buffer("mask", torch.full((2, 2), float("-inf")), persistent=False)
    make(tmp_path, model)
    model = BertForQuestionAnswering(tiny_bert_config(num_hidden_layers=1))
    model.register_buffer("mean", torch.full((2,), float("nan")))
    with pytest.raises(GETAError, match="mean holds nan"):
        make(tmp_path, model)


def test_the_padding_token_of_the_tokenizer_holds_before_training(tmp_path: Path) -> None:
    """Trainer gives it to the config only when training starts; without one, no batch of two rows can be run."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForSequenceClassification(LlamaConfig(vocab_size=257, **sizes))
    data = [{"input_ids": torch.arange(4, 12), "labels": place % 2} for place in range(32)]
    tokenizer = byte_tokenizer(bos_token="<s>", pad_token="<s>")
    config = GETAConfig(**SMALL)
    made = GETATrainer(model, arguments(tmp_path), geta_config=config, train_dataset=data, processing_class=tokenizer)
    assert made.model.config.pad_token_id == tokenizer.pad_token_id


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8)])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("bert-base", "model is the string 'bert-base'.*from_pretrained"),
        (3, "model is a int"),
        (Plain(), "Plain is none: derive it from PreTrainedModel.*build_space and QASSO"),
    ],
)
def test_what_is_no_transformers_model(tmp_path: Path, model: Any, message: str) -> None:
    with pytest.raises(GETAError, match=message):
        make(tmp_path, model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": 0}, "max_steps = 0 trains no step"),
        ({"max_steps": -1, "num_train_epochs": 0}, "num_train_epochs = 0 trains no step"),
        ({"max_steps": -1, "num_train_epochs": -2.0}, "num_train_epochs = -2.0 trains no step"),
    ],
)
def test_a_training_without_a_step(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GETAError, match=message):
        make(tmp_path, BertForQuestionAnswering(tiny_bert_config(num_hidden_layers=1)), **changes)


class Caches(BertForQuestionAnswering):
    """Holds a lock and an activation of the last step, of neither of which a copy can be made."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.lock = threading.Lock()

    @wraps(BertForQuestionAnswering.forward)  # Trainer keeps the columns that a forward names
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self.lock:
            output = super().forward(*args, **kwargs)
        if self.training:
            self.bert.last = [output.start_logits]
        return output


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GETATrainer]:
    """One run with everything that was once in the way of its export."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    model = Caches(tiny_bert_config(num_hidden_layers=1))
    model.log = (folder / "log").open("w")
    model.places = (place for place in range(3))
    model.bert.random = torch.Generator()
    own = GETAConfig(**SMALL, distill_logits=0.1)
    options = arguments(folder, bf16_full_eval=True, save_strategy="no")
    made = GETATrainer(model, options, geta_config=own, train_dataset=rows(), eval_dataset=rows(8))
    made.train()
    yield made
    model.log.close()


def test_attributes_that_no_copy_can_be_made_of(trained: GETATrainer, tmp_path: Path) -> None:
    assert trained.model.bert.last[0].grad_fn is not None  # it does hold what deepcopy refuses
    report = trained.export_model(tmp_path / "small")
    assert report is not None and report.bits


def test_an_evaluation_in_sixteen_bits_changes_nothing(trained: GETATrainer, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in trained.model.state_dict().items()}
    seen = []
    handle = trained.model.qa_outputs.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    trained.evaluate()
    trained.predict(rows(8))
    handle.remove()
    assert set(seen) == {torch.bfloat16}  # they did run in 16 bits
    for name, tensor in trained.model.state_dict().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]), name
    trained.export_model(tmp_path / "small")
    assert json.loads((tmp_path / "small" / "config.json").read_text())["dtype"] == "float32"


def test_a_hook_added_after_training(trained: GETATrainer, tmp_path: Path) -> None:
    handle = trained.model.qa_outputs.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(GETAError, match=r"forward hook .* on qa_outputs\. Remove it"):
        trained.export_model(tmp_path / "small")
    with pytest.raises(GETAError, match=r"forward hook .* on qa_outputs\. Remove it"):
        export(trained.model, tmp_path / "small", space=trained.space, batch=trained._batch)
    assert not (tmp_path / "small").exists()
    handle.remove()
    assert trained.export_model(tmp_path / "small") is not None


def test_another_type_at_the_export_is_said(
    trained: GETATrainer, tmp_path: Path, caplog: Any, monkeypatch: Any
) -> None:
    """The last test of the run, whose weights it rounds."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("geta_hf"), "propagate", True)
    trained.export_model(tmp_path / "small")
    assert "another dtype" not in caplog.text
    trained.model.to(torch.bfloat16)
    trained.export_model(tmp_path / "half")
    assert "parameters have another dtype than when training ended, such as bert.embeddings" in caplog.text
    assert "torch.bfloat16, trained in torch.float32" in caplog.text


def convolutional(folder: Path, momentum: float, **changes: Any) -> GETATrainer:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"depths": [1], "hidden_sizes": [8], "embedding_size": 8}
    model = CifarResNetForImageClassification(CifarResNetConfig(num_labels=2, **sizes))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
    images = [{"pixel_values": torch.randn(3, 8, 8), "labels": row % 2} for row in range(8)]
    values = arguments(folder, **changes)
    return GETATrainer(model, values, geta_config=GETAConfig(**SMALL), train_dataset=images)  # type: ignore[arg-type]


def test_batch_norm_needs_more_than_one_row(tmp_path: Path) -> None:
    with pytest.raises(GETAError, match=r"batch norm \(\S+\) needs batches of 2 rows or more, and per_device"):
        convolutional(tmp_path, 0.1, per_device_train_batch_size=1)


def test_statistics_of_the_last_batch_alone_are_warned_of(tmp_path: Path, caplog: Any, monkeypatch: Any) -> None:
    """MobileNetV2 of transformers has TensorFlow's momentum."""
    monkeypatch.setattr(logging.getLogger("geta_hf"), "propagate", True)
    convolutional(tmp_path, 0.1)
    assert "momentum" not in caplog.text
    convolutional(tmp_path, 0.997)
    assert caplog.text.count("has momentum 0.997") == 1
    assert "--batch_norm_momentum 0.1" in caplog.text
