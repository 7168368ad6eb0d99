"""Scores without gradients: written out on one layer; what is held in memory is what the plan says."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from geta_hf.errors import GETAError
from geta_hf.methods import OneShotConfig, OneShotMethod
from geta_hf.methods.one_shot import Calibration, memory
from geta_hf.methods.one_shot.first_weights import FirstWeights
from geta_hf.methods.one_shot.forward_scores import measure_forward
from geta_hf.methods.one_shot.layers import fit_grid, round_on
from geta_hf.methods.one_shot.memory import foresee_memory
from geta_hf.qadg import build_space
from geta_hf.qadg.group_labels import GroupLabels
from geta_hf.quantization import select_layers
from geta_hf.quantization.by_block import BlockRunner, find_blocks
from geta_hf.quantization.covariances import Covariance, collecting
from geta_hf.training.plan import make_ledger
from geta_hf.training.preparation import empty_copy
from tests.tiny_tasks import tiny_llama

IDS = torch.randint(0, 257, (6, 2, 8), generator=torch.Generator().manual_seed(0))
BATCHES = [{"input_ids": rows, "labels": rows} for rows in IDS]


class Pair(nn.Module):
    """Two blocks of one layer each, and one that nothing reaches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Linear(5, 6), nn.Linear(6, 3), nn.Linear(4, 4)])

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"out": self.blocks[1](torch.tanh(self.blocks[0](x)))}


def test_scores_are_shares_of_a_layers_output():
    model = Pair()
    batches = [{"x": torch.randn(3, 5)}, {"x": torch.randn(2, 5)}]
    label = torch.tensor([0, 0, 1, 1, 2, 3])  # the last column belongs to no group
    layers = {f"blocks.{place}": layer for place, layer in enumerate(model.blocks)}
    found = measure_forward(
        model, layers, batches, [GroupLabels("blocks.1.weight", 1, label)], 3, [2, 4], "channel", lambda x, *_: x
    )
    weight = model.blocks[1].weight.detach()
    with torch.no_grad():
        inputs = torch.tanh(model.blocks[0](torch.cat([batch["x"] for batch in batches])))
    squares = (inputs**2).mean(0)
    energy = (squares * weight**2).sum()
    columns = (squares * weight**2).sum(0) / energy
    expected = torch.stack([columns[:2].sum(), columns[2:4].sum(), columns[4]])
    torch.testing.assert_close(found.removal, expected.double(), rtol=1e-5, atol=1e-8)
    change = round_on(weight, fit_grid(weight, 2)) - weight
    assert float(found.rounding[1, 0]) == pytest.approx(float((squares * change**2).sum() / energy), rel=1e-4)
    # Of what no data reaches the share of the weight itself that is lost.
    unreached = model.blocks[2].weight.detach()
    change = round_on(unreached, fit_grid(unreached, 4)) - unreached
    assert float(found.rounding[2, 1]) == pytest.approx(float((change**2).sum() / (unreached**2).sum()), rel=1e-4)


def test_a_frugal_runner_gives_the_same_and_forgets_what_nothing_reads():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_ff": 24, "d_kv": 4, "num_heads": 4, "num_layers": 2}
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=257, decoder_start_token_id=0, **sizes)).eval()
    for model in (tiny_llama().eval(), t5):
        layers = select_layers(model)
        blocks = find_blocks(model, layers, BATCHES[0])
        means = []
        held = []
        for frugal in (False, True):
            runner = BlockRunner(model, BATCHES)
            for block in blocks:
                own = {name: layers[name] for stage in block.stages for name in stage}
                with collecting(own, {name: name for name in own}, [None]) as found:
                    runner.finish(block)
                if frugal:
                    runner.forget(block)
                means.append({name: found[name].mean(name) for name in own})
            held.append(runner.held_bytes())
        assert held[1] < held[0]
        for one, other in zip(means[: len(blocks)], means[len(blocks) :], strict=True):
            assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_is_held_is_what_the_plan_says(monkeypatch: pytest.MonkeyPatch):
    model = tiny_llama()
    config = OneShotConfig(saliency="activation", target_parameters=0.3, mean_bits=4)
    plan = foresee_memory(model, select_layers(model), BATCHES[:4])
    assert plan.weights == sum(tensor.numel() * 4 for tensor in (*model.parameters(), *model.buffers()))
    peaks = []
    sums: dict[int, Covariance] = {}
    finish, add = BlockRunner.finish, Covariance.add

    def note(runner: BlockRunner, *args: object) -> None:
        finish(runner, *args)
        peaks.append(runner.peak)

    monkeypatch.setattr(BlockRunner, "finish", note)
    # Those of one stage are alive together, and those of a block while it is scored.
    monkeypatch.setattr(Covariance, "add", lambda self, rows: sums.setdefault(id(self), self) and add(self, rows))
    space = build_space(model, {"input_ids": IDS[0]})
    method = OneShotMethod(config)
    empty = empty_copy(model)
    method.attach(empty, None)
    data = Calibration(BATCHES[:2], BATCHES[:4], BATCHES[4:])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    monkeypatch.setattr(memory, "free_memory", lambda _: plan.added - 1)
    ledger = make_ledger(empty, space)
    with pytest.raises(GETAError, match=r"needs 0\.8 GB on top of the weights"):
        method.compress(model, data, space, ledger)
    assert not peaks
    monkeypatch.setattr(memory, "free_memory", lambda _: plan.added)
    outcome = method.compress(model, data, space, ledger)
    hidden, inner = model.config.hidden_size, model.config.intermediate_size
    assert plan.covariances == 4 * (3 * hidden**2 + inner**2)
    assert {len(one.total) for one in sums.values() if one.total is not None} == {hidden, inner}
    assert max(peaks) == plan.activations == 2 * 4 * 2 * 8 * model.config.hidden_size * 4
    assert outcome.result.removed_groups > 0
    method.undo()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("on_disk", [False, True])
def test_first_weights_are_given_back(on_disk: bool):
    layer = nn.Linear(3, 2).bfloat16()
    before = layer.weight.detach().clone()
    kept = FirstWeights([layer.weight], on_disk)
    with torch.no_grad():
        layer.weight.zero_()
    kept.restore()
    assert torch.equal(layer.weight, before)


def test_one_block_at_a_time_needs_blocks():
    with pytest.raises(GETAError, match="by_block = False must be True with saliency='activation'"):
        OneShotConfig(saliency="activation", by_block=False)
