"""Summarize an exported folder without its weights: the data behind the report page and the model card."""

from __future__ import annotations

import copy
import math
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from geta_hf.config import CONFIG_NAME
from geta_hf.costs.model_costs import Costs, Image, image_of, layer_costs, mean_bits, measure_costs
from geta_hf.errors import GETAError
from geta_hf.export.folder_files import STRUCTURE_NAME
from geta_hf.export.untouched import Untouched, read_untouched
from geta_hf.qadg.tracing.dummy_inputs import empty_model
from geta_hf.quantization.functional import FLOAT_BITS
from geta_hf.reporting.comparison import Metrics, Structure, read_structure
from geta_hf.reporting.results import Results, read_results
from geta_hf.serialization.hf_quantizer import GETAQuantizationConfig, apply_fixes
from geta_hf.serialization.packed_layers import BLOCKS, INPUT_SCALE, WEIGHT_SCALE
from geta_hf.serialization.sizes import tensor_sizes
from geta_hf.serialization.validate import check_headers, check_readable, read_json
from geta_hf.utils.model_classes import find_model_class, registered_classes
from geta_hf.utils.plain_yaml import load_plain_yaml
from geta_hf.utils.version import __version__

METRICS_NAME = "geta_metrics.json"
"""{"dense": {metric: value}, "compressed": {metric: value}, "latency_ms": {"dense": …, "compressed": …}}, or a part."""

CARD_NAME = "README.md"
LOCAL_BASE = "geta_base_model"
"""Key of a card for a base model that is not on the Hub."""

_LONGEST_FRONT = 2**20
"""Characters of a card that are searched for the end of its front matter."""

PACKED, EMBEDDINGS, SCALES, REST = "packed weights", "embeddings", "step sizes", "everything else"

_TOKENS = 384
_PROCESSOR_NAME = "preprocessor_config.json"
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
"""Auto class -> the Hub's tag. `AutoModel` is last, because many architectures with a head are registered there too."""


@dataclass(frozen=True)
class FolderSummary:
    """Hold what is known of an exported folder without reading its weights.

    Attributes:
        folder: its path.
        architecture: the class that saved it.
        auto_class: the auto class that loads it, such as `AutoModelForQuestionAnswering`.
        task: tag of its pipeline, such as `question-answering`; None if transformers has no pipeline for it.
        remote_code: whether the folder carries the code that loads it without geta_hf.
        structure: what was kept, and at how many bits.
        parts: bytes of tensors by part: packed weights, embeddings, step sizes, everything else.
        dense_bytes: bytes of the parameters of the dense model, in the dtype of config.json; None if unknown.
        costs: "dense" and "compressed"; empty if transformers cannot build the model. `macs` is 0 for a model that
            needs other inputs than token ids.
        metrics: "dense", "compressed" and "latency_ms", if measured.
        config: all fields of the GETAConfig; empty if it was not saved.
        front: the YAML front matter of its model card, such as `base_model`.
        versions: of the software that wrote it and that reads it.
        results: scores of "dense" and "compressed" by data set, if measured.
        untouched: what was not pruned, and why.
        grid: what has a step size of its own: a `layer`, a `channel`, or a `block32` of inputs.
        float_layers: modules with a matrix that is not quantized, embeddings excluded; empty if transformers cannot
            build the model.
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
    results: Results = field(default_factory=dict)
    untouched: Untouched = field(default_factory=Untouched)
    float_layers: tuple[str, ...] = ()
    grid: str = "layer"

    @property
    def base_model(self) -> str | None:
        """Return the base model that the card names: its name on the Hub, otherwise the last part of a local path."""
        found = self.front.get("base_model") or self.front.get(LOCAL_BASE)
        return found if isinstance(found, str) else None

    @property
    def dataset(self) -> str | None:
        """Return the data set that the card names for metrics that are no part of `results`."""
        own = {one.data for one in self.results.get("compressed", ())}
        return next((name for name in self.datasets if name not in own), None)

    @property
    def datasets(self) -> list[str]:
        """Return the data sets that the card names, in order."""
        try:
            blocks = self.front["model-index"][0]["results"]
            return list(dict.fromkeys(str(block["dataset"]["name"]) for block in blocks))
        except (KeyError, IndexError, TypeError):
            return []

    @property
    def sizes(self) -> dict[str, int]:
        """Return the bytes of the tensors of "dense", if known, and "compressed"."""
        found = {"dense": self.dense_bytes, "compressed": sum(self.parts.values())}
        return {side: size for side, size in found.items() if size is not None}


def read_summary(folder: str | os.PathLike[str]) -> FolderSummary:
    """Summarize an exported folder. No weight is loaded and no code of the folder is run.

    Costs are counted on empty models, dense and cut, for one sequence of 384 tokens or of the longest allowed length,
    or for one image of the size that the folder's processor makes.

    Raises:
        GETAError: not an exported folder, or one of its files cannot be read.
    """
    path = Path(folder)
    structure = read_structure(path)
    check_readable(path)
    config = read_json(path / "config.json")
    model = empty_model_of(path)
    auto_class, task = _auto_class(config)
    return FolderSummary(
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
        results=read_results(path),
        untouched=read_untouched(path),
        float_layers=() if model is None else _float_layers(model, structure),
        grid=_grid(path, config, structure, () if model is None else _embeddings(model)),
    )


def read_metrics(folder: Path) -> dict[str, dict[str, float]]:
    """Read `METRICS_NAME`; return an empty dict without that file. Raise GETAError for values that are not numbers."""
    path = folder / METRICS_NAME
    return check_metrics(read_json(path) if path.is_file() else {}, str(path))


def check_metrics(metrics: Mapping[str, Any], where: str) -> dict[str, dict[str, float]]:
    """Return metrics as plain floats.

    Args:
        metrics: {"dense", "compressed" or "latency_ms": {name: finite number}}.
        where: start of an error message.

    Raises:
        GETAError: another key, or a value that is not a finite number.
    """
    found: dict[str, dict[str, float]] = {}
    for side, values in metrics.items():
        if side not in ("dense", "compressed", "latency_ms") or not isinstance(values, Mapping):
            raise GETAError(f"{where}: {side!r} is not a key of metrics; give {{'dense': {{…}}, 'compressed': {{…}}}}")
        for name, value in values.items():
            # bool is an int in Python, and JSON gives NaN and Infinity as floats.
            if not _is_finite(value):
                raise GETAError(f"{where}: {side}[{str(name)!r}] is {_shorten(value)}, not a finite number; remove it")
        found[side] = {str(name): float(value) for name, value in values.items()}
    times = found.get("latency_ms")
    if times is not None and not (set(times) == {"dense", "compressed"} and min(times.values()) > 0):
        raise GETAError(
            f"{where}: latency_ms is {times}; give positive numbers for both 'dense' and 'compressed', or remove it"
        )
    return found


def _is_finite(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def _shorten(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python writes no integers of more than 4300 digits
        return "an integer of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."


def read_front(folder: Path) -> dict[str, Any]:
    """Read the YAML front matter of the folder's card; return an empty dict if there is none."""
    path = folder / CARD_NAME
    if not path.is_file():
        return {}
    # A card is often edited by hand, and a wrong byte in it is no reason to fail.
    with path.open(encoding="utf-8", errors="replace") as file:
        text = file.read(_LONGEST_FRONT)
    found = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    front = load_plain_yaml(found[1], f"{path}: the YAML at its head") if found else {}
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


def _grid(folder: Path, config: Mapping[str, Any], structure: Structure, embeddings: Collection[str]) -> str:
    """Return what has a step size of its own, by the folder's configuration and the sizes of its tensors."""
    stored = config.get("quantization_config") or {}
    if stored.get("grid") == BLOCKS:
        return BLOCKS
    layers = [name for name in structure.bits if name not in embeddings]
    scales = {f"{name}.{WEIGHT_SCALE}" for name in layers}
    sizes = (
        size for file in folder.glob("*.safetensors") for name, size in tensor_sizes(file).items() if name in scales
    )
    # One number takes four bytes.
    return "channel" if any(size > 4 for size in sizes) else "layer"


def _float_layers(model: PreTrainedModel, structure: Structure) -> tuple[str, ...]:
    """Return the modules that remain and hold a matrix that is not stored at a few bits."""
    gone = tuple(f"{path}." for path in structure.dropped)
    found = []
    for path, module in model.named_modules():
        matrices = [parameter for parameter in module.parameters(recurse=False) if parameter.ndim > 1]
        if matrices and path not in structure.bits and not isinstance(module, nn.Embedding):
            found += [] if f"{path}.".startswith(gone) else [path]
    return tuple(found)


def _embeddings(model: PreTrainedModel) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}


def empty_model_of(folder: Path) -> PreTrainedModel | None:
    """Build the dense model of a folder without weights; None if transformers cannot without code from the folder.

    Raises:
        GETAError: the class of the model refuses what config.json says, or the folder's tensors are those of another
            model.
    """
    config = read_json(folder / "config.json")
    if config.get("model_type") not in CONFIG_MAPPING or find_model_class(_architecture(config)) is None:
        return None
    model: PreTrainedModel = empty_model(str(folder)).to("meta")  # type: ignore[arg-type]
    vars(model.config).pop("quantization_config", None)
    check_headers(model, folder)
    return model


def _costs(dense: PreTrainedModel, folder: Path, structure: Structure) -> dict[str, Costs]:
    # The fixes of the folder applied to an empty model give its sizes without a weight.
    compressed = copy.deepcopy(dense)
    config = GETAQuantizationConfig(**read_json(folder / "config.json")["quantization_config"])
    apply_fixes(compressed, config.fixes)
    embeddings = _embeddings(dense)
    config.bits = {name: bits for name, bits in config.bits.items() if name not in embeddings}
    # `measure_costs` looks the bit widths up here. Embeddings are excluded: they multiply nothing.
    compressed.config.quantization_config = config
    # The usual window of SQuAD, or what the model can read at most.
    tokens = min(_TOKENS, getattr(dense.config, "max_position_embeddings", None) or _TOKENS)
    names = [name for name in structure.bits if name not in embeddings]
    modules = dict(dense.named_modules())
    if unknown := [name for name in names if name not in modules]:
        raise GETAError(
            f"{folder / STRUCTURE_NAME}: bits names the module {unknown[0]!r}, which {type(dense).__name__} does not "
            f"have; export the folder again"
        )
    image = image_of(dense, _image_side(folder))
    return {
        "dense": _counted(dense, tokens, names, image),
        "compressed": _counted(compressed, tokens, names, image),
    }


def _image_side(folder: Path) -> int | None:
    """Return the height of the images that the folder's processor makes; None where it does not say."""
    path = folder / _PROCESSOR_NAME
    values = read_json(path) if path.is_file() else {}
    for name in ("crop_size", "size") if values.get("do_center_crop") else ("size",):
        size = values.get(name)
        found = (size.get("height") or size.get("shortest_edge")) if isinstance(size, dict) else size
        if isinstance(found, int) and not isinstance(found, bool) and found > 0:
            return found
    return None


def _counted(model: PreTrainedModel, tokens: int, names: list[str], image: Image | None) -> Costs:
    try:
        return measure_costs(model, tokens, names, image=image)
    except Exception:  # models that need more than token ids or an image raise many kinds of errors
        layers = layer_costs(model, names)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        return Costs(tokens, parameters, 0, 0.0, 0.0, mean_bits(layers) if layers else FLOAT_BITS, layers)


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else "PreTrainedModel"


def _auto_class(config: Mapping[str, Any]) -> tuple[str, str | None]:
    """Return the auto class that loads an architecture, and the Hub's tag of its task."""
    architecture = _architecture(config)
    for name, task in _TASKS.items():
        # In the order of `_TASKS`: a class may be registered under several auto classes, and the specific ones come
        # first.
        if architecture in _class_names(getattr(transformers, name)):
            return name, task
    # A class that transformers does not know: the folder's own code says what loads it.
    own = config.get("auto_map")
    mapped = [name for name in own if name.startswith("AutoModel")] if isinstance(own, dict) else []
    return (mapped[0], _TASKS.get(mapped[0])) if mapped else ("AutoModel", None)


def _class_names(auto: Any) -> set[str]:
    names: set[str] = set()
    for entry in auto._model_mapping._model_mapping.values():
        # Some architectures have several classes for one task.
        if isinstance(entry, str):
            names.add(entry)
        else:
            names.update(entry)
    return names | {kind.__name__ for kind in registered_classes(auto)}


def _versions(config: Mapping[str, Any]) -> dict[str, str]:
    stored = config.get("quantization_config") or {}
    written = {
        "folder format": stored.get("format_version"),
        "written with transformers": config.get("transformers_version"),
    }
    read = {"read with geta_hf": __version__, "transformers": transformers.__version__, "torch": torch.__version__}
    return {name: str(version) for name, version in {**written, **read}.items() if version is not None}
