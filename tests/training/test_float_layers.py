"""Layers whose weight the model reads itself are left float, from before the first step to the reloaded folder."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput

from geta_hf import GETAConfig, GETAError, GETATrainer, attach_quantizers, export, prepare_for_inference
from geta_hf.serialization.packed_layers import packed_layers
from geta_hf.training.float_layers import (
    check_first_gradients,
    exclude_layers,
    exclude_raw_reads,
    left_float,
    name_patterns,
)

RAW = ("layers.*.attention.out_proj", "layers.*.encoder.self_attn.out_proj", "layers.*.encoder.linear1")


class RawConfig(PreTrainedConfig):
    model_type = "reads-raw"


class Block(nn.Module):
    """Reads weights in three ways: attention always, the encoder's fast path in evaluation, `router` in training."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
        self.router = nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x + self.attention(x, x, x, need_weights=False)[0])
        x = x + (F.linear(x, self.router.weight, self.router.bias) if self.training else self.router(x))
        return x + self.down(self.up(x).relu_())


class ReadsRaw(PreTrainedModel):
    config_class = RawConfig

    def __init__(self, config: RawConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(50, 16)
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(16, 2)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.3)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **_: Any) -> SequenceClassifierOutput:
        x = self.embeddings(input_ids)
        for layer in self.layers:
            x = layer(x)
        logits = self.head(x.mean(1))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def make_trainer(folder: Path, **config: Any) -> GETATrainer:
    torch.manual_seed(0)
    rows = [{"input_ids": torch.arange(6) * (i + 1) % 50, "labels": i % 2} for i in range(16)]
    args = TrainingArguments(
        str(folder), max_steps=8, report_to=[], save_strategy="no", disable_tqdm=True, learning_rate=1e-2, use_cpu=True
    )
    stages = {"warmup": 1, "projection": 2, "joint": 3, "projection_periods": 2, "pruning_periods": 2}
    return GETATrainer(ReadsRaw(RawConfig()), args, geta_config=GETAConfig(**stages, **config), train_dataset=rows)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("raw")
    warned: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warned.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("geta_hf.training.float_layers")
    logger.addHandler(handler)
    trainer = make_trainer(folder, exclude=["head"], include=["layers", "head"])
    logger.removeHandler(handler)
    trainer.train()
    trainer.save_model(str(folder / "checkpoint-8"))
    report = trainer.export_model(folder / "small")
    return SimpleNamespace(trainer=trainer, folder=folder, report=report, warned=warned)


def test_they_have_no_quantizer_and_the_plan_and_a_warning_name_them(run: SimpleNamespace) -> None:
    assert run.trainer.plan.left_float == (*RAW, "layers.*.encoder.linear2", "layers.*.router")
    for name in RAW:
        assert name in run.warned[0]
        assert name in str(run.trainer.plan)
    assert run.trainer.geta_config.exclude == ["head"]
    assert set(run.report.bits) == {f"layers.{i}.{leaf}" for i in (0, 1) for leaf in ("up", "down")}


def test_the_folder_evaluates_as_the_trained_model(run: SimpleNamespace) -> None:
    ids = torch.arange(12).view(2, 6)
    small = ReadsRaw.from_pretrained(run.folder / "small").eval()
    assert set(packed_layers(small)) == set(run.report.bits)
    with torch.no_grad():
        trained = run.trainer.model.eval()(ids).logits
        assert torch.allclose(small(ids).logits, trained, atol=1e-5)
        prepare_for_inference(small, "int8", {"input_ids": ids})
        assert torch.allclose(small(ids).logits, trained, atol=0.1)
    # The folder names them, so that whoever reads it quantizes the same layers again.
    assert r"^layers\.\d+\.router$" in GETAConfig.load(run.folder / "small" / "geta_config.json").exclude


def test_nothing_to_quantize_remains(tmp_path: Path) -> None:
    with pytest.raises(GETAError, match="no layer to quantize"):
        make_trainer(tmp_path, include=["router", "out_proj"])


class Router(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).softmax(-1)


def test_layers_with_a_forward_of_their_own_are_left_float_unless_they_are_named() -> None:
    layers = {"h.0.router": Router(4, 4), "h.0.up": nn.Linear(4, 4), "h.1.router": Router(4, 4)}
    model = nn.ModuleList(layers.values())
    config = GETAConfig()
    assert left_float(config, exclude_raw_reads(config, model, layers, {})) == ("h.*.router",)
    routers = {name: layer for name, layer in layers.items() if isinstance(layer, Router)}
    with pytest.raises(GETAError, match=r"no layer to quantize: in each of 2, such as h.0.router \(Router\)"):
        exclude_raw_reads(config, model, routers, {})
    config = GETAConfig(include=["router", "up"])
    assert exclude_raw_reads(config, model, layers, {}) is config  # attaching refuses them with a reason


def test_an_export_without_the_trainer_names_the_layer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ReadsRaw(RawConfig())
    attach_quantizers(model, initial_bits=4)
    with pytest.raises(GETAError, match=r"reads the weight of layers\.0\.attention\.out_proj itself.*`exclude`"):
        export(model, tmp_path / "small", batch={"input_ids": torch.arange(12).view(2, 6)})
    assert not (tmp_path / "small").exists()


def test_a_kernel_that_no_operator_shows_is_found_after_the_first_backward() -> None:
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    attach_quantizers(model, include=["0", "1"])
    model[0](torch.ones(1, 4)).sum().backward()
    check_first_gradients(model)  # 1 was not reached at all, as an expert without tokens
    model[1].weight.sum().backward()
    with pytest.raises(GETAError, match=r"^1\.weight has a gradient, but its quantizer has none.*\^1\$"):
        check_first_gradients(model)


def test_patterns_match_what_was_found_and_no_more() -> None:
    names = ["h.0.a", "h.0.b", "h.1.a", "h.1.b", "h.10.b", "ends.1", "ends.2"]
    found = ["h.0.a", "h.1.a", "h.1.b", "ends.2"]
    patterns = name_patterns(found, names)
    assert [name for name in names if any(re.search(pattern, name) for pattern in patterns)] == sorted(
        found, key=names.index
    )
    assert patterns[0] == r"^h\.\d+\.a$" and len(patterns) == 3
    config = GETAConfig(exclude=["z"])
    assert exclude_layers(config, [], names) is config
    assert left_float(config, exclude_layers(config, found, names)) == ("h.*.a", "h.1.b", "ends.2")
