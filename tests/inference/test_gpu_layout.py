"""What a GPU gets, computed on a CPU: padded weights, halves of bytes, few rows and many."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from geta_hf.inference import layers, prepare, prepare_for_inference, products
from geta_hf.inference.layers import DYNAMIC, FEW_ROWS, FLOAT, WEIGHT_ONLY, IntegerLayer
from geta_hf.serialization.packed_layers import packed_layers
from tests.inference.models import bert, error, files, gpt2, outputs

SHAPES: list[tuple[int, ...]] = [(3, 5), (FEW_ROWS,), (5, FEW_ROWS)]


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (products, layers, prepare):
        monkeypatch.setattr(module, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(prepare, "HAS_TRITON", True)
    monkeypatch.setattr(layers, "HAS_TRITON", False)  # so that products are taken on decoded weights


def test_auto_decodes_within_the_product_and_changes_nothing() -> None:
    for model in (bert(), bert(per_channel=True), gpt2()[0]):
        expected = outputs(model)
        report = prepare_for_inference(model)
        assert set(report.paths.values()) == {FLOAT, WEIGHT_ONLY}
        torch.testing.assert_close(outputs(model), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_few_rows_are_exact_and_many_are_rounded(shape: tuple[int, ...]) -> None:
    model = bert()
    found = packed_layers(model)
    x = {name: torch.randn(*shape, layer.dense_shape[1]) for name, layer in found.items()}
    expected = {name: layer(x[name]) for name, layer in found.items()}
    prepare_for_inference(model, "int8")
    for name, layer in found.items():
        difference = error(layer(x[name]), expected[name])
        many = isinstance(layer, IntegerLayer) and len(shape) == 2 and shape[1] == FEW_ROWS
        assert (1e-4 < difference < 0.03) if many else difference < 1e-5


def test_weights_are_padded_to_eights_and_narrow_ones_take_half_a_byte(tmp_path: Path) -> None:
    for place, model in enumerate((bert(), gpt2()[0])):
        shapes = {name: layer.dense_shape for name, layer in packed_layers(model).items()}
        model.save_pretrained(tmp_path / f"before{place}")
        paths = prepare_for_inference(model, "int8").paths
        halved = set()
        for name, layer in packed_layers(model).items():
            assert layer.dense_shape == shapes[name]
            if paths[name] == DYNAMIC:
                assert all(size % 8 == 0 for size in layer.weight.shape)
                assert layer.halved == (layer.bits <= 4)
                halved.add(layer.halved)
        assert halved == {False, True}
        model.save_pretrained(tmp_path / f"after{place}")
        assert files(tmp_path / f"before{place}") == files(tmp_path / f"after{place}")


def test_trained_rounding_is_exact_for_few_rows_and_many() -> None:
    model = bert(6)
    found = packed_layers(model)
    for shape in SHAPES:
        x = {name: torch.randn(*shape, layer.dense_shape[1]) for name, layer in found.items()}
        prepare_for_inference(model, "float")
        expected = {name: layer(x[name]) for name, layer in found.items()}
        prepare_for_inference(model)
        for name, layer in found.items():
            torch.testing.assert_close(layer(x[name]), expected[name], rtol=1e-5, atol=1e-5)
