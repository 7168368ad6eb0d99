"""Running block by block gives what the full model gives, and covariances are those of the activations."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

from geta_hf.errors import GETAError
from geta_hf.quantization import select_layers
from geta_hf.quantization.by_block import BlockRunner, find_blocks
from geta_hf.quantization.covariances import Covariance, as_rows, collecting, input_rows, recording

IDS = torch.randint(0, 30, (3, 2, 8), generator=torch.Generator().manual_seed(0))


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=30, num_key_value_heads=2, **sizes)).eval()


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(vocab_size=30, d_model=16, d_ff=24, d_kv=4, num_heads=4, num_layers=2, decoder_start_token_id=0)
    ).eval()


def albert() -> AlbertModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
    return AlbertModel(AlbertConfig(vocab_size=30, embedding_size=8, **sizes)).eval()


def batches(model: nn.Module) -> list[dict[str, torch.Tensor]]:
    more = {"decoder_input_ids": IDS[0]} if isinstance(model, T5ForConditionalGeneration) else {}
    return [{"input_ids": ids, **more} for ids in IDS]


def test_stages_are_the_layers_that_read_one_tensor():
    model = llama()
    blocks = find_blocks(model, select_layers(model), batches(model)[0])
    assert [block.name for block in blocks] == ["model.layers.0", "model.layers.1"]
    leaves = [[name.rpartition(".")[2] for name in stage] for stage in blocks[0].stages]
    assert leaves == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


@pytest.mark.parametrize("make", [llama, pytest.param(t5, marks=pytest.mark.slow), albert])
def test_covariances_of_changed_blocks_are_those_of_full_runs(make):
    model = make()
    layers = select_layers(model)
    data = batches(model)
    blocks = find_blocks(model, layers, data[0])
    runner = BlockRunner(model, data)
    for block in blocks:
        for stage in block.stages:
            mask: list[torch.Tensor | None] = [None]
            shared = dict.fromkeys(stage, stage[0])
            with collecting({name: layers[name] for name in stage}, shared, mask) as found:
                runner.run(block, mask, until=stage[0])
            own: dict[str, list[torch.Tensor]] = {name: [] for name in stage}
            hooks = [
                layers[name].register_forward_pre_hook(lambda _, args, own=own[name]: own.append(args[0]))
                for name in stage
            ]
            with torch.no_grad():
                for batch in data:
                    model(**batch)
            for hook in hooks:
                hook.remove()
            for name in stage:
                x = torch.cat([part.flatten(0, -2) for part in own[name]])
                torch.testing.assert_close(found[stage[0]].mean(name), x.t() @ x / len(x), rtol=1e-4, atol=1e-6)
            with torch.no_grad():
                for name in stage:
                    layers[name].weight.mul_(1.1)
        runner.finish(block)


@pytest.mark.parametrize("make", [llama, albert])
def test_drifts_are_those_of_two_models_side_by_side(make):
    """A block is recorded while it is dense; a copy that stays dense must give the same."""
    model = make()
    copied = copy.deepcopy(model)
    layers, others = select_layers(model), select_layers(copied)
    data = batches(model)
    dense, runner = BlockRunner(model, data), BlockRunner(model, data)
    for block in find_blocks(model, layers, data[0]):
        mask: list[torch.Tensor | None] = [None]
        with recording({stage[0]: layers[stage[0]] for stage in block.stages}, mask) as inputs:
            dense.finish(block, mask)
        for stage in block.stages:
            name = stage[0]
            with collecting({name: layers[name]}, {name: name}, mask, inputs) as found:
                runner.run(block, mask)
            read = [rows_read(one, own[name], data) for one, own in ((copied, others), (model, layers))]
            drift = (read[0] - read[1]).t() @ read[1] / len(read[1])
            torch.testing.assert_close(found[name].mean_drift(), drift, rtol=1e-4, atol=1e-6)
            with torch.no_grad():
                for name in stage:
                    layers[name].weight.mul_(1.1)
        runner.finish(block)


@torch.no_grad()
def rows_read(model: nn.Module, layer: nn.Module, data: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Return all that a layer reads, one row for each token."""
    read: list[torch.Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, args: read.append(args[0].flatten(0, -2)))
    for batch in data:
        model(**batch)
    hook.remove()
    return torch.cat(read)


def test_flat_lists_of_tokens_are_not_compared():
    """Two runs of a mixture may send other tokens to an expert, so that its inputs are no pairs."""
    model = Routed()
    expert = model.layers[0][0]
    with recording({"expert": expert}, [None]) as found:
        expert(torch.ones(3, 4))
    assert not found


def test_a_batch_ends_with_the_layer_that_is_asked_for():
    model = llama()
    layers = select_layers(model)
    block = find_blocks(model, layers, batches(model)[0])[0]
    runner = BlockRunner(model, batches(model))
    ran = []
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        model.model.layers[0].get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    gate = "model.layers.0.mlp.gate_proj"
    with collecting({gate: layers[gate]}, {gate: gate}, [None]) as found:
        runner.run(block, [None], until=gate)
    assert found[gate].count == IDS.numel()
    assert ran == ["self_attn.o_proj"] * len(IDS)


def test_layers_that_run_several_times_end_no_batch():
    """ALBERT's block runs three times, each time with the same layers, and all three count."""
    model = albert()
    (block,) = find_blocks(model, select_layers(model), batches(model)[0])
    assert block.calls == 3 and not block.once


def test_finished_blocks_do_not_run_again():
    model = llama()
    blocks = find_blocks(model, select_layers(model), batches(model)[0])
    runner = BlockRunner(model, batches(model))
    runner.finish(blocks[0])
    calls = []
    model.model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(0))
    model.model.norm.register_forward_hook(lambda *_: calls.append(1))
    runner.finish(blocks[1])
    assert not calls
    assert "forward" not in vars(model.model.layers[0])
    assert model.config.use_cache


def test_padding_does_not_count():
    model = llama()
    layers = select_layers(model)
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, 5:] = 0
    block = find_blocks(model, layers, {"input_ids": IDS[0]})[0]
    name = block.stages[0][0]
    found = {}
    for key, batch in {"padded": {"input_ids": IDS[0], "attention_mask": mask}, "full": {"input_ids": IDS[0]}}.items():
        present: list[torch.Tensor | None] = [None]
        with collecting({name: layers[name]}, {name: name}, present) as collected:
            BlockRunner(model, [batch]).run(block, present)
        found[key] = collected[name].count
    assert found == {"padded": 13, "full": 16}


class Routed(nn.Module):
    """Two experts, of which the sign of the first input chooses one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[0][int(x[0, 0] > 0)](x)


def test_layers_that_the_first_batch_misses_are_found():
    model = Routed()
    data = [{"x": torch.ones(3, 4)}, {"x": -torch.ones(2, 4)}]
    blocks = find_blocks(model, dict(select_layers(model)), data[0])
    assert [(block.name, block.stages, block.calls) for block in blocks] == [
        ("layers.0", [["layers.0.1"], ["layers.0.0"]], 0)
    ]
    # The list itself never runs, so every batch runs to its end.
    layers = dict(select_layers(model))
    with collecting(layers, {name: name for name in layers}, [None]) as found:
        BlockRunner(model, data).run(blocks[0], [None])
    assert {name: one.count for name, one in found.items()} == {"layers.0.0": 2, "layers.0.1": 3}


def test_rows_times_inputs_are_the_outputs_of_every_kind_of_layer():
    torch.manual_seed(0)
    x = torch.randn(2, 6, 9, 9)
    for layer, given in (
        (nn.Linear(9, 4, bias=False), x),
        (Conv1D(4, 9), x),
        (nn.Conv2d(6, 4, 3, stride=2, padding=1, bias=False), x),
        (nn.Conv2d(6, 4, (3, 1), dilation=2, padding="same", padding_mode="reflect", bias=False), x),
        (nn.Conv1d(6, 4, 3, stride=2, padding=1, bias=False), x[:, :, 0]),
        (nn.Conv1d(6, 4, 3, dilation=2, padding="same", padding_mode="reflect", bias=False), x[:, :, 0]),
    ):
        expected = layer(given)
        if isinstance(layer, nn.Conv1d | nn.Conv2d):
            expected = expected.flatten(2).transpose(1, 2)
        rows = as_rows(layer, layer.weight)
        torch.testing.assert_close(
            input_rows(layer, given) @ rows.t(), expected.reshape(-1, rows.shape[0]), rtol=1e-4, atol=1e-5
        )


def test_overflow_names_the_layer_and_no_input_is_none():
    found = Covariance()
    assert found.mean("x") is None
    found.add(torch.full((2, 3), 1e30))
    with pytest.raises(GETAError, match=r"inputs of h\.0\.up overflow"):
        found.mean("h.0.up")
