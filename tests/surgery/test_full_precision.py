"""Proofs run in full precision, and draw what they draw from the model's generators, whatever the process has set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
)

from geta_hf import attach_quantizers, export
from geta_hf.qadg.tracing.record_forward import record_forward
from geta_hf.surgery.compare_outputs import attention_outputs
from geta_hf.surgery.other_paths import other_paths, path_outputs
from geta_hf.surgery.rebuild import check_rebuilds
from geta_hf.surgery.trial_cut import try_cuts
from tests.imitated_tf32 import ImitatedTF32
from tests.spaces import build_space

_Case = tuple[PreTrainedModel, dict[str, torch.Tensor]]


def _bert() -> _Case:
    """Return a model of large weights: at those of a new one nothing is as large as the tolerance."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
    config = BertConfig(vocab_size=60, max_position_embeddings=40, initializer_range=0.3, **sizes)
    return BertForSequenceClassification(config), {"input_ids": torch.arange(18).view(2, 9)}


def _llama() -> _Case:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    config = LlamaConfig(vocab_size=60, num_key_value_heads=2, initializer_range=0.3, **sizes)
    return LlamaForCausalLM(config), {"input_ids": torch.arange(18).view(2, 9)}


def _resnet() -> _Case:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[32, 32], depths=[2, 2], layer_type="basic", num_labels=3)
    model = ResNetForImageClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=2 * parameter[0].numel() ** -0.5)
    return model, {"pixel_values": torch.randn(2, 3, 32, 32)}


@pytest.fixture
def _tf32() -> Iterator[None]:
    torch.backends.fp32_precision = "tf32"
    yield
    torch.backends.fp32_precision = "none"


@pytest.mark.parametrize("case", [_bert, _llama])
@pytest.mark.usefixtures("_tf32")
def test_a_trial_cut_loses_no_family_to_tf32(case: Callable[[], _Case]) -> None:
    check_cuts_under_tf32(case)


def check_cuts_under_tf32(case: Callable[[], _Case]) -> None:
    """Check that a trial cut rounds nothing and loses no family, while what the user runs is rounded as it was set."""
    torch.manual_seed(0)
    model, batch = case()
    space = build_space(model, batch)
    with ImitatedTF32() as mode:
        assert try_cuts(model, space, batch) is space
        assert mode.rounded == 0
        with torch.no_grad():
            model(**batch)
        assert mode.rounded > 0


def test_convolutions_which_cudnn_runs_in_tf32_by_itself_are_compared_without() -> None:
    check_cuts_under_tf32(_resnet)


def test_autocast_around_a_proof_does_not_round_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, batch = _llama()
    attach_quantizers(model, initial_bits=8)
    expected = attention_outputs(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        found = attention_outputs(model, batch)
        report = export(model, tmp_path / "small", batch=batch)
    assert all(torch.equal(found[kind][name], each) for kind in expected for name, each in expected[kind].items())
    assert report.difference < 1e-5


def test_autocast_around_the_comparison_with_a_rebuilt_model_hides_no_difference() -> None:
    torch.manual_seed(0)
    model, batch = _bert()
    seen: list[Any] = []
    model.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", torch.bfloat16):
        check_rebuilds(model, batch)
    assert seen
    assert not any(seen)


def test_no_device_that_the_model_is_not_on_is_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.manual_seed` seeds all GPUs, those that are initialized later too."""
    torch.manual_seed(0)
    model, batch = _bert()
    state = torch.get_rng_state()
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    attention_outputs(model, batch)
    path_outputs(model, other_paths(model, batch)[0])
    check_rebuilds(model, batch)
    record_forward(model, batch)
    assert seeded == []
    assert torch.equal(torch.get_rng_state(), state)
