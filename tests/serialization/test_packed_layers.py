from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from geta_hf.errors import GETAError
from geta_hf.quantization import Quantizer
from geta_hf.quantization.layers import quantize_layer
from geta_hf.serialization.bitpack import largest_code
from geta_hf.serialization.decode import Decode
from geta_hf.serialization.encode import layer_codes, pack_layer, packed_tensors
from geta_hf.serialization.packed_layers import (
    PackedConv1D,
    PackedConv2d,
    PackedLayer,
    PackedLinear,
    become_packed,
    packed_layers,
)

BITS, STEP = 5, 0.0371


class Sub(nn.Linear):
    """A subclass that keeps the forward."""


LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), PackedLinear, (2, 6)),
    "unbiased": (lambda: nn.Linear(6, 5, bias=False), PackedLinear, (2, 6)),
    "subclass": (lambda: Sub(6, 5), PackedLinear, (2, 6)),
    "conv1d": (lambda: Conv1D(5, 6), PackedConv1D, (2, 6)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), PackedConv2d, (2, 4, 7, 7)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), PackedConv2d, (2, 4, 7, 7)),
}


def codes_for(layer: nn.Module, bits: int = BITS) -> Tensor:
    limit = largest_code(bits)
    return torch.randint(-limit, limit + 1, layer.weight.shape, generator=torch.Generator().manual_seed(3))


def packed_layer(kind: str = "linear", dtype: torch.dtype = torch.float32) -> PackedLayer:
    layer = LAYERS[kind][0]().to(dtype)
    pack_layer("layer", layer, codes_for(layer), BITS, STEP)
    return layer


@pytest.mark.parametrize("kind", LAYERS)
def test_packed_layer_is_the_original_with_the_decoded_weight(kind: str) -> None:
    make, packed_class, shape = LAYERS[kind]
    layer = make()
    plain, original = copy.deepcopy(layer), type(layer)
    codes = codes_for(layer)
    plain.weight.data = codes * torch.tensor(STEP)
    pack_layer("layer", layer, codes, BITS, STEP)
    assert isinstance(layer, packed_class)
    assert isinstance(layer, original)
    assert torch.equal(layer.weight, plain.weight)
    assert not layer.weight.requires_grad
    assert [name for name, _ in layer.named_parameters()] == [name for name, _ in plain.named_parameters()]
    x = torch.randn(shape)
    assert torch.equal(layer(x), plain(x))


@pytest.mark.parametrize("kind", LAYERS)
def test_decoded_layer_equals_the_quantized_layer(kind: str) -> None:
    make, _, shape = LAYERS[kind]
    torch.manual_seed(0)
    layer = make()
    quantize_layer(layer, Quantizer(q_m=layer.weight.abs().max().item() * 0.8, bits=BITS))
    x = torch.randn(shape)
    with torch.no_grad():
        expected = layer(x)
    quantizer = layer.weight_quantizer
    plain = make()
    plain.load_state_dict({name: t for name, t in layer.state_dict().items() if "quantizer" not in name})
    pack_layer("layer", plain, quantizer.codes(layer.weight), BITS, quantizer.d.item())
    torch.testing.assert_close(plain(x), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", LAYERS)
def test_bytes_survive_the_way_through_a_file(kind: str) -> None:
    saved = packed_tensors("layer", packed_layer(kind))
    assert saved["layer.weight"].dtype == torch.uint8
    assert saved["layer.weight"].dim() == 1
    assert saved["layer.weight_scale"].dtype == torch.float32
    layer = loaded_layer(saved, kind)
    again = packed_tensors("layer", layer)
    assert all(torch.equal(saved[name], again[name]) for name in saved)
    assert torch.equal(layer.weight, packed_layer(kind).weight)
    assert set(layer.state_dict()) <= {"weight", "bias"}


def loaded_layer(saved: dict[str, Tensor], kind: str = "linear") -> PackedLayer:
    layer = become_packed("layer", LAYERS[kind][0](), BITS)
    decoder = Decode(None, "layer", ["layer"], layer)
    found = decoder.convert(dict(saved), full_layer_name="layer.weight")
    if decoder.problem is not None:
        raise GETAError(decoder.problem)
    layer.weight = nn.Parameter(found["layer.weight"], requires_grad=False)
    return layer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_cast_and_copy_keep_the_codes_and_the_scale(dtype: torch.dtype) -> None:
    layer = packed_layer()
    saved = packed_tensors("layer", layer)
    clone = copy.deepcopy(layer).to(dtype)
    assert clone.weight.dtype == dtype
    again = packed_tensors("layer", clone)
    assert again["layer.weight_scale"].dtype == torch.float32
    back = packed_tensors("layer", clone.float())
    assert all(torch.equal(saved[name], again[name]) and torch.equal(saved[name], back[name]) for name in saved)
    assert clone.step_size is not layer.step_size


def test_decodes_to_the_declared_dtype() -> None:
    layer = packed_layer(dtype=torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.weight, layer.decoded(layer_codes("layer", layer)).bfloat16())


def test_a_weight_that_is_on_its_grid_is_not_held_twice() -> None:
    layer, other = nn.Linear(6, 5), nn.Linear(6, 5)
    codes = torch.randint(-15, 16, (5, 6))
    with torch.no_grad():
        layer.weight.copy_(codes * STEP)
        other.weight.copy_(codes * STEP + 1e-3)
    places = [layer.weight.data_ptr(), other.weight.data_ptr()]
    for each in (layer, other):
        pack_layer("layer", each, codes, BITS, STEP)
    assert layer.weight.data_ptr() == places[0] and other.weight.data_ptr() != places[1]
    assert torch.equal(layer.weight, other.weight) and not layer.weight.requires_grad


@pytest.mark.parametrize("value", [1e-4, STEP * (largest_code(BITS) + 1)])
def test_weight_changed_after_decoding_cannot_be_saved(value: float) -> None:
    """A value between two steps, and a step that the bit width does not have."""
    layer = packed_layer()
    layer.weight.data[0, 0] = torch.tensor(value)
    with pytest.raises(GETAError, match=r"layer\.weight was changed"):
        packed_tensors("layer", layer)


@pytest.mark.parametrize("scale", [0.0, -0.1, float("nan"), float("inf")])
def test_scale_that_is_no_step_size_is_refused(scale: float) -> None:
    saved = packed_tensors("layer", packed_layer()) | {"layer.weight_scale": torch.tensor([scale])}
    with pytest.raises(GETAError, match=r"layer\.weight_scale is .*positive and finite"):
        loaded_layer(saved)


@pytest.mark.parametrize("scale", [torch.ones(2), torch.tensor(1.0), torch.ones(1).half()])
def test_scale_of_wrong_form_is_refused(scale: Tensor) -> None:
    saved = packed_tensors("layer", packed_layer()) | {"layer.weight_scale": scale}
    with pytest.raises(GETAError, match=r"layer\.weight_scale .* not one float32"):
        loaded_layer(saved)


def test_stream_of_wrong_length_names_the_tensor() -> None:
    saved = packed_tensors("layer", packed_layer())
    saved["layer.weight"] = saved["layer.weight"][:-1]
    with pytest.raises(GETAError, match=r"layer\.weight: 30 codes of 5 bits are a uint8 stream of 19 bytes"):
        loaded_layer(saved)


def test_code_beyond_its_bits_names_the_layer() -> None:
    layer = nn.Linear(6, 5)
    with pytest.raises(GETAError, match=r"some\.layer: code .* does not fit in 4 bits"):
        pack_layer("some.layer", layer, codes_for(layer), 4, STEP)
    assert type(layer) is nn.Linear


@pytest.mark.parametrize("layer", [nn.EmbeddingBag(5, 6), nn.LayerNorm(5), nn.Conv3d(2, 3, 1)])
def test_unsupported_class_is_refused(layer: nn.Module) -> None:
    with pytest.raises(GETAError, match=f"some.layer is a {type(layer).__name__}"):
        become_packed("some.layer", layer, 4)


def test_layer_cannot_be_packed_twice() -> None:
    layer = packed_layer()
    with pytest.raises(GETAError, match="only Linear"):
        become_packed("layer", layer, 4)


def test_packed_layers_are_found_by_name_and_say_their_bits() -> None:
    model = nn.Sequential(nn.Linear(6, 6), packed_layer())
    assert list(packed_layers(model)) == ["1"]
    assert "bits=5" in repr(model)
