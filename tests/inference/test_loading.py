from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForQuestionAnswering
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from geta_hf.errors import GETAError
from geta_hf.inference import load_for_inference, prepare_for_inference
from geta_hf.inference.layers import DYNAMIC, FLOAT, STATIC, IntegerLayer
from geta_hf.serialization.hf_quantizer import GETAHfQuantizer
from geta_hf.serialization.packed_layers import PackedLayer, packed_layers
from tests.inference.models import bert, files, gpt2, outputs

KINDS: dict[str, Any] = {
    "bert": (lambda: (bert(), None), AutoModelForQuestionAnswering),
    "bert-6-bit-inputs": (lambda: (bert(6, True), None), AutoModelForQuestionAnswering),
    "gpt2": (gpt2, AutoModelForCausalLM),
}


@pytest.mark.parametrize("compute", ["auto", "int8", "float"])
@pytest.mark.parametrize("kind", KINDS)
def test_loaded_as_loading_and_preparing_one_after_the_other(kind: str, compute: str, tmp_path: Path) -> None:
    build, model_class = KINDS[kind]
    build()[0].save_pretrained(tmp_path / "out")
    expected = model_class.from_pretrained(tmp_path / "out").eval()
    wanted = prepare_for_inference(expected, compute)
    found, report = load_for_inference(model_class, tmp_path / "out", compute)
    assert report.paths == wanted.paths
    assert report.bytes_after == wanted.bytes_after
    assert {name: type(module) for name, module in found.named_modules()} == {
        name: type(module) for name, module in expected.named_modules()
    }
    assert torch.equal(outputs(found), outputs(expected))
    found.save_pretrained(tmp_path / "again")
    expected.save_pretrained(tmp_path / "twice")
    assert files(tmp_path / "again") == files(tmp_path / "twice")


def test_no_weight_of_a_byte_is_ever_float(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bert().save_pretrained(tmp_path / "out")
    decoded, plain = set(), PackedLayer.decoded_rows

    def noted(self: PackedLayer, codes: Tensor, rows: slice) -> Tensor:
        decoded.add(self.bits)
        return plain(self, codes, rows)

    monkeypatch.setattr(PackedLayer, "decoded_rows", noted)
    model, report = load_for_inference(AutoModelForQuestionAnswering, tmp_path / "out", "int8")
    assert decoded == {layer.bits for layer in packed_layers(model).values() if layer.bits > 8} != set()
    assert set(report.paths.values()) == {FLOAT, DYNAMIC}


def test_inputs_that_were_trained_to_be_rounded_take_their_own_step(tmp_path: Path) -> None:
    bert(4).save_pretrained(tmp_path / "out")
    _, report = load_for_inference(AutoModelForQuestionAnswering, tmp_path / "out", "int8")
    assert STATIC in report.paths.values() and DYNAMIC not in report.paths.values()


def test_where_modules_lie_on_devices_it_is_prepared_after_loading(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path / "out")
    model, report = load_for_inference(AutoModelForQuestionAnswering, tmp_path / "out", "int8", device_map="cpu")
    assert DYNAMIC in report.paths.values()
    assert any(isinstance(layer, IntegerLayer) for layer in packed_layers(model).values())


def test_a_failure_leaves_usual_loading_as_it_was(tmp_path: Path) -> None:
    with pytest.raises(GETAError, match="compute is 'fast'"):
        load_for_inference(AutoModelForQuestionAnswering, tmp_path, "fast")
    bert().save_pretrained(tmp_path / "out")
    weights = tmp_path / "out" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(GETAError, match="damaged or cut short"):
        load_for_inference(AutoModelForQuestionAnswering, tmp_path / "out", "int8")
    assert AUTO_QUANTIZER_MAPPING["geta"] is GETAHfQuantizer
