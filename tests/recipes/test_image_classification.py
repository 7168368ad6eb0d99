from __future__ import annotations

import html
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageClassification, TrainingArguments, ViTImageProcessor, pipeline

from geta_hf import GETAError
from geta_hf.evaluation.image_classification import accuracies, collate_images
from geta_hf.recipes import image_classification as recipe
from geta_hf.recipes.averages import Averages, averaged
from geta_hf.recipes.cifar_models import CifarResNetConfig, CifarResNetForImageClassification
from geta_hf.reporting.comparison import compare
from geta_hf.reporting.folder_summary import read_summary
from geta_hf.reporting.html_report import write_report
from geta_hf.reporting.results import read_results
from geta_hf.serialization.packed_layers import packed_layers
from tests.recipes.pictures import CLASSES, SIDE, picture, write_folder, write_idx

CONFIGS = Path(recipe.__file__).parent / "configs"
SHIPPED = ("deit", "mobilenet_v2", "pvt_v2", "resnet", "resnet8", "resnet20", "swin", "vgg7", "vit")
TINY = ["--architecture.model_type", "cifar_resnet", "--architecture.depths", "[1, 1]"]
TINY += ["--architecture.hidden_sizes", "[8, 16]", "--architecture.embedding_size", "8"]
TINY += ["--architecture.image_size", str(SIDE)]
QUICK = ["--use_cpu", "--disable_tqdm", "--report_to", "none", "--save_strategy", "no"]
QUICK += ["--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "8", "--learning_rate", "0.05"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    home = tmp_path_factory.mktemp("images")
    train, test = write_folder(home / "train", 8), write_folder(home / "test", 4)
    return ["--train_dir", str(train), "--eval_dir", str(test)]


@pytest.fixture(scope="module")
def compressed(folders: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    output = tmp_path_factory.mktemp("run")
    more = ["--max_steps", "40", "--optim", "sgd", "--geta.target_sparsity", "0.25", "--geta.bits", "[4, 8]"]
    more += ["--geta.activation_bits", "[6, 8]", "--augmentation", "shift_flip", "--ema_decay", "0.9", "--mixup", "0.1"]
    more += ["--label_smoothing_factor", "0.1"]
    return recipe.main([*TINY, *QUICK, *folders, *more, "--output_dir", str(output)]), output


def test_a_compressed_run_from_end_to_end(compressed: tuple[dict[str, Any], Path]) -> None:
    results, output = compressed
    assert json.loads((output / "results.json").read_text()) == json.loads(json.dumps(results))
    assert (results["images"], results["train_images"], results["steps"]) == (8, 16, 40)
    assert results["image_size"] == [SIDE, SIDE]
    # The folder scores what the trained model scored: averages, removed groups and widths are all in it.
    assert results["before_export"]["accuracy"] == results["accuracy"] and results["start"] is None
    assert results["accuracy"] > 80
    card = (output / "export" / "README.md").read_text()
    assert "pipeline_tag: image-classification" in card and "accuracy" in card
    structure = json.loads((output / "export" / "geta_structure.json").read_text())
    assert structure


def test_card_and_report_speak_of_images(compressed: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    folder = compressed[1] / "export"
    card, summary = (folder / "README.md").read_text(), read_summary(folder)
    page = html.unescape(write_report(folder, tmp_path / "report.html").read_text())
    for text in (card, page):
        assert f"MACs, image of 3 · {SIDE} · {SIDE}" in text and "relative BOPs, paper (quantized layers)" in text
        assert "the full count every convolution and matrix product" in text
        assert "linear layers" not in text and "tokens" not in text
        assert "AutoModelForImageClassification.from_pretrained" in text
    assert summary.task == "image-classification" and "classifier.1" in summary.float_layers
    # A dense folder is measured beside it, though transformers lacks the class.
    dense = CifarResNetForImageClassification.from_pretrained(folder).dequantize()
    dense.save_pretrained(tmp_path / "dense")
    assert "image of" in compare(tmp_path / "dense", folder, latency=False)


def test_the_export_runs_in_a_pipeline(compressed: tuple[dict[str, Any], Path]) -> None:
    classify = pipeline("image-classification", model=str(compressed[1] / "export"), device="cpu")
    found = classify([picture(label, 900 + label) for label in (0, 1)])
    assert [answers[0]["label"] for answers in found] == list(CLASSES)


def test_a_dense_run_on_idx_files_of_one_channel(tmp_path: Path) -> None:
    data = write_idx(tmp_path / "idx", 8)
    argv = [*TINY, *QUICK, "--idx_dir", str(data), "--output_dir", str(tmp_path / "out"), "--max_steps", "2"]
    with pytest.raises(GETAError, match="has 1 channel"):
        recipe.main(argv)
    results = recipe.main([*argv, "--architecture.num_channels", "1"])
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "out" / "export")
    assert isinstance(loaded, CifarResNetForImageClassification) and loaded.config.num_channels == 1
    assert results["images"] == 8 and (tmp_path / "out" / "export" / "preprocessor_config.json").is_file()


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_are_understood(name: str, tmp_path: Path) -> None:
    arguments = recipe.parse_arguments([str(CONFIGS / f"{name}.yaml"), "--output_dir", str(tmp_path), "--use_cpu"])
    assert isinstance(arguments.training, TrainingArguments) and arguments.geta is not None
    assert arguments.training.remove_unused_columns is False


_ENCODER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
_STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 8}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "deit": {"model_type": "deit", "patch_size": 4, **_ENCODER},
    "mobilenet_v2": {"model_type": "mobilenet_v2", "depth_multiplier": 0.1, "tf_padding": False},
    # Its convolutions see 2 · 2 pixels and more: of a single one, torch's gradient in bf16 is NaN on some processors.
    "pvt_v2": {
        "model_type": "pvt_v2",
        "strides": [2, 2, 2, 1],
        "hidden_sizes": [8, 8, 16, 16],
        "depths": [1] * 4,
        "num_attention_heads": [1, 2, 2, 2],
        "mlp_ratios": [2] * 4,
        "sr_ratios": [2, 2, 1, 1],
    },
    "resnet": {"model_type": "resnet", "layer_type": "basic", **_STAGES},
    "resnet8": {"model_type": "cifar_resnet", "num_channels": 3, **_STAGES},
    "resnet20": {"model_type": "cifar_resnet", **_STAGES},
    "swin": {
        "model_type": "swin",
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [1, 2],
        "window_size": 4,
        "patch_size": 2,
    },
    "vgg7": {"model_type": "vgg7", "hidden_sizes": [4, 8], "classifier_size": 16},
    "vit": {"model_type": "vit", "patch_size": 4, **_ENCODER},
}
"""The config's name -> a small model of its kind."""


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_train_a_small_model_of_their_kind(name: str, folders: list[str], tmp_path: Path) -> None:
    """Everything but the model, the data and the lengths is the config's own."""
    config = {**ARCHITECTURES[name], "image_size": SIDE}
    words = [str(CONFIGS / f"{name}.yaml"), "--model_name_or_path", "null", "--architecture", json.dumps(config)]
    words += ["--dataset_name", "null", *folders, "--dataloader_num_workers", "0", "--measure_speed", "false"]
    words += ["--output_dir", str(tmp_path), "--max_steps", "12", "--per_device_train_batch_size", "4"]
    if find_spec("torchvision") is None:
        words += ["--augmentation", "none"]
    results = recipe.main([*words, "--use_cpu", "--disable_tqdm"])
    assert (results["steps"], results["images"], results["image_size"]) == (12, 8, [SIDE, SIDE])
    assert results["before_export"]["accuracy"] == results["accuracy"]
    exported = AutoModelForImageClassification.from_pretrained(tmp_path / "export")
    assert packed_layers(exported)
    if name != "resnet8":  # a search removes what its score says
        chosen = recipe.ModelArguments(None, config)
        dense, _ = recipe.load_model(chosen, recipe.make_config(chosen, CLASSES))
        assert exported.num_parameters() < dense.num_parameters()


@pytest.fixture(scope="module")
def trained_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"depths": [1], "hidden_sizes": [8], "embedding_size": 8}
    CifarResNetForImageClassification(CifarResNetConfig(num_labels=5, **sizes)).save_pretrained(folder)
    return folder


def test_a_head_for_another_number_of_labels(trained_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = recipe.ModelArguments(model_name_or_path=str(trained_folder))
    with pytest.raises(GETAError, match=r"has a head for 5 labels, and the data has 2 classes; pass --new_head"):
        recipe.make_config(model, CLASSES)
    assert recipe.make_config(model, "abcde").id2label[0] == "LABEL_0"  # a head that is kept keeps its names
    model.new_head = True
    config = recipe.make_config(model, CLASSES)
    assert config.id2label == {0: "level", 1: "upright"} and config.label2id == {"level": 0, "upright": 1}
    loaded, trained = recipe.load_model(model, config)
    assert loaded.classifier[1].out_features == 2 and not trained


def test_batch_norm_takes_the_share_of_a_batch_that_is_asked_for(trained_folder: Path) -> None:
    """MobileNetV2 has TensorFlow's momentum, with which PyTorch keeps the statistics of the last batch alone."""

    def momenta(arguments: recipe.ModelArguments) -> set[float | None]:
        model, _ = recipe.load_model(arguments, recipe.make_config(arguments, "abcde"))
        return {module.momentum for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)}

    own = recipe.ModelArguments(None, ARCHITECTURES["mobilenet_v2"])
    assert momenta(own) == {0.997}
    assert momenta(recipe.ModelArguments(None, own.architecture, batch_norm_momentum=0.1)) == {0.1}
    assert momenta(recipe.ModelArguments(str(trained_folder), batch_norm_momentum=0.3)) == {0.3}
    shipped = recipe.parse_arguments([str(CONFIGS / "mobilenet_v2.yaml"), "--output_dir", "x", "--use_cpu"])
    assert shipped.model.batch_norm_momentum == 0.1


def test_a_trained_start_is_scored_and_timed(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its head fits the data, so the run can say what compression cost."""
    config = CifarResNetConfig(num_labels=2, depths=[1], hidden_sizes=[8], embedding_size=8)
    CifarResNetForImageClassification(config).save_pretrained(tmp_path / "m")
    ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(tmp_path / "m")
    words = ["--model_name_or_path", str(tmp_path / "m"), "--output_dir", str(tmp_path / "out"), "--max_steps", "8"]
    results = recipe.main([*words, *QUICK, *folders, "--geta.target_sparsity", "0.25"])
    assert results["start"]["images"] == 8
    (speed,) = results["speed"]
    assert speed["work"] == f"an image of {SIDE}x{SIDE}"
    assert f"accuracy {results['start']['accuracy']:.2f} → {results['accuracy']:.2f}" in capsys.readouterr().out
    scored = read_results(tmp_path / "out" / "export")
    assert scored["dense"][0].metrics == {"accuracy": results["start"]["accuracy"]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give one of model_name_or_path .* and architecture"),
        (["--architecture.depths", "[1]"], "architecture needs model_type"),
        (["--architecture.model_type", "resnot"], "no config of model type 'resnot'"),
        (["--architecture.model_type", "bert"], "no image classification model of type 'bert'"),
        ([*TINY, "--ema_decay", "1.5"], "ema_decay = 1.5 must lie between 0 and 1"),
        ([*TINY, "--batch_norm_momentum", "0"], r"batch_norm_momentum = 0 must lie in \(0, 1\]"),
        ([*TINY, "--ema_decay", "0.9", "--resume_from_checkpoint", "x"], "not part of a checkpoint"),
        ([*TINY, "--architecture.num_labels", "3", "--architecture.model_type", "no"], "no config of model type"),
        ([*TINY, "--per_device_train_batch_size", "1"], "batch norm .* needs batches of 2 rows or more"),
        ([*TINY, "--per_device_train_batch_size", "5"], "the last of 16 rows in batches of 5 has one"),
        (["--architecture.model_type", "vit", "--architecture.image_size", "32", "--image_size", "16"], "can't run"),
    ],
)
def test_what_cannot_work_ends_before_training(
    options: list[str], message: str, folders: list[str], tmp_path: Path
) -> None:
    if "vit" in options:
        options = [*options, "--architecture.num_hidden_layers", "1"]
    with pytest.raises(GETAError, match=message):
        recipe.main([*QUICK, *folders, "--output_dir", str(tmp_path / "out"), *options])


def test_sizes_that_make_no_batch() -> None:
    rows = [{"pixel_values": torch.zeros(3, 4, width), "labels": 0} for width in (4, 5)]
    with pytest.raises(GETAError, match=r"images of different sizes \[\(4, 4\), \(4, 5\)\]"):
        collate_images(rows)


def test_accuracies_against_counting() -> None:
    found = torch.tensor([[1, 0, 2, 3, 4], [0, 1, 2, 3, 4], [5, 0, 2, 3, 4], [4, 3, 2, 1, 0]])
    scores = accuracies(found, torch.tensor([1, 1, 1, 4]))
    assert (scores["accuracy"], scores["accuracy_top5"]) == (50, 75)
    assert scores["accuracy_stderr"] == pytest.approx(25)
    assert "accuracy_top5" not in accuracies(found[:, :2], torch.tensor([1, 1, 1, 4]))


@pytest.mark.parametrize("pieces", [1, 2])
def test_the_loss_of_mixed_labels_adds_up_over_micro_batches(pieces: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, shares = torch.randn(4, 3, generator=generator), torch.rand(4, 3, generator=generator).softmax(-1)
    smooth = 0.9 * shares + 0.1 / 3
    mean = -(smooth * logits.log_softmax(-1)).sum(-1).mean()
    loss = recipe.MixedLoss(0.1)
    count = None if pieces == 1 else torch.tensor(shares.numel())  # as Trainer counts labels
    total = sum(
        loss({"logits": part}, labels, count)
        for part, labels in zip(logits.chunk(pieces), shares.chunk(pieces), strict=True)
    )
    torch.testing.assert_close(total, mean)
    # Evaluation has plain labels, without smoothing.
    labels = torch.tensor([0, 2, 1, 1])
    torch.testing.assert_close(loss({"logits": logits}, labels), torch.nn.functional.cross_entropy(logits, labels))


def test_averages_against_a_loop() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    model[0].bias.requires_grad_(False)
    assert sorted(averaged(model)) == ["0.weight", "1.bias", "1.running_mean", "1.running_var", "1.weight"]
    kept, expected = Averages(0.5), None
    for step in range(6):
        with torch.no_grad():
            model[0].weight.fill_(float(step))
        kept.on_step_end(None, None, None, model=model)
        decay = min(0.5, (1 + step) / (10 + step)) if step else 0.0
        expected = float(step) if expected is None else decay * expected + (1 - decay) * step
    # Each step keeps its own share, at most half.
    kept.on_train_end(None, None, None, model=model)
    assert float(model[0].weight[0, 0].detach()) == pytest.approx(expected)
