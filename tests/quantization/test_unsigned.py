"""Inputs without negative codes: the grid of a bit more, zero below zero, and the same in folders and integers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import OPTConfig, OPTForCausalLM

from geta_hf import SearchConfig
from geta_hf.errors import GETAError
from geta_hf.export import export
from geta_hf.inference.layers import STATIC, is_exact, set_path
from geta_hf.quantization import attach_input_quantizers, attach_quantizers, quantized_layers
from geta_hf.quantization.fixed import FixedQuantizer
from geta_hf.quantization.quantizer import Quantizer, fixed_quantizer
from geta_hf.serialization.loader import GETAQuantizationConfig
from geta_hf.serialization.packed_layers import packed_layers
from tests.methods import loop
from tests.methods.qasso.toy import Toy
from tests.spaces import build_space


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_there_are_twice_as_many_steps_and_no_negative_ones(bits: int) -> None:
    quantizer = Quantizer(3.0, bits, unsigned=True)
    assert float(quantizer.bits()) == pytest.approx(bits, abs=1e-5)
    x = torch.linspace(-4, 4, 1001)
    step = 3.0 / (2**bits - 1)
    wanted = torch.round(x.clamp(0, 3) / step) * step
    torch.testing.assert_close(quantizer(x), wanted)
    fixed = fixed_quantizer(quantizer, bits)
    torch.testing.assert_close(fixed(x), wanted)
    assert fixed.largest_code == 2**bits - 1 and len(quantizer(x).unique()) == 2**bits
    assert "unsigned" in repr(fixed) and "unsigned" not in repr(FixedQuantizer(torch.ones(1), 4))


def test_gradients_are_those_of_pact() -> None:
    quantizer = Quantizer(1.0, 4, unsigned=True)
    x = torch.tensor([-0.5, 0.3, 0.9, 1.5], requires_grad=True)
    quantizer(x).backward(torch.tensor([1.0, 2.0, 4.0, 8.0]))
    assert x.grad.tolist() == [0, 2, 4, 0]
    # At a fixed width d follows q_m: the log-slopes add up to c · Σ g over x >= c, plus what rounding gives.
    quantizer.d.grad.zero_()
    assert float(quantizer.q_m.grad) == pytest.approx(8.0)


def relu_model() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    config = OPTConfig(vocab_size=20, hidden_size=16, ffn_dim=24, num_hidden_layers=1, num_attention_heads=2)
    config.word_embed_proj_dim, config.max_position_embeddings = 16, 32
    return OPTForCausalLM(config).eval(), {"input_ids": torch.arange(8)[None]}


def test_a_folder_says_which_inputs_they_are(tmp_path: Path) -> None:
    model, batch = relu_model()
    space = build_space(model, batch)
    attach_quantizers(model, initial_bits=6, grid="channel")
    attach_input_quantizers(model, [batch], initial_bits=7, target_bits=7, unsigned=True)
    found = [name for name, layer in quantized_layers(model).items() if layer.input_quantizer.unsigned]
    assert found == ["model.decoder.layers.0.fc2"]  # which follows the ReLU
    assert f"{found[0]}.input_quantizer.unsigned_codes" in model.state_dict()
    export(model, tmp_path / "out", space=space, batch=batch)
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert stored["unsigned_inputs"] == found and stored["format_version"] == 2
    assert stored["activation_bits"][found[0]] == 7
    reloaded = OPTForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(reloaded(**batch).logits, model(**batch).logits, rtol=1e-3, atol=1e-3)
    layer = packed_layers(reloaded)[found[0]]
    assert is_exact(layer) and layer.input_quantizer.unsigned
    x = torch.randn(5, 24)
    with torch.no_grad():
        wanted = layer(x)
        set_path(found[0], layer, STATIC)
        torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-5)
    layer.input_quantizer = FixedQuantizer(torch.ones(1), 8, unsigned=True)
    assert not is_exact(layer)  # 255 is no int8


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"unsigned_inputs": "fc2"}, "unsigned_inputs must be a list of module names, not 'fc2'"),
        ({"unsigned_inputs": ["fc2"]}, "unsigned_inputs names 'fc2', which is not in activation_bits"),
        (
            {"unsigned_inputs": ["fc2"], "format_version": 1},
            "unsigned_inputs came with format_version 2, but this is 1",
        ),
    ],
)
def test_hostile_lists_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(GETAError, match=message):
        GETAQuantizationConfig(bits={"fc2": 4}, **values)


@pytest.mark.parametrize("unsigned", [True, False])
def test_a_search_chooses_widths_of_such_inputs(unsigned: bool) -> None:
    config = SearchConfig(
        target_bops=0.015, bits=(2, 6), warmup=1, search=6, activation_bits=(4, 7), unsigned_inputs=unsigned
    )
    model, method, optimizer = loop.prepare(config, Toy(), steps=10)
    layers = quantized_layers(model)
    # The second layer of each block reads what a ReLU gives.
    assert [layer.input_quantizer.unsigned for layer in layers.values()] == [False, unsigned] * 2
    loop.train(model, method, optimizer, steps=5)
    own = layers["layers.1"].input_mixture
    assert own.levels.tolist() == [2 ** (b + unsigned - 1) - 1 for b in (4, 5, 6, 7)]
    loop.train(model, method, optimizer, steps=10)
    for name, bits in method.result().input_bits.items():
        assert float(layers[name].input_quantizer.bits()) == pytest.approx(bits, abs=1e-3)
        own = layers[name].input_quantizer
        steps = float((own.q_m / own.d).detach())
        assert steps == pytest.approx(2 ** (bits - 1 + own.unsigned) - 1, rel=1e-3)
