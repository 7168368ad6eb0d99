"""Load configs and tokenizers for the recipes, with one-line errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, TrainingArguments
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.trainer_utils import get_last_checkpoint

from geta_hf.errors import GETAError
from geta_hf.serialization.atomic_folder import check_target
from geta_hf.utils.loading import one_line_errors


def load_config(name: str) -> PreTrainedConfig:
    """Load the config of the model to start from.

    Raises:
        GETAError: it does not exist, or the model is quantized already.
    """
    with one_line_errors(f"the model {name} can't be loaded"):
        config = AutoConfig.from_pretrained(name)
    quantized = getattr(config, "quantization_config", None)  # only quantized models have it
    if quantized is not None:
        method = quantized["quant_method"] if isinstance(quantized, dict) else quantized.quant_method
        raise GETAError(f"{name} is quantized already ({method}); start from the dense model")
    return config


def load_model(auto: Any, name: str, **options: Any) -> tuple[PreTrainedModel, bool]:
    """Load the model to start from.

    Args:
        auto: such as `AutoModelForSequenceClassification`.
        name: a folder, or a name on the Hub.
        options: as for `from_pretrained`.

    Returns:
        The model, and whether it had all of its weights: a new head has none, and its scores would mean nothing.

    Raises:
        GETAError: it can't be loaded, or is quantized already.
    """
    load_config(name)  # first, because it refuses a quantized model before the weights are read
    with one_line_errors(f"the model {name} can't be loaded"):
        model, found = auto.from_pretrained(name, output_loading_info=True, **options)
    return model, not found["missing_keys"] and not found["mismatched_keys"]


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or of a name on the Hub. Raise GETAError if there is none."""
    with one_line_errors(f"the tokenizer of {name} can't be loaded"):
        return AutoTokenizer.from_pretrained(name)


def check_folders(training: TrainingArguments) -> None:
    """Check before anything is loaded what is read and written in the folder of the run.

    Raises:
        GETAError: there is no checkpoint to resume from, or the last run's export can't be replaced.
    """
    check_target((Path(str(training.output_dir)) / "export").resolve(), overwrite=True)
    asked, folder = training.resume_from_checkpoint, str(training.output_dir)
    if asked is True and (not Path(folder).is_dir() or get_last_checkpoint(folder) is None):
        raise GETAError(f"resume_from_checkpoint: {folder} has no checkpoint; omit the option to start afresh")
    if isinstance(asked, str) and not Path(asked).is_dir():
        raise GETAError(f"resume_from_checkpoint: {asked} is not a folder")
