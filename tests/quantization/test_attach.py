"""Which layers get a quantizer, what they keep, and that detaching gives the plain model back."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn
from torch.nn.utils import prune
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from geta_hf.errors import GETAError
from geta_hf.quantization import (
    QuantConv1D,
    QuantConv1d,
    QuantConv2d,
    QuantLinear,
    attach_quantizers,
    clipping_value,
    cut_quantizers,
    detach_quantizers,
    quantized_layers,
    quantizer_prefixes,
    select_layers,
    without_quantizers,
)
from geta_hf.quantization.layer_types import base_type
from geta_hf.quantization.parametrized import removal_of


def in_list(*layers: nn.Module) -> nn.Module:
    model = nn.Module()
    model.layers = nn.ModuleList(layers)
    return model


def test_bert_gets_attention_and_mlp_but_no_pooler_embedding_or_head(bert) -> None:
    names = list(select_layers(bert))
    parts = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
    parts += ("intermediate.dense", "output.dense")
    assert names == [f"bert.encoder.layer.{i}.{part}" for i in range(2) for part in parts]


def test_gpt2_gets_its_conv1d_layers_and_no_head() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20, n_positions=16))
    layers = attach_quantizers(model)
    assert all(isinstance(layer, QuantConv1D) for layer in layers.values())
    assert sorted(layers) == [f"transformer.h.0.{n}" for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]


def test_patterns_choose_and_refuse_to_match_nothing(bert) -> None:
    assert len(select_layers(bert, include=[r"query$", r"key$"], exclude=[r"layer\.1\."])) == 2
    assert list(select_layers(bert, include=["qa_outputs"])) == ["qa_outputs"]
    with pytest.raises(GETAError, match="matches no linear layer"):
        select_layers(bert, exclude=["qurey"])
    with pytest.raises(GETAError, match=r"no layer to quantize: exclude = \['\.'\] leaves none of 12; exclude fewer"):
        select_layers(bert, exclude=["."])
    # No pattern of the user's is at fault, so none is named.
    with pytest.raises(GETAError, match="quantize: none of 1 linear layers is in a list of repeated blocks; name some"):
        select_layers(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(GETAError, match=r"pattern '\(' is no regular expression .*; correct it"):
        select_layers(bert, include=["("])


@pytest.mark.parametrize("include", [None, ["."]])
def test_a_model_without_any_such_layer_is_refused_by_name(include: list[str] | None) -> None:
    with pytest.raises(GETAError, match=r"Module has no layer to quantize: .* no Linear, Conv1D, Conv1d or Conv2d"):
        select_layers(in_list(nn.Conv3d(2, 2, 3), nn.ConvTranspose1d(2, 2, 3)), include)


def test_parameters_keep_identity_name_dtype_mode_and_requires_grad(bert) -> None:
    bert.to(torch.bfloat16).eval()
    frozen = bert.bert.encoder.layer[0].intermediate.dense.weight.requires_grad_(False)
    before = dict(bert.named_parameters())
    attach_quantizers(bert)
    after = {name: value for name, value in bert.named_parameters() if "weight_quantizer" not in name}
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    layer = bert.bert.encoder.layer[0].intermediate.dense
    assert isinstance(layer, nn.Linear) and isinstance(layer, QuantLinear) and not layer.training
    assert not layer.weight_quantizer.training and not frozen.requires_grad and frozen.dtype == torch.bfloat16
    assert {tuple(p.shape) for n, p in bert.named_parameters() if "weight_quantizer" in n} == {(1,)}


def test_detach_gives_the_plain_model_back(bert, batch) -> None:
    bert.eval()
    reference, logits = copy.deepcopy(bert), bert(**batch).start_logits
    attach_quantizers(bert, initial_bits=4, target_bits=4)
    assert not torch.allclose(bert(**batch).start_logits, logits)
    detach_quantizers(bert)
    assert not quantized_layers(bert) and type(bert.bert.encoder.layer[0].output.dense) is nn.Linear
    assert list(bert.state_dict()) == list(reference.state_dict())
    assert torch.equal(bert(**batch).start_logits, logits)


def test_starting_at_16_bits_changes_next_to_nothing(bert, batch) -> None:
    bert.eval()
    logits = bert(**batch).start_logits
    attach_quantizers(bert, clipping="max")
    assert torch.allclose(bert(**batch).start_logits, logits, atol=1e-4)


def test_tied_weights_stay_tied_and_share_one_quantizer() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    model = in_list(first, second)
    attach_quantizers(model)
    assert second.weight is first.weight and second.weight_quantizer is first.weight_quantizer
    assert len(list(model.parameters())) == 1 + 2 + 3


def test_a_weight_tied_to_an_unquantized_layer_is_refused() -> None:
    linear, table = nn.Linear(4, 8), nn.Embedding(8, 4)
    linear.weight = table.weight
    with pytest.raises(GETAError, match="tied to"):
        attach_quantizers(in_list(linear, table), include=["layers"])


@pytest.mark.parametrize("other", [nn.Linear(4, 8), nn.Embedding(8, 4)])
def test_a_layer_tied_to_one_outside_the_blocks_is_not_selected_by_default(other: nn.Module) -> None:
    inside, tied = nn.Linear(4, 4), nn.Linear(4, 8)
    model = in_list(inside, tied)
    model.head = other
    tied.weight = other.weight
    assert list(attach_quantizers(model)) == ["layers.0"]
    # A layer that the user names is not left out without a word.
    detach_quantizers(model)
    with pytest.raises(GETAError, match=r"layers.1.weight is tied to head, which is not quantized"):
        attach_quantizers(model, include=["layers"])


def test_subclasses_keep_their_class_and_their_own_forward_is_refused() -> None:
    class Named(nn.Linear):
        def greet(self) -> str:
            return "hello"

    class Other(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    class Same(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return input @ self.weight.T + (0 if self.bias is None else self.bias)

    assert base_type(Same(3, 3)) is nn.Linear and base_type(Other(3, 3)) is None
    model = in_list(Named(3, 3))
    attach_quantizers(model)
    assert isinstance(model.layers[0], Named) and isinstance(model.layers[0], QuantLinear)
    assert model.layers[0].greet() == "hello"
    assert copy.deepcopy(model).layers[0].weight_quantizer.d == model.layers[0].weight_quantizer.d
    detach_quantizers(model)
    assert type(model.layers[0]) is Named
    with pytest.raises(GETAError, match="forward of its own"):
        attach_quantizers(in_list(Other(3, 3)))
    with pytest.raises(GETAError, match="already quantized"):
        attach_quantizers(model) and attach_quantizers(model)


@pytest.mark.parametrize(
    ("layer", "shape", "kind"),
    [
        (nn.Linear(6, 4), (2, 6), QuantLinear),
        (Conv1D(4, 6), (2, 6), QuantConv1D),
        (nn.Conv2d(3, 4, 3, stride=2, padding=1, padding_mode="circular"), (2, 3, 8, 8), QuantConv2d),
        (nn.Conv2d(6, 6, 3, groups=6), (2, 6, 5, 5), QuantConv2d),
        (nn.Conv1d(3, 4, 5, stride=2, padding=2, padding_mode="reflect"), (2, 3, 9), QuantConv1d),
    ],
)
def test_each_layer_equals_the_plain_one_on_its_quantized_weight(layer, shape, kind) -> None:
    torch.manual_seed(0)
    nn.init.normal_(layer.weight)
    x = torch.randn(shape)
    plain = copy.deepcopy(layer)
    attach_quantizers(in_list(layer), include=["."], initial_bits=4, target_bits=4)
    assert type(layer) is kind
    plain.weight.data = layer.quantized_weight().detach()
    assert torch.equal(layer(x), plain(x))


def test_a_weight_that_is_not_finite_is_refused() -> None:
    layer = nn.Linear(4, 4)
    nn.init.constant_(layer.weight, float("nan"))
    with pytest.raises(GETAError, match=r"layers\.0\.weight: max\|W\| is nan"):
        attach_quantizers(in_list(layer))


@pytest.mark.parametrize("clipping", ["mse", "max"])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize(
    ("layer", "shape", "inputs"),
    [(nn.Linear(16, 4), (3, 16), 16), (Conv1D(4, 16), (3, 16), 16), (nn.Conv2d(4, 4, 2), (3, 4, 5, 5), 16)],
)
def test_a_layer_of_zeros_is_quantized_and_learns(layer, shape, inputs, per_channel, clipping, caplog) -> None:
    layer = copy.deepcopy(layer)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    attach_quantizers(in_list(layer), clipping=clipping, per_channel=per_channel)
    assert "all weights are zero in layers.0:" in caplog.text
    # The range that torch would have initialized the layer with.
    assert torch.equal(layer.weight_quantizer.q_m, torch.full_like(layer.weight_quantizer.q_m, inputs**-0.5))
    x = torch.randn(shape)
    assert not layer(x).any()
    layer(x).square().sum().backward()
    assert not layer.weight.grad.any()  # as of the plain layer: the output is zero
    (layer(x) - 1).square().sum().backward()
    assert (layer.weight.grad != 0).all() and torch.isfinite(layer.weight_quantizer.d.grad).all()


def test_a_failure_leaves_no_layer_quantized() -> None:
    good, bad = nn.Linear(4, 4), nn.Linear(4, 4)
    nn.init.constant_(bad.weight, float("inf"))
    model = in_list(good, bad)
    with pytest.raises(GETAError, match="max"):
        attach_quantizers(model)
    assert not quantized_layers(model) and type(good) is nn.Linear


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_clipping_by_squared_error_beats_the_maximum(bits: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 64)
    weight[0, 0] = 12.0

    def error(q_m: float) -> float:
        step = q_m / (2 ** (bits - 1) - 1)
        return ((weight.clamp(-q_m, q_m) / step).round() * step - weight).square().sum().item()

    chosen = clipping_value(weight, bits)
    assert error(chosen) < error(clipping_value(weight, bits, "max"))
    best = min(error(q) for q in torch.linspace(0.3, 12, 400).tolist())
    assert error(chosen) <= best * 1.05


def test_per_channel_gives_every_output_channel_its_own_start() -> None:
    torch.manual_seed(0)
    linear, conv1d, conv2d = nn.Linear(6, 4), Conv1D(5, 6), nn.Conv2d(4, 6, 3, groups=2)
    model = in_list(linear, conv1d, conv2d)
    conv1d.weight.data[:, 3] *= 100
    attach_quantizers(model, per_channel=True, clipping="max", initial_bits=5)
    assert [tuple(layer.weight_quantizer.d.shape) for layer in model.layers] == [(4,), (5,), (6,)]
    assert torch.equal(conv1d.weight_quantizer.q_m, conv1d.weight.abs().amax(dim=0))
    assert torch.equal(conv2d.weight_quantizer.q_m, conv2d.weight.abs().amax(dim=(1, 2, 3)))
    for layer in model.layers:
        assert layer.weight_quantizer.t.shape == (1,)
        torch.testing.assert_close(layer.weight_quantizer.bits(), torch.full_like(layer.weight_quantizer.d, 5.0))


def test_a_conv1d_is_quantized_where_it_is_named() -> None:
    model = in_list(nn.Conv1d(4, 6, 3, groups=2), nn.Linear(6, 4))
    assert list(select_layers(model)) == ["layers.1"]
    assert list(select_layers(model, ["."])) == ["layers.0", "layers.1"]
    attach_quantizers(model, include=["."], grid="channel", clipping="max")
    conv = model.layers[0]
    assert torch.equal(conv.weight_quantizer.q_m, conv.weight.abs().amax(dim=(1, 2)))


def test_one_step_size_a_channel_is_closer_than_one_for_all() -> None:
    torch.manual_seed(0)
    errors = []
    for per_channel in (False, True):
        layer = nn.Linear(64, 8)
        nn.init.normal_(layer.weight)
        layer.weight.data *= torch.logspace(-2, 0, 8)[:, None]
        attach_quantizers(in_list(layer), per_channel=per_channel, initial_bits=4, target_bits=4)
        error = (layer.quantized_weight() - layer.weight).detach()
        errors.append(float((error / layer.weight.detach().norm(dim=1, keepdim=True)).norm()))
    assert errors[1] < errors[0] / 3


def test_tied_weights_share_one_quantizer_of_channels() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    model = in_list(first, second)
    attach_quantizers(model, per_channel=True)
    assert second.weight_quantizer is first.weight_quantizer
    assert set(quantizer_prefixes(model).values()) == {"layers.0.weight_quantizer"}


def test_quantizers_of_channels_follow_weights_that_were_cut() -> None:
    linear, conv1d, whole = nn.Linear(6, 4), Conv1D(5, 6), nn.Linear(6, 4)
    model = in_list(linear, conv1d, whole)
    attach_quantizers(model, per_channel=True)
    before = [layer.weight_quantizer.d.detach().clone() for layer in model.layers]
    rows, columns = torch.tensor([0, 3]), torch.tensor([1, 2, 4])
    kept = {
        "layers.0.weight": {0: rows},
        "layers.1.weight": {1: columns, 0: torch.arange(2)},
        "layers.2.weight": {1: torch.arange(3)},
    }
    linear.weight = nn.Parameter(linear.weight[rows])
    conv1d.weight = nn.Parameter(conv1d.weight[:2, columns])
    whole.weight = nn.Parameter(whole.weight[:, :3])
    for _ in range(2):  # a second time changes nothing
        cut_quantizers(model, kept)
        after = [layer.weight_quantizer.d for layer in model.layers]
        wanted = [before[0][rows], before[1][columns], before[2]]
        assert all(torch.equal(a, b) for a, b in zip(after, wanted, strict=True))
        assert [tuple(layer.quantized_weight().shape) for layer in model.layers] == [(2, 6), (2, 3), (4, 3)]


def test_a_layer_below_a_hook_of_accelerate_computes_as_its_class_says() -> None:
    model = in_list(nn.Linear(4, 3))
    (layer,), x = model.layers, torch.randn(2, 4)
    add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu"))
    plain = layer(x)
    attach_quantizers(model, initial_bits=3, exclude=[])
    assert torch.equal(layer(x), type(layer).forward(layer, x)) and not torch.equal(layer(x), plain)
    detach_quantizers(model)
    assert torch.equal(layer(x), plain)


@pytest.mark.parametrize("per_channel", [False, True])
def test_a_model_computes_without_its_quantizers_for_a_while(per_channel: bool) -> None:
    model, x = in_list(nn.Linear(6, 4), Conv1D(5, 4)), torch.randn(2, 6)

    def run() -> torch.Tensor:
        return model.layers[1](model.layers[0](x))

    plain = run()
    attach_quantizers(model, initial_bits=3, per_channel=per_channel)
    quantized, text, state = run(), str(model), list(model.state_dict())
    with pytest.raises(ValueError, match="some error"), without_quantizers(model):
        assert torch.equal(run(), plain)
        assert quantized_layers(model) == {}
        assert not any("quantizer" in name for name in model.state_dict())
        raise ValueError("some error")
    assert torch.equal(run(), quantized) and not torch.equal(quantized, plain)
    assert str(model) == text and list(model.state_dict()) == state
    assert [layer.input_quantizer for layer in quantized_layers(model).values()] == [None, None]


@pytest.mark.parametrize("computed", ["weight_norm", "old weight_norm", "masks"])
def test_a_weight_that_is_no_parameter_is_refused_before_anything_changes(bert, computed: str) -> None:
    dense = bert.bert.encoder.layer[1].output.dense
    if computed == "weight_norm":
        nn.utils.parametrizations.weight_norm(dense)
    elif computed == "old weight_norm":
        with pytest.warns(FutureWarning, match="deprecated"):
            nn.utils.weight_norm(dense)
    else:
        prune.random_unstructured(dense, "weight", 0.5)
    with pytest.raises(GETAError, match=r"layer.1.output.dense.weight is computed by .*; call .*, or exclude"):
        attach_quantizers(bert)
    assert not quantized_layers(bert)
    assert "bert.encoder.layer.1.output.dense" not in attach_quantizers(bert, exclude=[r"1\.output\.dense"])


def test_the_call_that_an_error_names_is_the_remedy(bert) -> None:
    dense = bert.bert.encoder.layer[1].output.dense
    nn.utils.parametrizations.spectral_norm(dense)
    found = removal_of(dense, "bert.encoder.layer.1.output.dense")
    assert found is not None
    eval(found[1], {"torch": torch, "model": bert})
    assert removal_of(dense, "dense") is None and len(attach_quantizers(bert)) == 12
