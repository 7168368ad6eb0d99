"""Ordinary checkpoints of pruned models: found, proved, read without geta_hf, or refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForQuestionAnswering, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from geta_hf.errors import GETAError
from geta_hf.export import export
from geta_hf.export.formats import plain as plain_module
from geta_hf.export.formats.plain import ConfigSearch, plain_models
from geta_hf.export.formats.vanilla import write_plain, write_vanilla
from geta_hf.serialization.hf_quantizer import attach_quantizer
from geta_hf.surgery.slice import slice_model
from geta_hf.surgery.verify import mask_groups
from tests.architectures import build
from tests.elsewhere import run_elsewhere
from tests.export.formats.uniform import compressed, cut, halved, logits, prepared, tiny
from tests.export.test_activations import rounding
from tests.export.tiny_encoders import some_batch, tiny_model, train_by_hand
from tests.spaces import build_space

KINDS = ("llama", "mistral", "qwen2", "qwen3", "phi", "phi3", "gemma", "gemma2")
SMALLER = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24}
NEW_TOKENS = 4

Made = tuple[PreTrainedModel, PreTrainedModel, dict[str, Tensor], Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Made]]:
    """By kind: the masked model, its compressed copy, the batch and the vanilla folder."""
    home, found = tmp_path_factory.mktemp("vanilla"), {}
    for name in KINDS:
        model, small, batch = prepared(name)
        (home / name).mkdir()
        write_vanilla(small, home / name, batch)
        found[name] = (model, small, batch, home / name)
    yield found


@pytest.mark.parametrize("kind", KINDS)
def test_masked_and_reloaded_agree(kind: str, made: dict[str, Made]) -> None:
    model, _, batch, folder = made[kind]
    reloaded = AutoModelForCausalLM.from_pretrained(folder)
    assert type(reloaded) is type(model)
    assert (logits(reloaded, batch) - logits(model, batch)).abs().max() <= 1e-5
    assert all(type(layer) is nn.Linear for layer in reloaded.modules() if isinstance(layer, nn.Linear))


@pytest.mark.parametrize("kind", KINDS)
def test_config_says_the_cut_and_nothing_else(kind: str, made: dict[str, Made]) -> None:
    model, _, _, folder = made[kind]
    saved = json.loads((folder / "config.json").read_text())
    before = model.config.to_dict()
    changed = {key: value for key, value in saved.items() if before.get(key) != value}
    del changed["architectures"], changed["dtype"]
    heads = {**SMALLER, "num_key_value_heads": 2} if kind == "phi" else SMALLER
    assert changed == (heads if before.get("head_dim") else heads | {"head_dim": 8})
    assert saved["head_dim"] == 8
    assert "geta" not in (folder / "config.json").read_text() and "quantization_config" not in saved
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors"}


def test_read_and_run_without_geta(made: dict[str, Made], tmp_path: Path) -> None:
    """Logits, and tokens generated with a cache and without, of all kinds in one environment without geta_hf."""
    for name, (_, _, batch, _) in made.items():
        save_file({key: tensor.contiguous() for key, tensor in batch.items()}, tmp_path / f"{name}.in")
    home = made["llama"][3].parent
    run_elsewhere(
        f"""
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
for name in {KINDS!r}:
    model = AutoModelForCausalLM.from_pretrained({str(home)!r} + "/" + name)
    batch = load_file(name + ".in")
    options = dict(input_ids=batch["input_ids"], max_new_tokens={NEW_TOKENS}, do_sample=False)
    with torch.no_grad():
        found = {{"logits": model(**batch).logits}}
        for cached in (True, False):
            found[f"tokens {{cached}}"] = model.generate(**options, use_cache=cached)
    save_file(found, name + ".out")
""",
        tmp_path,
    )
    for name, (model, _, batch, _) in made.items():
        found = load_file(tmp_path / f"{name}.out")
        assert (found["logits"] - logits(model, batch)).abs().max() <= 1e-5
        ids, options = batch["input_ids"], {"max_new_tokens": NEW_TOKENS, "do_sample": False}
        for cached in (True, False):
            assert torch.equal(found[f"tokens {cached}"], model.generate(ids, use_cache=cached, **options))


def test_the_model_is_left_unchanged(tmp_path: Path) -> None:
    _, small, batch = prepared("llama")
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    config, text = small.config.to_dict(), str(small)
    write_vanilla(small, tmp_path, batch)
    assert (small.config.to_dict(), str(small)) == (config, text)
    assert all(torch.equal(tensor, before[name]) for name, tensor in small.state_dict().items())


def test_without_cut_or_without_quantizers(tmp_path: Path) -> None:
    for name, kinds, bits in (("dense", (), (4,)), ("pruned", ("heads", "channels"), None), ("neither", (), None)):
        model, batch = tiny("qwen2")
        (tmp_path / name).mkdir()
        write_vanilla(cut(model, batch, kinds=kinds, bits=bits), tmp_path / name, batch)
        saved = json.loads((tmp_path / name / "config.json").read_text())
        assert saved["num_attention_heads"] == (2 if kinds else 4)
        assert ("head_dim" in saved) == bool(kinds)  # pinned only where it would change


def test_from_a_folder_of_ours(tmp_path: Path) -> None:
    model, batch = tiny("llama-bias")
    space = build_space(model, batch)
    mask_groups(model, space.families, {family.name: halved(family) for family in space.prunable})
    export(model, tmp_path / "geta", space=space, batch=batch)
    (tmp_path / "vanilla").mkdir()
    write_vanilla(AutoModelForCausalLM.from_pretrained(tmp_path / "geta"), tmp_path / "vanilla", batch)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "vanilla")
    assert (logits(reloaded, batch) - logits(model, batch)).abs().max() <= 1e-5
    assert reloaded.lm_head.weight is reloaded.model.embed_tokens.weight
    assert "geta" not in (tmp_path / "vanilla" / "config.json").read_text()


def test_a_plain_model_is_written_as_it_is(tmp_path: Path) -> None:
    model, batch = tiny("llama")
    write_vanilla(model, tmp_path, batch)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(reloaded, batch), logits(model, batch))


def test_dtype_is_kept(tmp_path: Path) -> None:
    dtype = torch.bfloat16
    model, batch = tiny("qwen3", dtype)
    small = cut(model, batch)
    write_vanilla(small, tmp_path, batch)
    stored, weights = load_file(tmp_path / "model.safetensors"), small.state_dict()
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    assert all(torch.equal(tensor, weights[name]) for name, tensor in stored.items())
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == dtype


def test_encoder_with_fewer_channels(tmp_path: Path) -> None:
    model = tiny_model()
    small = cut(model, some_batch(), kinds=("channels",))
    write_vanilla(small, tmp_path, some_batch())
    reloaded = AutoModelForQuestionAnswering.from_pretrained(tmp_path)
    assert reloaded.config.intermediate_size == 32
    with torch.no_grad():
        gap = reloaded(**some_batch()).start_logits - model.eval()(**some_batch()).start_logits
    assert gap.abs().max() <= 1e-5


def test_a_number_that_the_config_leaves_open(tmp_path: Path) -> None:
    """gpt2's `n_inner` is None, for four times the hidden size."""
    model, batch = tiny("gpt2")
    write_vanilla(cut(model, batch, kinds=("channels",)), tmp_path, batch)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["n_inner"] == 64 and saved["n_embd"] == model.config.n_embd


def test_a_list_by_layer_may_differ_from_layer_to_layer(tmp_path: Path) -> None:
    model, batch = tiny("gemma3n")
    space = build_space(model, batch)
    mlps = [family for family in space.prunable if family.name.endswith("mlp:channels")]
    removal = {family.name: torch.arange(family.size) < 8 * (place + 1) for place, family in enumerate(mlps)}
    write_vanilla(compressed(model, batch, space, removal), tmp_path, batch)
    assert json.loads((tmp_path / "config.json").read_text())["intermediate_size"] == [40, 32]


def test_one_number_for_two_kinds_of_layers(tmp_path: Path) -> None:
    """t5's heads: encoder, decoder and cross attention share a number; the position table follows it."""
    model, batch = tiny("t5")
    write_vanilla(cut(model, batch), tmp_path, batch)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["num_heads"], saved["d_kv"], saved["d_ff"]) == (2, 8, 24)


def test_cut_experts_run_in_plain_transformers(tmp_path: Path) -> None:
    """18 of 48 channels are rows of 72 bytes, which the fused kernel refuses; whole 16 bytes it takes."""
    model, batch = tiny("mixtral")
    space = build_space(model, batch)
    for kept, experts in ((18, "eager"), (16, "grouped_mm")):
        folder = tmp_path / str(kept)
        folder.mkdir()
        removal = {f.name: torch.arange(f.size) >= kept for f in space.prunable if f.kind == "channels"}
        small = compressed(*tiny("mixtral"), space, removal)
        write_vanilla(small, folder, batch)
        saved = json.loads((folder / "config.json").read_text())
        assert saved["intermediate_size"] == kept and saved.get("experts_implementation", "grouped_mm") == experts
        reloaded = AutoModelForCausalLM.from_pretrained(folder)
        assert reloaded.config._experts_implementation == experts
        assert (logits(reloaded, batch) - logits(small, batch)).abs().max() <= 1e-5


def test_a_folder_that_does_not_run_is_said_to_be_one(tmp_path: Path) -> None:
    """A mutation: the experts' fused kernel where it can't be."""
    model, batch = tiny("mixtral")
    space = build_space(model, batch)
    removal = {f.name: torch.arange(f.size) >= 18 for f in space.prunable if f.kind == "channels"}

    def save(plain: PreTrainedModel) -> None:
        del plain.config.experts_implementation
        plain.save_pretrained(tmp_path)

    with pytest.raises(GETAError, match="the vanilla folder loads, but MixtralForCausalLM can't run it: strides"):
        write_plain(compressed(model, batch, space, removal), tmp_path, batch, save, "vanilla")
    assert list(tmp_path.iterdir()) == []


class TwoWaysConfig(PreTrainedConfig):
    """Sizes of `head_dim` times `heads`: either may have been halved."""

    model_type = "two_ways"

    def __init__(self, head_dim: int = 4, heads: int = 4, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.head_dim, self.heads = head_dim, heads


class TwoWays(PreTrainedModel):
    config_class = TwoWaysConfig

    def __init__(self, config: TwoWaysConfig) -> None:
        super().__init__(config)
        self.head_dim = config.head_dim
        self.qkv = nn.Linear(8, 3 * config.heads * config.head_dim)
        self.out = nn.Linear(config.heads * config.head_dim, 8)
        self.post_init()

    def forward(self, x: Tensor, return_dict: bool = True) -> BaseModelOutput:
        q, k, v = self.qkv(x).view(*x.shape[:-1], 3, -1, self.head_dim).unbind(2)
        weights = (q.transpose(1, 2) @ k.transpose(1, 2).transpose(2, 3)).softmax(-1)
        return BaseModelOutput(last_hidden_state=self.out((weights @ v.transpose(1, 2)).transpose(1, 2).flatten(2)))


def test_outputs_decide_where_sizes_leave_a_choice(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TwoWays(TwoWaysConfig()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    kept = torch.arange(8, 16)
    qkv = torch.cat([kept, kept + 16, kept + 32])
    fixes = slice_model(model, {"qkv.weight": {0: qkv}, "qkv.bias": {0: qkv}, "out.weight": {1: kept}})
    attach_quantizer(model, fixes)
    found = [(m.config.head_dim, m.config.heads) for m in plain_models(model)]
    assert found == [(2, 4), (4, 2)]
    write_vanilla(model, tmp_path, {"x": torch.randn(2, 5, 8)})
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["head_dim"], saved["heads"]) == (4, 2)


def test_layers_that_differ_are_refused_by_name_and_count(tmp_path: Path) -> None:
    model, batch = tiny("llama")
    space = build_space(model, batch)
    mlps = [family for family in space.prunable if family.kind == "channels"]
    removal = {family.name: torch.arange(family.size) < 8 * (place + 1) for place, family in enumerate(mlps)}
    message = (
        r"a LlamaConfig has one number for all: model\.layers\.0\.mlp\.gate_proj\.weight has 40 of 48, "
        r"model\.layers\.1\.mlp\.gate_proj\.weight has 32 of 48; train with uniform=True in GETAConfig"
    )
    with pytest.raises(GETAError, match=message):
        write_vanilla(compressed(model, batch, space, removal), tmp_path, batch)
    assert list(tmp_path.iterdir()) == []


def test_a_layer_left_whole_is_a_difference_too(tmp_path: Path) -> None:
    model, batch = tiny("llama")
    space = build_space(model, batch)
    first = next(family for family in space.prunable if family.kind == "channels")
    with pytest.raises(GETAError, match=r"layers\.0\.mlp\.gate_proj\.weight has 24 of 48, .*layers\.1.* has 48 of 48"):
        write_vanilla(compressed(model, batch, space, {first.name: halved(first)}), tmp_path, batch)


def test_what_the_config_cannot_say_is_refused_by_tensor_and_shape(tmp_path: Path) -> None:
    model = tiny_model()
    message = r"no number in BertConfig makes bert\..*query\.weight \(16, 32\), which it makes \(32, 32\)"
    with pytest.raises(GETAError, match=message):
        write_vanilla(cut(model, some_batch()), tmp_path, some_batch())


def test_what_the_config_refuses_is_said(tmp_path: Path) -> None:
    """A Llama's heads must divide its hidden size, though nothing in it needs that."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "use_cache": False}
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=4, **sizes)).eval()
    batch = build("llama")[1]
    space = build_space(model, batch)
    removal = {family.name: torch.arange(4) < 1 for family in space.prunable if family.kind == "heads"}
    message = r"q_proj\.weight \(24, 32\).*num_attention_heads = 3 is refused: .*not a multiple of the number of att"
    with pytest.raises(GETAError, match=message):
        write_vanilla(compressed(model, batch, space, removal), tmp_path, batch)


def test_rounded_activations_are_refused(tmp_path: Path) -> None:
    model, batch = build("llama")
    space = build_space(model, batch)
    train_by_hand(model, space)
    rounding(model, batch)
    with pytest.raises(GETAError, match=r"no place for rounded activations, which 14 layers have \(the first is model"):
        write_vanilla(compressed(model, batch, space, {}, bits=None), tmp_path, batch)


def test_wrong_weights_are_caught_and_nothing_is_left(tmp_path: Path) -> None:
    _, small, batch = prepared("llama")

    def save(plain: PreTrainedModel) -> None:
        plain.model.norm.weight = nn.Parameter(1.01 * plain.model.norm.weight)
        plain.save_pretrained(tmp_path)

    with pytest.raises(GETAError, match=r"the vanilla model's logits \(eager attention\) differs by"):
        write_plain(small, tmp_path, batch, save, "vanilla")
    assert list(tmp_path.iterdir()) == []


def test_wrong_generation_is_caught(tmp_path: Path) -> None:
    """A mutation that logits do not show."""
    _, small, batch = prepared("llama")

    def save(plain: PreTrainedModel) -> None:
        plain.generation_config.suppress_tokens = list(range(50))
        plain.save_pretrained(tmp_path)

    with pytest.raises(GETAError, match="generation"):
        write_plain(small, tmp_path, batch, save, "vanilla")


def test_without_pinning_the_head_size_is_not_guessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mutation: qwen2 would work the size of a head out from the number of heads."""
    _, small, batch = prepared("qwen2")
    monkeypatch.setattr(ConfigSearch, "_found_pins", lambda *_: {})
    with pytest.raises(GETAError, match="no number in Qwen2Config makes"):
        write_vanilla(small, tmp_path, batch)


def test_a_size_attribute_that_does_not_follow_is_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """phi3 splits its fused projection by numbers of its own, which the fix list names."""
    model, batch = tiny("phi3")
    small = cut(model, batch)
    small.config.quantization_config.fixes["attrs"]["model.layers.1.self_attn"]["num_key_value_heads"] = 2
    small.model.layers[1].self_attn.num_key_value_heads = 2
    with pytest.raises(GETAError, match=r"no number in Phi3Config|layers differ"):
        list(plain_models(small))


def test_few_models_are_built_however_many_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    settings: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4}
    settings |= {"vocab_size": 99, "intermediate_size": 96, "num_hidden_layers": 24}
    with torch.device("meta"):
        full = Qwen2ForCausalLM(Qwen2Config(**settings))
        smaller = {"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 40, "head_dim": 8}
        small = Qwen2ForCausalLM(Qwen2Config(**{**settings, **smaller}))
    small.config = full.config
    built: list[int] = []
    build_model = plain_module.ConfigSearch.build
    monkeypatch.setattr(ConfigSearch, "build", lambda self, changes: built.append(1) or build_model(self, changes))
    found = next(ConfigSearch(small).solutions())
    assert {place[0]: value for place, value in found.items()} == smaller
    assert len(built) <= 30
