from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn
from transformers import AutoModelForQuestionAnswering

from geta_hf.errors import GETAError
from geta_hf.inference import InferenceReport, prepare, prepare_for_inference
from geta_hf.inference.layers import DYNAMIC, FLOAT, STATIC, IntegerConv1D, IntegerLayer, set_path
from geta_hf.serialization.packed_layers import packed_layers
from tests.export.tiny_encoders import some_batch, tiny_model
from tests.inference.models import bert, error, files, gpt2, outputs, t5

QUERY = "bert.encoder.layer.0.attention.self.query"


def test_auto_takes_integers_only_where_inputs_were_trained_to_be_rounded() -> None:
    plain = bert()
    expected = outputs(plain)
    assert set(prepare_for_inference(plain).paths.values()) == {FLOAT}
    assert torch.equal(outputs(plain), expected)


@pytest.mark.parametrize("per_channel", [False, True])
def test_trained_rounding_gives_the_float_path_in_integers(per_channel: bool) -> None:
    model = bert(6, per_channel)
    layers = packed_layers(model)
    x = {name: torch.randn(3, 5, layer.dense_shape[1]) for name, layer in layers.items()}
    expected = {name: layer(x[name]) for name, layer in layers.items()}
    report = prepare_for_inference(model)
    for name, layer in layers.items():
        assert report.paths[name] == (STATIC if layer.bits <= 8 else FLOAT)
        assert isinstance(layer, IntegerLayer) == (layer.bits <= 8)
        torch.testing.assert_close(layer(x[name]), expected[name], rtol=1e-5, atol=1e-5)
    assert STATIC in report.paths.values()


@pytest.mark.parametrize("build", [lambda: (bert(), some_batch()), gpt2, t5], ids=["bert", "gpt2", "t5"])
def test_dynamic_integers_change_outputs_by_about_a_percent(build: Any) -> None:
    model, batch = build()
    expected = outputs(model, batch)
    report = prepare_for_inference(model, "int8")
    assert DYNAMIC in report.paths.values()
    assert all(isinstance(layer, IntegerLayer) == (layer.bits <= 8) for layer in packed_layers(model).values())
    assert 0 < error(outputs(model, batch), expected) < 0.03


def test_conv1d_has_an_integer_kind() -> None:
    model, _ = gpt2()
    prepare_for_inference(model, "int8")
    assert any(type(layer) is IntegerConv1D for layer in packed_layers(model).values())


@pytest.mark.parametrize("build", [lambda: (bert(6), some_batch()), gpt2], ids=["bert", "gpt2"])
def test_hooks_of_accelerate_stand_over_every_path(build: Any) -> None:
    """As a model over several devices has them: each holds on to the forward that its module had."""
    plain, batch = build()
    hooked = copy.deepcopy(plain)
    for layer in packed_layers(hooked).values():
        add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu"))
    for compute in ("int8", "float", "auto"):
        assert prepare_for_inference(hooked, compute).paths == prepare_for_inference(plain, compute).paths
        assert torch.equal(outputs(hooked, batch), outputs(plain, batch))
    assert torch.equal(outputs(hooked.dequantize(), batch), outputs(plain.dequantize(), batch))
    assert not packed_layers(hooked)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_cast_reaches_the_type_that_integers_go_back_to(dtype: torch.dtype) -> None:
    expected, model = bert(), bert()
    expected.to(dtype)
    prepare_for_inference(model, "int8")
    dense = copy.deepcopy(model).to(dtype).dequantize()
    model.to(dtype)
    assert outputs(model).dtype == dtype
    prepare_for_inference(model, "float")
    for found in (model, dense):
        assert {parameter.dtype for parameter in found.parameters()} == {dtype}
        assert not [name for name, _ in found.named_buffers() if "like" in name]
    assert torch.equal(outputs(model), outputs(expected))
    assert torch.equal(outputs(dense), outputs(expected.dequantize()))


def test_rows_of_a_batch_have_no_part_in_each_other() -> None:
    model = bert()
    prepare_for_inference(model, "int8")
    layer = model.get_submodule(QUERY)
    x = torch.randn(4, 3, layer.in_features) * torch.tensor([1.0, 100.0, 0.01, 1.0]).view(4, 1, 1)
    assert torch.equal(layer(x), torch.cat([layer(part) for part in x.split(1)]))


@pytest.mark.parametrize("build", [lambda: (bert(4), None), gpt2], ids=["bert", "gpt2"])
def test_saved_folder_is_the_same_bit_for_bit(build: Any, tmp_path: Path) -> None:
    model, _ = build()
    model.save_pretrained(tmp_path / "before")
    prepare_for_inference(model, "int8")
    model.save_pretrained(tmp_path / "after")
    assert files(tmp_path / "before") == files(tmp_path / "after")


def test_prepared_after_loading_as_in_memory(tmp_path: Path) -> None:
    model = bert()
    model.save_pretrained(tmp_path / "out")
    reloaded = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "out").eval()
    reports = [prepare_for_inference(each, "int8") for each in (model, reloaded)]
    assert reports[0].paths == reports[1].paths
    assert torch.equal(outputs(model), outputs(reloaded))


@pytest.mark.parametrize("build", [lambda: (bert(per_channel=True), None), gpt2], ids=["bert", "gpt2"])
def test_float_brings_everything_back(build: Any) -> None:
    model, _ = build()
    text, expected = str(model), outputs(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kinds = {name: set(vars(layer)) for name, layer in packed_layers(model).items()}
    prepare_for_inference(model, "int8")
    prepare_for_inference(model, "int8")
    prepare_for_inference(model, "float")
    assert str(model) == text
    assert torch.equal(outputs(model), expected)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert {name: set(vars(layer)) for name, layer in packed_layers(model).items()} == kinds


def test_weights_that_lie_right_are_not_made_anew() -> None:
    model = bert(4)
    prepare_for_inference(model, "int8")
    weights = {name: layer.weight for name, layer in packed_layers(model).items()}
    name = next(name for name, layer in packed_layers(model).items() if isinstance(layer, IntegerLayer))
    set_path(name, model.get_submodule(name), DYNAMIC)
    assert prepare_for_inference(model, "int8").paths[name] == STATIC
    assert all(layer.weight is weights[name] for name, layer in packed_layers(model).items())


def test_copies_and_plain_models_are_made_of_prepared_ones() -> None:
    model = bert()
    dense = copy.deepcopy(model).dequantize()
    prepare_for_inference(model, "int8")
    twin = copy.deepcopy(model)
    assert torch.equal(outputs(twin), outputs(model))
    plain = twin.dequantize()
    assert {type(module) for module in plain.modules()} == {type(module) for module in dense.modules()}
    assert torch.equal(outputs(plain), outputs(dense))
    for (name, module), other in zip(plain.named_modules(), dense.modules(), strict=True):
        assert set(vars(module)) == set(vars(other)), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_get_and_give_their_own_type(dtype: torch.dtype) -> None:
    model = bert().to(dtype)
    expected = outputs(model)
    prepare_for_inference(model, "int8")
    assert outputs(model).dtype == dtype
    assert error(outputs(model).float(), expected.float()) < 0.05
    prepare_for_inference(model, "float")
    assert torch.equal(outputs(model), expected)


def test_compiles_without_a_break() -> None:
    model = bert(5)
    prepare_for_inference(model, "int8")
    set_path(QUERY, model.get_submodule(QUERY), DYNAMIC)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside torch's own compiler
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(outputs(compiled), outputs(model))


def test_memory_is_one_byte_for_each_weight() -> None:
    model = bert()
    layers = packed_layers(model).values()
    weights = {
        bits: sum(layer.weight.numel() for layer in layers if (layer.bits <= 8) == bits) for bits in (True, False)
    }
    report = prepare_for_inference(model, "int8")
    assert report.bytes_before["packed layers"] == 4 * (weights[True] + weights[False])
    assert report.bytes_after["packed layers"] == weights[True] + 4 * weights[False]
    assert report.bytes_after["codes kept for saving"] == report.bytes_before["codes kept for saving"] > 0
    kept = [layer.stream for layer in layers if layer.stream is not None]
    every = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers(), *kept))
    assert sum(report.bytes_after.values()) == every
    assert "packed layers" in str(report) and "int8 dynamic" in str(report)


def test_gradients_are_refused_with_the_way_out() -> None:
    model = bert()
    prepare_for_inference(model, "int8")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model(**some_batch())  # nothing to differentiate, so no no_grad() is needed
    model.bert.embeddings.word_embeddings.requires_grad_(True)
    with pytest.raises(GETAError, match=r"no gradient; .* prepare_for_inference\(model, 'float'\)"):
        model(**some_batch())


def test_tied_weights_stay_float() -> None:
    model = bert()
    first, second = (model.bert.encoder.layer[place].attention.self.query for place in (0, 1))
    other = nn.Linear(1, 1)
    other.weight, model.other = first.weight, other
    paths = prepare_for_inference(model, "int8").paths
    assert paths[QUERY] == FLOAT
    assert second.bits > 8 or isinstance(second, IntegerLayer)


def test_a_single_input_stays_float() -> None:
    """torch's product of integers leaves memory as it was there."""
    model = bert()
    layer = model.get_submodule(QUERY)
    layer.weight = nn.Parameter(layer.weight[:, :1].clone(), requires_grad=False)
    assert prepare_for_inference(model, "int8").paths[QUERY] == FLOAT


@pytest.mark.parametrize("integers_win", [False, True])
def test_batch_decides_by_time_and_leaves_out_what_is_never_called(
    monkeypatch: pytest.MonkeyPatch, integers_win: bool
) -> None:
    model = bert()

    class Clock:
        def __init__(self, text: str, globals: dict[str, Any], num_threads: int) -> None:
            self.integer, self.x = isinstance(globals["layer"], IntegerLayer), globals["x"]

        def timeit(self, number: int) -> Any:
            assert self.x.shape[:2] == some_batch()["input_ids"].shape
            return type("Time", (), {"mean": float(self.integer != integers_win)})

    monkeypatch.setattr(prepare, "Timer", Clock)
    own = model.get_submodule(QUERY)
    attention = model.get_submodule(QUERY.rpartition(".")[0])
    attention.query = None
    attention.query = _Around(own)
    report = prepare_for_inference(model, "int8", batch=some_batch())
    assert report.paths[f"{QUERY}.inner"] == FLOAT
    wanted = {name for name, layer in packed_layers(model).items() if layer.bits <= 8} - {f"{QUERY}.inner"}
    assert {name for name, path in report.paths.items() if path == DYNAMIC} == (wanted if integers_win else set())


class _Around(nn.Module):
    """Uses the weight of a layer without calling it."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.inner.weight, self.inner.bias)


def test_batch_is_really_timed() -> None:
    model = bert()
    expected = outputs(model)
    report = prepare_for_inference(model, "int8", batch=some_batch())
    assert set(report.paths.values()) <= {FLOAT, DYNAMIC}
    assert error(outputs(model), expected) < 0.03


def test_without_integer_instructions_layers_stay_float(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "_cpu_has_integers", lambda: False)
    assert set(prepare_for_inference(bert(8), "int8").paths.values()) == {FLOAT}


def test_what_cannot_be_prepared_is_refused() -> None:
    with pytest.raises(GETAError, match="compute is 'int4'; choose one of auto, int8, float"):
        prepare_for_inference(bert(), "int4")
    with pytest.raises(GETAError, match="has no packed layer; load a folder"):
        prepare_for_inference(tiny_model())
    model = bert()
    name, layer = next((name, layer) for name, layer in packed_layers(model).items() if layer.bits <= 8)
    layer.weight.data[0, 0] += 1e-3
    with pytest.raises(GETAError, match=f"{name}.weight was changed after it was decoded"):
        prepare_for_inference(model, "int8")


def test_report_is_a_table() -> None:
    report = InferenceReport({"a": FLOAT, "b": DYNAMIC}, {"all of it": 2**20}, {"all of it": 2**19})
    assert "| all of it | 1.00 MiB | 0.50 MiB |" in str(report)
    assert str(report).endswith("layers: 1 float, 1 int8 dynamic")
