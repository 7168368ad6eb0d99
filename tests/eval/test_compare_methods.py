"""Methods of the comparison against their formulas, and that each stays within its budget."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eval.compare.job import Budget, Job, batches_of, bytes_after, bytes_for, read_budget
from eval.compare.method import Method, load_methods, missing_packages
from eval.compare.methods import lora_prune, slicegpt
from eval.compare.methods import torch_pruning as adapter
from eval.compare.shared import pruned_model, remaining_elements
from geta_hf.errors import GETAError
from geta_hf.methods import OneShotConfig, OneShotMethod
from geta_hf.methods.one_shot import Calibration
from geta_hf.training.plan import make_ledger
from geta_hf.training.preparation import empty_copy
from tests.spaces import build_space
from tests.tiny_tasks import tiny_llama

METHODS = load_methods()


@pytest.fixture(scope="module")
def job() -> Job:
    torch.manual_seed(0)
    weights = tiny_llama().state_dict()

    def load() -> PreTrainedModel:
        model = tiny_llama()
        model.load_state_dict(weights)
        return model.eval()

    model = load()
    blocks = torch.randint(0, 257, (16, 12), generator=torch.Generator().manual_seed(1))
    space = build_space(model, {"input_ids": blocks[:2]})
    empty = empty_copy(model)
    OneShotMethod(OneShotConfig(target_bytes=1)).attach(empty, None)
    ledger = make_ledger(empty, space)
    used = batches_of(blocks[:6])
    data = Calibration(used, used, batches_of(blocks[6:8]))
    return Job(load, space, ledger, Budget("B=5", bytes_for(ledger, 5.0)), data, blocks[8:], rows=2)


def test_lora_prune_estimates_gradients_from_low_rank_ones() -> None:
    torch.manual_seed(0)
    w, a, b = torch.randn(3, 4), torch.randn(2, 4), torch.randn(3, 2)
    ga, gb = torch.randn(2, 4), torch.randn(3, 2)
    found = lora_prune.importance(w, a, b, ga, gb)
    for i in range(3):
        for j in range(4):
            gradient = sum(float(gb[i, r] * a[r, j] + b[i, r] * ga[r, j] - gb[i, r] * ga[r, j]) for r in range(2))
            value = float(w[i, j]) + sum(float(b[i, r] * a[r, j]) for r in range(2))
            assert float(found[i, j]) == pytest.approx((gradient * value) ** 2, rel=1e-4)


def test_lora_prune_removes_in_the_first_half(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []

    def watched(own: Job, removed: Tensor) -> dict[str, Tensor]:
        counts.append(int(removed.sum()))
        return remaining_elements(own, removed)

    monkeypatch.setattr(lora_prune, "remaining_elements", watched)
    METHODS["LoRAPrune + GPTQ"].run(replace(job, budget=Budget("B=3.5", bytes_for(job.ledger, 3.5)), steps=6))
    assert counts == sorted(counts) and 0 < counts[0] < counts[2] == counts[5]


def sliced_logits(model: PreTrainedModel, bases: list[Tensor], kept: int, ids: Tensor) -> Tensor:
    """The network that SliceGPT's paper describes, with matrices of k rows or columns."""
    model = copy.deepcopy(model)
    config = model.config
    h = model.model.embed_tokens(ids) @ bases[0]
    position = model.model.rotary_emb(h, torch.arange(ids.shape[1])[None])
    mask = torch.full((ids.shape[1], ids.shape[1]), float("-inf")).triu(1)[None, None]

    def norm(x: Tensor) -> Tensor:
        # The mean square is over the full width, of which only k coordinates remain.
        return x / (x.square().sum(-1, keepdim=True) / config.hidden_size + config.rms_norm_eps).sqrt()

    def linear(weight: Tensor) -> nn.Linear:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight.data.copy_(weight)
        return layer

    for number, layer in enumerate(model.model.layers):
        before, between, after = bases[2 * number : 2 * number + 3]
        attention, mlp = layer.self_attn, layer.mlp
        for name in ("q_proj", "k_proj", "v_proj"):
            weight = getattr(attention, name).weight * layer.input_layernorm.weight
            setattr(attention, name, linear(weight @ before))
        attention.o_proj = linear(between.t() @ attention.o_proj.weight)
        h = h @ (before.t() @ between) + attention(norm(h), position_embeddings=position, attention_mask=mask)[0]
        gate, up = (
            linear(part.weight * layer.post_attention_layernorm.weight @ between)
            for part in (mlp.gate_proj, mlp.up_proj)
        )
        x = norm(h)
        h = h @ (between.t() @ after) + linear(after.t() @ mlp.down_proj.weight)(nn.functional.silu(gate(x)) * up(x))
    return model.lm_head(norm(h) @ bases[-1].t() * model.model.norm.weight)


@torch.no_grad()
@pytest.mark.parametrize("kept", [32, 20])
def test_projections_are_what_a_sliced_network_computes(job: Job, kept: int) -> None:
    dense = job.load()
    for parameter in dense.parameters():
        if parameter.dim() == 1:
            parameter.copy_(torch.rand(parameter.shape) + 0.5)  # norms have weights
    model = copy.deepcopy(dense)
    sliced = slicegpt.Sliced(model, kept)
    sliced.compress(list(job.data.covariances), None, "channel")
    ids = job.training[:2]
    found = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, sliced_logits(dense, sliced.bases, kept, ids), rtol=1e-4, atol=1e-4)
    assert torch.allclose(found, dense(input_ids=ids).logits, atol=1e-4) == (kept == dense.config.hidden_size)


def test_directions_are_of_the_largest_mean_square() -> None:
    rows = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.1, 5.0, 1.0])
    found = slicegpt.principal_directions(rows)
    torch.testing.assert_close(found.t() @ found, torch.eye(3).double())
    shares = (rows.double() @ found).square().sum(0)
    assert shares.tolist() == sorted(shares.tolist(), reverse=True)
    assert abs(float(found[1, 0])) > 0.99


def test_torch_pruning_means_what_its_paper_says(job: Job) -> None:
    pytest.importorskip("torch_pruning")
    model = job.load()
    found = adapter.score(model, job.space.trainable, job.data.scores)
    sum(model(**batch).loss for batch in job.data.scores).div(len(job.data.scores)).backward()
    start = 0
    for family in job.space.trainable:
        own = found[start : start + family.size]
        start += family.size
        if family.kind != "channels":
            assert not own.any()
            continue
        values = []
        for member in family.members:
            weight = model.get_parameter(member.tensor)
            products = (weight * weight.grad).abs().detach().movedim(member.dim, 0).sum(1)
            values.append(products[member.index[:, 0]])
        mean = torch.stack(values).mean(0)
        torch.testing.assert_close(own.float(), mean / mean.mean(), rtol=1e-4, atol=1e-6)


def test_a_pruned_model_is_refitted(job: Job) -> None:
    removed = job.ledger.nothing
    removed[-10:] = True
    model, dense = pruned_model(job, removed), job.load()
    masks = remaining_elements(job, removed)
    cut = [name for name, mask in masks.items() if not mask.all()]
    assert cut and all(not model.get_parameter(name)[~masks[name]].any() for name in cut)
    reader = next(name for name in cut if "down_proj" in name)
    assert not torch.equal(model.get_parameter(reader)[masks[reader]], dense.get_parameter(reader)[masks[reader]])


# Between rotations SliceGPT stores matrices, which are large beside these layers.
SIZES = {"SliceGPT + GPTQ": 12.0}
BY_TRAINER = ("HESSO, then GPTQ", "ours, trained (QASSO)", "Bayesian Bits", "CoFi, one width")
# Other scores go the same way as these.
ALIKE = (
    "ours",
    "ours, one width",
    "same, unpruned",
    "Taylor (LLM-Pruner) + GPTQ",
    "Wanda-sp + GPTQ",
    "activations (Minitron) + GPTQ",
)
INSTALLED = [
    pytest.param(name, marks=pytest.mark.slow if name in BY_TRAINER else ())
    for name, method in METHODS.items()
    if name not in ALIKE and not missing_packages(method)
]


def test_ours_at_one_width_removes_what_the_budget_says(job: Job) -> None:
    method = METHODS["ours, one width"]
    compressed = method.run(replace(job, budget=read_budget("30%@4", job.ledger)))
    assert set(compressed.result.weight_bits.values()) == {4}
    assert compressed.bytes <= bytes_after(job.ledger, 0.3, 4)
    assert compressed.share == pytest.approx(0.3, abs=0.05)
    with pytest.raises(GETAError, match="budget B=5 names no width"):
        method.run(job)


@pytest.mark.parametrize("name", INSTALLED)
def test_methods_stay_within_their_budget(job: Job, name: str) -> None:
    method: Method = METHODS[name]
    budget = Budget("B", bytes_for(job.ledger, SIZES.get(name, 3.5)))
    compressed = method.run(replace(job, budget=budget, steps=6 if method.needs == "training" else 0))
    assert compressed.bytes <= budget.bytes
    assert bool(torch.isfinite(compressed.model(input_ids=job.training[:1]).logits).all())
    if compressed.removed is None:
        return
    assert compressed.result is not None
    assert int(compressed.removed.sum()) == compressed.result.removed_groups
    for weight, mask in remaining_elements(job, compressed.removed).items():
        assert not compressed.model.get_parameter(weight)[~mask].any()
