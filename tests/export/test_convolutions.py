"""Convolutional and hierarchical vision models: masked in training, cut at export and reloaded they are one model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PvtV2Config,
    PvtV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
)
from transformers.modeling_outputs import ImageClassifierOutput

from geta_hf.export import export
from geta_hf.quantization import attach_input_quantizers, select_layers, step_size
from geta_hf.serialization.packed_layers import packed_layers
from tests.export.tiny_encoders import train_by_hand
from tests.spaces import build_space

_LABELS: dict[str, Any] = {"num_labels": 3}


def resnet(layer_type: str = "basic") -> PreTrainedModel:
    widths = [8, 16] if layer_type == "basic" else [32, 48]
    sizes: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": widths, "depths": [2, 1]}
    return ResNetForImageClassification(ResNetConfig(layer_type=layer_type, **sizes, **_LABELS))


def mobilenet() -> PreTrainedModel:
    return MobileNetV2ForImageClassification(
        MobileNetV2Config(depth_multiplier=0.1, image_size=32, tf_padding=False, **_LABELS)
    )


def pvt() -> PreTrainedModel:
    sizes: dict[str, Any] = {"hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4, "num_attention_heads": [1, 2, 2, 2]}
    return PvtV2ForImageClassification(PvtV2Config(image_size=32, mlp_ratios=[2] * 4, **sizes, **_LABELS))


def swin() -> PreTrainedModel:
    sizes: dict[str, Any] = {"embed_dim": 8, "depths": [2, 1], "num_heads": [2, 2], "window_size": 4, "mlp_ratio": 2.0}
    return SwinForImageClassification(SwinConfig(image_size=32, patch_size=4, **sizes, **_LABELS))


def pictures(rows: int = 2) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(rows, 3, 32, 32, generator=torch.Generator().manual_seed(1))}


def used(model: PreTrainedModel, batch: dict[str, Tensor]) -> PreTrainedModel:
    """Return a model whose batch norm has seen data and whose norms are not those of the first step."""
    model.train()
    with torch.no_grad():
        for _ in range(2):
            model(**batch)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.LayerNorm):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
    return model.eval()


@torch.no_grad()
def round_inputs(model: PreTrainedModel, batch: dict[str, Tensor]) -> None:
    for place, layer in enumerate(attach_input_quantizers(model, [batch]).values()):
        quantizer = layer.input_quantizer
        quantizer.d.copy_(step_size(4 + place % 5, quantizer.q_m, quantizer.t))


_LONG = [pytest.param(name, marks=pytest.mark.slow) for name in ("bottleneck", "mobilenet", "swin")]


@pytest.mark.parametrize("name", ["resnet", "pvt", *_LONG])
def test_masked_sliced_and_reloaded_give_the_same_logits(name: str, tmp_path: Path) -> None:
    makers: dict[str, Callable[[], PreTrainedModel]] = {"resnet": resnet, "mobilenet": mobilenet, "pvt": pvt}
    makers |= {"swin": swin, "bottleneck": lambda: resnet("bottleneck")}
    torch.manual_seed(0)
    model = used(makers[name](), pictures())
    space = build_space(model, pictures())
    if name == "pvt":
        # The model's own code writes the width of a stage where it joins heads, so that none can be removed.
        space = build_space(model, pictures(), keep=["heads"])
    with torch.no_grad():
        kept = train_by_hand(model, space, include=["."], grid="channel")
    round_inputs(model, pictures())
    report = export(model, tmp_path / "small", space=space, batch=pictures())
    assert report.kept.keys() == kept.keys() and any(count < before for count, before in report.kept.values())
    small = AutoModelForImageClassification.from_pretrained(tmp_path / "small").eval()
    with torch.no_grad():
        expected, found = model(**pictures(5)).logits, small(**pictures(5)).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    # Statistics of channels that are gone are gone as well.
    for module in small.modules():
        if isinstance(module, nn.BatchNorm2d):
            sizes = {module.num_features, *(len(value) for value in (module.weight, module.running_var))}
            assert len(sizes) == 1
    removed = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in small.parameters())
    assert removed > 0 and all(layer.step_size.numel() > 1 for layer in packed_layers(small).values())
    depthwise = [m for m in small.modules() if isinstance(m, nn.Conv2d) and m.weight.shape[1] == 1 and m.groups > 1]
    assert all(layer.groups == layer.in_channels == layer.out_channels for layer in depthwise)
    assert bool(depthwise) == (name in ("mobilenet", "pvt"))


@pytest.mark.parametrize(
    ("make", "ends"),
    [
        (resnet, {"resnet.embedder.embedder.convolution", "classifier.1"}),
        (
            mobilenet,
            {
                "mobilenet_v2.conv_stem.first_conv.convolution",
                "mobilenet_v2.conv_stem.conv_3x3.convolution",
                "mobilenet_v2.conv_stem.reduce_1x1.convolution",
                "mobilenet_v2.conv_1x1.convolution",
                "classifier",
            },
        ),
        (pvt, {"classifier"}),
    ],
)
def test_first_and_last_layers_stay_float_unless_all_are_named(
    make: Callable[[], PreTrainedModel], ends: set[str]
) -> None:
    model = make()
    layers = {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    assert set(select_layers(model, include=["."])) == layers
    assert layers - set(select_layers(model)) == ends


def test_residual_channels_of_a_resnet_are_removed_on_request(tmp_path: Path) -> None:
    """Batch norm normalizes each channel by itself, so that a stage's width can shrink exactly."""
    torch.manual_seed(0)
    model = used(resnet(), pictures())
    default = build_space(model, pictures())
    coupled = [family for family in default.families if family.kind == "residual" and not family.prunable]
    assert coupled
    space = build_space(model, pictures(), prune=["residual"])
    names = {family.name for family in space.prunable} - {family.name for family in default.prunable}
    assert names == {family.name for family in coupled}
    with torch.no_grad():
        train_by_hand(model, space)
    report = export(model, tmp_path / "small", space=space, batch=pictures())
    assert any(report.kept[name][0] < report.kept[name][1] for name in names)
    small = AutoModelForImageClassification.from_pretrained(tmp_path / "small").eval()
    with torch.no_grad():
        torch.testing.assert_close(small(**pictures(5)).logits, model(**pictures(5)).logits, rtol=1e-4, atol=1e-5)


class WavesConfig(PreTrainedConfig):
    model_type = "test_waves"


class Waves(PreTrainedModel):
    """Two Conv1d with batch norm, the second depthwise, and a head."""

    config_class = WavesConfig
    main_input_name = "input_values"

    def __init__(self, config: WavesConfig) -> None:
        super().__init__(config)
        first, second = nn.Conv1d(2, 8, 5, stride=2), nn.Conv1d(8, 8, 3, padding=1, groups=8)
        self.layers = nn.ModuleList([first, nn.BatchNorm1d(8), nn.ReLU(), second])
        self.head = nn.Linear(8, 3)
        self.post_init()

    def forward(self, input_values: Tensor, **kwargs: Any) -> ImageClassifierOutput:
        hidden = input_values
        for layer in self.layers:
            hidden = layer(hidden)
        return ImageClassifierOutput(logits=self.head(hidden.relu().mean(-1)))


def test_a_conv1d_is_cut_packed_and_read_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    batch = {"input_values": torch.randn(3, 2, 21)}
    model = used(Waves(WavesConfig()), batch)
    space = build_space(model, batch, prune=["output"])
    with torch.no_grad():
        train_by_hand(model, space, include=["layers"], grid="channel")
    round_inputs(model, batch)
    report = export(model, tmp_path / "small", space=space, batch=batch)
    small = Waves.from_pretrained(tmp_path / "small").eval()
    assert set(report.bits) == {"layers.0", "layers.3"} == set(packed_layers(small))
    assert small.layers[3].groups == small.layers[0].out_channels < 8
    with torch.no_grad():
        torch.testing.assert_close(small(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-5)
