"""Whole experts removed: chosen by what they add, and proved against a router that never chooses them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainingArguments

from geta_hf import GETAConfig, GETATrainer
from geta_hf.costs.model_costs import measure_costs
from geta_hf.errors import GETAError
from geta_hf.quantization.experts import restack_experts, stacked_experts, unstack_experts, unstacked_experts
from geta_hf.surgery.drop_experts import drop_experts, expert_scores
from tests.quantization.test_experts import made

NUMBERS = {
    "mixtral": "num_local_experts",
    "qwen2_moe": "num_experts",
    "qwen3_moe": "num_experts",
    "gpt_oss": "num_local_experts",
    "olmoe": "num_experts",
}
SMALL = {"warmup": 2, "projection": 4, "joint": 6, "projection_periods": 2, "pruning_periods": 3}


def apart(name: str) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    model, batch = made(name)
    unstack_experts(model)
    return model, batch


@torch.no_grad()
def logits(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    return model.eval()(**batch).logits


@pytest.mark.parametrize("name", NUMBERS)
def test_fewer_experts_are_an_ordinary_smaller_model(tmp_path: Path, name: str) -> None:
    model, batch = apart(name)
    number = model.config.num_experts_per_tok
    dropped = drop_experts(model, 4 - number, batch, [batch])
    assert len(dropped.removed) == 2 * (4 - number) and getattr(model.config, NUMBERS[name]) == number
    assert all(len(module.experts) == number for module in unstacked_experts(model).values())
    restack_experts(model)
    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(len(m.down_proj) == number for m in stacked_experts(plain).values())
    assert torch.allclose(logits(plain, batch), logits(model, batch), atol=1e-5)
    # With as many experts as each token goes to, the choice is no choice, and costs are those of the dense model.
    dense, _ = made(name)
    layers = measure_costs(model, tokens=8)
    router = 2 * 8 * (4 - number) * model.config.hidden_size
    assert layers.macs == measure_costs(dense, tokens=8).macs - router


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_what_an_expert_adds_is_counted_token_by_token(name: str) -> None:
    """Against the definition, on what the router gave: Σ router weight · norm of the expert's output."""
    model, padded = apart(name)
    batch = {"input_ids": padded["input_ids"]}
    path, module = next(iter(unstacked_experts(model).items()))
    seen: list[tuple[Tensor, ...]] = []
    hook = module.register_forward_pre_hook(lambda _, args: seen.append(args))
    logits(model, batch)
    hook.remove()
    hidden, chosen, weights = seen[0]
    expected, counts = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for token in range(len(hidden)):
        for place, weight in zip(chosen[token].tolist(), weights[token].tolist(), strict=True):
            expert = module.experts[place]
            inner = module._apply_gate(expert["up"](hidden[token]))
            expected[place] += abs(weight) * float(expert["down"](inner).detach().norm())
            counts[place] += 1
    scores, tokens = expert_scores(model, [batch])
    assert torch.allclose(scores[path], expected, rtol=1e-5) and torch.equal(tokens[path], counts)
    assert torch.equal(expert_scores(model, [batch], "tokens")[0][path], counts)
    # Padding does not count.
    half = {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}
    half["attention_mask"][1:] = 0
    assert expert_scores(model, [half], "tokens")[0][path].sum() == 2 * half["attention_mask"].sum()
    sizes = expert_scores(model, [batch], "magnitude")[0][path]
    squares = [sum(float(p.detach().square().sum()) for p in expert.parameters()) for expert in module.experts]
    assert torch.allclose(sizes**2, torch.tensor(squares, dtype=torch.float64), rtol=1e-5)


def test_the_experts_of_the_least_score_leave() -> None:
    model, batch = apart("qwen3_moe")
    scores, _ = expert_scores(model, [batch])
    dropped = drop_experts(model, 1, batch, [batch])
    for path, values in scores.items():
        assert dropped.kept[path] == tuple(place for place in range(4) if place != int(values.argmin()))
    assert "2 of 8" in str(dropped) and dropped.removed[0] in str(dropped)
    dropped.restore()
    assert model.config.num_experts == 4
    assert torch.equal(logits(model, batch), logits(apart("qwen3_moe")[0], batch))


def test_experts_without_a_token_are_named() -> None:
    model, batch = apart("mixtral")
    single = {"input_ids": batch["input_ids"][:1, :1]}
    dropped = drop_experts(model, 2, single, [single])
    assert set(dropped.removed) == set(dropped.unreached) and len(dropped.unreached) == 4
    assert f"no token of the calibration data reached {dropped.unreached[0]}" in str(dropped)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (3, "leaves 1 of 4 experts, but each token goes to 2 of them; remove at most 2"),
        (4, "removes all 4 experts"),
        (["model.layers.0.mlp.experts.1"], "leaves 3 in model.layers.0.mlp.experts, 4 in .* remove equally many"),
        (
            ["model.layers.0.mlp.experts.9"],
            "'model.layers.0.mlp.experts.9', which is no expert; there are model.layers",
        ),
    ],
)
def test_what_can_not_be_is_said_and_changes_nothing(wanted: int | list[str], message: str) -> None:
    model, batch = apart("mixtral")
    before = logits(model, batch)
    with pytest.raises(GETAError, match=message):
        drop_experts(model, wanted, batch, [batch])
    assert torch.equal(logits(model, batch), before) and model.config.num_local_experts == 4


def test_a_model_without_experts_is_refused() -> None:
    with pytest.raises(GETAError, match="drop_experts needs a mixture, whose experts Linear lacks; set it to 0"):
        drop_experts(nn.Linear(2, 2), 1, {})
    model, batch = made("mixtral")
    with pytest.raises(GETAError, match="take them apart by unstack_experts first"):
        drop_experts(model, 1, batch)


def test_a_run_drops_experts_first_and_names_them(tmp_path: Path) -> None:
    def trainer(wanted: int | list[str]) -> GETATrainer:
        model, _ = made("mixtral")
        tokens = torch.randint(4, 60, (32, 10), generator=torch.Generator().manual_seed(0))
        arguments = TrainingArguments(
            str(tmp_path / "run"), max_steps=14, save_steps=9, use_cpu=True, report_to=[], disable_tqdm=True
        )
        config = GETAConfig(target_sparsity=0.3, drop_experts=wanted, **SMALL)
        return GETATrainer(
            model, arguments, geta_config=config, train_dataset=[{"input_ids": row, "labels": row} for row in tokens]
        )

    run = trainer(1)
    assert run.geta_config.drop_experts == 1 and len(run.run_config.drop_experts) == 2
    run.train()
    report = run.export_model(tmp_path / "small")
    assert sum(".experts." in layer for layer in report.bits) == 2 * 3 * 2
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert small.config.num_local_experts == 3
    ids = torch.arange(4, 24)[None]
    assert torch.allclose(logits(small, {"input_ids": ids}), logits(run.model, {"input_ids": ids}), atol=1e-5)
    assert GETAConfig.load(tmp_path / "small" / "geta_config.json").drop_experts == run.run_config.drop_experts
    # The same experts leave when the run goes on.
    resumed = trainer(1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-9"))
    assert torch.equal(logits(resumed.model, {"input_ids": ids}), logits(run.model, {"input_ids": ids}))
