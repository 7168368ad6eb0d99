"""GETATrainer under Trainer's other options: base optimizers, precision, checkpointing, targets, distillation."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForQuestionAnswering,
    BertForQuestionAnswering,
    MixtralConfig,
    MixtralForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from geta_hf import GETAConfig, GETATrainer
from geta_hf.errors import GETAError
from geta_hf.export.export import STRUCTURE_NAME
from geta_hf.quantization import quantized_layers
from geta_hf.training.support import Launch, check_launch
from tests.conftest import tiny_bert_config
from tests.small_folders import exported
from tests.training.test_trainer import SMALL, arguments, rows, trainer

pytestmark = pytest.mark.usefixtures("shared_spaces")

EIGHT_BIT = {"adamw_bnb_8bit": "bitsandbytes", "rmsprop_bnb_8bit": "bitsandbytes", "adamw_torch_8bit": "torchao"}
OPTIMIZERS = ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "rmsprop", "adagrad"]


def settled(made: GETATrainer) -> bool:
    """Exactly K groups gone, and whole bits."""
    bits = made.qasso.bits().values()
    return made.qasso.removed_groups == 52 and all(abs(b - round(b)) < 1e-3 for b in bits)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_base_optimizer(tmp_path, name: str) -> None:
    made = trainer(tmp_path, optim=name)
    made.train()
    assert settled(made)


@pytest.mark.filterwarnings("default")  # theirs
@pytest.mark.parametrize("name", EIGHT_BIT)
def test_base_optimizers_in_eight_bits(tmp_path, name: str) -> None:
    """Tensors of 4096 elements and more have moments in 8 bits; a resumed run ends with the same weights."""
    pytest.importorskip(EIGHT_BIT[name])

    def make(folder) -> GETATrainer:
        torch.manual_seed(0)
        model = BertForQuestionAnswering(tiny_bert_config(hidden_size=128, intermediate_size=128))
        config, options = GETAConfig(**SMALL), arguments(folder, optim=name, save_steps=12)
        return GETATrainer(model, options, geta_config=config, train_dataset=rows())

    whole, resumed = make(tmp_path / "a"), make(tmp_path / "b")
    whole.train()
    weight = whole.model.bert.encoder.layer[0].output.dense.weight
    moments = [value for value in whole.qasso.state[weight].values() if isinstance(value, torch.Tensor)]
    assert any(value.dtype == torch.uint8 or type(value).__name__ == "OptimState8bit" for value in moments)
    assert whole.qasso.removed_groups == whole.qasso.target_groups
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-12"))
    for (key, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), key


@pytest.mark.parametrize(
    "changes",
    [{"bf16": True}, {"activation_checkpointing": True}, {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1}],
    ids=["bf16", "gradient checkpointing", "accumulation and clipping"],
)
def test_every_way_of_stepping(tmp_path, changes: dict) -> None:
    made = trainer(tmp_path, **changes)
    made.train()
    assert settled(made)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> GETATrainer:
    """A finished run without dropout."""
    made = trainer(tmp_path_factory.mktemp("plain"), dropout=0.0)
    made.train()
    return made


def test_gradient_checkpointing_changes_nothing(tmp_path, plain) -> None:
    assert not plain.args.activation_checkpointing
    saving = trainer(tmp_path, dropout=0.0, activation_checkpointing=True)
    saving.train()
    for (name, a), b in zip(plain.model.named_parameters(), saving.model.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the compiler's own
def test_a_compiled_model(tmp_path) -> None:
    made = trainer(tmp_path, torch_compile=True, torch_compile_backend="inductor")
    made.train()
    assert settled(made)
    made.export_model(tmp_path / "small")


# --- targets and kinds of quantizers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"target_parameters": 0.5, "mean_bits": 4.5},
        {"target_bops": 0.06},
        {"target_bytes": 24_000},
        {"target_sparsity": 0.4, "target_bytes": 28_000, "per_channel": True},
        {"target_bytes": 28_000, "grid": "block32", "split": "early", "saliency": "mask_fisher"},
        {"target_bops": 0.02, "activation_bits": [4, 8]},
        {"target_sparsity": 0.5, "uniform": True, "multiple_of": 8, "bit_choices": [4, 8]},
    ],
    ids=["parameters", "bops", "bytes", "bytes per channel", "bytes in blocks", "bops with activations", "structure"],
)
def test_targets_are_met_by_the_exported_folder(tmp_path, changes: dict) -> None:
    config = GETAConfig(**SMALL, **changes)
    made = trainer(tmp_path, config)
    planned = made.plan
    made.train()
    state = made.compression_state()
    report = made.export_model(tmp_path / "small")
    kept, bits = report.kept, report.bits
    if config.target_parameters is not None:
        ledger = made.qasso.ledger
        left = ledger.prunable_parameters(made.qasso.gone) / ledger.prunable_parameters(ledger.nothing)
        assert 0.49 <= left <= 0.5
    if config.target_bops is not None:
        assert 0.97 * config.target_bops < state["relative_bops"] <= config.target_bops
    if config.target_bytes is not None:
        assert 0.98 * config.target_bytes < report.file_bytes <= config.target_bytes
        assert planned.bytes <= 1.01 * config.target_bytes
    if config.uniform:
        heads, channels = ({k for n, (k, _) in kept.items() if n.endswith(kind)} for kind in (":heads", ":channels"))
        assert len(heads) == len(channels) == 1 and channels.pop() % 8 == 0
    assert set(bits.values()) <= set(config.widths)
    reloaded = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "small")
    assert (tmp_path / "small" / STRUCTURE_NAME).is_file() and reloaded is not None


@pytest.mark.parametrize("embedding_bits", [None, 3])
def test_the_ledger_counts_the_exported_file_to_the_byte(tmp_path, embedding_bits: int | None) -> None:
    made = trainer(tmp_path, GETAConfig(**SMALL, embedding_bits=embedding_bits))
    made.train()
    report = made.export_model(tmp_path / "small")
    ledger = made.qasso.ledger
    bits = torch.tensor([report.bits[layer.weight.removesuffix(".weight")] for layer in ledger.layers])
    counted = ledger.stored_bytes(made.qasso.gone, bits.double())
    assert counted == report.file_bytes


def images() -> tuple[ViTForImageClassification, list[dict]]:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=3))
    pictures = torch.randn(64, 3, 16, 16)
    return model, [{"pixel_values": picture, "labels": torch.tensor(i % 3)} for i, picture in enumerate(pictures)]


def experts() -> tuple[MixtralForCausalLM, list[dict]]:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MixtralConfig(**sizes, vocab_size=64, num_key_value_heads=2, num_local_experts=3)
    ids = torch.randint(4, 60, (64, 12))
    return MixtralForCausalLM(config), [{"input_ids": row, "labels": row} for row in ids]


@pytest.mark.parametrize("make", [images, experts])
def test_names_that_transformers_gives_tensors_in_the_file_are_counted(tmp_path, make) -> None:
    """ViT's and Mixtral's tensors are renamed."""
    torch.manual_seed(0)
    model, data = make()
    config = GETAConfig(**SMALL, activation_bits=(8, 8), per_channel=True)
    made = GETATrainer(model, arguments(tmp_path), geta_config=config, train_dataset=data)
    made.train()
    report = made.export_model(tmp_path / "small")
    ledger = made.qasso.ledger
    bits = torch.tensor([report.bits[layer.weight.removesuffix(".weight")] for layer in ledger.layers])
    counted = ledger.stored_bytes(made.qasso.gone, bits.double(), True)
    assert report.file_bytes == counted


@pytest.mark.parametrize("nonlinear", [False, True])
def test_activations_have_bits_of_their_own(tmp_path, nonlinear: bool) -> None:
    config = GETAConfig(**SMALL, activation_bits=(6, 7), learn_activation_exponent=nonlinear)
    made = trainer(tmp_path, config)
    made.train()
    quantizers = [layer.input_quantizer for layer in quantized_layers(made.model).values()]
    assert {float(own.bits()) for own in quantizers} <= {6.0, 7.0}
    assert all((own.t.item() != 1) == nonlinear for own in quantizers)
    assert made.compression_state()["mean_input_bits"] <= 7
    report = made.export_model(tmp_path / "small")
    assert set(report.activation_bits.values()) <= {6, 7} and len(report.activation_bits) == 12


# --- distillation -----------------------------------------------------------------------------------------------------


def test_the_dense_start_teaches_by_default(tmp_path, plain) -> None:
    """The teacher is the model as it was, gets no gradient and is in no checkpoint; its weight changes training."""
    config = GETAConfig(**SMALL, distill_logits=1.0, distill_hidden=0.5)
    made = trainer(tmp_path, config, dropout=0.0)
    start = {name: value.clone() for name, value in made.distiller.teacher.named_parameters()}
    assert not any("quantizer" in name for name in start)
    made.train()
    assert all(torch.equal(value, start[name]) for name, value in made.distiller.teacher.named_parameters())
    assert made.model.state_dict().keys() == plain.model.state_dict().keys()
    weights = (model.bert.encoder.layer[0].output.dense.weight for model in (made.model, plain.model))
    assert not torch.equal(*weights) and settled(made)


def test_a_teacher_of_ones_own_and_teachers_that_do_not_fit(tmp_path) -> None:
    def made(teacher: nn.Module | None, **changes: float) -> GETATrainer:
        torch.manual_seed(0)
        student = BertForQuestionAnswering(tiny_bert_config())
        config = GETAConfig(**SMALL, **changes)
        return GETATrainer(
            student, arguments(tmp_path, max_steps=20), geta_config=config, teacher=teacher, train_dataset=rows()
        )

    wider = BertForQuestionAnswering(tiny_bert_config(hidden_size=64))
    made(wider, distill_logits=1.0).train()
    with pytest.raises(GETAError, match="hidden"):
        made(wider, distill_hidden=1.0)
    with pytest.raises(GETAError, match="vocab"):
        made(BertForQuestionAnswering(tiny_bert_config(vocab_size=70)), distill_logits=1.0)
    with pytest.raises(GETAError, match="give one a weight"):
        made(wider)


def test_evaluation_is_without_the_teacher(tmp_path) -> None:
    made = trainer(tmp_path, GETAConfig(**SMALL, distill_logits=5.0), dropout=0.0)
    plain = trainer(tmp_path, dropout=0.0)
    assert made.evaluate(rows(8))["eval_loss"] == pytest.approx(plain.evaluate(rows(8))["eval_loss"])


# --- refused before training ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"deepspeed_plugin": object()}, "DeepSpeed keeps its own optimizer.*use DDP or FSDP2"),
        ({"fsdp_plugin": SimpleNamespace(fsdp_version=1)}, "set fsdp_version: 2"),
        ({"fsdp_plugin": SimpleNamespace()}, "set fsdp_version: 2"),
        ({"tp_size": 2}, "tensor parallelism splits heads"),
        ({"tp_enabled": True}, "tensor parallelism splits heads"),
    ],
)
def test_launches_that_hide_groups_are_refused(state: dict, message: str) -> None:
    parallel = SimpleNamespace(tp_enabled=state.get("tp_enabled", False))
    accelerator = SimpleNamespace(state=SimpleNamespace(**state), parallelism_config=parallel)
    with pytest.raises(GETAError, match=message):
        check_launch(Launch.of(accelerator, SimpleNamespace(tp_size=state.get("tp_size"))))


def test_several_gpus_in_one_process_are_refused_with_the_ways_to_start(tmp_path) -> None:
    """Trainer would copy the model over them by nn.DataParallel at every step."""
    several = arguments(tmp_path)
    several._n_gpu = 2
    with pytest.raises(GETAError, match=r"sees 2 GPUs.*`torchrun --nproc_per_node 2`.*CUDA_VISIBLE_DEVICES=0"):
        GETATrainer(BertForQuestionAnswering(tiny_bert_config()), several, train_dataset=rows())


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch.compile's own
def test_a_model_that_is_wrapped_already_is_refused(tmp_path) -> None:
    plain = BertForQuestionAnswering(tiny_bert_config())
    # Without its constructor, which needs a group of processes.
    spread = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(spread)
    spread.module = plain
    for wrapped in (nn.DataParallel(plain), spread):
        message = f"wrapped in {type(wrapped).__name__}; pass the BertForQuestionAnswering inside.*accelerate launch"
        with pytest.raises(GETAError, match=message):
            GETATrainer(wrapped, arguments(tmp_path), train_dataset=rows())
    with pytest.raises(GETAError, match=r"compiled already.*set torch_compile"):
        GETATrainer(torch.compile(plain), arguments(tmp_path), train_dataset=rows())


def test_launches_that_keep_groups_together_are_accepted() -> None:
    for state in ({}, {"fsdp_plugin": SimpleNamespace(fsdp_version=2)}):
        check_launch(Launch.of(SimpleNamespace(state=SimpleNamespace(**state)), None))


def test_an_unreachable_size_fails_before_training_and_leaves_the_model_plain(tmp_path) -> None:
    with pytest.raises(GETAError, match=r"target_bytes = 9,000 can't be reached.*it is [\d,]+; raise it"):
        trainer(tmp_path, GETAConfig(**SMALL, target_bytes=9000))


def test_a_model_that_was_cut_before_is_refused_at_once(tmp_path) -> None:
    small = AutoModelForQuestionAnswering.from_pretrained(exported(tmp_path)[1])
    with pytest.raises(GETAError, match="is compressed already"):
        GETATrainer(small, arguments(tmp_path), geta_config=GETAConfig(**SMALL), train_dataset=rows())
    with pytest.raises(GETAError, match="pruned before by geta_hf; start from the dense model"):
        GETATrainer(small.dequantize(), arguments(tmp_path), geta_config=GETAConfig(**SMALL), train_dataset=rows())
    small.hf_quantizer, small.config.quantization_config = object(), None
    with pytest.raises(GETAError, match="loaded in quantized form"):
        GETATrainer(small, arguments(tmp_path), geta_config=GETAConfig(**SMALL), train_dataset=rows())
