"""Costs of convolutional networks and vision transformers, counted on models without weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from geta_hf import GETAConfig, PruningSpace, measure_costs
from geta_hf.costs.ledger import LayerEntry, Ledger
from geta_hf.costs.model_costs import forward_uses, image_of, one_sample
from geta_hf.costs.selection import Limits
from geta_hf.costs.targets import most_removed
from geta_hf.quantization import select_layers
from geta_hf.recipes.cifar_models import (
    CifarResNetConfig,
    CifarResNetForImageClassification,
    Vgg7Config,
    Vgg7ForImageClassification,
)


def conv(places: int, kernel: int, inputs: int, outputs: int) -> int:
    return places**2 * kernel**2 * inputs * outputs


def resnet_20() -> int:
    total, inputs = conv(32, 3, 3, 16), 16
    for side, width in ((32, 16), (16, 32), (8, 64)):
        for _ in range(3):
            total += conv(side, 3, inputs, width) + conv(side, 3, width, width)
            total += 0 if inputs == width else conv(side, 1, inputs, width)
            inputs = width
    return total + 64 * 10


def resnet_50() -> int:
    """The stride is in the 3 · 3 convolution, as in torchvision (4.09 G) and in transformers."""
    total, inputs, side = conv(112, 7, 3, 64), 64, 56
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
        for block in range(blocks):
            before, side = side, side // 2 if stage and not block else side
            total += conv(before, 1, inputs, width) + conv(side, 3, width, width) + conv(side, 1, width, 4 * width)
            total += conv(side, 1, inputs, 4 * width) if not block else 0
            inputs = 4 * width
    return total + 2048 * 1000


def vgg_7() -> int:
    total, inputs = 0, 3
    for side, width in ((32, 128), (16, 256), (8, 512)):
        total += conv(side, 3, inputs, width) + conv(side, 3, width, width)
        inputs = width
    return total + 512 * 4 * 4 * 1024 + 1024 * 10


def mobilenet_v2() -> int:
    """Its depthwise convolutions read one channel each; torchvision says 300.77 M."""
    total, inputs, side = conv(112, 3, 3, 32), 32, 112
    for factor, width, blocks, stride in (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ):
        for block in range(blocks):
            inner = factor * inputs
            total += conv(side, 1, inputs, inner) if factor > 1 else 0
            side //= stride if not block else 1
            total += conv(side, 3, 1, inner) + conv(side, 1, inner, width)
            inputs = width
    return total + conv(7, 1, 320, 1280) + 1280 * 1000


def vit(width: int, extra: int = 1) -> int:
    tokens = 14**2 + extra
    layer = 4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * 4 * width
    return conv(14, 16, 3, width) + 12 * layer + width * 1000


def swin_tiny() -> int:
    total, width, side = conv(56, 4, 3, 96), 96, 56
    for stage, blocks in enumerate((2, 2, 6, 2)):
        tokens = side**2
        total += blocks * (4 * tokens * width**2 + 2 * tokens * 49 * width + 8 * tokens * width**2)
        if stage < 3:
            side //= 2
            total += side**2 * 4 * width * 2 * width
            width *= 2
    return total + width * 1000


_SMALL: dict[str, Any] = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
_TINY: dict[str, Any] = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}
_LABELS: dict[str, Any] = {"num_labels": 1000}
_MOBILE: dict[str, Any] = {"first_layer_is_expansion": True, "finegrained_output": True, "tf_padding": False}

MODELS: dict[str, tuple[Callable[[], PreTrainedModel], int]] = {
    "resnet_20": (lambda: CifarResNetForImageClassification(CifarResNetConfig(num_labels=10)), resnet_20()),
    "vgg_7": (lambda: Vgg7ForImageClassification(Vgg7Config(num_labels=10)), vgg_7()),
    "resnet_50": (lambda: ResNetForImageClassification(ResNetConfig(**_LABELS)), resnet_50()),
    "mobilenet_v2": (
        lambda: MobileNetV2ForImageClassification(MobileNetV2Config(**_MOBILE, **_LABELS)),
        mobilenet_v2(),
    ),
    "vit_small": (lambda: ViTForImageClassification(ViTConfig(**_SMALL, **_LABELS)), vit(384)),
    "deit_tiny": (lambda: DeiTForImageClassification(DeiTConfig(**_TINY, **_LABELS)), vit(192, extra=2)),
    "swin_tiny": (lambda: SwinForImageClassification(SwinConfig(**_LABELS)), swin_tiny()),
}


@pytest.mark.parametrize("name", MODELS)
def test_macs_and_bops_of_real_architectures(name: str) -> None:
    make, macs = MODELS[name]
    with torch.device("meta"):
        model = make().eval()
    costs = measure_costs(model, names=list(select_layers(model, ["."])))
    assert costs.macs == macs
    attention = macs - costs.bops_linear / 32**2
    # Convolutions and linear layers are all there is, but for attention's two products.
    assert attention >= 0 and (attention == 0) == ("net" in name or "vgg" in name)
    assert costs.bops_full == macs * 32**2 and costs.tokens == 0
    side = 32 if name in ("resnet_20", "vgg_7") else 224
    assert costs.sample == f"image of 3 · {side} · {side}"


def test_published_counts() -> None:
    assert round(resnet_50() / 1e9, 2) == 4.09 and round(mobilenet_v2() / 1e6, 1) == 300.8


def test_the_size_of_an_image_and_the_width_of_layers_count() -> None:
    sizes: dict[str, Any] = {"depths": [1], "hidden_sizes": [8], "embedding_size": 8, "num_labels": 2}
    model = CifarResNetForImageClassification(CifarResNetConfig(image_size=[6, 10], num_channels=1, **sizes))
    assert image_of(model) == (1, 6, 10) and image_of(model, 4) == (1, 4, 4)
    layers = list(select_layers(model))
    assert len(layers) == 2  # by default neither the stem nor the head
    costs = measure_costs(model, names=layers)
    assert costs.bops_linear == 2 * 60 * 9 * 8 * 8 * 32 * 32
    assert costs.macs == 60 * 9 * 8 + 2 * 60 * 9 * 8 * 8 + 16
    assert measure_costs(model, names=layers, image=(1, 3, 5)).bops_linear == costs.bops_linear / 4


def even_macs(share: float) -> float:
    """Return what remains of ResNet-50's MACs without this share of the stem and of the inner widths of each block."""
    inputs, side = 64 - round(share * 64), 56
    total = conv(112, 7, 3, inputs)
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
        kept = width - round(share * width)
        for block in range(blocks):
            before, side = side, side // 2 if stage and not block else side
            total += conv(before, 1, inputs, kept) + conv(side, 3, kept, kept) + conv(side, 1, kept, 4 * width)
            total += conv(side, 1, inputs, 4 * width) if not block else 0
            inputs = 4 * width
    return (total + 2048 * 1000) / resnet_50()


@pytest.mark.parametrize(("share", "paper"), [(0.4, 0.0697), (0.5, 0.0538)])
def test_relative_bops_of_the_papers_table_4(share: float, paper: float) -> None:
    """The paper's figures for ResNet-50, weights alone, are those of even pruning at 4 to 4.3 bits."""
    with torch.device("meta"):
        model = ResNetForImageClassification(ResNetConfig(**_LABELS)).eval()
    names = list(select_layers(model, ["."]))
    dense = measure_costs(model, names=names).bops_linear
    # The families come from the graph, what they take away from the ledger: neither knows the architecture.
    families = PruningSpace.from_config(model.config).prunable
    shapes = {name: tuple(value.shape) for name, value in (*model.named_parameters(), *model.named_buffers())}
    uses = forward_uses(model, names, one_sample(model, 0, (3, 224, 224)))
    ledger = Ledger.of(families, shapes, [LayerEntry(f"{name}.weight", uses[name]) for name in names])
    assert float(ledger.relative_bops(ledger.nothing, 32.0)) == pytest.approx(1)
    removed = most_removed(families, Limits.of(GETAConfig()), share)
    found = float(ledger.relative_bops(removed, 32.0))
    assert found == pytest.approx(even_macs(share), rel=1e-9) and dense == resnet_50() * 32**2
    # BOPs of weights alone: what remains of the MACs · mean bits / 32.
    assert 4 <= paper / found * 32 <= 4.3
