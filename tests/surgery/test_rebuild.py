"""A model that is not what its config builds is refused, with the module's name; what changes no output is welcome."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, prune
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
    WavLMConfig,
    WavLMForSequenceClassification,
)
from transformers.activations import ACT2FN

from geta_hf.errors import GETAError
from geta_hf.surgery import rebuild
from geta_hf.surgery.rebuild import check_rebuilds
from tests.conftest import tiny_bert_config

Change = Callable[[BertForQuestionAnswering], Any]


def layer(model: BertForQuestionAnswering, place: int = 0) -> Any:
    return model.bert.encoder.layer[place]


# --- code that no folder holds --------------------------------------------------------------------------------------


def hook(model: BertForQuestionAnswering) -> None:
    def doubled(module: nn.Module, args: Any, output: Any) -> Any:
        output["start_logits"] = output["start_logits"] * 2
        return output

    model.register_forward_hook(doubled)


def inner_hook(model: BertForQuestionAnswering) -> None:
    layer(model).intermediate.register_forward_hook(lambda module, args, output: output * 1.5)


def pre_hook(model: BertForQuestionAnswering) -> None:
    layer(model).output.dense.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))


def keyword_hook(model: BertForQuestionAnswering) -> None:
    def reverse(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "input_ids": kwargs["input_ids"].flip(1)}

    model.register_forward_pre_hook(reverse, with_kwargs=True)


def own_forward(model: BertForQuestionAnswering) -> None:
    plain = layer(model).output.forward
    layer(model).output.forward = lambda *args: plain(*args) + 0.1


def own_call(model: BertForQuestionAnswering) -> None:
    plain = model._call_impl

    def call(*args: Any, **kwargs: Any) -> Any:
        output = plain(*args, **kwargs)
        output["end_logits"] = output["end_logits"] * 3
        return output

    model._call_impl = call  # type: ignore[method-assign]


CODE: dict[str, tuple[Change, str]] = {
    "a hook on the model": (hook, "forward hook hook.*doubled on the BertForQuestionAnswering"),
    "a hook on a layer": (inner_hook, r"forward hook .* on bert.encoder.layer.0.intermediate\."),
    "a pre-hook": (pre_hook, "pre-hook .* on bert.encoder.layer.0.output.dense"),
    "a pre-hook with keywords": (keyword_hook, "pre-hook keyword_hook.*reverse on the BertForQuestionAnswering"),
    "a forward of its own": (own_forward, "bert.encoder.layer.0.output has its method forward replaced"),
    "a call of its own": (own_call, "has its method _call_impl replaced by own_call"),
}


@pytest.mark.parametrize("kind", CODE)
def test_code_on_an_instance_is_refused_by_name(bert: BertForQuestionAnswering, batch: Any, kind: str) -> None:
    change, named = CODE[kind]
    change(bert)
    with pytest.raises(GETAError, match=rf"(?s){named}.*Remove it"):
        check_rebuilds(bert, batch)


@pytest.fixture
def everywhere() -> Iterator[None]:
    def halved(module: nn.Module, args: Any, output: Any) -> Any:
        return output / 2 if isinstance(module, nn.Linear) and module.out_features == 2 else None

    handle = register_module_forward_hook(halved)
    yield
    handle.remove()


def test_a_hook_on_all_modules_of_the_process(bert: BertForQuestionAnswering, batch: Any, everywhere: None) -> None:
    with pytest.raises(GETAError, match=r"the hook everywhere.*halved on all modules of torch"):
        check_rebuilds(bert, batch)


def test_a_hook_under_which_the_model_does_not_run(bert: BertForQuestionAnswering, batch: Any) -> None:
    bert.bert.register_forward_hook(lambda module, args, output: (output[0],))
    with pytest.raises(GETAError, match=r"cannot run the batch, but a copy .* can: .*They differ: the forward hook"):
        check_rebuilds(bert, batch)


def test_a_forward_that_names_no_inputs(bert: BertForQuestionAnswering) -> None:
    """Trainer then removes all columns, and a batch without any would be blamed."""
    bert.forward = lambda *args, **kwargs: type(bert).forward(bert, *args, **kwargs)  # type: ignore[method-assign]
    with pytest.raises(GETAError, match=r"is given no inputs: .* has its method forward replaced by .*Remove it"):
        check_rebuilds(bert, {})


# --- structure ------------------------------------------------------------------------------------------------------


def cut(model: BertForQuestionAnswering) -> None:
    model.bert.encoder.layer = model.bert.encoder.layer[:1]


def more_outputs(model: BertForQuestionAnswering) -> None:
    model.qa_outputs = nn.Linear(32, 7)


def deep_head(model: BertForQuestionAnswering) -> None:
    model.qa_outputs = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 2))  # type: ignore[assignment]


def more_words(model: BertForQuestionAnswering) -> None:
    model.bert.embeddings.word_embeddings = nn.Embedding(70, 32)


def weight_norm(model: BertForQuestionAnswering) -> None:
    parametrizations.weight_norm(model.qa_outputs)


def pruned(model: BertForQuestionAnswering) -> None:
    prune.l1_unstructured(model.qa_outputs, "weight", 0.5)


def other_activation(name: str) -> Change:
    def change(model: BertForQuestionAnswering) -> None:
        for one in model.bert.encoder.layer:
            one.intermediate.intermediate_act_fn = ACT2FN[name]

    return change


def one_activation(model: BertForQuestionAnswering) -> None:
    layer(model).intermediate.intermediate_act_fn = nn.Tanh()


def scaling(model: BertForQuestionAnswering) -> None:
    layer(model).attention.self.scaling = 0.7


def epsilon(model: BertForQuestionAnswering) -> None:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-3


def other_heads(model: BertForQuestionAnswering) -> None:
    model.config.num_attention_heads = 2


def buffer(model: BertForQuestionAnswering) -> None:
    model.bert.embeddings.position_ids += 1


STRUCTURE: dict[str, tuple[Change, str]] = {
    "layers cut": (cut, "no tensor bert.encoder.layer.1.*num_hidden_layers=1"),
    "a head by hand": (more_outputs, r"qa_outputs.weight .*\(7, 32\), but \(2, 32\).*num_labels=7"),
    "a deeper head": (deep_head, "no tensor qa_outputs.weight.*Undo the change"),
    "more words": (more_words, "word_embeddings.weight.*vocab_size=70"),
    "weight norm": (
        weight_norm,
        r"no tensor qa_outputs.weight.*remove_parametrizations\(model.get_submodule\('qa_outputs'\), 'weight'\)",
    ),
    "masks": (pruned, r"no tensor qa_outputs.weight.*prune.remove\(model.get_submodule\('qa_outputs'\), 'weight'\)"),
    "another activation": (other_activation("relu"), "layer.0.*act_fn is a ReLU.*GELU.*hidden_act='relu'"),
    "an activation that is close": (other_activation("gelu_new"), "NewGELUActivation.*hidden_act='gelu_new'"),
    "an activation in one layer": (one_activation, "layer.0.intermediate.*act_fn is a Tanh.*Undo the change"),
    "an attribute": (scaling, "layer.0.attention.self has scaling = 0.7, and 0.35.*Undo the change"),
    "an attribute that the config has": (epsilon, "eps = 0.001.*layer_norm_eps=0.001"),
    "the config changed later": (other_heads, "num_attention_heads = 4, and 2 in the copy.*num_attention_heads=4"),
    "a buffer": (buffer, "the buffer position_ids of bert.embeddings has other values"),
}


@pytest.mark.parametrize("kind", STRUCTURE)
def test_what_the_config_does_not_build_is_refused(bert: BertForQuestionAnswering, batch: Any, kind: str) -> None:
    change, named = STRUCTURE[kind]
    change(bert)
    with pytest.raises(GETAError, match=rf"(?s){named}"):
        check_rebuilds(bert, batch)


def added_gate(model: BertForQuestionAnswering) -> None:
    norm = layer(model).output.LayerNorm
    norm.register_parameter("gate", nn.Parameter(torch.zeros(())))
    norm.forward = lambda x: nn.LayerNorm.forward(norm, x) + norm.gate * x


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("place", ["lm_head", "model.layers.0.mlp.up_proj"])
def test_a_bias_added_in_place_is_refused_even_where_it_is_zero(place: str, value: float) -> None:
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
    linear = model.get_submodule(place)
    linear.bias = nn.Parameter(torch.full((linear.out_features,), value))
    with pytest.raises(GETAError, match=f"the parameter bias of {place} is not in the copy"):
        check_rebuilds(model, {"input_ids": torch.arange(4, 12)[None]})


def test_a_parameter_that_is_zero_at_first_is_refused(bert: BertForQuestionAnswering, batch: Any) -> None:
    added_gate(bert)
    with pytest.raises(GETAError, match=r"the parameter gate of .*layer.0.output.LayerNorm is not in the copy"):
        check_rebuilds(bert, batch)


def test_an_added_parameter_that_no_output_needs_is_welcome(bert: BertForQuestionAnswering, batch: Any) -> None:
    bert.log_variance = nn.Parameter(torch.zeros(()))
    check_rebuilds(bert, batch)


def test_a_layer_added_in_place(bert: BertForQuestionAnswering, batch: Any) -> None:
    bert.bert.encoder.layer.append(type(layer(bert))(bert.config))
    with pytest.raises(GETAError, match=r"layer.2 \(BertLayer\) is not in the copy. .*num_hidden_layers=3"):
        check_rebuilds(bert, batch)
    # Even a layer that computes nothing cannot be stored in packed form.
    bert.bert.encoder.layer = bert.bert.encoder.layer[:2]
    bert.more = nn.Linear(2, 2)
    check_rebuilds(bert, batch)
    with pytest.raises(GETAError, match="more is to be quantized, but the config"):
        check_rebuilds(bert, batch, ["more"])


class NeedsMore(BertForQuestionAnswering):
    def __init__(self, config: BertConfig, width: int) -> None:
        super().__init__(config)
        self.width = width


def test_a_class_that_its_config_does_not_build(batch: Any) -> None:
    with pytest.raises(GETAError, match="NeedsMore cannot be built from its BertConfig"):
        check_rebuilds(NeedsMore(tiny_bert_config(), 3), batch)


def test_a_config_that_no_file_holds(bert: BertForQuestionAnswering, batch: Any) -> None:
    bert.config.device = object()
    with pytest.raises(GETAError, match=r"BertConfig can't be written to config.json"):
        check_rebuilds(bert, batch)


@pytest.mark.parametrize("name", ["qa_outputs.weight", "bert.encoder.layer.0.intermediate.dense.weight"])
def test_weights_of_zero_hide_nothing(bert: BertForQuestionAnswering, batch: Any, name: str) -> None:
    inner_hook(bert)
    bert.get_parameter(name).data.zero_()
    if name == "qa_outputs.weight":
        bert.qa_outputs.bias.data.zero_()
        with pytest.raises(GETAError, match="the forward hook"):
            check_rebuilds(bert, batch)
    else:
        check_rebuilds(bert, batch)  # 1.5 times GELU of 0 is 0, and all other outputs agree bit by bit


# --- what changes nothing -------------------------------------------------------------------------------------------


def observing(model: BertForQuestionAnswering) -> None:
    model.seen = []
    layer(model).register_forward_hook(lambda module, args, output: model.seen.append(1))


def no_dropout(model: BertForQuestionAnswering) -> None:
    layer(model).output.dropout = nn.Identity()
    layer(model).attention.output.dropout.p = 0.3


def wrapped_by_accelerate(model: BertForQuestionAnswering) -> None:
    model.forward = convert_outputs_to_fp32(torch.autocast("cpu", dtype=torch.bfloat16)(model.forward))


WELCOME: dict[str, Change] = {
    "a hook that only observes": observing,
    "dropout": no_dropout,
    "checkpointing": lambda model: model.activation_checkpointing_enable(),
    "inputs that require gradients": lambda model: model.enable_input_require_grads(),
    "a module that computes nothing": lambda model: model.add_module("more", nn.Linear(2, 2)),
    "a buffer that is not read": lambda model: model.register_buffer("steps", torch.zeros(1)),
    "autocast around the forward": wrapped_by_accelerate,
    "words added by transformers": lambda model: model.resize_token_embeddings(70),
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "eager attention": lambda model: model.set_attn_implementation("eager"),
}


@pytest.mark.parametrize("kind", WELCOME)
def test_what_changes_no_output_is_welcome(bert: BertForQuestionAnswering, batch: Any, kind: str) -> None:
    WELCOME[kind](bert)
    bert.train()
    before = {name: (tensor, tensor.clone()) for name, tensor in bert.state_dict(keep_vars=True).items()}
    random = torch.get_rng_state()
    check_rebuilds(bert, batch)
    assert bert.training and torch.equal(random, torch.get_rng_state())
    for name, tensor in bert.state_dict(keep_vars=True).items():
        assert tensor is before[name][0] and torch.equal(tensor, before[name][1]), name


def test_rounding_alone_is_welcome(bert: BertForQuestionAnswering, batch: Any) -> None:
    """Another order of summation, as a fused kernel has it."""
    dense = bert.qa_outputs

    def forward(x: torch.Tensor) -> torch.Tensor:
        return (x.flip(-1).unsqueeze(-2) * dense.weight.flip(-1)).sum(-1) + dense.bias

    plain = bert(**batch).start_logits
    dense.forward = forward  # type: ignore[method-assign]
    assert not torch.equal(bert(**batch).start_logits, plain)
    check_rebuilds(bert, batch)


def test_buffers_made_on_another_device_may_differ_in_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes))
    ids = {"input_ids": torch.arange(8)[None]}
    model.model.rotary_emb.inv_freq *= 1 + 1e-7
    check_rebuilds(model, ids)
    model.model.rotary_emb.inv_freq *= 1.5
    with pytest.raises(GETAError, match=r"the buffer inv_freq of model.rotary_emb has"):
        check_rebuilds(model, ids)


def test_models_whose_own_code_uses_parametrizations() -> None:
    config = WavLMConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=[8, 8],
        conv_stride=[5, 4],
        conv_kernel=[10, 3],
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    check_rebuilds(WavLMForSequenceClassification(config), {"input_values": torch.randn(2, 400)})


def test_pictures_and_a_config_of_labels() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=5, **sizes))
    pixels = {"pixel_values": torch.randn(1, 3, 8, 8)}
    check_rebuilds(model, pixels)
    model.config.num_labels = 4
    with pytest.raises(GETAError, match=r"classifier.weight .*\(5, 16\), but \(4, 16\).*num_labels=5"):
        check_rebuilds(model, pixels)


def test_without_weights_only_the_tensors_are_compared(batch: Any) -> None:
    with torch.device("meta"):
        model = BertForQuestionAnswering(tiny_bert_config())
    check_rebuilds(model, batch)
    more_outputs(model)
    with pytest.raises(GETAError, match="num_labels=7"):
        check_rebuilds(model, batch)


def test_a_batch_that_the_model_refuses_is_for_others_to_name(bert: BertForQuestionAnswering) -> None:
    check_rebuilds(bert, {"input_ids": torch.full((1, 3), 1000)})


def test_one_copy_is_built_and_each_runs_once(
    bert: BertForQuestionAnswering, batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it costs before training: no weights are copied."""
    built, run = [], []
    build, outputs = rebuild.build_empty, rebuild._outputs
    monkeypatch.setattr(rebuild, "build_empty", lambda *args, **kwargs: built.append(1) or build(*args, **kwargs))
    monkeypatch.setattr(rebuild, "_outputs", lambda *args: run.append(1) or outputs(*args))
    check_rebuilds(bert, batch)
    assert len(built) == 1 and len(run) == 2
