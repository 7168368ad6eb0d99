"""What is run beside PLiNIO computes as our network does, and its size is counted as ours is."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.plinio_search import PlainResNet, stored_bits
from geta_hf.recipes.cifar_models import CifarResNetConfig, CifarResNetForImageClassification


def test_the_plain_network_computes_the_same() -> None:
    torch.manual_seed(0)
    config = CifarResNetConfig(depths=[1, 2], hidden_sizes=[8, 16], embedding_size=8, num_channels=1, num_labels=3)
    model = CifarResNetForImageClassification(config).eval()
    plain = PlainResNet(model, 12).eval()
    images = torch.randn(2, 1, 12, 12)
    torch.testing.assert_close(plain(images), model(images).logits)
    convolutions = [module for module in plain.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 1 + 2 * 3 + 1
    # The graph that PLiNIO follows.
    traced = torch.fx.symbolic_trace(plain)
    torch.testing.assert_close(traced(images), plain(images))


def test_bits_are_those_of_what_remains() -> None:
    # Three outputs of 0, 2 and 8 bits read one channel by 9 elements; a second layer reads the two that remain.
    assert stored_bits([(3, 1, 9), (2, 3, 1)], [([0, 2, 8], 1), ([4, 4], 2)]) == 10 * 9 + 8 * 2
