"""GGUF files as the package gguf reads them, and as llama.cpp runs them where it is installed."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast

from geta_hf import convert, export
from geta_hf.errors import GETAError
from geta_hf.export.formats import exported
from geta_hf.export.formats.gguf import check_gguf, proof, write_gguf
from geta_hf.export.formats.gguf.architectures import layout_of, longest_alike, tensors
from geta_hf.export.formats.gguf.vocabulary import read_vocabulary
from geta_hf.quantization import attach_quantizers
from geta_hf.serialization.encode import dense_weight
from geta_hf.serialization.packed_layers import packed_layers
from tests.export.formats.gguf import tiny

gguf = pytest.importorskip("gguf")

LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 256,
    "partial_rotary_factor": 1.0,
}
LONG_PHI = {
    "pad_token_id": 0,
    "rope_parameters": LONG,
    "original_max_position_embeddings": 256,
    "max_position_embeddings": 512,
}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 64}


@pytest.fixture(scope="module", autouse=True)
def without_runner() -> Iterator[None]:
    """Nothing runs unless a test says so: every run takes a process of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proof, "RUNNER", "no_such_package")
        yield


def write(model: PreTrainedModel, folder: Path, tokenizer: Any = None, **options: Any) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    write_gguf(model, folder, tiny.batch(), processing_class=tokenizer or tiny.byte_level(), **options)
    return json.loads((folder / "config.json").read_text())["exported_as"]


def read(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, str]]:
    """Metadata, decoded tensors and their types."""
    reader = gguf.GGUFReader(folder / "model.gguf")
    decoded = {
        one.name: torch.from_numpy(np.array(gguf.quants.dequantize(one.data, one.tensor_type), dtype=np.float32))
        for one in reader.tensors
    }
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, decoded, {one.name: one.tensor_type.name for one in reader.tensors}


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path, dict[str, Any]]:
    small = tiny.cut(tiny.model("Llama"), alike=False)
    folder = tmp_path_factory.mktemp("gguf")
    return small, folder, write(small, folder)


def in_pairs(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Row i of the first half of each head, then row i of its second half, for all i."""
    order = []
    for head in range(weight.shape[0] // head_dim):
        for place in range(head_dim // 2):
            order += [head * head_dim + place, head * head_dim + head_dim // 2 + place]
    return weight[order]


def test_every_tensor_is_the_model_s(uneven: tuple[PreTrainedModel, Path, dict[str, Any]]) -> None:
    model, folder, found = uneven
    _, decoded, _ = read(folder)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for name, layer in packed_layers(model).items():
        block, path = name.removeprefix("model.layers.").split(".", 1)
        expected = dense_weight(layer)
        expected = in_pairs(expected, 16) if names[path] in ("attn_q", "attn_k") else expected
        stored = decoded[f"blk.{block}.{names[path]}.weight"]
        assert (stored - expected).abs().max() <= 2**-11 * expected.abs().max()
        if stored.shape[1] % 32 == 0:
            # Codes are as they were: only the one step size was rounded.
            step = float(layer.step_size.half())
            assert torch.equal(stored, torch.round(expected / layer.step_size) * step)
    assert torch.equal(decoded["output_norm.weight"], model.model.norm.weight)
    assert torch.equal(decoded["token_embd.weight"], model.model.embed_tokens.weight.half().float())
    assert len(decoded) == len(list(model.parameters())) and found["architecture"] == "deci"


def test_layers_that_differ_have_counts_of_their_own(uneven: tuple[PreTrainedModel, Path, dict[str, Any]]) -> None:
    model, folder, found = uneven
    fields, decoded, types = read(folder)
    assert fields["general.architecture"] == "deci" and fields["deci.block_count"] == 2
    assert fields["deci.attention.head_count"] == [4, 2] and fields["deci.attention.head_count_kv"] == [2, 1]
    assert fields["deci.feed_forward_length"] == [64, 48]
    assert decoded["blk.1.attn_q.weight"].shape == (32, 64)
    bits = {name: layer.bits for name, layer in packed_layers(model).items()}
    assert types["blk.0.attn_q.weight"] == "Q4_0" and bits["model.layers.0.self_attn.q_proj"] == 4
    assert types["blk.0.ffn_up.weight"] == "Q5_0" and bits["model.layers.0.mlp.up_proj"] == 5
    # 48 values to a row have no blocks of 32.
    assert types["blk.1.ffn_down.weight"] == "F16"
    assert any("blk.1.ffn_down.weight (7 bits, rows of 48) is F16" in note for note in found["notes"])
    assert any("multiple_of=32" in note for note in found["notes"])


def test_folder_says_what_is_not_exact_and_that_nothing_ran(
    uneven: tuple[PreTrainedModel, Path, dict[str, Any]],
) -> None:
    _, folder, found = uneven
    card = (folder / "README.md").read_text()
    assert not found["run"]["ran"] and "Not run: no_such_package is not installed" in card
    assert 0 < found["not_exact"]["blk.0.attn_q.weight"]["error"] <= 2**-11
    assert "blk.0.attn_norm.weight" not in found["not_exact"] and "not exactly the trained ones" in card


def test_steps_in_half_precision_lose_nothing(
    uneven: tuple[PreTrainedModel, Path, dict[str, Any]], tmp_path: Path
) -> None:
    small = copy.deepcopy(uneven[0])
    for layer in packed_layers(small).values():
        codes = torch.round(layer.weight / layer.step_size)
        layer.step_size = layer.step_size.half().float()
        layer.weight.data = codes * layer.step_size
    for parameter in (small.model.embed_tokens.weight, small.lm_head.weight):
        parameter.data = parameter.data.half().float()
    found = write(small, tmp_path)
    assert list(found["not_exact"]) == ["blk.1.ffn_down.weight"]  # rows of 48


@pytest.mark.parametrize(
    ("kind", "changes", "alike", "name"),
    [
        ("Qwen2", {}, None, "qwen2"),
        ("Qwen2", {}, True, "deci"),  # qwen2 wants all heads
        ("Qwen3", {"head_dim": 32}, True, "qwen3"),
        ("Phi3", {"pad_token_id": 0}, None, "phi3"),
        ("Phi", {"num_key_value_heads": 4}, None, "phi2"),
        ("Gemma3", GEMMA, None, "gemma3"),
    ],
)
def test_architectures(kind: str, changes: dict[str, Any], alike: bool | None, name: str, tmp_path: Path) -> None:
    model = tiny.model(kind, **changes)
    small = tiny.sliced(model) if alike else model
    assert write(small, tmp_path, float32=True)["architecture"] == name
    fields, decoded, types = read(tmp_path)
    assert set(types.values()) == {"F32"}
    heads = fields[f"{name}.attention.head_count"]
    assert (heads if isinstance(heads, int) else heads[0]) == (4 if alike is None else 2)
    if kind == "Qwen2" and alike:
        bias = small.model.layers[0].self_attn.q_proj.bias
        assert torch.equal(decoded["blk.0.attn_q.bias"], in_pairs(bias, 16))
    if kind == "Qwen2" and alike is None:
        assert torch.equal(decoded["blk.0.attn_q.bias"], small.model.layers[0].self_attn.q_proj.bias)
    if kind == "Gemma3":
        assert torch.equal(decoded["blk.1.ffn_norm.weight"], 1 + small.model.layers[1].pre_feedforward_layernorm.weight)
        assert fields["gemma3.attention.sliding_window"] == 64
    if kind == "Phi":
        assert fields["phi2.rope.dimension_count"] == 8


def test_rotary_factors_of_llama_3(tmp_path: Path) -> None:
    model = tiny.model("Llama", rope_parameters=LLAMA_3, head_dim=32)
    write(model, tmp_path)
    factors = read(tmp_path)[1]["rope_freqs.weight"]
    expected = []
    for place in range(0, 32, 2):
        # By the definition in Llama 3.1: long waves are divided, short ones are not, with a ramp between.
        wave = 2 * math.pi * 10000 ** (place / 32)
        smooth = min(max((64 / wave - 1) / (4 - 1), 0.0), 1.0)
        expected.append(1 / ((1 - smooth) / 8 + smooth))
    assert factors.tolist() == pytest.approx(expected, rel=1e-5)


def test_tied_head_is_stored_once(tmp_path: Path) -> None:
    write(tiny.model("Llama", tie_word_embeddings=True), tmp_path)
    assert "output.weight" not in read(tmp_path)[1]


# --- the tokenizer ------------------------------------------------------------------------------------------------


def test_byte_level_tokenizer() -> None:
    found = read_vocabulary(tiny.byte_level(), 262, tiny.model("Llama").config)
    assert (found.model, found.pre, found.merges) == ("gpt2", "gpt-2", ["t h", "th e"])
    assert found.tokens[256:] == ["<s>", "</s>", "th", "the", "[PAD260]", "[PAD261]"]
    assert found.kinds[256:] == [3, 3, 1, 1, 5, 5] and found.special == {"bos": 256, "eos": 257}
    assert found.added["bos"] is False and found.space_prefix is None


def test_tokenizer_on_characters() -> None:
    found = read_vocabulary(tiny.characters(), 280, tiny.model("Llama").config)
    assert (found.model, found.added["bos"], found.space_prefix) == ("llama", True, True)
    assert found.kinds[:4] == [2, 3, 3, 6] and found.scores is not None
    # The better score is merged first.
    scores = dict(zip(found.tokens, found.scores, strict=True))
    assert scores["▁t"] > scores["he"] > scores["▁the"] > scores["▁"]


def test_chat_template_is_written(tmp_path: Path) -> None:
    tokenizer = tiny.byte_level()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    write(tiny.model("Llama"), tmp_path, tokenizer)
    fields = read(tmp_path)[0]
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template
    assert fields["tokenizer.ggml.eos_token_id"] == 257 and fields["tokenizer.ggml.model"] == "gpt2"


def word_piece() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]")


def other_split() -> PreTrainedTokenizerFast:
    tokenizer = tiny.byte_level()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def no_split() -> PreTrainedTokenizerFast:
    tokenizer = tiny.byte_level()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (None, "holds the tokenizer, and there is none"),
        (word_piece(), "is a WordPiece tokenizer without a GGUF model"),
        (other_split(), "for which there is no name here"),
        (no_split(), "splits texts by no rule, for which"),
        (tiny.byte_level(ignore_merges=True), "merges in another way"),
    ],
)
def test_tokenizers_that_llama_cpp_lacks(tokenizer: Any, message: str) -> None:
    with pytest.raises(GETAError, match=message):
        check_gguf(tiny.model("Llama"), tokenizer)


def test_tokenizer_of_another_model() -> None:
    with pytest.raises(GETAError, match="has ids up to 259, the model has 200 rows"):
        check_gguf(tiny.model("Llama", vocab_size=200, bos_token_id=1, eos_token_id=2), tiny.byte_level())


# --- what has no place --------------------------------------------------------------------------------------------


def test_architecture_without_a_name() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=288, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(GETAError, match=r"no architecture for GPT2LMHeadModel \(gpt2\)"):
        check_gguf(model, tiny.byte_level())


def test_activation_that_llama_cpp_does_not_compute() -> None:
    with pytest.raises(GETAError, match=r"computes relu, but llama\.cpp's llama silu"):
        check_gguf(tiny.model("Llama", hidden_act="relu"), tiny.byte_level())


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exported, "find_spec", lambda _: None)
    with pytest.raises(GETAError, match=r"pip install 'geta_hf\[gguf\]'"):
        check_gguf(tiny.model("Llama"), tiny.byte_level())


def test_norms_of_queries_have_no_place_where_layers_differ() -> None:
    small = tiny.sliced(tiny.model("Qwen3", head_dim=16), (1,))
    with pytest.raises(GETAError, match=r"layers of Qwen3ForCausalLM differ \(heads 4, 2"):
        check_gguf(small, tiny.byte_level())


def test_removed_heads_have_no_place_in_phi() -> None:
    small = tiny.sliced(tiny.model("Phi", num_key_value_heads=4))
    with pytest.raises(GETAError, match="no place for removed heads: 2 of 16 remain"):
        check_gguf(small, tiny.byte_level())


def test_heads_that_are_rotated_in_part() -> None:
    model = tiny.model("Llama")
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq[:4]
    with pytest.raises(GETAError, match="rotates 8 of the 16 dims of a head"):
        check_gguf(model, tiny.byte_level())


def test_heads_that_were_cut_in_width() -> None:
    model = tiny.model("Llama")
    model.model.layers[1].self_attn.head_dim = 12
    with pytest.raises(GETAError, match=r"model.layers.1.self_attn has heads of 12 dims, of 16 before the cut"):
        check_gguf(model, tiny.byte_level())


def test_windows_in_another_order() -> None:
    with pytest.raises(GETAError, match="a full layer after every five"):
        check_gguf(tiny.model("Gemma3", layer_types=["full_attention"] * 2, **GEMMA), tiny.byte_level())


def test_rotary_positions_without_a_name() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(GETAError, match="rotary positions of type dynamic"):
        check_gguf(tiny.model("Llama", rope_parameters=rope), tiny.byte_level())


def test_window_is_noted() -> None:
    assert "the model to the last 32" in layout_of(tiny.model("Mistral", sliding_window=32)).notes[0]


def test_long_factors_are_noted() -> None:
    model = tiny.model("Phi3", **LONG_PHI)
    assert "with a context above 256 tokens" in layout_of(model).notes[0] and longest_alike(model.config) == 256
    assert longest_alike(tiny.model("Llama", rope_parameters=YARN).config) == 128  # one set of factors


# --- proofs -------------------------------------------------------------------------------------------------------


def test_damaged_file_is_found(uneven: tuple[PreTrainedModel, Path, dict[str, Any]], tmp_path: Path) -> None:
    model, folder, _ = uneven
    data = bytearray((folder / "model.gguf").read_bytes())
    (tmp_path / "model.gguf").write_bytes(data)
    expected = list(tensors(model, layout_of(model)))
    proof.prove_decoded(tmp_path / "model.gguf", expected)
    data[gguf.GGUFReader(folder / "model.gguf").tensors[0].data_offset + 1] ^= 16
    (tmp_path / "model.gguf").write_bytes(data)
    with pytest.raises(GETAError, match="once decoded"):
        proof.prove_decoded(tmp_path / "model.gguf", expected)
    with pytest.raises(GETAError, match=r"holds no blk\.9"):
        proof.prove_decoded(folder / "model.gguf", [("blk.9", expected[0][1])])


def test_other_probabilities_and_tokens_are_found() -> None:
    model, prompt = tiny.model("Llama"), [5, 6, 7]
    with torch.no_grad():
        row = model(input_ids=torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1)
    best = int(row.argmax())

    def gaps(token: int, shift: float) -> list[float]:
        answer = {"prompts": [{"tokens": [token], "listed": [{str(best): float(row[best]) + shift}]}]}
        with torch.no_grad():
            return proof._gaps(model, [prompt], answer)[0]

    best_chance, least_chance = float(row[best].exp()), float(row.min().exp())
    assert gaps(best, 0.0) == pytest.approx([0.0], abs=1e-6)
    assert gaps(best, 0.5) == pytest.approx([best_chance * (math.exp(0.5) - 1)], rel=1e-4)
    assert gaps(int(row.argmin()), 0.0) == pytest.approx([best_chance - least_chance], rel=1e-4)
    proof._check_gap(1e-3, proof.EXACT)
    for gap in (1.1e-3, math.nan):
        with pytest.raises(GETAError, match="probabilities of next tokens differ"):
            proof._check_gap(gap, proof.EXACT)
    tokenizer = tiny.byte_level()
    expected = tokenizer(proof.TEXT)["input_ids"]
    proof._check_text(expected, tokenizer)
    with pytest.raises(GETAError, match="splits a text into other tokens"):
        proof._check_text([*expected[:3], 0], tokenizer)


def test_other_perplexity_is_found() -> None:
    model, text = tiny.model("Llama"), [5, 6, 7, 8]
    with torch.no_grad():
        rows = model(input_ids=torch.tensor([text])).logits[0].double().log_softmax(-1)
        expected = [float(rows[place, token]) for place, token in enumerate(text[1:])]
        # Without a score a token counts on neither side.
        found, own = proof._perplexities(model, [text], [[expected[0] - 0.1, None, expected[2] - 0.3]])
    assert own == pytest.approx(math.exp(-(expected[0] + expected[2]) / 2), rel=1e-6)
    assert found == pytest.approx(own * math.exp(0.2), rel=1e-6)
    proof._check_perplexity(10.09, 10.0)
    for perplexity in (10.11, 9.89, math.nan):
        with pytest.raises(GETAError, match="perplexity of a text is"):
            proof._check_perplexity(perplexity, 10.0)
    run = proof.Run(True, "llama.cpp", perplexity=(10.0, 10.2, 10.0))
    assert "by +2.0%" in proof.perplexity_notes(run)[0]
    assert not proof.perplexity_notes(proof.Run(True, "llama.cpp", perplexity=(10.0, 10.05, 10.0)))


def test_an_export_becomes_a_file(tmp_path: Path) -> None:
    model, tokenizer = tiny.model("Llama", num_hidden_layers=1), tiny.byte_level()
    attach_quantizers(model, initial_bits=4)
    export(model, tmp_path / "geta", batch=tiny.batch(), processing_class=tokenizer)
    export(model, tmp_path / "trained", batch=tiny.batch(), processing_class=tokenizer, format="gguf")
    convert(tmp_path / "geta", tmp_path / "file", format="gguf")
    first, second = read(tmp_path / "trained"), read(tmp_path / "file")
    assert first[2] == second[2] and "Q4_0" in first[2].values()
    assert all(torch.equal(tensor, second[1][name]) for name, tensor in first[1].items())
    assert (tmp_path / "file" / "model.gguf").is_file() and (tmp_path / "file" / "tokenizer.json").is_file()
    (tmp_path / "geta" / "tokenizer_config.json").unlink()
    with pytest.raises(GETAError, match="there is none"):
        convert(tmp_path / "geta", tmp_path / "other", format="gguf")
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "changes", "alike"),
    [
        ("Llama", {"rope_parameters": LLAMA_3}, False),
        ("Llama", {"tie_word_embeddings": True}, False),
        ("Llama", {"rope_parameters": YARN}, True),
        ("Llama", {"attention_bias": True, "mlp_bias": True}, False),
        ("Mistral", {"sliding_window": None}, False),
        ("Qwen2", {}, False),
        ("Qwen2", {}, None),
        ("Qwen2", {"tie_word_embeddings": True}, True),
        ("Qwen3", {"head_dim": 32}, True),
        ("Phi3", {"pad_token_id": 0}, None),
        ("Phi3", LONG_PHI, None),
        ("Phi", {"num_key_value_heads": 4}, None),
        ("Gemma3", GEMMA, True),
    ],
)
def test_llama_cpp_gives_the_model_s_probabilities(
    kind: str, changes: dict[str, Any], alike: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xllamacpp")
    monkeypatch.setattr(proof, "RUNNER", "xllamacpp")
    model = tiny.model(kind, **changes)
    run = write(model if alike is None else tiny.cut(model, alike), tmp_path)["run"]
    assert run["ran"] and run["tokens"] == 128
    assert run["float_difference"] <= 1e-3 and run["mean_difference"] <= run["difference"] <= 0.05
    expected, found, floats = run["perplexity"]
    assert run["same_tokens"] == 128 and floats == pytest.approx(expected, rel=1e-4)
    assert found == pytest.approx(expected, rel=0.01)
    assert "Perplexity of a short text" in (tmp_path / "README.md").read_text()
