"""`geta_hf.compress` from end to end: a folder that reloads, a report that is true, and input that cannot work."""

from __future__ import annotations

import importlib
import math
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from geta_hf import GETAConfig, GETAError, OneShotConfig, compress
from geta_hf.cli import main
from geta_hf.compress import CompressReport, _split, bytes_of
from geta_hf.config import read_config
from geta_hf.evaluation.calibration_data import make_batches
from geta_hf.export.formats import geta
from geta_hf.methods import OneShotMethod, make_method
from geta_hf.methods.one_shot import method
from geta_hf.quantization import quantized_layers
from geta_hf.reporting.comparison import load_model
from tests.tiny_tasks import byte_tokenizer, tiny_llama

TEXT = "Once there was a small model that had to become smaller still, and it did so in one call. " * 40
IDS = torch.randint(0, 30, (8, 2, 8), generator=torch.Generator().manual_seed(0))


def bert_sizes() -> dict[str, int]:
    return {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 32, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> tuple[CompressReport, LlamaForCausalLM]:
    model = tiny_llama()
    folder = tmp_path_factory.mktemp("compress") / "small one"
    config = OneShotConfig(target_bytes=1, bits=(3, 8))
    report = compress(
        model,
        [TEXT],
        byte_tokenizer(),
        out=folder,
        target_parameters=0.3,
        mean_bits=4,
        config=config,
        sequence_length=16,
        sequences=24,
        progress=False,
    )
    return report, model


def test_the_folder_computes_what_the_report_says(pruned: tuple[CompressReport, LlamaForCausalLM]):
    report, model = pruned
    small = AutoModelForCausalLM.from_pretrained(report.path)
    tokenizer = AutoTokenizer.from_pretrained(report.path)
    ids = torch.tensor([tokenizer(TEXT)["input_ids"][:20]])
    with torch.no_grad():
        torch.testing.assert_close(small(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    assert report.export.bits == dict(report.outcome.result.weight_bits)
    assert min(report.export.bits.values()) >= 3
    assert report.removed_groups == sum(before - kept for kept, before in report.export.kept.values()) > 0
    assert report.parameters == sum(parameter.numel() for parameter in small.parameters())
    assert report.export.file_bytes == (report.path / "model.safetensors").stat().st_size
    assert read_config(report.path / "geta_config.json").method == "one-shot"
    assert (report.path / "README.md").is_file()


def test_blocks_are_those_of_what_remains(tmp_path: Path):
    model = tiny_llama()
    config = OneShotConfig(target_bytes=1, bits=(3, 8), grid="block32")
    report = compress(
        model, [TEXT], byte_tokenizer(), out=tmp_path / "x", target_parameters=0.3, mean_bits=4, config=config,
        sequence_length=16, sequences=8, progress=False,
    )  # fmt: skip
    small = AutoModelForCausalLM.from_pretrained(report.path)
    with torch.no_grad():
        torch.testing.assert_close(small(input_ids=IDS[0]).logits, model(input_ids=IDS[0]).logits, rtol=1e-4, atol=1e-5)
    layers = quantized_layers(model).values()
    for layer in layers:
        torch.testing.assert_close(layer.quantized_weight(), layer.weight, rtol=1e-6, atol=1e-8)
        assert torch.equal(layer.weight_quantizer.d, layer.weight_quantizer.d.half().float())
    assert any(layer.weight_quantizer.block_order is not None for layer in layers)
    assert "with a step size for every 32 inputs of an output channel" in (report.path / "README.md").read_text()


def test_weights_are_on_their_grids(pruned: tuple[CompressReport, LlamaForCausalLM]):
    _, model = pruned
    for layer in quantized_layers(model).values():
        torch.testing.assert_close(layer.quantized_weight(), layer.weight, rtol=1e-6, atol=1e-8)


def test_the_report_reads_as_a_table(pruned: tuple[CompressReport, LlamaForCausalLM]):
    report, _ = pruned
    text = str(report)
    assert "perplexity, held back" in text and "next: geta-hf eval" in text and f"{report.parameters:,}" in text
    assert shlex.split(report.next_command)[2] == str(report.path)
    assert report.perplexity is not None
    assert report.perplexity[1] == pytest.approx(math.exp(report.outcome.loss))


SMALL: dict[str, Any] = {"sequence_length": 16, "sequences": 8, "progress": False}


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def is_unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_family_shares_what_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls = []
    real = method.measure_gradients
    monkeypatch.setattr(method, "measure_gradients", lambda *args: calls.append(1) or real(*args))
    model = tiny_llama()
    before = values(model)
    reports = compress(model, [TEXT], byte_tokenizer(), out=tmp_path / "x", targets=["65%", 77_000], **SMALL)
    assert len(calls) == 1 and is_unchanged(model, before)
    assert [report.path.name for report in reports] == ["x-65", "x-77000"]
    for report, most in zip(reports, (0.65 * reports[0].dense_bytes, 77_000), strict=True):
        assert (report.path / "model.safetensors").stat().st_size == report.export.file_bytes <= most
    assert reports[0].removed_groups == 0 and "no group was removed" in str(reports[0])
    assert reports[1].removed_groups > 0 and "splits of the budget tried" in str(reports[1])
    # Each alone is the same as in a family; scores are those that the family left.
    alone = compress(model, [TEXT], byte_tokenizer(), out=tmp_path / "x", target_bytes=77_000, **SMALL)
    assert len(calls) == 1 and not is_unchanged(model, before)
    written = [(path / "model.safetensors").read_bytes() for path in (reports[1].path, alone.path)]
    assert written[0] == written[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": []}, "must be a list of sizes"),
        ({"targets": "60%"}, "must be a list of sizes"),
        ({"targets": ["60%", "60 %"]}, "has a size twice"),
        ({"targets": ["60%", 0.6]}, "target_bytes = 0.6 must be a positive integer"),
        ({"targets": ["60%"], "mean_bits": 4}, "targets and mean_bits both"),
        ({"targets": ["60%", 100]}, "target_bytes = 100 can't be reached"),
        ({"target_bytes": 0}, "target_bytes = 0 must be a positive integer"),
        ({"target_bytes": True}, "target_bytes = True must be a positive integer"),
    ],
)
def test_targets_that_cannot_be_met_fail_before_anything_is_measured(options, message: str, tmp_path, monkeypatch):
    monkeypatch.setattr(method, "measure_gradients", lambda *_: pytest.fail("scores are measured"))
    with pytest.raises(GETAError, match=message):
        compress(tiny_llama(), [TEXT], byte_tokenizer(), out=tmp_path / "x", **options, **SMALL)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_splits_of_a_small_budget_are_compared(tmp_path: Path):
    model = tiny_llama()
    # So small that two bits alone do not do.
    config = OneShotConfig(target_bytes=1, bits=(2, 8))
    with pytest.raises(GETAError, match=r"it is ([\d,]+); raise it") as refused:
        compress(
            model, [TEXT], byte_tokenizer(), out=tmp_path / "x", target_bytes=100, config=config,
            sequence_length=16, sequences=16, progress=False,
        )  # fmt: skip
    assert not (tmp_path / "x").exists()
    reachable = int(str(refused.value).split("it is ")[1].split(";")[0].replace(",", ""))
    report = compress(
        model, [TEXT], byte_tokenizer(), out=tmp_path / "x", target_bytes=reachable + 900, config=config,
        sequence_length=16, sequences=16, progress=False,
    )  # fmt: skip
    assert report.export.file_bytes <= reachable + 900
    assert report.removed_groups > 0


def bert() -> tuple[BertForSequenceClassification, list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, 6:] = 0
    batches = [{"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1])} for ids in IDS]
    return BertForSequenceClassification(BertConfig(vocab_size=30, **bert_sizes())), batches


def bert_for_answers() -> tuple[BertForQuestionAnswering, list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    ends = {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])}
    return BertForQuestionAnswering(BertConfig(vocab_size=30, **bert_sizes())), [{"input_ids": i, **ends} for i in IDS]


def bare_bert() -> tuple[BertModel, list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    return BertModel(BertConfig(vocab_size=30, **bert_sizes())), [{"input_ids": ids} for ids in IDS]


def t5() -> tuple[T5ForConditionalGeneration, list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_ff": 24, "d_kv": 4, "num_heads": 4, "num_layers": 1}
    model = T5ForConditionalGeneration(T5Config(vocab_size=30, decoder_start_token_id=0, **sizes))
    return model, [{"input_ids": ids, "labels": ids[:, :5]} for ids in IDS]


def gpt2() -> tuple[GPT2LMHeadModel, list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=16, n_head=4, n_layer=1, n_positions=16))
    return model, [{"input_ids": ids} for ids in IDS]


def vit() -> tuple[ViTForImageClassification, list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    config = ViTConfig(**bert_sizes(), image_size=16, patch_size=8)
    generator = torch.Generator().manual_seed(0)
    return ViTForImageClassification(config), [
        {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)} for _ in IDS
    ]


def albert() -> tuple[AlbertForSequenceClassification, list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    config = AlbertConfig(vocab_size=30, embedding_size=8, **bert_sizes())
    return AlbertForSequenceClassification(config), [{"input_ids": ids} for ids in IDS]


def half_llama() -> tuple[LlamaForCausalLM, list[dict[str, Tensor]]]:
    return tiny_llama().bfloat16(), [{"input_ids": ids} for ids in IDS]


@pytest.mark.slow
@pytest.mark.parametrize("make", [bert, bert_for_answers, bare_bert, t5, gpt2, vit, albert, half_llama])
def test_models_of_every_kind(make, tmp_path: Path):
    model, batches = make()
    report = compress(model, batches, out=tmp_path / "x", target_parameters=0.25, mean_bits=5, progress=False)
    assert report.removed_groups > 0
    assert report.outcome.has_labels == (model.can_generate() or len(batches[0]) > 1)
    small = load_model(report.path)
    batch = {
        name: item for name, item in batches[0].items() if name not in ("labels", "start_positions", "end_positions")
    }
    if isinstance(model, T5ForConditionalGeneration):
        batch["decoder_input_ids"] = batches[0]["labels"]
    with torch.no_grad():
        expected, found = model.eval()(**batch)[0], small(**batch)[0]
    error = 1e-5 if expected.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=error)
    for layer in quantized_layers(model).values():
        assert torch.equal(layer.quantized_weight(), layer.weight)


@pytest.mark.slow
def test_failures_leave_the_model_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = tiny_llama()
    before = values(model)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("geta_hf.methods.one_shot.method.BlockRunner.finish", interrupt)
    with pytest.raises(KeyboardInterrupt):
        compress(model, [TEXT], byte_tokenizer(), out=tmp_path / "x", mean_bits=4, sequence_length=16, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["x.scores.safetensors"]
    assert is_unchanged(model, before)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ([TEXT], {}, "needs a target"),
        ([TEXT], {"config": OneShotConfig()}, "the config has none"),
        ([TEXT], {"target_bytes": "110%"}, "a share below 100%"),
        ([TEXT], {"target_bytes": "0%"}, "a share below 100%"),
        ([TEXT], {"config": GETAConfig(target_bytes=1)}, "config is a GETAConfig"),
        (["a", None], {"target_bytes": "60%"}, "row 1 of calibration_data is a NoneType"),
        ([{"text": "a"}, {"title": "b"}], {"target_bytes": "60%"}, "row 1 of calibration_data is a NoneType"),
        (
            [{"input_ids": [1, 2]}, {"text": "a"}],
            {"target_bytes": "60%"},
            "row 1 of calibration_data has no 'input_ids'",
        ),
        ([TEXT], {"target_bytes": "60%", "sequences": 4.5}, "sequences = 4.5 must be an integer"),
        ([TEXT], {"target_bytes": "60%", "sequence_length": "16"}, "sequence_length = '16' must be an integer"),
        (["too short"], {"target_bytes": "60%"}, "tokens, which give 0 sequences of 16"),
        ([], {"target_bytes": "60%"}, "is empty"),
        ({"input_ids": IDS[0]}, {"target_bytes": "60%"}, "pass a list of batches"),
        ([{"title": "a"}], {"target_bytes": "60%"}, r"has the columns \['title'\]"),
        ([{"input_ids": torch.full((4, 8), 10_000)}], {"target_bytes": "60%"}, "holds the token 10000"),
        ([TEXT], {"target_bytes": "60%", "sequence_length": 100_000}, "sequence_length = 100000"),
        ([TEXT], {"target_bytes": "60%", "sequences": 2}, "at least 4"),
        (7, {"target_bytes": "60%"}, "is a int"),
        ("no/such/file.txt", {"target_bytes": "60%"}, "neither a text file nor a data set"),
    ],
)
def test_input_that_cannot_work_is_named(data, options, message: str, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    options = {"sequence_length": 16, **options}
    with pytest.raises(GETAError, match=message):
        compress(tiny_llama(), data, byte_tokenizer(), out=tmp_path / "x", progress=False, **options)


def test_texts_need_a_tokenizer_of_the_same_vocabulary(tmp_path: Path):
    with pytest.raises(GETAError, match="need the model's tokenizer"):
        compress(tiny_llama(), [TEXT], out=tmp_path / "x", target_bytes="60%")
    model, _ = gpt2()
    with pytest.raises(GETAError, match="has no row in the model's embedding"):
        compress(model, [TEXT], byte_tokenizer(), out=tmp_path / "x", target_bytes="60%")
    model.resize_token_embeddings(400)
    with pytest.raises(GETAError, match=r"has 257 tokens, but the model's embedding 400 rows"):
        compress(model, [TEXT], byte_tokenizer(), out=tmp_path / "x", target_bytes="60%")
    tokenizer = byte_tokenizer()
    model.name_or_path = tokenizer.name_or_path = "where both come from"
    assert len(make_batches([TEXT], model, tokenizer, sequences=4, length=16)) == 1


def test_where_nothing_may_be_pruned_weights_are_rounded(tmp_path: Path):
    model, batches = bare_bert()
    config = OneShotConfig(target_bytes=1, keep=["heads", "channels"], bits=(3, 8))
    with pytest.raises(GETAError, match=r"target_bytes = 2,000 can't be reached"):
        compress(model, batches, out=tmp_path / "x", target_bytes=2000, config=config, progress=False)
    with pytest.raises(GETAError, match=r"target_parameters = 0\.2"):
        compress(model, batches, out=tmp_path / "x", target_parameters=0.2, config=config, progress=False)
    report = compress(model, batches, out=tmp_path / "x", mean_bits=4, config=config, progress=False)
    assert report.mean_bits == pytest.approx(4, abs=0.3) and report.removed_groups == 0
    with torch.no_grad():
        found = load_model(report.path)(**batches[0]).last_hidden_state
        torch.testing.assert_close(found, model.eval()(**batches[0]).last_hidden_state, rtol=1e-4, atol=1e-5)


def test_a_failed_export_gives_the_model_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, batches = bare_bert()
    before = values(model)

    def fail(*_: object, **__: object) -> None:
        raise GETAError("the disk is full")

    # By its module, since the name in the package is the function.
    monkeypatch.setattr(importlib.import_module("geta_hf.compress"), "export", fail)
    with pytest.raises(GETAError, match="the disk is full"):
        compress(model, batches, out=tmp_path / "x", target_parameters=0.25, mean_bits=5, progress=False)
    assert is_unchanged(model, before)
    assert all(type(module).__module__.startswith(("torch.", "transformers.")) for module in model.modules())


def recovered(kind: str, folder: Path) -> tuple[CompressReport, LlamaForCausalLM]:
    model = tiny_llama()
    model.model.embed_tokens.weight.requires_grad_(False)
    report = compress(
        model, [TEXT], byte_tokenizer(), out=folder, target_parameters=0.3, mean_bits=4, recover_steps=6, recover=kind,
        learning_rate=1e-3, config=OneShotConfig(grid="block32"), **SMALL,
    )  # fmt: skip
    return report, model


@pytest.mark.parametrize("kind", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_recovery_keeps_what_was_decided(kind: str, tmp_path: Path):
    report, model = recovered(kind, tmp_path / "x")
    before = report.outcome.loss_before_recovery
    assert before is not None and report.outcome.loss < before and "after recovery" in str(report)
    assert report.perplexity is not None
    assert report.perplexity[1] == pytest.approx(math.exp(report.outcome.loss))
    assert report.removed_groups == sum(all_ - kept for kept, all_ in report.export.kept.values()) > 0
    assert report.export.bits == dict(report.outcome.result.weight_bits)
    small = AutoModelForCausalLM.from_pretrained(report.path)
    with torch.no_grad():
        torch.testing.assert_close(small(input_ids=IDS[0]).logits, model(input_ids=IDS[0]).logits, rtol=1e-4, atol=1e-5)
    layers = quantized_layers(model).values()
    # Weights have moved, off their grids, and no matrix of LoRA remains.
    assert not all(torch.equal(layer.quantized_weight(), layer.weight) for layer in layers)
    assert all(layer.lora is None for layer in layers)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert "model.embed_tokens.weight" in frozen and "model.norm.weight" not in frozen
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_recovery_starts_next_to_the_dense_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Where they are rounded as before, so that nothing changes until a step does."""
    started: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
    original = OneShotMethod.leave_middles

    def watched(self: OneShotMethod, first: nn.Module) -> None:
        before = {name: layer.weight.clone() for name, layer in quantized_layers(model).items()}
        original(self, first)
        for name, layer in quantized_layers(model).items():
            assert torch.equal(layer.quantized_weight(), before[name]), name
            started[name] = before[name], layer.weight.clone(), first.get_submodule(name).weight.clone()

    monkeypatch.setattr(OneShotMethod, "leave_middles", watched)
    model = tiny_llama()
    compress(
        model,
        [TEXT],
        byte_tokenizer(),
        out=tmp_path / "x",
        target_parameters=0.3,
        mean_bits=3,
        recover_steps=1,
        **SMALL,
    )
    for name, (rounded, moved, dense) in started.items():
        kept = moved != 0
        assert ((moved - dense).abs() <= (rounded - dense).abs() + 1e-6)[kept].all(), name
        assert (moved - dense).abs().sum() < (rounded - dense).abs().sum()
    assert started


def test_a_failure_after_recovery_gives_every_parameter_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = tiny_llama()
    before = values(model)
    monkeypatch.setattr(importlib.import_module("geta_hf.compress"), "export", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compress(
            model,
            [TEXT],
            byte_tokenizer(),
            out=tmp_path / "x",
            mean_bits=4,
            recover_steps=2,
            learning_rate=0.1,
            **SMALL,
        )
    assert is_unchanged(model, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recover_steps": -1}, "recover_steps = -1 must be"),
        ({"recover_steps": 2.5}, "recover_steps = 2.5 must be"),
        ({"recover_steps": 2, "recover": "all"}, "recover = 'all' must be 'full' or 'lora'"),
        ({"recover_steps": 2, "learning_rate": 0}, "learning_rate = 0 must be"),
        ({"config": OneShotConfig(distill_logits=1)}, "are for recovery; give recover_steps"),
        ({"recover_steps": 2}, "BertModel gives no loss on this; pass batches with labels"),
    ],
)
def test_recovery_that_cannot_be_is_named(options, message: str, tmp_path: Path):
    model, batches = bare_bert()
    with pytest.raises(GETAError, match=message):
        compress(model, batches, out=tmp_path / "x", mean_bits=4, progress=False, **options)


@pytest.mark.parametrize("labelled", [True, False])
def test_outputs_that_are_not_finite_are_named(labelled: bool, tmp_path: Path):
    model, batches = bert()
    with torch.no_grad():
        model.bert.encoder.layer[0].intermediate.dense.weight.mul_(1e30)
        model.bert.encoder.layer[0].output.dense.weight.mul_(1e30)
    if not labelled:
        batches = [{"input_ids": batch["input_ids"]} for batch in batches]
    with pytest.raises(GETAError, match="activations overflow: what BertForSequenceClassification computes"):
        compress(model, batches, out=tmp_path / "x", mean_bits=5, progress=False)


def test_special_tokens_are_restored_on_a_failure(tmp_path: Path):
    model = tiny_llama()
    before = model.config.to_dict(), model.generation_config.to_dict()
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert tokenizer.pad_token_id != model.config.pad_token_id
    with pytest.raises(GETAError, match="tokens, which give"):
        compress(model, ["a"], tokenizer, out=tmp_path / "x", target_bytes="60%")
    assert (model.config.to_dict(), model.generation_config.to_dict()) == before


def test_a_folder_does_not_replace_the_model_that_is_read(tmp_path: Path):
    model = tiny_llama()
    model.save_pretrained(tmp_path / "dense")
    for out in (tmp_path / "dense", tmp_path / "other" / ".." / "dense"):
        with pytest.raises(GETAError, match="which would be lost"):
            compress(tmp_path / "dense", [TEXT], byte_tokenizer(), out=out, target_bytes="60%", overwrite=True)
    assert load_model(tmp_path / "dense").config.model_type == "llama"


def test_a_model_in_memory_does_not_lose_its_source(tmp_path: Path):
    tiny_llama().save_pretrained(tmp_path / "dense")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "dense")
    with pytest.raises(GETAError, match="which would be lost"):
        compress(model, [TEXT], byte_tokenizer(), out=tmp_path / "dense", target_bytes="60%", overwrite=True)


def test_models_without_values_or_gradients_are_refused(tmp_path: Path):
    model = tiny_llama()
    with torch.inference_mode(), pytest.raises(GETAError, match="call it outside"):
        compress(model, [TEXT], byte_tokenizer(), out=tmp_path / "x", target_bytes="60%")
    model.model.layers[1].to("meta")
    with pytest.raises(GETAError, match=r"model\.layers\.1\..* is on the meta device"):
        compress(model, [TEXT], byte_tokenizer(), out=tmp_path / "x", target_bytes="60%")


def test_what_is_compressed_already_is_named(pruned: tuple[CompressReport, LlamaForCausalLM], tmp_path: Path):
    report, model = pruned
    with pytest.raises(GETAError, match="has quantizers already"):
        compress(model, [TEXT], byte_tokenizer(), out=tmp_path / "x", target_bytes="60%")
    with pytest.raises(GETAError, match="is compressed already"):
        compress(report.path, [TEXT], byte_tokenizer(), out=tmp_path / "x", target_bytes="60%")


@pytest.mark.parametrize("name", ["no/such/model", "/no/such/model", "config.json"])
def test_a_model_that_is_not_there_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text("no json", encoding="utf-8")
    with pytest.raises(GETAError, match=f"^{name} is neither the folder of a model nor") as caught:
        compress(name, [TEXT], out=tmp_path / "x", target_bytes="60%")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_activations_that_overflow_are_named(tmp_path: Path):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1e30)
    with pytest.raises(GETAError, match="activations overflow"):
        compress(model, [TEXT], byte_tokenizer(), out=tmp_path / "x", mean_bits=4, sequence_length=16, progress=False)


def test_what_is_not_done_without_training_is_refused():
    with pytest.raises(GETAError, match="activation_bits"):
        OneShotConfig(target_bytes=1, activation_bits=(8, 8))
    with pytest.raises(GETAError, match="trains nothing"):
        make_method(OneShotConfig(target_bytes=1)).check(frozen_weights=False)


@pytest.mark.parametrize("grid", ["channel", "block32"])
def test_the_loss_that_is_reported_is_that_of_the_folder_with_its_rounded_embedding(tmp_path: Path, grid: str):
    losses = {}
    for bits in (None, 2):
        config = OneShotConfig(mean_bits=8, embedding_bits=bits, grid=grid)
        out = tmp_path / str(bits)
        sizes = {"sequences": 8, "sequence_length": 16}
        report = compress(tiny_llama(), [TEXT], byte_tokenizer(), out=out, config=config, progress=False, **sizes)
        losses[bits] = report.outcome.loss
        small = load_model(out)
        batches = make_batches([TEXT], small, byte_tokenizer(), sequences=8, length=16)
        held_back = _split(batches).held_back
        assert method.measure(small, held_back)[0] == pytest.approx(report.outcome.loss, rel=1e-4)
    assert losses[2] != pytest.approx(losses[None], rel=1e-4)


def test_the_loss_before_recovery_is_that_of_a_folder_without_it(tmp_path: Path):
    config = OneShotConfig(mean_bits=8, embedding_bits=3)
    sizes = {"sequences": 8, "sequence_length": 16, "progress": False}
    reports = [
        compress(
            tiny_llama(),
            [TEXT],
            byte_tokenizer(),
            out=tmp_path / str(steps),
            config=config,
            recover_steps=steps,
            **sizes,
        )
        for steps in (0, 1)
    ]
    assert reports[1].outcome.loss_before_recovery == pytest.approx(reports[0].outcome.loss, rel=1e-5)
    held_back = _split(make_batches([TEXT], tiny_llama(), byte_tokenizer(), sequences=8, length=16)).held_back
    assert method.measure(load_model(tmp_path / "1"), held_back)[0] == pytest.approx(reports[1].outcome.loss, rel=1e-4)


def test_text_is_packed_without_loss():
    model = tiny_llama()
    batches = make_batches([TEXT[:100], TEXT[100:300]], model, byte_tokenizer(), sequences=4, length=16)
    tokens = torch.cat([batch["input_ids"].flatten() for batch in batches])
    tokenizer = byte_tokenizer()
    expected = tokenizer(TEXT[:100])["input_ids"] + tokenizer(TEXT[100:300])["input_ids"]
    assert tokens.tolist() == expected[:64]
    assert all(torch.equal(batch["labels"], batch["input_ids"]) for batch in batches)


def test_rows_of_a_data_set_and_text_files_are_read(tmp_path: Path):
    model = tiny_llama()
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    expected = make_batches([TEXT], model, byte_tokenizer(), sequences=4, length=16)
    for data in (str(tmp_path / "a.txt"), tmp_path / "a.txt", [{"text": TEXT}], [{"id": 1, "content": TEXT}]):
        found = make_batches(data, model, byte_tokenizer(), sequences=4, length=16)
        assert torch.equal(found[0]["input_ids"], expected[0]["input_ids"])


def test_shares_are_those_of_the_dense_model():
    assert bytes_of("12.5%", 1000) == 125 and bytes_of(77, 1000) == 77


@pytest.mark.slow
def test_the_command_writes_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tiny_llama().save_pretrained(tmp_path / "dense")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    options = ["--data", str(tmp_path / "a.txt"), "--target-bytes", "60%", "--sequence-length", "16"]
    assert main(["compress", str(tmp_path / "dense"), str(tmp_path / "small"), *options]) == 0
    assert "no group was removed" in capsys.readouterr().out
    several = [*options[:2], "--targets", "60%", "70%", *options[4:]]
    assert main(["compress", str(tmp_path / "dense"), str(tmp_path / "small"), *several]) == 0
    assert capsys.readouterr().out.count("next: geta-hf eval") == 2
    assert {path.name for path in tmp_path.glob("small-*")} == {"small-60", "small-70"}
    assert main(["compress", str(tmp_path / "dense"), str(tmp_path / "small"), *options]) == 2


def test_an_export_takes_no_second_copy_of_weights_on_their_grids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = tiny_llama().to(torch.bfloat16)
    places: list[dict[str, int]] = []
    real = geta.prove_alike

    def note(first: nn.Module, outputs: Any, second: nn.Module, *args: Any, **kwargs: Any) -> float:
        for each in (first, second):
            places.append({name: parameter.data_ptr() for name, parameter in each.named_parameters()})
        return real(first, outputs, second, *args, **kwargs)

    monkeypatch.setattr(geta, "prove_alike", note)
    batches = [{"input_ids": rows, "labels": rows} for rows in IDS]
    report = compress(model, batches, out=tmp_path / "x", mean_bits=4, gradients=False, progress=False)
    assert not report.removed_groups
    layers = [f"{name}.weight" for name in quantized_layers(model)]
    held = {name: model.get_parameter(name).data_ptr() for name in layers}
    assert all({name: found[name] for name in layers} == held for found in places) and len(places) == 2
