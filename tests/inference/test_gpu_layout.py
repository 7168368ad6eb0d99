"""What a GPU gets, computed on a CPU: padded weights, halves of bytes, few rows and many."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from geta_hf.inference import layers, prepare, prepare_for_inference, products
from geta_hf.inference.layers import DYNAMIC, FEW_ROWS, FLOAT, WEIGHT_ONLY, IntegerLayer
from geta_hf.serialization.packed_layers import packed_layers
from tests.inference.models import bert, error, files, gpt2, outputs

SHAPES: list[tuple[int, ...]] = [(3, 5), (FEW_ROWS,), (5, FEW_ROWS)]


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (products, layers, prepare):
        monkeypatch.setattr(module, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(prepare, "multiplies_bytes", lambda device: True)
    monkeypatch.setattr(prepare, "runs_triton", lambda device: True)
    monkeypatch.setattr(layers, "HAS_TRITON", False)  # so that products are taken on decoded weights
    monkeypatch.setattr(torch, "_int_mm", int_mm_of_a_gpu)


def int_mm_of_a_gpu(a: Tensor, b: Tensor) -> Tensor:
    """Refuse what torch and cuBLAS refuse there: too few rows, sizes that are no multiples of 8, any other order."""
    assert a.dtype == b.dtype == torch.int8
    assert a.shape[0] > 16 and a.shape[1] % 8 == 0 and b.shape[1] % 8 == 0
    assert a.is_contiguous() and b.t().is_contiguous()
    return (a.double() @ b.double()).to(torch.int32)


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


def test_rows_are_padded_to_sixteen_bytes_and_narrow_weights_take_half_a_byte(tmp_path: Path) -> None:
    for place, model in enumerate((bert(), gpt2()[0])):
        shapes = {name: layer.dense_shape for name, layer in packed_layers(model).items()}
        model.save_pretrained(tmp_path / f"before{place}")
        paths = prepare_for_inference(model, "int8").paths
        halved = set()
        for name, layer in packed_layers(model).items():
            assert layer.dense_shape == shapes[name]
            if paths[name] == DYNAMIC:
                rows = layer.weight.t() if isinstance(layer, Conv1D) else layer.weight
                assert rows.shape[0] % 8 == 0 and rows.shape[1] % 16 == 0 and rows.is_contiguous()
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


@pytest.mark.parametrize("bits", [4, 8])
def test_a_transposed_weight_that_needs_no_padding_still_has_its_rows_in_memory(bits: int) -> None:
    model, _ = gpt2()
    layer = next(layer for layer in packed_layers(model).values() if isinstance(layer, Conv1D) and layer.bits <= 4)
    layer.bits, layer.__class__ = bits, layers._integer_class(type(layer))
    stored = layer.stored(torch.randint(-7, 8, (64, 24), generator=torch.Generator().manual_seed(0)), torch.float32)
    assert stored.t().is_contiguous() and stored.shape == (32 if bits == 4 else 64, 24)


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(0, 8, 8), (1, 13, 7), (5, 32, 8), (70, 33, 24)])
def test_products_of_any_size_and_order_are_those_that_a_gpu_takes(rows: int, inputs: int, outputs: int) -> None:
    """A model that was prepared on a CPU and then moved has no padding; an input may be a transposed view."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-127, 128, (inputs, rows), generator=generator).to(torch.int8).t()
    weight = torch.randint(-127, 128, (inputs, outputs), generator=generator).to(torch.int8).t()
    expected = x.long() @ weight.long().t()
    assert torch.equal(products.integer_product(x, weight, outputs).long(), expected)


def test_gpus_that_do_not_multiply_bytes_decode_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """V100 and older: cuBLAS refuses the product. Older than those, Triton does not run either."""
    monkeypatch.setattr(prepare, "multiplies_bytes", lambda device: False)
    for model in (bert(), bert(6)):
        x = {name: torch.randn(70, layer.dense_shape[1]) for name, layer in packed_layers(model).items()}
        expected = {name: layer(x[name]) for name, layer in packed_layers(model).items()}
        assert set(prepare_for_inference(model, "int8").paths.values()) == {FLOAT, WEIGHT_ONLY}
        for name, layer in packed_layers(model).items():
            torch.testing.assert_close(layer(x[name]), expected[name], rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(prepare, "runs_triton", lambda device: False)
    assert set(prepare_for_inference(bert(), "int8").paths.values()) == {FLOAT}
