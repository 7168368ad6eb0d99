"""Groups of frozen tensors: scored as in the full-parameter run, and forgotten smoothly to exactly zero."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM

from geta_hf import GETAConfig
from geta_hf.errors import GETAError
from geta_hf.methods.frozen_weights import Adapter, FrozenWeights
from geta_hf.methods.qasso.frozen import GradientSums, check_rules, forget_frozen
from geta_hf.methods.qasso.slices import build_slices, group_sums
from geta_hf.qadg import build_space
from geta_hf.qadg.group_labels import GroupLabels
from geta_hf.quantization import attach_quantizers, detach_quantizers, quantized_layers, select_layers
from geta_hf.training.lora import attach_lora, find_frozen_weights, plan_lora
from geta_hf.training.plan import make_ledger

SIZES = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 32}
IDS = torch.randint(0, 40, (4, 8), generator=torch.Generator().manual_seed(1))


def llama() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2))


def phi() -> nn.Module:
    torch.manual_seed(0)
    model = PhiForCausalLM(PhiConfig(**SIZES, resid_pdrop=0.0))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


def losses(model: nn.Module, parts: int) -> list[torch.Tensor]:
    return [model(input_ids=ids, labels=ids).loss / parts for ids in IDS.chunk(parts)]


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("make", [llama, phi])
def test_scores_are_those_of_the_full_parameter_run(make, parts: int, targets) -> None:
    model = make()
    space = build_space(model, {"input_ids": IDS[:2]}, prune=["residual"])
    attach_quantizers(model, initial_bits=6)
    ledger = make_ledger(model, space)
    attach_lora(model, plan_lora(model, LoraConfig(r=3, target_modules=targets), select_layers(model)))
    for layer in quantized_layers(model).values():
        if layer.lora is not None:
            nn.init.normal_(layer.lora.B, std=0.05)
    named, frozen = dict(model.named_parameters()), find_frozen_weights(model, space)
    weights = [layer.weight for layer in ledger.layers]
    watch = GradientSums(frozen, ledger.labels, ledger.groups, weights, torch.device("cpu"))
    watch.set_active(True, named)
    for loss in losses(model, parts):
        loss.backward()
        assert all(named[name].grad is None for name in frozen.names)
    watch.set_active(False, named)
    inner, squares = watch.take()
    assert not any(named[name].requires_grad for name in frozen.names)
    assert float(torch.stack(watch.take()[0:1]).abs().sum()) == 0  # the sums have started anew

    full = make()
    bits = {n: p.detach() for n, p in model.named_parameters() if "quantizer" in n}
    merged = {f"{n}.weight": m.merged_weight().detach() for n, m in quantized_layers(model).items()}
    attach_quantizers(full, initial_bits=6)
    full.load_state_dict(bits | merged, strict=False)
    for loss in losses(full, parts):
        loss.backward()
    theirs = dict(full.named_parameters())
    expected = group_sums(ledger.labels, theirs, ledger.groups, torch.mul)
    assert float((inner - expected).abs().max()) <= 1e-5 * min(1.0, float(expected.abs().max()))
    assert len(inner) == space.num_groups and float(expected.abs().min()) > 0
    if parts == 1:
        norms = torch.stack([theirs[weight].grad.norm() ** 2 for weight in weights])
        assert torch.allclose(squares, norms, rtol=1e-5)
    else:
        assert bool((squares > 0).all())
    detach_quantizers(full)


@pytest.mark.parametrize("transposed", [False, True])
def test_slices_shrink_evenly_to_exactly_zero_and_all_else_stays(transposed: bool) -> None:
    torch.manual_seed(0)
    named = {"w": torch.randn(8, 6), "a": torch.randn(2, 6), "b": torch.randn(8, 2)}
    if transposed:
        named["w"] = named["w"].t().contiguous()
    frozen = FrozenWeights(frozenset({"w"}), {"w": Adapter("a", "b", 0.5, transposed)})
    rows, columns = torch.arange(8) // 2, torch.tensor([4, 5, 6, 6, 6, 6])
    cuts = frozen.with_adapters(
        [GroupLabels("w", int(transposed), rows), GroupLabels("w", int(not transposed), columns)]
    )
    assert [(cut.tensor, cut.dim) for cut in cuts[2:]] == [("b", 0), ("a", 1)]
    mask = torch.tensor([False, True, False, False, True, False])
    slices = build_slices(cuts, mask, torch.tensor([0, 0, 0, 0, 1, 1]), named)
    start = {name: tensor.clone() for name, tensor in named.items()}
    whole = frozen.merged("w", named)
    whole = whole.t() if transposed else whole
    factor = torch.ones(8, 6)
    factor[2:4] *= 0.75
    factor[:, 0] *= 0.75
    rate = forget_frozen(slices, named, steps_remaining=4, families=3)
    assert rate[:2].tolist() == [0.25, 0.25] and bool(rate[2].isnan())
    now = frozen.merged("w", named)
    assert torch.allclose(now.t() if transposed else now, whole * factor, atol=1e-6)
    for left in (3, 2, 1):
        forget_frozen(slices, named, left, families=3)
    final = frozen.merged("w", named)
    final = final.t() if transposed else final
    assert torch.equal(final == 0, factor < 1)
    keep_rows, keep_columns = (factor[:, 5] == 1), (factor[7] == 1)
    assert torch.equal(named["b"][keep_rows], start["b"][keep_rows])
    assert torch.equal(named["a"][:, keep_columns], start["a"][:, keep_columns])
    w, before = (value.t() if transposed else value for value in (named["w"], start["w"]))
    assert torch.equal(w[factor == 1], before[factor == 1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"saliency": "hesso"}, "choose 'fisher' or 'taylor'"),
        ({"forgetting": "paper"}, "choose 'uniform'"),
        ({"bit_rule": "paper"}, "choose 'sensitivity' or 'ppsg'"),
    ],
)
def test_rules_that_need_whole_gradients_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(GETAError, match=message):
        check_rules(GETAConfig(**changes))
