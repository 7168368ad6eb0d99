"""Layers whose rows or columns differ in width: masked = sliced = reloaded, sorted, packed to the byte, version 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertForQuestionAnswering, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from geta_hf import prepare_for_inference
from geta_hf.costs.model_costs import layer_costs
from geta_hf.errors import GETAError
from geta_hf.export import export
from geta_hf.export.plan import read_result
from geta_hf.inference.layers import DYNAMIC, STATIC, WEIGHT_ONLY, fits_integers, is_exact, set_path
from geta_hf.qadg import PruningSpace
from geta_hf.quantization import attach_input_quantizers, attach_quantizers, quantized_layers, step_size
from geta_hf.reporting.comparison import read_structure
from geta_hf.reporting.folder_summary import read_summary
from geta_hf.reporting.model_card import describe_folder
from geta_hf.reporting.structure_svg import layer_grid
from geta_hf.serialization.encode import pack, pack_layer, pack_weight
from geta_hf.serialization.loader import GETAQuantizationConfig
from geta_hf.serialization.packed_layers import ChannelWidths, packed_layers
from geta_hf.surgery.compare_outputs import attention_outputs
from tests.export.tiny_encoders import some_batch, tiny_model
from tests.spaces import build_space

MLP = "bert.encoder.layer.0.intermediate.dense"
DOWN = "bert.encoder.layer.0.output.dense"
QUERY = "bert.encoder.layer.0.attention.self.query"


def logits(model: PreTrainedModel) -> Tensor:
    return attention_outputs(model, some_batch())["eager"]["start_logits"]


@torch.no_grad()
def set_widths(model: PreTrainedModel, space: PruningSpace, remove: bool = True, four_levels: bool = False) -> None:
    """Give the groups of each family widths in turn, and all else 4 bits; of each family remove the first group.

    With `four_levels` those of 2 bits have these.
    """
    widths = (2, 3, 5, 8)
    bits = {name: torch.full_like(own.weight_quantizer.d, 4) for name, own in quantized_layers(model).items()}
    tensors = model.state_dict()
    for family in space.prunable:
        for member in family.members:
            if remove:
                tensors[member.tensor].index_fill_(member.dim, member.index[0], 0.0)
            layer = quantized_layers(model).get(member.tensor.removesuffix(".weight"))
            if layer is None or layer.weight_quantizer.channel_dim != member.dim:
                continue
            for group, index in enumerate(member.index):
                bits[member.tensor.removesuffix(".weight")][index] = widths[group % len(widths)]
    for name, own in quantized_layers(model).items():
        own.weight_quantizer.d.copy_(step_size(bits[name], own.weight_quantizer.q_m, own.weight_quantizer.t))
        own.weight_quantizer.set_four_levels((bits[name] == 2) & four_levels)


def trained(
    inputs: bool = False, remove: bool = True, four_levels: bool = False
) -> tuple[PreTrainedModel, PruningSpace]:
    model = tiny_model()
    space = build_space(model, some_batch())
    ends = [f"bert.encoder.layer.{n}.{end}" for n in range(2) for end in ("output.dense", "attention.output.dense")]
    attach_quantizers(model, initial_bits=4, grid="channel", by_input=ends)
    if inputs:
        attach_input_quantizers(model, [dict(some_batch())])
        for layer in quantized_layers(model).values():
            own = layer.input_quantizer
            own.d.data.copy_(step_size(8.0, own.q_m, own.t))
    set_widths(model, space, remove, four_levels)
    return model, space


@pytest.fixture(scope="module", params=[False, True], ids=["three levels", "four levels"])
def original(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, PruningSpace]:
    return trained(four_levels=request.param)


@pytest.fixture(scope="module")
def folder(original: tuple[PreTrainedModel, PruningSpace], tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, space = original
    target = tmp_path_factory.mktemp("blocks") / "out"
    export(model, target, space=space, batch=some_batch())
    return target


def test_masked_sliced_and_reloaded_agree(original: tuple[PreTrainedModel, PruningSpace], folder: Path) -> None:
    model, _ = original
    reloaded = BertForQuestionAnswering.from_pretrained(folder)
    torch.testing.assert_close(logits(reloaded), logits(model), rtol=1e-4, atol=1e-5)
    reloaded.save_pretrained(folder.parent / "again")
    files = [path / "model.safetensors" for path in (folder, folder.parent / "again")]
    assert files[0].read_bytes() == files[1].read_bytes()
    half = BertForQuestionAnswering.from_pretrained(folder, dtype=torch.bfloat16)
    half.save_pretrained(folder.parent / "half")
    packed = load_file(folder.parent / "half" / "model.safetensors")
    name = f"{DOWN}.weight"
    assert torch.equal(packed[name], load_file(files[0])[name])
    reloaded.dequantize()
    torch.testing.assert_close(logits(reloaded), logits(model), rtol=1e-4, atol=1e-5)


def test_channels_are_sorted_and_heads_have_a_table(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 2
    # 63 of 64 channels: the first, of 2 bits, is gone.
    widths = {"widths": [2, 3, 5, 8], "counts": [15, 16, 16, 16]}
    assert config["blocks"][MLP] == {"dim": 0, **widths} and config["blocks"][DOWN] == {"dim": 1, **widths}
    assert config["bits"][MLP] == 8 and config["blocks"][QUERY]["counts"] == [8, 8, 8]
    tensors = load_file(folder / "model.safetensors")
    assert f"{MLP}.weight_widths" not in tensors and f"{DOWN}.weight_widths" not in tensors
    lengths = [-(-32 * count * bits // 8) for bits, count in zip((2, 3, 5, 8), (15, 16, 16, 16), strict=True)]
    assert len(tensors[f"{MLP}.weight"]) == len(tensors[f"{DOWN}.weight"]) == sum(lengths)
    assert len(tensors[f"{DOWN}.weight_scale"]) == 63
    # Of heads 1 to 3 the order is theirs, and their widths are 3, 5 and 8 bits as it happens.
    assert f"{QUERY}.weight_widths" not in tensors


def test_reports_count_every_width(folder: Path) -> None:
    structure = read_structure(folder)
    assert structure.widths[MLP] == {2: 15, 3: 16, 5: 16, 8: 16}
    model = BertForQuestionAnswering.from_pretrained(folder)
    costs = {cost.name: cost.bits for cost in layer_costs(model)}
    assert costs[DOWN] == pytest.approx((2 * 15 + 3 * 16 + 5 * 16 + 8 * 16) / 63)
    card = describe_folder(read_summary(folder), None)
    assert (
        "are stored at 2 to 8 bits with a step size for each output channel, 12 of them with a width for each" in card
    )
    titles = {cell.title for row in layer_grid(structure).rows for cell in row.cells.values()}
    assert f"{MLP}: 2 to 8, 4.5 on average bits (2 bits: 15, 3 bits: 16, 5 bits: 16, 8 bits: 16)" in titles


@pytest.mark.parametrize("four_levels", [False, True])
def test_integers_compute_the_same(four_levels: bool, tmp_path: Path) -> None:
    model, space = trained(inputs=True, four_levels=four_levels)
    export(model, tmp_path / "out", space=space, batch=some_batch())
    reloaded = BertForQuestionAnswering.from_pretrained(tmp_path / "out")
    before = logits(reloaded)
    torch.testing.assert_close(before, logits(model), rtol=1e-3, atol=1e-3)
    layers = packed_layers(reloaded)
    inputs = {name: torch.randn(5, layers[name].dense_shape[1]) for name in (MLP, DOWN)}
    with torch.no_grad():
        wanted = {name: layers[name](x) for name, x in inputs.items()}
        for path in (STATIC, DYNAMIC, WEIGHT_ONLY):
            for name, x in inputs.items():
                assert fits_integers(layers[name])
                if path == STATIC and name == DOWN:
                    assert not is_exact(layers[name])  # each input has a factor of its own
                    continue
                set_path(name, layers[name], path)
                found = layers[name](x)
                # Rounding each row of the input to 8 bits costs a percent; the other paths are exact.
                allowed = 0.02 if path == DYNAMIC else 1e-5
                torch.testing.assert_close(found, wanted[name], rtol=0, atol=allowed * float(wanted[name].abs().max()))
    prepare_for_inference(reloaded, "float")
    assert torch.equal(logits(reloaded), before)


@pytest.mark.parametrize("four_levels", [False, True])
def test_widths_that_do_not_ascend_are_stored(four_levels: bool, tmp_path: Path) -> None:
    """Rows of one channel differ between layers, so that no order of channels suits all."""
    model, space = trained(four_levels=four_levels)
    quantizer = quantized_layers(model)[MLP].weight_quantizer
    bits = torch.arange(64) % 5 + 2.0
    quantizer.d.data.copy_(step_size(bits, quantizer.q_m, quantizer.t))
    quantizer.set_four_levels((bits == 2) & four_levels)
    export(model, tmp_path / "out", space=space, batch=some_batch())
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(tensors[f"{MLP}.weight_widths"], bits[1:].to(torch.int8))
    reloaded = BertForQuestionAnswering.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(reloaded), logits(model), rtol=1e-4, atol=1e-5)
    reloaded.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == tensors.keys()

    tensors[f"{MLP}.weight_widths"] = tensors[f"{MLP}.weight_widths"].clone()
    tensors[f"{MLP}.weight_widths"][0] = 8
    damaged = tmp_path / "again"
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    with pytest.raises(GETAError, match=r"weight_widths (is|has counts)|checksum|damaged"):
        BertForQuestionAnswering.from_pretrained(damaged)
    config = json.loads((damaged / "config.json").read_text())
    del config["quantization_config"]["checksums"]
    (damaged / "config.json").write_text(json.dumps(config))
    with pytest.raises(GETAError, match=r"weight_widths has counts of widths .*, but config.json"):
        BertForQuestionAnswering.from_pretrained(damaged)
    tensors[f"{MLP}.weight_widths"] = tensors[f"{MLP}.weight_widths"].to(torch.uint8)
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    with pytest.raises(GETAError, match=r"weight_widths is U8 of shape \(63,\), not int8 of shape \(63,\)"):
        BertForQuestionAnswering.from_pretrained(damaged)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 2}, r"blocks\[.*\] is .*, not a dim, ascending widths"),
        ({"dim": True}, "not a dim, ascending widths"),
        ({"widths": [3, 2, 5, 8]}, "not a dim, ascending widths"),
        ({"counts": [15, 16, 16]}, "not a dim, ascending widths"),
        ({"counts": [15, 16, 16, 0]}, "not a dim, ascending widths"),
        ({"counts": [15, 16, 16, 10**12]}, r"has 1000000000047 indices along dim 0, but the Linear has a weight of"),
        ({"widths": [2, 3, 5, 7]}, r"bits\[.*\] is 8, not the widest of blocks, 7"),
        ({"counts": [16, 15, 16, 16]}, "codes of 2 and 3 and 5 and 8 bits are a uint8 stream of"),
    ],
)
def test_hostile_blocks_are_refused(folder: Path, tmp_path: Path, changes: dict, message: str) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["blocks"][MLP].update(changes)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(GETAError, match=message):
        BertForQuestionAnswering.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format_version", 1, "blocks came with format_version 2, but this is 1"),
        ("format_version", 3, "format_version is 3, but this release of geta_hf reads 1 and 2"),
        ("blocks", [1], "blocks must be an object of module names"),
    ],
)
def test_versions_are_refused(folder: Path, tmp_path: Path, key: str, value: object, message: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"][key] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(GETAError, match=message):
        BertForQuestionAnswering.from_pretrained(tmp_path)


@pytest.mark.parametrize("four_levels", [False, True])
@pytest.mark.parametrize("format", ["vanilla", "compressed-tensors", pytest.param("onnx", marks=pytest.mark.slow)])
def test_other_formats_hold_the_same_values(format: str, four_levels: bool, tmp_path: Path) -> None:
    if format != "vanilla":
        pytest.importorskip({"compressed-tensors": "compressed_tensors", "onnx": "onnxscript"}[format])
    model, space = trained(remove=False, four_levels=four_levels)  # which BertConfig could not say of heads
    # Its proof compares the outputs of what is written with those of the model.
    export(model, tmp_path / "out", space=space, batch=some_batch(), format=format)


@pytest.mark.parametrize("four_levels", [False, True])
def test_a_conv1d_has_widths_along_both_dims(four_levels: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=20, n_positions=16)).eval()
    batch = {"input_ids": torch.arange(8)[None]}
    space = build_space(model, batch)
    attach_quantizers(model, initial_bits=4, grid="channel", by_input=["transformer.h.0.mlp.c_proj"])
    set_widths(model, space, four_levels=four_levels)
    export(model, tmp_path / "out", space=space, batch=batch)
    reloaded = GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    blocks = reloaded.config.quantization_config.blocks
    assert [blocks[f"transformer.h.0.mlp.{name}"]["dim"] for name in ("c_fc", "c_proj")] == [1, 0]
    torch.testing.assert_close(reloaded(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        before = reloaded(**batch).logits
        prepare_for_inference(reloaded, "int8")
        torch.testing.assert_close(reloaded(**batch).logits, before, rtol=0.05, atol=0.05)


def test_the_stream_is_one_width_after_the_other() -> None:
    generator = torch.Generator().manual_seed(0)
    for dim, shape in ((0, (5, 3)), (1, (3, 5)), (0, (5, 2, 3, 3)), (1, (2, 5, 3, 3))):
        widths = ChannelWidths(dim, torch.tensor([8, 2, 9, 2, 3], dtype=torch.int8))
        codes = torch.randint(-1, 2, shape, generator=generator)
        stream = pack_weight(codes, 9, widths)
        index = {2: [1, 3], 3: [4], 8: [0], 9: [2]}
        parts = [pack(codes.index_select(dim, torch.tensor(own)), bits) for bits, own in index.items()]
        assert torch.equal(stream, torch.cat(parts)) and len(stream) == widths.length(shape)
        assert torch.equal(widths.unpack(stream, shape).long(), codes)
        with pytest.raises(GETAError, match="codes of 2, 3, 8, 9 bits in a weight of shape"):
            widths.unpack(stream[1:], shape)
    assert widths.entry() == {"dim": 1, "widths": [2, 3, 8, 9], "counts": [2, 1, 1, 1]} and not widths.is_sorted


@pytest.mark.parametrize("dim", [0, 1])
def test_what_has_two_bits_may_have_four_levels(dim: int) -> None:
    bits = torch.tensor([8, 2, 2, 3, 2], dtype=torch.int8)
    widths = ChannelWidths(dim, bits)
    generator = torch.Generator().manual_seed(0)
    shape = (5, 7) if dim == 0 else (7, 5)
    odd = 2 * torch.randint(-2, 2, shape, generator=generator) + 1
    narrow = widths.index(2)
    codes = torch.randint(-3, 4, shape, generator=generator).index_copy(dim, narrow, odd.index_select(dim, narrow))
    stream = pack_weight(codes, 8, widths, four_levels=True)
    assert len(stream) == widths.length(shape)
    assert torch.equal(widths.unpack(stream, shape, four_levels=True).long(), codes)
    layer = torch.nn.Linear(shape[1], shape[0])
    for value, message in (
        (0, "code 0 does not fit in 2 bits, the largest is 3"),
        (5, "code 5 does not fit in 2 bits"),
    ):
        wrong = codes.index_fill(dim, narrow[:1], value)
        with pytest.raises(GETAError, match=message):
            pack_layer("a.layer", layer, wrong, 8, torch.ones(5), widths=widths, four_levels=True)
    # The others still have theirs.
    wrong = codes.index_fill(dim, widths.index(3), 4)
    with pytest.raises(GETAError, match="code 4 does not fit in 3 bits, the largest is 3"):
        pack_layer("a.layer", layer, wrong, 8, torch.ones(5), widths=widths, four_levels=True)


@pytest.mark.parametrize("name", [MLP, DOWN])
def test_a_zero_among_four_levels_takes_a_third_bit(name: str, tmp_path: Path) -> None:
    model, space = trained(four_levels=True)
    layer = quantized_layers(model)[name]
    group = 8  # of 2 bits, and not removed
    with torch.no_grad():
        layer.weight[(group, 3) if name == MLP else (3, group)] = 0.0
    export(model, tmp_path / "out", space=space, batch=some_batch())
    entry = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert name not in entry["four_levels"] and len(entry["four_levels"]) > 1
    assert entry["blocks"][name]["widths"] == [3, 5, 8]
    reloaded = BertForQuestionAnswering.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(reloaded), logits(model), rtol=1e-4, atol=1e-5)


def test_four_levels_need_two_bits(original: tuple[PreTrainedModel, PruningSpace], folder: Path) -> None:
    entry = json.loads((folder / "config.json").read_text())["quantization_config"]
    some = {name for name, layer in quantized_layers(original[0]).items() if layer.weight_quantizer.some_four_levels}
    # Of the attention, all heads of 2 bits are gone.
    remain = [name for name, block in entry["blocks"].items() if 2 in block["widths"]] if some else []
    assert entry.get("four_levels", []) == remain and set(remain) <= some and bool(remain) == bool(some)
    plain = {"bits": {"a": 5}, "blocks": {"a": {"dim": 0, "widths": [3, 5], "counts": [1, 1]}}}
    with pytest.raises(GETAError, match="four_levels names 'a', whose width in bits is 3, 5; only what has 2 bits"):
        GETAQuantizationConfig(**plain, four_levels=["a"])


def test_a_result_says_where_widths_are(original: tuple[PreTrainedModel, PruningSpace], tmp_path: Path) -> None:
    model, space = original
    result = read_result(model, space)
    assert set(result.channel_bits[MLP].tolist()) == {2, 3, 5, 8} and result.weight_bits[MLP] == 8
    result.channel_bits[MLP][5] = 5
    with pytest.raises(
        GETAError, match=r"the result stores channels of .*intermediate.dense at .*, or has them elsewh"
    ):
        export(model, tmp_path / "out", space=space, batch=some_batch(), result=result)


def test_loaded_layers_say_their_widths(folder: Path) -> None:
    layer = packed_layers(BertForQuestionAnswering.from_pretrained(folder))[MLP]
    assert "bits={2: 15, 3: 16, 5: 16, 8: 16}" in repr(layer) and layer.mean_bits == pytest.approx(286 / 63)
