"""Tiny configurations of Hugging Face architectures with random weights.

`build(name)` gives a model and a batch that it runs. Left out for a package that the project does without: mask2former,
maskformer, oneformer and other users of the Hungarian matcher (scipy); timm_wrapper and what stands on a timm backbone
(timm); layoutlmv2 (detectron2); dinat (natten).
"""

from __future__ import annotations

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from geta_hf.qadg.tracing.dummy_inputs import example_batch
from tests.architectures.audio import AUDIO
from tests.architectures.base import Architecture
from tests.architectures.decoders import DECODERS
from tests.architectures.encoders import ENCODERS
from tests.architectures.experts import EXPERT_MODELS
from tests.architectures.multimodal import MULTIMODAL
from tests.architectures.recurrent import RECURRENT
from tests.architectures.scenes import SCENES
from tests.architectures.seeing import SEEING
from tests.architectures.seq2seq import SEQ2SEQ
from tests.architectures.series import SERIES
from tests.architectures.vision import VISION

ARCHITECTURES: dict[str, Architecture] = {
    **ENCODERS,
    **DECODERS,
    **EXPERT_MODELS,
    **RECURRENT,
    **SEQ2SEQ,
    **VISION,
    **SCENES,
    **AUDIO,
    **MULTIMODAL,
    **SEEING,
    **SERIES,
}


def build(name: str) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """The tiny model of that name in evaluation mode, always with the same weights, and a batch for it."""
    architecture = ARCHITECTURES[name]
    torch.manual_seed(0)
    model_class = getattr(transformers, architecture.model)
    config = model_class.config_class(**architecture.settings)
    config.use_cache = False
    model = model_class(config).eval()
    if architecture.inputs is not None:
        return model, architecture.inputs()
    return model, example_batch(model, length=architecture.length)
