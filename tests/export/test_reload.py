"""Masked = sliced = reloaded on architectures whose code needs attributes changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from geta_hf.export import export
from geta_hf.qadg import zero_groups
from geta_hf.surgery.compare_outputs import attention_outputs
from geta_hf.surgery.trial_cut import try_cuts
from geta_hf.surgery.verify import mask_groups
from geta_hf.training.plan import make_ledger
from tests.architectures import build
from tests.export.tiny_encoders import train_by_hand
from tests.qadg.test_architectures import QUICK
from tests.spaces import build_space
from tests.surgery.test_verify import with_kinds


def logits(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return attention_outputs(model, batch)["eager"]["logits"]


FAST = ("gpt2", "opt", "phi3", "t5", "deberta-v2", "mixtral", "wav2vec2", "resnet")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(QUICK - set(FAST)))
def test_every_common_architecture_is_exported_and_reloaded(name: str, tmp_path: Path) -> None:
    model, batch = build(name)
    space = try_cuts(model, build_space(model, batch), batch)
    kept = train_by_hand(model, space)
    report = export(model, tmp_path / "out", space=space, batch=batch)
    assert {family: count for family, (count, _) in report.kept.items()} == kept
    assert any(count < whole for count, whole in report.kept.values())
    type(model).from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")
    files = [folder / "model.safetensors" for folder in (tmp_path / "out", tmp_path / "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("name", FAST)
def test_masked_sliced_and_reloaded_agree(name: str, tmp_path: Path) -> None:
    model, batch = build(name)
    original = model.config.to_dict()
    space = build_space(model, batch)
    kept = train_by_hand(model, space, quantize=name != "resnet")
    report = export(model, tmp_path / "out", space=space, batch=batch)
    assert {family: count for family, (count, _) in report.kept.items()} == kept
    reloaded = type(model).from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(reloaded, batch), logits(model, batch), rtol=1e-4, atol=1e-5)
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    for key in ("num_attention_heads", "num_heads", "n_head", "intermediate_size", "hidden_size"):
        assert saved.get(key) == original.get(key)


def test_tied_layers_are_packed_once(tmp_path: Path) -> None:
    """The attention and MLP of one block serve several; some modules would be initialized in their full size."""
    model, batch = build("zamba")
    space = try_cuts(model, build_space(model, batch), batch)
    train_by_hand(model, space)
    ledger = make_ledger(model, space)
    report = export(model, tmp_path / "out", space=space, batch=batch)
    gone = torch.cat([zero_groups(model, space)[family.name] for family in space.prunable])
    bits = torch.tensor([report.bits[layer.weight.removesuffix(".weight")] for layer in ledger.layers])
    assert len(bits) < len(report.bits)
    assert report.file_bytes == ledger.stored_bytes(gone, bits.double())
    reloaded = type(model).from_pretrained(tmp_path / "out")
    first, other = (reloaded.model.layers[place].shared_transf.self_attn.q_proj for place in (1, 3))
    assert first.weight is other.weight
    reloaded.save_pretrained(tmp_path / "again")
    files = [folder / "model.safetensors" for folder in (tmp_path / "out", tmp_path / "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_folder_saved_again_is_the_same(tmp_path: Path) -> None:
    model, batch = build("phi3")
    space = build_space(model, batch)
    train_by_hand(model, space)
    export(model, tmp_path / "out", space=space, batch=batch)
    first = type(model).from_pretrained(tmp_path / "out")
    assert any("config.num_attention_heads" in a for a in first.config.quantization_config.fixes["attrs"].values())
    first.save_pretrained(tmp_path / "again")
    second = type(model).from_pretrained(tmp_path / "again")
    assert torch.equal(logits(first, batch), logits(second, batch))


def test_buffers_that_are_not_saved_are_cut_after_loading(tmp_path: Path) -> None:
    """Dims of heads of queries, keys and values alike: the rotary frequencies lose theirs."""
    model, batch = build("llama")
    space = with_kinds(build_space(model, batch), "head_dim")
    removal = {f.name: torch.arange(f.size) < f.size // 4 for f in space.prunable}
    mask_groups(model, space.families, removal)
    report = export(model, tmp_path / "out", space=space, batch=batch)
    fixes = json.loads((report.path / "config.json").read_text())["quantization_config"]["fixes"]
    assert fixes["keep"] == {"model.rotary_emb.inv_freq": {"0": [1, 2, 3]}}
    assert fixes["attrs"]["model.layers.0.self_attn"]["head_dim"] == 6
    reloaded = type(model).from_pretrained(tmp_path / "out")
    assert reloaded.model.rotary_emb.inv_freq.shape == (3,)
    torch.testing.assert_close(logits(reloaded, batch), logits(model, batch))


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_the_residual_stream_is_cut_and_reloaded(name: str, tmp_path: Path) -> None:
    model, batch = build(name)
    space = with_kinds(build_space(model, batch), "residual")
    train_by_hand(model, space)
    report = export(model, tmp_path / "out", space=space, batch=batch)
    assert all(left < whole for left, whole in report.kept.values())
    assert report.difference <= 1e-5
