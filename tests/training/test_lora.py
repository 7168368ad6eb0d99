"""GETATrainer with a LoraConfig: the whole way, exact resume, what stands still, memory, and every refusal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertForQuestionAnswering,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    TrainerCallback,
    TrainingArguments,
)

from geta_hf import GETAConfig, GETATrainer
from geta_hf.convert import convert
from geta_hf.errors import GETAError
from geta_hf.methods.qasso.frozen import GradientSums
from geta_hf.qadg import zero_groups
from geta_hf.quantization import quantized_layers, select_layers
from geta_hf.training.lora import LORA_NAME, load_lora, merged, plan_lora
from tests.conftest import tiny_bert_config
from tests.training.test_trainer import SMALL, rows

pytestmark = pytest.mark.usefixtures("shared_spaces")

STEPS = 24
SIZES = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
RENAMED = (
    "ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"  # of newer transformers; peft asks for it, too
)
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


def phi() -> PhiForCausalLM:
    torch.manual_seed(0)
    model = PhiForCausalLM(PhiConfig(**SIZES, intermediate_size=48, max_position_embeddings=32, resid_pdrop=0.1))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)  # forgotten biases are told from biases that never were
    return model


def texts(count: int = 64) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(4, 60, (count, 10), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


def arguments(folder: Path, **changes: object) -> TrainingArguments:
    values: dict = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "weight_decay": 0.01,
        "logging_steps": 6,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    return TrainingArguments(**{**values, **changes})


def trainer(folder: Path, model: nn.Module | None = None, *, lora: object = None, data=None, **changes) -> GETATrainer:
    config = changes.pop("config", None) or GETAConfig(**SMALL)
    return GETATrainer(
        model or phi(),
        arguments(folder, **changes),
        geta_config=config,
        train_dataset=data or texts(),
        peft_config=lora or LoraConfig(**LORA),
        optimizers=changes.pop("optimizers", (None, None)),
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> GETATrainer:
    made = trainer(tmp_path_factory.mktemp("run"), save_strategy="steps", save_steps=1)
    made.train()
    return made


def test_the_target_is_met_exactly_with_whole_bits(trained) -> None:
    zero = zero_groups(trained.model, trained.space)
    assert trained.space.num_groups == 2 * (4 + 48) and trained.qasso.removed_groups == 52
    with merged(trained.model):
        again = zero_groups(trained.model, trained.space)
    for family in trained.space.prunable:
        assert torch.equal(zero[family.name], trained.qasso.removed[family.name])
        assert torch.equal(again[family.name], zero[family.name])  # nothing is written back by B A
    assert sum(int(mask.sum()) for mask in zero.values()) == 52
    bits = [float(layer.weight_quantizer.bits()) for layer in quantized_layers(trained.model).values()]
    assert all(4 <= round(b) <= 8 and b == pytest.approx(round(b), abs=1e-4) for b in bits)


def test_base_weights_outside_removed_groups_stand_still_bit_for_bit(trained) -> None:
    state, gone = dict(trained.model.named_parameters()), trained.qasso.removed
    cut: dict[str, torch.Tensor] = {}
    for family in trained.space.prunable:
        for member in family.members:
            index = member.index[gone[family.name]].flatten()
            mask = cut.setdefault(member.tensor, torch.zeros(state[member.tensor].shape, dtype=torch.bool))
            mask.index_fill_(member.dim, index, True)
    for name, before in phi().named_parameters():
        mask = cut.get(name, torch.zeros(before.shape, dtype=torch.bool))
        assert torch.equal(state[name][~mask], before[~mask]), name
        assert not state[name][mask].any(), name
    assert sum(int(mask.sum()) for mask in cut.values()) > 1000
    moved = [layer.lora.B.detach().abs().sum() for layer in quantized_layers(trained.model).values()]
    assert len(moved) == 12 and all(float(value) > 0 for value in moved)


def test_the_optimizer_holds_state_of_the_small_matrices_alone(tmp_path) -> None:
    counted = []

    class Count(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            counted.append(sum(p.grad.nbytes for p in model.parameters() if p.grad is not None))

    model = phi()
    made = trainer(tmp_path, model, max_steps=8, config=GETAConfig(**SMALL | {"joint": 2, "pruning_periods": 1}))
    made.add_callback(Count())
    made.train()
    small = sum(layer.lora.A.numel() + layer.lora.B.numel() for layer in quantized_layers(model).values())
    quantizers = 2 * len(quantized_layers(model))
    assert small == 4 * 2 * (4 * (32 + 32) + 2 * (32 + 48))
    assert set(counted) == {4 * (small + quantizers)}  # those of frozen quantizers are zeros
    state = [value for kept in made.qasso.state.values() for value in kept.values() if isinstance(value, torch.Tensor)]
    assert sum(value.nbytes for value in state if value.dim()) == 2 * 4 * (small + quantizers)
    assert small < 0.2 * sum(p.numel() for p in phi().parameters())


def test_no_two_large_gradients_exist_at_once(tmp_path, monkeypatch) -> None:
    made, held, seen, add = trainer(tmp_path), [], {}, GradientSums.add

    def note(watch: GradientSums, name: str, x: torch.Tensor, gradient: torch.Tensor) -> None:
        held.append(sum(p.grad is not None for n, p in made.model.named_parameters() if n in watch.frozen.names))
        seen.setdefault(made.qasso.phase.stage, set()).add(name)
        add(watch, name, x, gradient)

    monkeypatch.setattr(GradientSums, "add", note)
    made.train()
    assert set(held) == {1}
    assert seen == {stage: set(made.qasso.frozen.names) for stage in ("projection", "joint")}
    assert not any(p.requires_grad for n, p in made.model.named_parameters() if n in made.qasso.frozen.names)


def test_the_export_is_the_merged_model_without_a_trace(trained, tmp_path) -> None:
    before = {name: value.clone() for name, value in trained.model.state_dict().items()}
    report = trained.export_model(tmp_path / "small")
    assert all(torch.equal(value, before[name]) for name, value in trained.model.state_dict().items())
    assert sum(kept for kept, _ in report.kept.values()) == 52
    names = set(load_file(tmp_path / "small" / "model.safetensors"))
    assert not any("lora" in name for name in names)
    assert not (tmp_path / "small" / LORA_NAME).exists()
    assert "lora" not in (tmp_path / "small" / "config.json").read_text()
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    ids, model = texts()[0]["input_ids"][None], trained.model.eval()
    assert (model(input_ids=ids).logits - small(input_ids=ids).logits).abs().max() <= 1e-5
    with merged(model):
        assert (model(input_ids=ids).logits - small(input_ids=ids).logits).abs().max() <= 1e-5


def test_a_checkpoint_is_exported_without_a_trainer(trained, tmp_path) -> None:
    trained.export_model(tmp_path / "one")
    convert(trained.args.output_dir, tmp_path / "two")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("stop", [1, 4, 11, 20])
def test_resume_is_bit_exact_from_every_stage(trained, tmp_path, stop: int) -> None:
    again = trainer(tmp_path)
    again.train(resume_from_checkpoint=f"{trained.args.output_dir}/checkpoint-{stop}")
    state = again.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in trained.model.state_dict().items())
    assert torch.equal(again.qasso.gone, trained.qasso.gone)


def test_resume_under_another_lora_config_is_refused(trained, tmp_path) -> None:
    folder = f"{trained.args.output_dir}/checkpoint-4"
    stored = json.loads((Path(folder) / LORA_NAME).read_text())
    assert stored["peft_type"] == "LORA" and stored["r"] == 4 and load_lora(Path(folder)).lora_alpha == 8
    with pytest.raises(GETAError, match=r"another LoraConfig \(lora_alpha: 8 there, 16 here\)"):
        trainer(tmp_path, lora=LoraConfig(**{**LORA, "lora_alpha": 16})).train(resume_from_checkpoint=folder)
    full = GETATrainer(phi(), arguments(tmp_path), geta_config=GETAConfig(**SMALL), train_dataset=texts())
    with pytest.raises(GETAError, match="written with LoRA, this run is without"):
        full.train(resume_from_checkpoint=folder)
    bare = shutil.copytree(folder, tmp_path / "bare")
    (bare / LORA_NAME).write_text("{")
    with pytest.raises(GETAError, match="can't be read"):
        trainer(tmp_path).train(resume_from_checkpoint=str(bare))
    (bare / LORA_NAME).unlink()
    with pytest.raises(GETAError, match="written without LoRA, this run is with"):
        trainer(tmp_path).train(resume_from_checkpoint=str(bare))


@pytest.mark.filterwarnings(RENAMED)
def test_heads_biases_and_conv1d(tmp_path) -> None:
    """BERT's task head is trained in full and biases of its layers too; GPT-2's weights are (in, out)."""
    bert = BertForQuestionAnswering(tiny_bert_config(hidden_dropout_prob=0.1))
    head = bert.qa_outputs.weight.detach().clone()
    some = LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["qa_outputs"], bias="lora_only")
    how = {"gradient_checkpointing": True, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    made = trainer(tmp_path / "bert", bert, lora=some, data=rows(), save_strategy="no", **how)
    made.train()
    trainable = {n for n, p in bert.named_parameters() if p.requires_grad and "quantizer" not in n}
    assert trainable >= {"qa_outputs.weight", "bert.encoder.layer.0.attention.self.query.bias"}
    assert len(trainable) == 2 + 4 + 4 * 2 and not torch.equal(bert.qa_outputs.weight, head)
    assert sum(kept for kept, _ in made.export_model(tmp_path / "one").kept.values()) == 52

    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_positions=32, n_embd=32, n_layer=2, n_head=4))
    rule = {"rank_pattern": {"c_fc": 6}, "use_rslora": True, "layers_to_transform": [0]}
    some = LoraConfig(r=2, target_modules=["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True, **rule)
    made = trainer(tmp_path / "gpt2", gpt2, lora=some)
    made.train()
    adapted = {n: layer.lora for n, layer in quantized_layers(gpt2).items() if layer.lora is not None}
    assert len(adapted) == 4 and adapted["transformer.h.0.mlp.c_fc"].A.shape == (6, 32)
    assert adapted["transformer.h.0.mlp.c_fc"].scale == pytest.approx(8 / 6**0.5)
    made.export_model(tmp_path / "two")


def test_embeddings_and_norms_that_stand_still_are_pruned_too(tmp_path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=48, num_key_value_heads=2))
    config = GETAConfig(**SMALL, prune=["residual"], target_sparsity=0.3)
    made = trainer(tmp_path, model, config=config)
    made.train()
    assert int(made.qasso.gone.sum()) == made.qasso.target_groups
    assert sum(int(m.sum()) for m in zero_groups(model, made.space).values()) == made.qasso.target_groups


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "IA3Config; only a plain LoraConfig"),
        (LoraConfig(**LORA, lora_dropout=0.1), "lora_dropout = 0.1 is not supported.*set it to 0"),
        (LoraConfig(**LORA, use_dora=True), "use_dora = True is not supported"),
        (LoraConfig(**LORA, lora_bias=True), "lora_bias = True is not supported"),
        (LoraConfig(**LORA, init_lora_weights="pissa"), "init_lora_weights = 'pissa'; choose True or 'gaussian'"),
        (LoraConfig(target_modules=["query"]), "peft can't use this LoraConfig.*query"),
        (LoraConfig(target_modules=["lm_head"]), "targets nothing quantized: lm_head, which has no quantizer"),
        (LoraConfig(target_modules=["lm_head", "q_proj"]), "targets lm_head, which has no quantizer"),
        (LoraConfig(target_modules=["embed_tokens"]), "nothing quantized: model.embed_tokens"),
    ],
)
def test_lora_configs_that_can_not_be_kept(tmp_path, lora: object, message: str) -> None:
    with pytest.raises(GETAError, match=message):
        trainer(tmp_path, lora=lora)


@pytest.mark.filterwarnings(RENAMED)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": GETAConfig(**SMALL, saliency="hesso")}, "saliency = 'hesso' needs gradients"),
        ({"fp16": True, "use_cpu": True}, "fp16 scales gradients"),
        ({"torch_compile": True}, "torch_compile loses"),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, "use_reentrant=True"),
    ],
)
def test_ways_of_training_that_can_not_be_kept(tmp_path, changes: dict, message: str) -> None:
    with pytest.raises(GETAError, match=message):
        trainer(tmp_path, **changes)


@pytest.mark.filterwarnings(RENAMED)
def test_optimizers_made_beforehand_and_wrapped_models_are_refused(tmp_path) -> None:
    model = phi()
    base = torch.optim.AdamW(model.parameters(), lr=1e-3)
    how = {"geta_config": GETAConfig(**SMALL), "train_dataset": texts()}
    with pytest.raises(GETAError, match="lacks LoRA's matrices"):
        GETATrainer(model, arguments(tmp_path), peft_config=LoraConfig(**LORA), optimizers=(base, None), **how)
    with pytest.raises(GETAError, match="give the plain model and peft_config"):
        GETATrainer(get_peft_model(phi(), LoraConfig(**LORA)), arguments(tmp_path), **how)


def test_a_tied_layer_is_refused() -> None:
    model = phi()
    model.model.layers[1].mlp.fc1.weight = model.model.layers[0].mlp.fc1.weight
    with pytest.raises(GETAError, match="are one tensor, which can't be merged"):
        plan_lora(model, LoraConfig(**LORA), select_layers(model))
