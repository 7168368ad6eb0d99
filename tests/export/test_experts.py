"""Mixtures of experts from training to a folder: each expert has its own widths and loses its own channels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainingArguments

from geta_hf import GETAConfig, GETATrainer, OneShotConfig, compress
from geta_hf.convert import convert
from geta_hf.errors import GETAError
from geta_hf.quantization.experts import stacked_experts, unstacked_experts
from geta_hf.reporting.comparison import load_model
from tests.quantization.test_experts import made

SMALL = {"warmup": 2, "projection": 4, "joint": 6, "projection_periods": 2, "pruning_periods": 3}
STEPS = 14


def rows(model: PreTrainedModel) -> list[dict[str, torch.Tensor]]:
    tokens = torch.randint(4, model.config.vocab_size, (32, 10), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in tokens]


def trainer(name: str, folder: Path, **settings: object) -> GETATrainer:
    model, _ = made(name)
    config = GETAConfig(target_sparsity=0.3, **{**SMALL, **settings})
    arguments = TrainingArguments(
        str(folder), max_steps=STEPS, save_steps=9, use_cpu=True, report_to=[], disable_tqdm=True, learning_rate=1e-3
    )
    return GETATrainer(model, arguments, geta_config=config, train_dataset=rows(model))


@torch.no_grad()
def logits(model: PreTrainedModel, data: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    return model.eval()(input_ids=torch.stack([row["input_ids"] for row in data[:4]])).logits


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("qwen2_moe", "qwen3_moe")]


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", *SLOW])
def test_a_trained_mixture_is_exported_and_read_again(tmp_path: Path, name: str) -> None:
    run = trainer(name, tmp_path / "run")
    data = rows(run.model)
    run.train()
    report = run.export_model(tmp_path / "small")
    experts = [layer for layer in report.bits if ".experts." in layer]
    assert len(experts) == 2 * 4 * 2
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    expected = logits(run.model, data)
    assert torch.allclose(logits(reloaded, data), expected, atol=1e-5)
    kept = {tuple(module.experts[0]["down"].weight.shape) for module in unstacked_experts(reloaded).values()}
    assert len(kept) >= 1 and all(
        module.experts[place]["down"].in_features == report.kept[f"{path}.{place}:channels"][0]
        for path, module in unstacked_experts(reloaded).items()
        for place in range(4)
    )
    reloaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again, data), logits(reloaded, data))
    # Experts of different sizes fit into no tensor of an ordinary model.
    with pytest.raises(GETAError, match="uniform=True"):
        convert(tmp_path / "run" / f"checkpoint-{STEPS}", tmp_path / "plain", format="vanilla")
    # The last checkpoint holds the same model.
    convert(tmp_path / "run" / f"checkpoint-{STEPS}", tmp_path / "converted")
    assert torch.allclose(logits(load_model(tmp_path / "converted"), data), expected, atol=1e-5)


def test_a_run_goes_on_and_an_even_one_becomes_an_ordinary_model(tmp_path: Path) -> None:
    whole = trainer("mixtral", tmp_path / "run", uniform=True)
    whole.train()
    resumed = trainer("mixtral", tmp_path / "run", uniform=True)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-9"))
    data = rows(whole.model)
    assert torch.equal(logits(resumed.model, data), logits(whole.model, data))
    convert(tmp_path / "run" / f"checkpoint-{STEPS}", tmp_path / "plain", format="vanilla")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert stacked_experts(plain) and not unstacked_experts(plain)
    assert torch.allclose(logits(plain, data), logits(whole.model, data), atol=1e-5)


def test_experts_that_no_token_reaches_are_kept_and_named(tmp_path: Path) -> None:
    """One token repeated reaches two experts of each layer."""
    model, _ = made("mixtral")
    batches = [{"input_ids": torch.full((2, 8), 7), "labels": torch.full((2, 8), 7)} for _ in range(8)]
    reached = {name: set() for name in stacked_experts(model)}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: reached[name].update(args[1].flatten().tolist()))
        for name, module in stacked_experts(model).items()
    ]
    model(**batches[0])
    for hook in hooks:
        hook.remove()
    config = OneShotConfig(target_bytes=1, bits=(3, 8))
    report = compress(model, batches, out=tmp_path / "small", target_bytes="45%", config=config, progress=False)
    missed = {f"{name}.{place}" for name, found in reached.items() for place in set(range(4)) - found}
    assert missed and {layer.rpartition(".")[0] for layer in report.outcome.unreached} == missed
    assert all(f"{place}.up" in str(report) for place in missed)
    for place in missed:
        kept, before = report.export.kept[f"{place}:channels"]
        assert kept == before
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    ids = torch.arange(4, 20)[None]
    assert torch.allclose(reloaded(ids).logits, model(ids).logits, atol=1e-5)


def test_several_sizes_leave_a_mixture_as_it_was(tmp_path: Path) -> None:
    """With an expert of each layer removed first; sizes are shares of the model that had it."""
    model, batch = made("qwen3_moe")
    expected = model(**batch).logits
    batches = [{"input_ids": row["input_ids"][None]} for row in rows(model)]
    dense = sum(parameter.nbytes for parameter in model.parameters())
    config = OneShotConfig(target_bytes=1, drop_experts=1)
    reports = compress(model, batches, out=tmp_path / "small", targets=["60%", "40%"], config=config, progress=False)
    assert stacked_experts(model) and torch.equal(model(**batch).logits, expected)
    assert model.config.num_experts == 4
    for report, share in zip(reports, (0.6, 0.4), strict=True):
        again = AutoModelForCausalLM.from_pretrained(report.path)
        assert again.config.num_experts == 3 and len(report.dropped_experts) == 2
        assert all(len(module.experts) == 3 for module in unstacked_experts(again).values())
        assert f"experts removed: {report.dropped_experts[0]}" in str(report)
        assert dense < report.dense_bytes < 1.3 * dense
        assert report.export.file_bytes <= share * report.dense_bytes
        assert report.dense_parameters == sum(parameter.numel() for parameter in model.parameters())
