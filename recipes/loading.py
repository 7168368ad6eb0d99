"""What the recipes load, with an error of one sentence where that fails."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, TrainingArguments
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.trainer_utils import get_last_checkpoint

from geta_hf import GETAError
from geta_hf.utils.loading import told


def load_config(name: str) -> PreTrainedConfig:
    """The config of a model to start from.

    Raises:
        GETAError: there is none, or the model is quantized already.
    """
    with told(f"the model {name} can't be loaded"):
        config = AutoConfig.from_pretrained(name)
    quantized = getattr(config, "quantization_config", None)  # present only where something was quantized
    if quantized is not None:
        method = quantized["quant_method"] if isinstance(quantized, dict) else quantized.quant_method
        raise GETAError(f"{name} is quantized already ({method}); start from the dense model")
    return config


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or a name on the Hub; GETAError where there is none."""
    with told(f"the tokenizer of {name} can't be loaded"):
        return AutoTokenizer.from_pretrained(name)


def check_resume(training: TrainingArguments) -> None:
    """Raises GETAError where there is no checkpoint to resume from."""
    asked, folder = training.resume_from_checkpoint, str(training.output_dir)
    if asked is True and (not Path(folder).is_dir() or get_last_checkpoint(folder) is None):
        raise GETAError(f"resume_from_checkpoint: {folder} holds no checkpoint; leave the option out to start anew")
    if isinstance(asked, str) and not Path(asked).is_dir():
        raise GETAError(f"resume_from_checkpoint: {asked} is no folder")
