from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForQuestionAnswering, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from geta_hf.errors import GETAError
from geta_hf.export import export
from geta_hf.export.formats import exported
from geta_hf.export.formats.exported import EXACT, Sample, difference, load
from geta_hf.export.formats.onnx import write_onnx
from geta_hf.serialization.encode import layer_codes
from geta_hf.serialization.packed_layers import packed_layers
from tests.export.formats.test_integers import compressed, gpt2, vit
from tests.export.tiny_encoders import some_batch, tiny_model, train_by_hand
from tests.spaces import build_space

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

BITS_OF_TYPE = {3: 8, 22: 4}  # TensorProto.INT8, INT4


def write(
    model: PreTrainedModel, folder: Path, batch: dict[str, Tensor], dynamic_int8: bool | None = False
) -> dict[str, float]:
    folder.mkdir()
    write_onnx(model, folder, batch, dynamic_int8=dynamic_int8)
    return json.loads((folder / "config.json").read_text())["exported_as"]["difference"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    """A model from a folder of `export`, and what was written of it."""
    home = tmp_path_factory.mktemp("onnx")
    model = tiny_model()
    space = build_space(model, some_batch())
    train_by_hand(model, space)
    export(model, home / "geta", space=space, batch=some_batch(), embedding_bits=8)
    small = AutoModelForQuestionAnswering.from_pretrained(home / "geta").eval()
    assert write(small, home / "out", some_batch())["exact"] <= 1e-6
    return small, home / "out"


def exact_session(folder: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return onnxruntime.InferenceSession(folder / "model.onnx", options)


@pytest.mark.parametrize(("rows", "length"), [(1, 1), (1, 17), (5, 3), (3, 40)])
def test_onnxruntime_gives_the_model_s_outputs_at_any_size(
    written: tuple[PreTrainedModel, Path], rows: int, length: int
) -> None:
    model, folder = written
    mask = torch.ones(rows, length, dtype=torch.int64)
    mask[0, length // 2 + 1 :] = 0
    batch = {"input_ids": torch.arange(rows * length).view(rows, length) % 60, "attention_mask": mask}
    found = exact_session(folder).run(None, {name: tensor.numpy() for name, tensor in batch.items()})
    with torch.no_grad():
        outputs = model(**batch)
    for expected, actual in zip((outputs.start_logits, outputs.end_logits), found, strict=True):
        assert (expected - torch.from_numpy(actual)).abs().max() <= 1e-5


def test_graph_holds_the_learned_codes_and_step_sizes(written: tuple[PreTrainedModel, Path]) -> None:
    model, folder = written
    graph = onnx.load(folder / "model.onnx").graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    found = {}
    for node in graph.node:
        if node.op_type == "DequantizeLinear":
            codes, scale = (tensors[name] for name in node.input)
            found[codes.name.removesuffix(".integers")] = codes, float(onnx.numpy_helper.to_array(scale))
    expected = {
        name: layer
        for name, layer in packed_layers(model).items()
        if layer.bits <= 8 and layer.weight.is_floating_point()
    }
    assert found.keys() == expected.keys() and len(found) == 8
    for name, (codes, scale) in found.items():
        values = torch.from_numpy(onnx.numpy_helper.to_array(codes).astype("int32"))
        assert torch.equal(values.t(), layer_codes(name, expected[name])) and scale == float(expected[name].step_size)
        assert BITS_OF_TYPE[codes.data_type] == (4 if expected[name].bits <= 4 else 8)
    tables = [tensor.data_type for tensor in graph.initializer if list(tensor.dims) == [60, 32]]
    assert tables == [onnx.TensorProto.INT8]  # the embedding


def test_folder_is_not_taken_for_another_kind(written: tuple[PreTrainedModel, Path]) -> None:
    model, folder = written
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "export.json",
        "model.onnx",
        "model.onnx.data",
    ]
    config = json.loads((folder / "config.json").read_text())
    assert config["exported_as"]["format"] == "onnx" and "quantization_config" not in config
    with pytest.raises(OSError, match="no file named"):
        type(model).from_pretrained(folder)
    assert b"/torch/" not in (folder / "model.onnx").read_bytes()  # no traces of the machine


@pytest.mark.parametrize("place", range(3))
def test_damaged_weights_are_caught(written: tuple[PreTrainedModel, Path], tmp_path: Path, place: int) -> None:
    model, folder = written
    proto = onnx.load(folder / "model.onnx")
    codes = [tensor for tensor in proto.graph.initializer if tensor.name.endswith(".integers")][place]
    codes.raw_data = bytes([codes.raw_data[0] ^ 0x11]) + codes.raw_data[1:]
    onnx.save(proto, tmp_path / "model.onnx", save_as_external_data=True, location="model.onnx.data")
    for name in ("config.json", "export.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with torch.no_grad():
        sample = Sample(some_batch(), dict(model(**some_batch())))
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    assert difference(load(folder, session_options=options), sample, EXACT, "ONNX model") <= 1e-6
    with pytest.raises(GETAError, match=r"_logits differs from the model's by .* of its largest value"):
        difference(load(tmp_path, session_options=options), sample, EXACT, "ONNX model")


def test_dynamic_products_are_of_integers(written: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    found = write(written[0], tmp_path / "out", some_batch(), dynamic_int8=True)
    assert 1e-6 < found["default"] <= 0.02
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "out" / "model.onnx").graph.node)
    assert kinds["MatMulInteger"] == kinds["DynamicQuantizeLinear"] == 8 and not kinds["DequantizeLinear"]


def test_as_it_comes_the_file_takes_the_fast_path_of_each_width(
    written: tuple[PreTrainedModel, Path], tmp_path: Path
) -> None:
    model, _ = written
    found = write(model, tmp_path / "out", some_batch(), dynamic_int8=None)
    # The exact graph was proved before its products rounded.
    assert found["exact"] <= 1e-6 < found["default"] <= 0.02
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    kinds = Counter(node.op_type for node in graph.node)
    narrow = sum(layer.bits <= 4 for layer in packed_layers(model).values())
    assert narrow and kinds["DequantizeLinear"] == narrow and kinds["MatMulInteger"] == 8 - narrow
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")  # with nothing set
    outputs = session.run(None, {name: tensor.numpy() for name, tensor in some_batch().items()})
    with torch.no_grad():
        expected = model(**some_batch()).start_logits
    assert (torch.from_numpy(outputs[0]) - expected).abs().max() <= found["default"] * expected.abs().max() + 1e-6


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exported, "find_spec", lambda name: None if name.startswith("onnxs") else object())
    with pytest.raises(GETAError, match=r"onnx format needs onnxscript: pip install 'geta_hf\[onnx\]'"):
        write_onnx(tiny_model(), tmp_path, some_batch())


def test_what_cannot_be_traced_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    with pytest.raises(GETAError, match=r"BertForQuestionAnswering cannot run the batch with \['input_ids'\]"):
        write_onnx(model, tmp_path, {"input_ids": torch.full((1, 3), 1000)})
    monkeypatch.setattr("transformers.exporters.OnnxExporter.export", lambda *_: 1 // 0)
    with pytest.raises(GETAError, match=r"ONNX exporter cannot write this BertFor.*: ZeroDivisionError"):
        write_onnx(model, tmp_path, some_batch())
    assert list(tmp_path.iterdir()) == []


def llama() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return LlamaForCausalLM(LlamaConfig(vocab_size=60, num_key_value_heads=2, **sizes))


_GRIDS = {"channels": "channel", "blocks": "block32"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["distilbert", "albert", "llama", "gpt2", "vit", "channels", "blocks", "one row", "plain"]
)
def test_other_models(kind: str, tmp_path: Path) -> None:
    batch = some_batch()
    if kind == "one row":
        batch = {name: tensor[:1] for name, tensor in batch.items()}
    model, batch = {"llama": lambda: (llama(), batch), "gpt2": lambda: (gpt2(), batch), "vit": vit}.get(
        kind, lambda: (tiny_model(kind if kind in ("distilbert", "albert") else "bert"), batch)
    )()
    small = model.eval() if kind == "plain" else compressed(model, batch, grid=_GRIDS.get(kind))
    found = write(small, tmp_path / "out", batch)
    assert found["exact"] <= 1e-6 and found["default"] <= 0.02


@pytest.mark.slow
@pytest.mark.parametrize("learn_t", [False, True])
def test_rounded_inputs(learn_t: bool, tmp_path: Path) -> None:
    found = write(compressed(tiny_model(), some_batch(), learn_t), tmp_path / "out", some_batch())
    assert found["exact"] <= 1e-5
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "out" / "model.onnx").graph.node)
    assert bool(kinds["QuantizeLinear"]) != learn_t
