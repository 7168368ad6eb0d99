"""Two convolutional networks for images of 32 pixels that transformers lacks, as models that its Auto classes know.

Importing this module registers them: `cifar_resnet` is ResNet for CIFAR (He et al., arXiv 1512.03385, Sec. 4.2) with
depths [3, 3, 3] for ResNet-20 and [9, 9, 9] for ResNet-56, and `vgg7` the VGG-like network of DJPQ and Bayesian Bits
(2 · 128C3, MP2, 2 · 256C3, MP2, 2 · 512C3, MP2, 1024FC; arXiv 2005.07093).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
)
from transformers.modeling_outputs import ImageClassifierOutput


class CifarResNetConfig(ResNetConfig):
    """ResNet's config with the sizes of ResNet-20 as defaults."""

    model_type = "cifar_resnet"

    def __init__(self, **kwargs: Any) -> None:
        sizes: dict[str, Any] = {"embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [3, 3, 3]}
        super().__init__(**{**sizes, "layer_type": "basic", "image_size": 32, **kwargs})


class CifarResNetForImageClassification(ResNetForImageClassification):
    """ResNet whose stem is one convolution of 3 · 3 that keeps the size of the image, without pooling."""

    config_class = CifarResNetConfig

    def __init__(self, config: CifarResNetConfig) -> None:
        super().__init__(config)
        stem = self.resnet.embedder
        stem.embedder.convolution = nn.Conv2d(config.num_channels, config.embedding_size, 3, padding=1, bias=False)
        stem.pooler = nn.Identity()  # type: ignore[assignment]
        self.post_init()


class Vgg7Config(PreTrainedConfig):
    """The sizes of VGG7.

    Args:
        num_channels: of an image. Default 3.
        image_size: pixels of a side, divisible by 8. Default 32.
        hidden_sizes: channels of the two convolutions of each stage. Default [128, 256, 512].
        classifier_size: outputs of the hidden linear layer. Default 1024.
    """

    model_type = "vgg7"

    def __init__(
        self,
        num_channels: int = 3,
        image_size: int = 32,
        hidden_sizes: list[int] | None = None,
        classifier_size: int = 1024,
        **kwargs: Any,
    ) -> None:
        self.num_channels = num_channels
        self.image_size = image_size
        self.hidden_sizes = hidden_sizes or [128, 256, 512]
        self.classifier_size = classifier_size
        super().__init__(**kwargs)


class Vgg7ForImageClassification(PreTrainedModel):
    """Six convolutions with batch norm and two linear layers."""

    config_class = Vgg7Config
    base_model_prefix = "vgg"
    main_input_name = "pixel_values"
    input_modalities = ["image"]  # noqa: RUF012 - as transformers declares it

    def __init__(self, config: Vgg7Config) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList()
        channels = config.num_channels
        for size in config.hidden_sizes:
            for _ in range(2):
                self.layers.append(_block(channels, size))
                channels = size
        places = (config.image_size // 2 ** len(config.hidden_sizes)) ** 2
        self.hidden = nn.Linear(channels * places, config.classifier_size)
        self.activation = nn.ReLU()
        self.classifier = nn.Linear(config.classifier_size, int(config.num_labels or 0))
        self.pool = nn.MaxPool2d(2)
        self.post_init()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> ImageClassifierOutput:
        """Return logits, shape (rows, labels), and the loss where labels are given, int64, shape (rows,)."""
        hidden = pixel_values
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden)
            if index % 2:
                hidden = self.pool(hidden)
        logits = self.classifier(self.activation(self.hidden(hidden.flatten(1))))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


def _block(channels: int, size: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, size, 3, padding=1, bias=False), nn.BatchNorm2d(size), nn.ReLU())


def _register() -> None:
    for config, model in (
        (CifarResNetConfig, CifarResNetForImageClassification),
        (Vgg7Config, Vgg7ForImageClassification),
    ):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModelForImageClassification.register(config, model, exist_ok=True)


_register()
