from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForQuestionAnswering, BertForQuestionAnswering, BertTokenizer, PreTrainedModel

from geta_hf.errors import GETAError
from geta_hf.export import ExportReport, export, plan, steps
from geta_hf.export.export import compress, integer_bits
from geta_hf.export.formats import FORMATS, geta
from geta_hf.export.plan import plan_export, read_result
from geta_hf.export.steps import cut, fill
from geta_hf.qadg import PruningSpace, zero_groups
from geta_hf.qadg.tracing.recorder import Recorder
from geta_hf.quantization import attach_quantizers, quantized_layers, step_size
from geta_hf.serialization.packed_layers import packed_layers
from geta_hf.surgery.slice import slice_model
from tests.export.tiny_encoders import CLASSES, some_batch, tiny_bloom, tiny_model, train_by_hand
from tests.spaces import build_space
from tests.surgery.test_verify import with_kinds

Trained = tuple[PreTrainedModel, PruningSpace]
NOTHING = PruningSpace(())


def run(trained: Trained, target: Path, **kwargs: Any) -> ExportReport:
    model, space = trained
    return export(model, target, **{"space": space, "batch": some_batch(), **kwargs})


def logits(model: PreTrainedModel, implementation: str) -> torch.Tensor:
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        return torch.cat([model.eval()(**some_batch())[name] for name in ("start_logits", "end_logits")])


@pytest.mark.parametrize("kind", CLASSES)
def test_masked_sliced_and_reloaded_agree(kind: str, tmp_path: Path) -> None:
    model = tiny_model(kind)
    space = build_space(model, some_batch())
    kept = train_by_hand(model, space)
    report = run((model, space), tmp_path / "out")
    sliced = compress(model, space, zero_groups(model, space), some_batch())
    reloaded = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "out")
    assert type(reloaded) is type(model)
    for implementation in ("eager", "sdpa"):
        masked = logits(model, implementation)
        assert (logits(sliced, implementation) - masked).abs().max() <= 1e-5
        assert (logits(reloaded, implementation) - masked).abs().max() <= 1e-5
    assert report.difference <= 1e-5
    assert {name: count for name, (count, _) in report.kept.items()} == kept
    assert len(set(kept.values())) > 1
    for name, layer in packed_layers(reloaded).items():
        full = model.get_submodule(name)
        assert layer.bits == report.bits[name] == round(full.weight_quantizer.bits().item())
        assert layer.weight.numel() <= full.weight.numel()


def test_layer_differs_from_layer_in_heads_channels_and_bits(trained: Trained, tmp_path: Path) -> None:
    report = run(trained, tmp_path / "out")
    reloaded = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "out")
    first, second = reloaded.bert.encoder.layer
    assert first.attention.self.query.out_features == 24
    assert second.attention.self.query.out_features == 8
    assert first.intermediate.dense.out_features == 64 - 17
    assert second.intermediate.dense.out_features == 63
    assert sorted(report.bits.values()) == sorted(2 + (5 * place) % 15 for place in range(12))


def test_heads_whose_positions_are_computed_as_the_model_runs_are_refused(tmp_path: Path) -> None:
    model = tiny_bloom()
    space = build_space(model, some_batch())
    train_by_hand(model, space)
    with pytest.raises(GETAError, match=r"arange at modeling_bloom.py:\d+: its content cannot lose"):
        run((model, space), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_file_is_as_small_as_its_bits(tmp_path: Path) -> None:
    model = tiny_model(hidden=128)
    space = build_space(model, some_batch())
    train_by_hand(model, space)
    report = run((model, space), tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    packed = {f"{name}.weight" for name in report.bits}
    others = sum(tensor.nbytes for name, tensor in tensors.items() if name not in packed)
    reloaded = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "out")
    bits = sum(layer.weight.numel() * layer.bits for layer in packed_layers(reloaded).values())
    assert report.packed_bits == bits
    assert report.tensor_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert report.file_bytes == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert report.file_bytes <= 1.05 * (bits / 8 + others)


def test_trained_model_is_left_unchanged(trained: Trained, tmp_path: Path) -> None:
    model, _ = trained
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    text, config, attention = str(model), model.config.to_dict(), model.config._attn_implementation
    run(trained, tmp_path / "out")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())
    assert (str(model), model.config.to_dict(), model.config._attn_implementation) == (text, config, attention)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for name, parameter in model.named_parameters() if "quantizer" not in name)
    assert model.hf_quantizer is None if "hf_quantizer" in vars(model) else True


def test_space_and_batch_have_defaults(trained: Trained, tmp_path: Path) -> None:
    report = run(trained, tmp_path / "out", space=None, batch=None)
    assert report.kept == run(trained, tmp_path / "again").kept


@dataclass
class Config:
    bits: int = 8

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def test_config_and_tokenizer_lie_beside_the_model(trained: Trained, tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "who", "knows"]
    tokenizer = BertTokenizer(vocab={word: place for place, word in enumerate(words)})
    run(trained, tmp_path / "out", config=Config(), processing_class=tokenizer)
    assert json.loads((tmp_path / "out" / "geta_config.json").read_text()) == {"bits": 8}
    assert BertTokenizer.from_pretrained(tmp_path / "out")("who knows")["input_ids"] == [2, 5, 6, 3]
    read = BertTokenizer.from_pretrained(tmp_path / "out")
    run(trained, tmp_path / "again", processing_class=read)
    stored = [json.loads((tmp_path / name / "tokenizer_config.json").read_text()) for name in ("out", "again")]
    assert stored[0] == stored[1] and "is_local" not in stored[1]


def test_half_precision_model_keeps_its_dtype(tmp_path: Path) -> None:
    model = tiny_model().to(torch.bfloat16)
    space = build_space(model, some_batch())
    train_by_hand(model, space)
    run((model, space), tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["qa_outputs.weight"].dtype == torch.bfloat16
    assert tensors["bert.encoder.layer.0.output.dense.weight_scale"].dtype == torch.float32


def test_only_quantized_or_only_pruned_is_an_export_too(tmp_path: Path) -> None:
    model = tiny_model()
    attach_quantizers(model)
    assert export(model, tmp_path / "packed", space=NOTHING, batch=some_batch()).kept == {}
    pruned = tiny_model()
    space = build_space(pruned, some_batch())
    train_by_hand(pruned, space, quantize=False)
    report = run((pruned, space), tmp_path / "pruned")
    assert report.bits == {}
    reloaded = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "pruned")
    assert (logits(reloaded, "sdpa") - logits(pruned, "sdpa")).abs().max() <= 1e-5


def test_family_of_zeros_keeps_one_group(trained: Trained, tmp_path: Path) -> None:
    model, space = trained
    family = space.prunable[0]
    with torch.no_grad():
        for member in family.members:
            model.get_parameter(member.tensor).index_fill_(member.dim, member.index.flatten(), 0.0)
    assert run(trained, tmp_path / "out").kept[family.name] == (1, family.size)


def test_groups_that_are_not_zero_yet_are_counted(trained: Trained, tmp_path: Path) -> None:
    found = sum(int(zero.sum()) for zero in zero_groups(*trained).values())
    with pytest.raises(GETAError, match=f"before the groups are zero: {found} of 136 .* {found + 1} were to be"):
        run(trained, tmp_path / "out", expected_zero_groups=found + 1)
    assert list(tmp_path.iterdir()) == []
    run(trained, tmp_path / "out", expected_zero_groups=found)


def test_nothing_to_export_is_an_error(tmp_path: Path) -> None:
    model = tiny_model()
    with pytest.raises(GETAError, match=r"nothing to export: .* no quantized layer and none of its 136 groups"):
        export(model, tmp_path / "out", batch=some_batch())


@pytest.mark.parametrize(
    ("bits", "message"),
    [(7.5, r"has 7\.5000 bits, which is not an integer"), (1.5, "has 1.5 bits; .* 2 to 16"), (20.0, "has 20 bits")],
)
def test_bits_must_be_snapped(trained: Trained, tmp_path: Path, bits: float, message: str) -> None:
    quantizer = quantized_layers(trained[0])["bert.encoder.layer.1.output.dense"].weight_quantizer
    with torch.no_grad():
        quantizer.d.copy_(step_size(bits, quantizer.q_m, quantizer.t))
    with pytest.raises(GETAError, match=rf"bert\.encoder\.layer\.1\.output\.dense {message}"):
        run(trained, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_whole_bits_forgives_rounding_alone() -> None:
    assert integer_bits("layer", torch.tensor([7.9995])) == 8
    with pytest.raises(GETAError, match="cool-down must round bits"):
        integer_bits("layer", torch.tensor([7.998]))
    with pytest.raises(GETAError, match="nan bits"):
        integer_bits("layer", torch.tensor([float("nan")]))


def test_tied_quantized_weights_are_refused(trained: Trained, tmp_path: Path) -> None:
    layers = trained[0].bert.encoder.layer
    layers[1].output.dense.weight = layers[0].output.dense.weight
    with pytest.raises(GETAError, match=r"layer\.1\.output\.dense\.weight is tied to bert\.encoder\.layer\.0"):
        export(trained[0], tmp_path / "out", space=NOTHING, batch=some_batch())


def test_existing_target_is_replaced_only_when_asked(trained: Trained, tmp_path: Path) -> None:
    run(trained, tmp_path / "out")
    stamp = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(GETAError, match="exists already"):
        run(trained, tmp_path / "out")
    (tmp_path / "out" / "onnx").mkdir()
    (tmp_path / "out" / "onnx" / "model.onnx").touch()
    with pytest.raises(GETAError, match=r"holds onnx/model.onnx, which no export writes"):
        run(trained, tmp_path / "out", overwrite=True)
    (tmp_path / "out" / "onnx" / "model.onnx").rename(tmp_path / "out" / "model.onnx")
    (tmp_path / "out" / "onnx").rmdir()
    run(trained, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "model.onnx").exists()
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns != stamp
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_failed_proof_leaves_the_target_as_it_was(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    if overwrite:
        run(trained, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in tmp_path.glob("out/*")}
    save = geta.save_compressed

    def damaged(model: PreTrainedModel, *args: Any) -> None:
        with torch.no_grad():
            model.qa_outputs.bias.add_(0.01)
        save(model, *args)

    monkeypatch.setattr(geta, "save_compressed", damaged)
    with pytest.raises(GETAError, match=r"the reloaded model's .* differs by 0\.01"):
        run(trained, tmp_path / "out", overwrite=overwrite)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("out/*")} == before
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if overwrite else [])


@pytest.mark.parametrize("leaf", ["attention.self.key", "attention.output.dense", "intermediate.dense"])
def test_wrong_cut_is_caught_before_anything_is_written(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leaf: str
) -> None:
    """A mutation: one tensor is cut at other indices than the rest of its groups."""
    kept_indices = plan.kept_indices

    def mutated(*args: Any) -> Any:
        kept = kept_indices(*args)
        dims = kept[f"bert.encoder.layer.0.{leaf}.weight"]
        for dim, index in dims.items():
            size = trained[0].get_parameter(f"bert.encoder.layer.0.{leaf}.weight").shape[dim]
            dims[dim] = (index + 1) % size
        return kept

    monkeypatch.setattr(plan, "kept_indices", mutated)
    with pytest.raises(GETAError, match=r"cannot be cut to the indices asked for"):
        run(trained, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("leaf", ["attention.self.key", "attention.output.dense", "intermediate.dense"])
def test_wrong_slices_are_caught_before_anything_is_written(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leaf: str
) -> None:
    """A mutation: the right indices are asked for, but one tensor is cut at others."""

    def mutated(model: nn.Module, kept: Any, values: Any) -> Any:
        name = f"bert.encoder.layer.0.{leaf}.weight"
        size = {dim: model.get_parameter(name).shape[dim] for dim in kept[name]}
        shifted = {dim: (index + 1) % size[dim] for dim, index in kept[name].items()}
        return slice_model(model, {**kept, name: shifted}, values)

    monkeypatch.setattr(steps, "slice_model", mutated)
    with pytest.raises(GETAError, match=r"the cut model's start_logits \((own|eager) attention\) differs by"):
        run(trained, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_models_that_cannot_be_exported(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(GETAError, match="a transformers model, not a Linear"):
        export(nn.Linear(2, 2), tmp_path / "out")  # type: ignore[arg-type]
    run(trained, tmp_path / "out")
    small = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "out")
    with pytest.raises(GETAError, match="an export already"):
        export(small, tmp_path / "again")
    with pytest.raises(GETAError, match="pruned before by geta_hf; start from the dense model"):
        export(small.dequantize(), tmp_path / "again")
    other = tiny_model()
    other.hf_quantizer = object()
    with pytest.raises(GETAError, match="loaded in quantized form"):
        export(other, tmp_path / "again")


def test_forward_wrapped_for_mixed_precision_does_not_spoil_the_proof(trained: Trained, tmp_path: Path) -> None:
    """Accelerate puts autocast around the forward of the very instance it prepares."""
    model, _ = trained
    plain = type(model).forward

    def wrapped(self: PreTrainedModel, **kwargs: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return plain(self, **kwargs)

    model.forward = MethodType(wrapped, model)
    assert run(trained, tmp_path / "out").difference <= 1e-5


def test_batch_that_does_not_run_is_a_clear_error(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(GETAError, match="cannot run the batch"):
        run(trained, tmp_path / "out", batch={"input_ids": torch.full((1, 3), 1000)})


def test_a_format_without_safetensors_is_reported(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that has appeared must not end in an error."""

    def write(model: PreTrainedModel, folder: Path, batch: object) -> None:
        (folder / "model.onnx").write_bytes(b"graph")

    monkeypatch.setitem(FORMATS, "bare", write)
    report = run(trained, tmp_path / "out", format="bare")
    assert report.tensor_bytes == report.file_bytes == 0 and report.bits
    assert (tmp_path / "out" / "model.onnx").is_file()


# --- what a method decided ------------------------------------------------------------------------------------------


def test_a_result_that_is_given_is_what_is_read(trained: Trained, tmp_path: Path) -> None:
    model, space = trained
    result = read_result(model, space)
    assert result.removed_groups == sum(int(zero.sum()) for zero in zero_groups(model, space).values())
    given = run(trained, tmp_path / "given", result=result)
    found = run(trained, tmp_path / "found")
    assert dataclasses.replace(given, path=found.path) == found
    assert given.bits == result.weight_bits
    files = [tmp_path / name / "model.safetensors" for name in ("given", "found")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_result_may_keep_groups_that_are_zero(trained: Trained, tmp_path: Path) -> None:
    model, space = trained
    full = read_result(model, space)
    name = space.prunable[0].name
    fewer = {family: mask for family, mask in full.removed.items() if family != name}
    report = run(trained, tmp_path / "out", result=dataclasses.replace(full, removed=fewer))
    assert report.kept[name] == (space.prunable[0].size, space.prunable[0].size)


def test_a_result_of_too_few_groups_or_of_other_types_is_refused(trained: Trained, tmp_path: Path) -> None:
    model, space = trained
    found = read_result(model, space)
    nothing = dataclasses.replace(found, removed={})
    with pytest.raises(GETAError, match="the result removes 0 groups, 1 were to be removed"):
        export(model, tmp_path / "a", space=space, batch=some_batch(), result=nothing, expected_zero_groups=1)
    lists = dataclasses.replace(found, removed={name: mask.tolist() for name, mask in found.removed.items()})
    with pytest.raises(GETAError, match=r"is a list; pass a tensor of torch\.bool"):
        export(model, tmp_path / "b", space=space, batch=some_batch(), result=lists)
    floats = dataclasses.replace(found, weight_bits={name: float(bits) for name, bits in found.weight_bits.items()})
    with pytest.raises(GETAError, match="but its quantizer has"):
        export(model, tmp_path / "c", space=space, batch=some_batch(), result=floats)
    assert not list(tmp_path.iterdir())


def test_a_result_that_the_model_does_not_have_is_refused(trained: Trained, tmp_path: Path) -> None:
    model, space = trained
    result = read_result(model, space)
    name, layer = space.prunable[0].name, "bert.encoder.layer.0.attention.self.query"
    place = int(torch.nonzero(~result.removed[name])[0])
    mask = result.removed[name].clone()
    mask[place] = True
    for changes, message in (
        ({"removed": {name: mask}}, rf"removes group {place} of {re.escape(name)}, whose weights are not zero"),
        ({"removed": {"other": mask}}, "removes groups of other, which is no prunable family"),
        ({"removed": {name: mask[1:]}}, r"mask of .* is torch.bool of shape \(\d+,\); pass torch.bool of shape"),
        ({"weight_bits": {**result.weight_bits, layer: 9}}, rf"weight of {layer} at 9 bits, but its quantizer has 2"),
        ({"weight_bits": {}}, rf"weight of {layer} at no bits, but its quantizer has 2"),
        ({"input_bits": {layer: 8}}, rf"input of {layer} at 8 bits, but its quantizer has none"),
    ):
        with pytest.raises(GETAError, match=message):
            run(trained, tmp_path / "out", result=dataclasses.replace(result, **changes))
    assert list(tmp_path.iterdir()) == []


# --- what an export costs ------------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Recordings that were begun, and deep copies of models."""
    counts: Counter[str] = Counter()
    enter = Recorder.__enter__

    def noted(self: Recorder) -> Recorder:
        counts["recordings"] += 1
        return enter(self)

    def deepcopy(self: PreTrainedModel, memo: dict[int, Any]) -> PreTrainedModel:
        counts["copies"] += isinstance(self, BertForQuestionAnswering)
        with monkeypatch.context() as patch:
            patch.delattr(PreTrainedModel, "__deepcopy__")
            return copy.deepcopy(self, memo)

    monkeypatch.setattr(Recorder, "__enter__", noted)
    monkeypatch.setattr(PreTrainedModel, "__deepcopy__", deepcopy, raising=False)
    return counts


def test_two_recordings_and_one_copy_are_enough(trained: Trained, tmp_path: Path, counted: Counter[str]) -> None:
    run(trained, tmp_path / "out")
    assert counted == {"recordings": 2, "copies": 1}


def test_a_norm_over_what_is_cut_costs_no_other(tmp_path: Path, counted: Counter[str]) -> None:
    model = tiny_model()
    space = with_kinds(build_space(model, some_batch()), "residual")
    train_by_hand(model, space)
    counted.clear()
    report = run((model, space), tmp_path / "out")
    assert counted == {"recordings": 2, "copies": 1}
    assert all(left < full for left, full in report.kept.values())


def test_what_is_not_cut_is_shared_with_the_trained_model(trained: Trained) -> None:
    model, space = trained
    planned = plan_export(model, space, some_batch())
    compressed = fill(cut(model, planned), planned)
    theirs = dict(compressed.named_parameters())
    assert theirs["bert.embeddings.word_embeddings.weight"] is model.bert.embeddings.word_embeddings.weight
    layer = "bert.encoder.layer.0.attention.self.query.weight"
    assert theirs[layer].shape != model.get_parameter(layer).shape
    alone = dict(compress(model, space, zero_groups(model, space), some_batch()).named_parameters())
    assert not {id(parameter) for parameter in alone.values()} & {id(parameter) for parameter in model.parameters()}
