"""What can be said of an exported folder without its weights: what the report page and the model card are made of."""

from __future__ import annotations

import copy
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from geta_hf.config import CONFIG_NAME
from geta_hf.costs.model_costs import Costs, layer_costs, mean_bits, measure_costs
from geta_hf.errors import GETAError
from geta_hf.qadg.tracing.dummy_inputs import empty_model
from geta_hf.quantization.functional import FLOAT_BITS
from geta_hf.reporting.comparison import Metrics, Structure, read_structure
from geta_hf.serialization.hf_quantizer import GETAQuantizationConfig, apply_fixes
from geta_hf.serialization.packed_layers import INPUT_SCALE, WEIGHT_SCALE
from geta_hf.serialization.sizes import tensor_sizes
from geta_hf.serialization.validate import read_json
from geta_hf.utils.version import __version__

METRICS_NAME = "geta_metrics.json"
"""{"dense": {metric: value}, "compressed": {metric: value}, "latency_ms": {"dense": …, "compressed": …}}, or a part."""

CARD_NAME = "README.md"
LOCAL_BASE = "geta_base_model"
"""Key of a card for a base model that is not on the Hub."""

PACKED, EMBEDDINGS, SCALES, REST = "packed weights", "embeddings", "step sizes", "everything else"

_TOKENS = 384
_TASKS = {
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSeq2SeqLM": "text2text-generation",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForZeroShotImageClassification": "zero-shot-image-classification",
    "AutoModelForObjectDetection": "object-detection",
    "AutoModelForAudioClassification": "audio-classification",
    "AutoModelForSpeechSeq2Seq": "automatic-speech-recognition",
    "AutoModelForCTC": "automatic-speech-recognition",
    "AutoModelForMultipleChoice": "multiple-choice",
    "AutoModel": "feature-extraction",
}
"""Auto classes and the Hub's tags; the trunk's last, which many architectures are also known by."""


@dataclass(frozen=True)
class Facts:
    """What an exported folder says of itself.

    Attributes:
        folder: where it is.
        architecture: the class that saved it.
        auto_class: the auto class that loads it, such as `AutoModelForQuestionAnswering`.
        task: its pipeline's tag, such as `question-answering`; None where transformers has no pipeline for it.
        remote_code: whether the folder carries the code that loads it without geta_hf.
        structure: what was kept, at how many bits.
        parts: bytes of tensors by part: packed weights, embeddings, step sizes, everything else.
        dense_bytes: bytes of the parameters before anything was cut, in the dtype of config.json; None if not counted.
        costs: "dense" and "compressed"; empty where transformers cannot build the model. `macs` is 0 for a model that
            does not run on token ids alone.
        metrics: "dense", "compressed" and "latency_ms", where measured.
        config: the GETAConfig in full, empty where it was not saved.
        front: the YAML at the head of its model card, such as `base_model`.
        versions: of what wrote and of what reads it.
    """

    folder: Path
    architecture: str
    auto_class: str
    task: str | None
    remote_code: bool
    structure: Structure
    parts: dict[str, int]
    dense_bytes: int | None
    costs: dict[str, Costs]
    metrics: Metrics
    config: dict[str, Any]
    front: dict[str, Any]
    versions: dict[str, str]

    @property
    def base_model(self) -> str | None:
        """What was compressed, as the model card says: its name on the Hub, or else the one it had in a local path."""
        found = self.front.get("base_model") or self.front.get(LOCAL_BASE)
        return found if isinstance(found, str) else None

    @property
    def dataset(self) -> str | None:
        """What the metrics were measured on, as the model card says."""
        try:
            return str(self.front["model-index"][0]["results"][0]["dataset"]["name"])
        except (KeyError, IndexError, TypeError):
            return None

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of the tensors of "dense", where known, and "compressed"."""
        found = {"dense": self.dense_bytes, "compressed": sum(self.parts.values())}
        return {side: size for side, size in found.items() if size is not None}


def read_facts(folder: str | os.PathLike[str]) -> Facts:
    """Read an exported folder; no weight is loaded and no code of the folder is run.

    Costs are counted on the model's outline, dense and cut: on one sequence of 384 tokens, or of as many as it takes.

    Raises:
        GETAError: no exported folder, or a file of it that cannot be read.
    """
    path = Path(folder)
    structure = read_structure(path)
    config = read_json(path / "config.json")
    model = outline(path)
    auto_class, task = _auto_class(config)
    return Facts(
        folder=path,
        architecture=_architecture(config),
        auto_class=auto_class,
        task=task,
        remote_code="auto_map" in config,
        structure=structure,
        parts=_parts(path, structure, model),
        dense_bytes=None if model is None else sum(parameter.nbytes for parameter in model.parameters()),
        costs={} if model is None else _costs(model, path, structure),
        metrics=read_metrics(path),
        config=read_json(path / CONFIG_NAME) if (path / CONFIG_NAME).is_file() else {},
        front=read_front(path),
        versions=_versions(config),
    )


def read_metrics(folder: Path) -> dict[str, dict[str, float]]:
    """What `METRICS_NAME` says, empty where there is no such file. Raises GETAError for values that are no numbers."""
    path = folder / METRICS_NAME
    return check_metrics(read_json(path) if path.is_file() else {}, str(path))


def check_metrics(metrics: Mapping[str, Any], where: str) -> dict[str, dict[str, float]]:
    """Metrics as plain floats. Raises GETAError for what is not {"dense" or "compressed": {name: finite number}}."""
    found: dict[str, dict[str, float]] = {}
    for side, values in metrics.items():
        if side not in ("dense", "compressed", "latency_ms") or not isinstance(values, Mapping):
            raise GETAError(f"{where}: {side!r} is no part of metrics; give {{'dense': {{…}}, 'compressed': {{…}}}}")
        for name, value in values.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise GETAError(f"{where}: {side}[{name!r}] is {value!r}, not a finite number; leave it out")
        found[side] = {str(name): float(value) for name, value in values.items()}
    return found


def read_front(folder: Path) -> dict[str, Any]:
    """The YAML between the first two lines of dashes of the folder's card; empty where there is none."""
    path = folder / CARD_NAME
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    found = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    try:
        front = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError as error:
        raise GETAError(f"{path}: the YAML at its head can't be read ({error}); correct or delete the file") from error
    return front if isinstance(front, dict) else {}


def _parts(folder: Path, structure: Structure, model: PreTrainedModel | None) -> dict[str, int]:
    embeddings = set() if model is None else _embeddings(model)
    parts = dict.fromkeys((PACKED, EMBEDDINGS, SCALES, REST), 0)
    for file in sorted(folder.glob("*.safetensors")):
        for name, size in tensor_sizes(file).items():
            path, _, leaf = name.rpartition(".")
            if path in structure.bits and leaf in (WEIGHT_SCALE, INPUT_SCALE):
                part = SCALES
            elif path in embeddings:
                part = EMBEDDINGS
            else:
                part = PACKED if path in structure.bits and leaf == "weight" else REST
            parts[part] += size
    return {part: size for part, size in parts.items() if size}


def _embeddings(model: PreTrainedModel) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}


def outline(folder: Path) -> PreTrainedModel | None:
    """The dense model without weights; None where transformers cannot build it without code from the folder."""
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        config = copy.deepcopy(config)
        del config.quantization_config
        return empty_model(config).to("meta")  # type: ignore[arg-type]
    except (GETAError, OSError, ValueError, AttributeError):
        return None


def _costs(dense: PreTrainedModel, folder: Path, structure: Structure) -> dict[str, Costs]:
    small, stored = copy.deepcopy(dense), read_json(folder / "config.json").get("quantization_config")
    if not isinstance(stored, dict):
        raise GETAError(
            f"{folder}/config.json: quantization_config is {stored!r}, not an object; export the folder again"
        )
    config = GETAQuantizationConfig(**stored)
    apply_fixes(small, config.fixes)
    embeddings = _embeddings(dense)
    config.bits = {name: bits for name, bits in config.bits.items() if name not in embeddings}
    small.config.quantization_config = config  # where the widths are looked up; an embedding multiplies nothing
    tokens = min(_TOKENS, getattr(dense.config, "max_position_embeddings", None) or _TOKENS)
    names = [name for name in structure.bits if name not in embeddings]
    return {"dense": _counted(dense, tokens, names), "compressed": _counted(small, tokens, names)}


def _counted(model: PreTrainedModel, tokens: int, names: list[str]) -> Costs:
    try:
        return measure_costs(model, tokens, names)
    except Exception:  # a model that wants more than token ids says so in many kinds of errors
        layers, parameters = layer_costs(model, names), sum(parameter.numel() for parameter in model.parameters())
        return Costs(tokens, parameters, 0, 0.0, 0.0, mean_bits(layers) if layers else FLOAT_BITS, layers)


def _architecture(config: Mapping[str, Any]) -> str:
    return str((config.get("architectures") or ["PreTrainedModel"])[0])


def _auto_class(config: Mapping[str, Any]) -> tuple[str, str | None]:
    """The auto class that loads an architecture, and the Hub's tag of what that is for."""
    architecture = _architecture(config)
    for name, task in _TASKS.items():
        if architecture in _class_names(getattr(transformers, name)):
            return name, task
    mapped = [name for name in config.get("auto_map", {}) if name.startswith("AutoModel")]
    return (mapped[0], _TASKS.get(mapped[0])) if mapped else ("AutoModel", None)


def _class_names(auto: Any) -> set[str]:
    entries = auto._model_mapping._model_mapping.values()
    return {name for entry in entries for name in ([entry] if isinstance(entry, str) else entry)}


def _versions(config: Mapping[str, Any]) -> dict[str, str]:
    stored = config.get("quantization_config") or {}
    written = {
        "folder format": stored.get("format_version"),
        "written with transformers": config.get("transformers_version"),
    }
    read = {"read with geta_hf": __version__, "transformers": transformers.__version__, "torch": torch.__version__}
    return {name: str(version) for name, version in {**written, **read}.items() if version is not None}
