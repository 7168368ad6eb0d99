"""LoRA: freeze the model's weights and train two small matrices for each layer instead.

peft gives the config, says which layers it means, and starts the matrices. The model keeps its class and its names: a
layer computes with W + scale · B A under its quantizer, and that sum is what is exported.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from geta_hf.errors import GETAError
from geta_hf.methods.frozen_weights import Adapter, FrozenWeights
from geta_hf.qadg import PruningSpace
from geta_hf.quantization import quantized_layers, quantizer_prefixes
from geta_hf.quantization.layers import absorb
from geta_hf.quantization.lora import LowRank, merge
from geta_hf.quantization.quantizer import Quantizer
from geta_hf.training.preparation import empty_copy
from geta_hf.utils.files import write_whole
from geta_hf.utils.process_state import exclusive

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

# Not adapter_config.json: a folder that holds this is taken by transformers for an adapter without its base model.
LORA_NAME = "geta_lora.json"
_ADAPTER = "default"

# What of a LoraConfig is honoured; all else is refused, of versions to come as well.
_PLACES = {"r", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern"}
_VALUES = {"lora_alpha", "alpha_pattern", "use_rslora", "init_lora_weights", "bias", "modules_to_save"}
_NOTES = {"peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"}
_IDLE = {"task_type", "peft_type", "fan_in_fan_out", "runtime_config", "megatron_core", "qalora_group_size"}
_REMEDIES = {
    "lora_dropout": "what is dropped at random can't be merged under a quantizer; set it to 0",
    "target_parameters": "quantizers are on layers; name them by target_modules",
    "trainable_token_indices": "name the embedding in modules_to_save",
}


@dataclass(frozen=True)
class LoraPlan:
    """The layers of a model that a LoraConfig selects.

    Attributes:
        config: peft's.
        layers: layer name -> peft's layer, without data; it knows rank and scale and how to start.
        trained: parameters that the config has trained in full: biases, and `modules_to_save`.
    """

    config: LoraConfig
    layers: Mapping[str, LoraLayer]
    trained: frozenset[str]


def plan_lora(model: nn.Module, config: LoraConfig, quantized: Mapping[str, nn.Module]) -> LoraPlan:
    """Find the layers that a config selects, as peft itself would, without touching the model.

    Args:
        model: plain, or with quantizers.
        config: what peft would be given.
        quantized: the layers that have, or will have, a quantizer.

    Raises:
        GETAError: no LoraConfig, an option that can't be merged into a weight, and layers that are not quantized,
            share their weight or are no linear ones.
    """
    _check_config(config)
    from peft import inject_adapter_in_model
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    # peft has many ways to name layers (patterns, all-linear, layer numbers). It is asked on a copy without data,
    # since it replaces modules and writes into the config what it found.
    twin = empty_copy(model)
    # Before the injection, which renames parameters (`base_layer.weight`): afterwards only their ids are the same.
    names = {id(parameter): name for name, parameter in twin.named_parameters()}
    try:
        with exclusive(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fan_in_fan_out")  # peft then sets it as the layer needs it
            inject_adapter_in_model(copy.deepcopy(config), twin, _ADAPTER, low_cpu_mem_usage=True)
    except (ValueError, TypeError) as error:
        raise GETAError(f"peft can't use this LoraConfig: {error}") from error
    layers = {name: module for name, module in twin.named_modules() if isinstance(module, LoraLayer)}
    _check_layers(model, layers, quantized)
    saved = [module.original_module for module in twin.modules() if isinstance(module, ModulesToSaveWrapper)]
    trained = [p for p in twin.parameters() if p.requires_grad and id(p) in names]
    trained += [parameter for module in saved for parameter in module.parameters()]
    return LoraPlan(config, layers, frozenset(names[id(parameter)] for parameter in trained))


def _check_config(config: LoraConfig) -> None:
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise GETAError("peft_config needs peft; install geta_hf[peft]") from error
    if type(config) is not LoraConfig:
        raise GETAError(
            f"peft_config is a {type(config).__name__}; only a plain LoraConfig can be merged into a weight"
        )
    # Any other option that is set is an error: a run that ignored it would train something else.
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value and field.name not in _PLACES | _VALUES | _NOTES | _IDLE:
            remedy = _REMEDIES.get(field.name, "only W + scale · B A can be merged under a quantizer; leave it out")
            raise GETAError(f"LoraConfig.{field.name} = {value!r} is not supported: {remedy}")
    if config.init_lora_weights not in (True, "gaussian"):
        raise GETAError(f"LoraConfig.init_lora_weights = {config.init_lora_weights!r}; choose True or 'gaussian'")


def _check_layers(model: nn.Module, layers: Mapping[str, LoraLayer], quantized: Mapping[str, nn.Module]) -> None:
    other = [name for name in layers if name not in quantized]
    if other:
        none = " nothing quantized:" if len(other) == len(layers) else ""
        raise GETAError(
            f"this LoraConfig targets{none} {_some(other)}, which {'have' if len(other) > 1 else 'has'} no quantizer; "
            f"quantized are {_some(list(quantized))}: choose by target_modules or exclude_modules"
        )
    holders: dict[int, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        holders.setdefault(id(parameter), []).append(path)
    for name in layers:
        layer = quantized[name]
        if not isinstance(layer, nn.Linear | Conv1D):
            raise GETAError(f"{name} is a {type(layer).__name__}; LoRA is for linear layers, exclude it")
        if len(shared := holders[id(layer.weight)]) > 1:
            raise GETAError(f"{_some(shared)} are one tensor, which can't be merged with one of two; exclude {name}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def attach_lora(model: nn.Module, plan: LoraPlan) -> None:
    """Freeze a model and add the trained matrices to its layers, in place; quantizers are not changed.

    Args:
        model: the one that was planned for, with its quantizers.
        plan: of `plan_lora`.
    """
    own = {id(p) for module in model.modules() if isinstance(module, Quantizer) for p in module.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in own:
            parameter.requires_grad_(name in plan.trained)
    quantized = quantized_layers(model)
    for name, start in plan.layers.items():
        layer = quantized[name]
        for matrix in (start.lora_A[_ADAPTER], start.lora_B[_ADAPTER]):
            # The plan's matrices are on meta.
            matrix.to_empty(device=layer.weight.device)
        # peft's own start: B = 0, so the first step computes the dense model's outputs.
        start.reset_lora_parameters(_ADAPTER, plan.config.init_lora_weights)
        a, b = (matrices[_ADAPTER].get_parameter("weight") for matrices in (start.lora_A, start.lora_B))
        layer.lora = LowRank(a, b, start.scaling[_ADAPTER], isinstance(layer, Conv1D))


def find_frozen_weights(model: nn.Module, space: PruningSpace) -> FrozenWeights:
    """Find the weights that are cut or quantized but not trained, and the adapters that move them.

    Args:
        model: after `attach_lora`.
        space: its pruning space.
    """
    tensors = {member.tensor for family in space.trainable for member in family.members}
    tensors |= set(quantizer_prefixes(model))
    names = frozenset(n for n, p in model.named_parameters() if n in tensors and not p.requires_grad)
    layers = {name: layer.lora for name, layer in quantized_layers(model).items() if layer.lora is not None}
    adapters = {
        f"{name}.weight": Adapter(f"{name}.lora.A", f"{name}.lora.B", low_rank.scale, low_rank.transposed)
        for name, low_rank in layers.items()
    }
    return FrozenWeights(names, adapters)


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Merge LoRA into the weights inside the context; afterwards restore everything bit for bit."""
    layers = [layer for layer in quantized_layers(model).values() if layer.lora is not None]
    # Kept and copied back, since W + BA - BA is not W in floating point. On the CPU, since the device may have no
    # room for the weights twice.
    before = [(layer, layer.lora, layer.weight.detach().to("cpu", copy=True)) for layer in layers]
    try:
        for layer in layers:
            absorb(layer)
        yield
    finally:
        with torch.no_grad():
            for layer, low_rank, weight in before:
                layer.weight.copy_(weight)
                layer.lora = low_rank


def merge_stored(model: nn.Module, plan: LoraPlan, stored: Mapping[str, Tensor]) -> None:
    """Merge the LoRA matrices of a checkpoint into the plain weights of its model, in place.

    Args:
        model: as in `plan_lora`.
        plan: of the checkpoint's config.
        stored: tensors of the checkpoint, A and B among them.

    Raises:
        GETAError: a matrix is missing.
    """
    for name, layer in plan.layers.items():
        a, b = (stored.get(f"{name}.lora.{leaf}") for leaf in ("A", "B"))
        if a is None or b is None:
            raise GETAError(f"the checkpoint holds no {name}.lora.A and .B, though its {LORA_NAME} names the layer")
        weight: Tensor = model.get_submodule(name).weight  # type: ignore[assignment]
        transposed = isinstance(model.get_submodule(name), Conv1D)
        with torch.no_grad():
            weight.copy_(merge(weight, a.to(weight.device), b.to(weight.device), layer.scaling[_ADAPTER], transposed))


# --- in a checkpoint --------------------------------------------------------------------------------------------------


def save_lora(folder: Path, config: LoraConfig) -> None:
    """Write a LoraConfig into a checkpoint as peft writes it, under its own file name."""
    # peft writes under a fixed name, which must never lie in the checkpoint.
    with tempfile.TemporaryDirectory() as draft:
        config.save_pretrained(draft)
        write_whole(folder / LORA_NAME, (Path(draft) / "adapter_config.json").read_text(encoding="utf-8"))


def load_lora(folder: Path) -> LoraConfig | None:
    """Read the LoraConfig of a checkpoint; None without LoRA. Raise GETAError where it cannot be read."""
    path = folder / LORA_NAME
    if not path.is_file():
        return None
    try:
        from peft import PeftConfig

        return PeftConfig.from_peft_type(**json.loads(path.read_text(encoding="utf-8")))
    except (ImportError, OSError, ValueError, TypeError, KeyError) as error:
        raise GETAError(f"{path} can't be read ({error}); is peft installed (geta_hf[peft])?") from error


def check_lora(folder: Path, config: LoraConfig | None) -> None:
    """Raise GETAError unless a checkpoint was written under this LoraConfig, or both are without LoRA."""
    theirs, ours = _comparable(load_lora(folder)), _comparable(config)
    if (theirs is None) != (ours is None):
        there, here = ("without", "with") if theirs is None else ("with", "without")
        raise GETAError(f"{folder} was written {there} LoRA, this run is {here}; resume the same way")
    if theirs is None or ours is None:
        return
    changed = {name: (theirs.get(name), value) for name, value in ours.items() if theirs.get(name) != value}
    if changed:
        text = ", ".join(f"{name}: {old!r} there, {new!r} here" for name, (old, new) in changed.items())
        raise GETAError(f"{folder} was written under another LoraConfig ({text}); resume with the same")


def _comparable(config: LoraConfig | None) -> dict[str, Any] | None:
    """Return the fields of a config that change training, with sets as sorted lists."""
    if config is None:
        return None
    # Sets come back from JSON as lists, in any order.
    values = {name: value for name, value in config.to_dict().items() if name not in _NOTES}
    return {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}
