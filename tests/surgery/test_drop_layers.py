"""Whole layers removed: chosen by the loss, proved against the dense model, and then an ordinary shorter model."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainingArguments

from geta_hf import GETAConfig, GETATrainer
from geta_hf.convert import convert
from geta_hf.errors import GETAError
from geta_hf.qadg.tracing.dummy_inputs import make_dummy_inputs
from geta_hf.reporting.comparison import compare
from geta_hf.surgery.drop_layers import drop_layers, mean_loss
from geta_hf.training.distillation import Distiller
from tests.architectures import ARCHITECTURES, build

pytestmark = pytest.mark.usefixtures("shared_spaces")

LAYERS = 5
TYPES = ["sliding_attention", "full_attention", "sliding_attention", "full_attention", "sliding_attention"]
EXTRA = {
    "gemma3": {"layer_types": TYPES},
    "qwen3": {"layer_types": TYPES, "sliding_window": 4, "use_sliding_window": True},
    "afmoe": {"num_dense_layers": 2},
}
WRITES = (
    "dense.weight",
    "dense.bias",
    "fc2.weight",
    "fc2.bias",
    "o_proj.weight",
    "down_proj.weight",
    "experts.down_proj",
)
SMALL = {"warmup": 2, "projection": 4, "joint": 6, "projection_periods": 2, "pruning_periods": 3}


def deep(name: str, **settings: object) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """A tiny causal model of five layers, and a batch with labels."""
    architecture = ARCHITECTURES[name]
    model_class = getattr(transformers, architecture.model)
    torch.manual_seed(0)
    values = {**architecture.settings, "num_hidden_layers": LAYERS, **EXTRA.get(name, {}), **settings}
    model = model_class(model_class.config_class(**values)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    batch = make_dummy_inputs(model)
    return model, {**batch, "labels": batch["input_ids"]}


def unlabelled(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def dropped(model: PreTrainedModel, wanted: int | list[str], batch: dict[str, Tensor]):
    return drop_layers(model, wanted, unlabelled(batch), lambda: float(mean_loss(model, [batch])))


@torch.no_grad()
def muted(model: PreTrainedModel, places: list[int]) -> PreTrainedModel:
    """The dense model with what these layers write to the residual stream at zero."""
    model = copy.deepcopy(model)
    for place in places:
        for name, parameter in model.model.layers[place].named_parameters():
            if name.endswith(WRITES):
                parameter.zero_()
    return model


@pytest.mark.parametrize("name", ["phi", "llama", "qwen3", "gemma3", "mixtral"])
@torch.no_grad()
def test_a_shorter_model_computes_what_the_dense_one_does_without_those_layers(name: str, tmp_path: Path) -> None:
    model, batch = deep(name)
    expected = muted(model, [1, 3])(**unlabelled(batch)).logits
    depth = dropped(model, ["model.layers.1", "model.layers.3"], batch)
    depth.release()
    assert depth.kept == {"model.layers": (0, 2, 4)} and model.config.num_hidden_layers == 3
    assert (model(**unlabelled(batch)).logits - expected).abs().max() <= 1e-5
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2]
    if name in ("qwen3", "gemma3"):
        assert model.config.layer_types == ["sliding_attention"] * 3
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(again.model.layers) == 3
    assert torch.equal(again(**unlabelled(batch)).logits, model(**unlabelled(batch)).logits)
    tokens = [
        again.generate(batch["input_ids"][:1], max_new_tokens=4, do_sample=False, use_cache=c) for c in (True, False)
    ]
    assert torch.equal(*tokens)


@torch.no_grad()
def test_layers_are_chosen_one_by_one_by_the_loss_without_them() -> None:
    model, batch = deep("llama")
    gone: list[int] = []
    for _ in range(3):
        losses = {p: float(muted(model, [*gone, p])(**batch).loss) for p in range(LAYERS) if p not in gone}
        gone.append(min(losses, key=lambda place: losses[place]))
    before = float(model(**batch).loss)
    depth = dropped(model, 3, batch)
    assert depth.removed == tuple(f"model.layers.{place}" for place in gone)
    assert depth.losses[0] == pytest.approx(before, abs=1e-6)
    assert depth.losses[-1] == pytest.approx(float(model(**batch).loss), abs=1e-5)
    assert str(depth).startswith(f"layers removed: model.layers.{gone[0]}, ") and "(3 of 5)" in str(depth)


def test_a_layer_that_the_configuration_can_not_spare_is_passed_over() -> None:
    """The first two layers are dense and the others hold experts, by a number in the config: only experts can go."""
    model, batch = deep("afmoe")
    assert set(dropped(model, 2, batch).removed) < {f"model.layers.{place}" for place in (2, 3, 4)}
    model, batch = deep("afmoe")
    message = r"model\.layers\.2\.mlp\..* has shape .* in what the shorter configuration builds"
    with pytest.raises(GETAError, match=message):
        dropped(model, ["model.layers.0"], batch)


def test_of_equal_numbers_the_one_that_counts_layers_is_found() -> None:
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 4, "intermediate_size": 4}
    model, batch = deep("llama", **sizes)
    dropped(model, 1, batch)
    assert [getattr(model.config, name) for name in sizes] == [4, 4, 3, 4]


def test_what_depends_on_the_place_of_a_layer_is_refused_and_nothing_changes() -> None:
    """A DiffLlama layer works a constant out of its place, so a reloaded model would have another one."""
    model, batch = deep("diffllama")
    before, config = {name: t.clone() for name, t in model.state_dict().items()}, model.config.to_dict()
    with pytest.raises(GETAError, match=r"lambda_init of model\.layers\.1\.self_attn is 0\.\d+, but 0\.\d+ in what"):
        dropped(model, ["model.layers.1"], batch)
    assert model.state_dict().keys() == before.keys() and model.config.to_dict() == config
    assert dropped(model, 1, batch).removed == ("model.layers.4",)


def test_restoring_gives_everything_back() -> None:
    model, batch = deep("gemma3")
    before, config, expected = list(model.state_dict()), model.config.to_dict(), model(**batch).logits
    depth = dropped(model, 2, batch)
    assert len(model.model.layers) == 3
    depth.restore()
    assert list(model.state_dict()) == before and model.config.to_dict() == config
    assert torch.equal(model(**batch).logits, expected)


def test_a_wrong_shorter_model_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutations: places that are not counted anew break the cache, and other layers than those chosen the logits."""
    import geta_hf.surgery.drop_layers as module

    model, batch = deep("llama")
    monkeypatch.setattr(module, "shorter_changes", lambda model, kept: [])
    with pytest.raises(GETAError, match="with a cache"):
        dropped(model, ["model.layers.0"], batch)
    assert len(model.model.layers) == LAYERS
    monkeypatch.undo()
    cut = module.DroppedLayers.cut_list
    monkeypatch.setattr(module.DroppedLayers, "cut_list", lambda own, blocks, _: cut(own, blocks, [0, 1, 2, 3]))
    with pytest.raises(GETAError, match=r"the shortened model's logits .* differs"):
        dropped(model, ["model.layers.0"], batch)


def test_what_can_not_be_is_said() -> None:
    model, batch = deep("llama")
    with pytest.raises(GETAError, match=r"drop_layers = 5, but at most 4 layers of LlamaForCausalLM can be removed"):
        dropped(model, 5, batch)
    with pytest.raises(
        GETAError, match=r"names 'model.layers.9', which is no layer .*model.layers.0, .* drop_layers = 0"
    ):
        dropped(model, ["model.layers.9"], batch)
    with pytest.raises(GETAError, match=r"names all of model.layers; keep at least one"):
        dropped(model, [f"model.layers.{place}" for place in range(LAYERS)], batch)
    with pytest.raises(GETAError, match="hold no labels; add them, or name the layers"):
        dropped(model, 1, unlabelled(batch))
    bert, inputs = build("bert")
    refusal = r"names bert.encoder.layer.0, which can't be removed: the residual stream does not"
    with pytest.raises(GETAError, match=refusal):
        dropped(bert, ["bert.encoder.layer.0"], inputs)
    with pytest.raises(GETAError, match="shortens a Hugging Face model by its configuration, which Linear lacks"):
        drop_layers(nn.Linear(2, 2), 1, {}, lambda: 0.0)
    assert len(model.model.layers) == LAYERS and model.config.num_hidden_layers == LAYERS


@pytest.mark.parametrize("value", [-1, 1.5, True, "1", [3]])
def test_a_config_takes_a_number_or_paths(value: object) -> None:
    with pytest.raises(GETAError, match=r"GETAConfig.drop_layers = .* a number of layers, or a list of their paths"):
        GETAConfig(drop_layers=value)
    assert GETAConfig.from_dict(GETAConfig(drop_layers=["model.layers.1"]).to_dict()).drop_layers == ["model.layers.1"]


# --- hidden states of a teacher -----------------------------------------------------------------------------------


@torch.no_grad()
def test_layers_that_stay_are_to_be_given_what_they_were_given_in_the_teacher() -> None:
    model, batch = deep("llama")
    teacher = copy.deepcopy(model)
    depth = dropped(model, ["model.layers.1", "model.layers.4"], batch)
    distiller = Distiller(model, teacher, hidden=1.0, kept=depth.kept)
    outputs = model(**distiller.student_inputs(batch))
    found = distiller.loss(batch, outputs)
    states = teacher(**batch, output_hidden_states=True).hidden_states
    mask = batch["attention_mask"].bool()
    errors = [
        ((ours - states[place]).square().mean(-1) / states[place].square().mean(-1))[mask].mean()
        for ours, place in zip(outputs.hidden_states, (0, 2, 3, 5), strict=True)
    ]
    assert found == pytest.approx(float(torch.stack(errors).mean()), abs=1e-6)
    assert float(errors[0]) == 0 and float(errors[2]) > 0


def test_a_teacher_as_short_as_the_student_is_matched_as_it_is() -> None:
    model, batch = deep("llama")
    depth = dropped(model, ["model.layers.1"], batch)
    distiller = Distiller(model, copy.deepcopy(model), hidden=1.0, kept=depth.kept)
    with torch.no_grad():
        assert float(distiller.loss(batch, model(**distiller.student_inputs(batch)))) == 0


def test_hidden_states_of_two_shortened_lists_are_refused() -> None:
    model, teacher = build("llama")[0], copy.deepcopy(build("llama")[0])
    kept = {"encoder.layers": (0,), "decoder.layers": (1,)}
    with pytest.raises(GETAError, match=r"can't match layers of encoder.layers and decoder.layers"):
        Distiller(model, teacher, hidden=1.0, kept=kept)
    Distiller(model, teacher, logits=1.0, kept=kept)


# --- the whole way ------------------------------------------------------------------------------------------------


def rows(count: int = 16) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 90, (12,), generator=generator) for _ in range(count)]
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer(folder: Path, **changes: object) -> GETATrainer:
    arguments = TrainingArguments(
        str(folder), max_steps=14, per_device_train_batch_size=4, save_steps=14, learning_rate=1e-3, use_cpu=True,
        report_to="none", disable_tqdm=True, seed=3,
    )  # fmt: skip
    values = {"drop_layers": 2, "uniform": True, "distill_logits": 1.0, "distill_hidden": 1.0, **SMALL, **changes}
    return GETATrainer(deep("phi")[0], arguments, geta_config=GETAConfig(**values), train_dataset=rows())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> GETATrainer:
    made = trainer(tmp_path_factory.mktemp("run"), target_parameters=0.5)
    made.train()
    return made


def test_bops_are_relative_to_the_dense_model(trained: GETATrainer) -> None:
    assert trained.plan.relative_bops == pytest.approx(6 / 32 * 0.5 * 3 / 5)
    assert trained.compression_state()["relative_bops"] < 0.5 * 3 / 5 * 8 / 32
    assert len(trained.space.prunable) == 2 * 3


def test_the_config_of_a_run_names_the_layers(trained: GETATrainer, tmp_path: Path) -> None:
    assert trained.run_config.drop_layers == list(trained.depth.removed) and len(trained.depth.removed) == 2
    assert trained.geta_config.drop_layers == 2  # what was given is not replaced
    report = trained.export_model(tmp_path / "small")
    assert GETAConfig.load(tmp_path / "small" / "geta_config.json") == trained.run_config
    small = AutoModelForCausalLM.from_pretrained(report.path)
    assert len(small.model.layers) == 3
    ids = torch.arange(4, 10)[None]
    assert (small(ids).logits - trained.model.eval()(ids).logits).abs().max() <= 1e-5


@torch.no_grad()
def test_the_table_counts_the_dense_model_whole(trained: GETATrainer, tmp_path: Path) -> None:
    deep("phi")[0].save_pretrained(tmp_path / "dense")
    trained.export_model(tmp_path / "small")
    table = compare(tmp_path / "dense", tmp_path / "small", tokens=8)
    rows = {
        cells[0]: cells[1:] for cells in ([c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines())
    }
    assert rows["layers removed"] == ["", ", ".join(trained.run_config.drop_layers)]
    found = float(rows["relative BOPs, paper (quantized linears)"][1].rstrip("%")) / 100
    assert found == pytest.approx(trained.compression_state()["relative_bops"], abs=1e-4)


def test_a_checkpoint_is_exported_and_becomes_a_vanilla_folder(trained: GETATrainer, tmp_path: Path) -> None:
    convert(trained.args.output_dir, tmp_path / "vanilla", format="vanilla")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "vanilla")
    assert plain.config.num_hidden_layers == 3 and "geta" not in (tmp_path / "vanilla" / "config.json").read_text()
    ids = torch.arange(4, 10)[None]
    assert (plain(ids).logits - trained.model.eval()(ids).logits).abs().max() <= 1e-5


def test_a_resumed_run_lost_the_same_layers_or_is_refused(trained: GETATrainer, tmp_path: Path) -> None:
    checkpoint = f"{trained.args.output_dir}/checkpoint-14"
    again = trainer(tmp_path, target_parameters=0.5)
    assert again.run_config == trained.run_config
    again.train(resume_from_checkpoint=checkpoint)
    assert all(torch.equal(t, trained.model.state_dict()[name]) for name, t in again.model.state_dict().items())
    other = [f"model.layers.{place}" for place in range(2)]
    assert other != trained.run_config.drop_layers
    with pytest.raises(
        GETAError, match=r"another GETAConfig \(drop_layers: \['model.layers.\d', 'model.layers.\d'\] there"
    ):
        trainer(tmp_path, target_parameters=0.5, drop_layers=other).train(resume_from_checkpoint=checkpoint)


def test_a_trainer_that_can_not_be_made_gives_the_layers_back(tmp_path: Path) -> None:
    model, batch = deep("phi")
    before = list(model.state_dict())
    arguments = TrainingArguments(str(tmp_path), max_steps=14, use_cpu=True, report_to="none")
    limits = GETAConfig(drop_layers=2, target_bytes=1000, **SMALL)
    with pytest.raises(GETAError, match="target_bytes"):
        GETATrainer(model, arguments, geta_config=limits, train_dataset=rows())
    assert list(model.state_dict()) == before and model.config.num_hidden_layers == LAYERS
    model(**batch)
