"""Runs with `grid="block32"` from the first step to a reloaded folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel, BertForQuestionAnswering, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from geta_hf import GETAConfig, GETATrainer
from geta_hf.errors import GETAError
from geta_hf.export import ExportReport
from geta_hf.methods import PostTrainingConfig
from geta_hf.quantization import quantized_layers
from geta_hf.serialization.decode import read_headers
from geta_hf.serialization.loader import GETAQuantizationConfig
from tests.conftest import tiny_bert_config
from tests.training.test_trainer import SMALL, STEPS, arguments, rows

pytestmark = pytest.mark.usefixtures("shared_spaces")


def bert() -> BertForQuestionAnswering:
    return BertForQuestionAnswering(tiny_bert_config(num_hidden_layers=1, hidden_size=40, intermediate_size=80))


def llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=60, num_hidden_layers=1, max_position_embeddings=32, **sizes))


class Ended(NamedTuple):
    made: GETATrainer
    report: ExportReport
    folder: Path


def run(name: str, folder: Path, resume: str | None = None, kind: type[GETAConfig] = GETAConfig) -> GETATrainer:
    torch.manual_seed(0)
    model: PreTrainedModel = bert() if name == "bert" else llama()
    data = rows()
    if name == "llama":
        data = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in data]
    config = kind(target_sparsity=0.4, grid="block32", **SMALL)
    made = GETATrainer(model, arguments(folder, save_steps=10), geta_config=config, train_dataset=data)
    made.train(resume_from_checkpoint=resume)
    return made


@pytest.fixture(scope="module", params=["bert", "llama"])
def ended(request, tmp_path_factory, shared_spaces) -> Ended:
    folder = tmp_path_factory.mktemp(request.param)
    made = run(request.param, folder)
    return Ended(made, made.export_model(folder / "small"), folder / "small")


def stored(folder: Path) -> dict[str, np.ndarray]:
    with safe_open(folder / "model.safetensors", "np") as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118


def codes_of(stream: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The codes of a bit stream, by the folder format's own words."""
    ones = np.unpackbits(stream, bitorder="little")[: count * bits].reshape(count, bits)
    return (ones * 2 ** np.arange(bits)).sum(1).astype(np.int64) - 2 ** (bits - 1)


def test_masked_cut_and_reloaded_models_agree(ended: Ended) -> None:
    made, report, folder = ended
    assert report.kept and any(kept < before for kept, before in report.kept.values())
    small = type(made.model).from_pretrained(folder)
    batch = {"input_ids": torch.stack([row["input_ids"] for row in rows(4)])}
    with torch.no_grad():
        wanted, found = made.model.eval()(**batch), small(**batch)
    for key in ("start_logits", "end_logits", "logits"):
        if key in wanted:
            torch.testing.assert_close(found[key], wanted[key], rtol=1e-4, atol=1e-5)
    assert AutoModel.from_pretrained(folder) is not None
    again = folder.parent / "again"
    small.save_pretrained(again)
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_every_block_of_the_folder_is_32_neighbors_on_a_step_of_fp16(ended: Ended) -> None:
    made, report, folder = ended
    small, tensors = type(made.model).from_pretrained(folder), stored(folder)
    checked = 0
    for name, bits in report.bits.items():
        weight, scale = small.get_submodule(name).weight.detach().numpy(), tensors[f"{name}.weight_scale"]
        outputs, inputs = weight.shape
        assert scale.dtype == np.float16 and scale.shape == (outputs, -(-inputs // 32))
        codes = codes_of(tensors[f"{name}.weight"], bits, weight.size).reshape(outputs, inputs)
        steps = np.repeat(scale.astype(np.float32), 32, axis=1)[:, :inputs]
        np.testing.assert_array_equal(weight, codes * steps)
        checked += inputs % 32 != 0
    # Last blocks that are shorter, because of what was removed, are among them.
    assert checked


def test_the_ledger_counts_the_folder_to_the_byte(ended: Ended) -> None:
    made, report, _ = ended
    ledger = made.qasso.ledger
    bits = torch.tensor([report.bits[layer.weight.removesuffix(".weight")] for layer in ledger.layers])
    assert ledger.stored_bytes(made.qasso.removed_mask, bits.double()) == report.file_bytes


def test_removed_inputs_lie_behind_the_blocks_of_the_others(ended: Ended) -> None:
    made = ended.made
    found = 0
    for layer in quantized_layers(made.model).values():
        own = layer.weight_quantizer
        assert own.order is not None
        kept = torch.nonzero(layer.weight.detach().abs().sum(0) > 0).flatten()
        assert torch.equal(own.order[: len(kept)], kept)
        found += len(kept) < len(own.order)
        assert torch.allclose(own.bits(), own.bits().round(), atol=1e-3)
    assert found


def test_a_wrong_order_of_the_blocks_is_caught(ended: Ended, tmp_path: Path) -> None:
    made = ended.made
    layer = next(
        layer for layer in quantized_layers(made.model).values() if layer.weight_quantizer.block_order is not None
    )
    own = layer.weight_quantizer
    right = own.order.clone()
    own.set_order(torch.arange(len(right)))
    try:
        with pytest.raises(GETAError, match="the blocks of 32 are those of all inputs"):
            made.export_model(tmp_path / "small")
        made.restore_compression()
        assert torch.equal(own.order, right)
    finally:
        own.set_order(right)


def test_a_run_resumes_bit_for_bit(ended: Ended) -> None:
    made = ended.made
    if not isinstance(made.model, BertForQuestionAnswering):
        return
    for step in (10, 20):
        folder = ended.folder.parent
        resumed = run("bert", folder / f"from {step}", str(folder / f"checkpoint-{step}"))
        assert resumed.state.global_step == STEPS
        whole, state = made.model.state_dict(), resumed.model.state_dict()
        assert whole.keys() == state.keys() and any(key.endswith("quantizer.order") for key in whole)
        for key, value in whole.items():
            assert torch.equal(state[key], value), (step, key)


def test_readers_refuse_what_they_do_not_know(ended: Ended, tmp_path: Path) -> None:
    config = json.loads((ended.folder / "config.json").read_text())["quantization_config"]
    assert config["grid"] == "block32"
    with pytest.raises(GETAError, match="grid is 'block64', not 'block32'"):
        GETAQuantizationConfig(**{**config, "grid": "block64"})
    # Without the key, a reader that knows no blocks refuses the type of the step sizes.
    for path in ended.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    whole = json.loads((tmp_path / "config.json").read_text())
    del whole["quantization_config"]["grid"]
    (tmp_path / "config.json").write_text(json.dumps(whole))
    with pytest.raises(GETAError, match=r"weight_scale is F16 of shape \(\d+, \d+\), not one float32"):
        type(ended.made.model).from_pretrained(tmp_path)
    assert {header.kind for header in read_headers([str(ended.folder / "model.safetensors")], ended.folder).values()}


def test_rounding_after_training_forms_blocks(tmp_path: Path) -> None:
    made = run("bert", tmp_path, kind=PostTrainingConfig)
    report = made.export_model(tmp_path / "small")
    assert set(report.bits.values()) <= set(range(4, 9))
    assert any(layer.weight_quantizer.block_order is not None for layer in quantized_layers(made.model).values())
