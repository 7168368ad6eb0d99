"""Check that a model is what its config builds: a folder holds the config and the weights, and nothing else.

A copy is built from the config as a folder would hold it and shares the model's weights. What decides is what both
compute, so hooks and attributes that change nothing are welcome. How they differ in structure is only asked for the
message.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2CLS, ACT2FN

from geta_hf.errors import GETAError
from geta_hf.qadg.tracing.dummy_inputs import build_empty
from geta_hf.quantization.parametrized import removal_of
from geta_hf.surgery.compare_outputs import TOLERANCE, comparison_mode
from geta_hf.surgery.shorter_config import nested_configs
from geta_hf.utils.model_io import Batch, cast_floats, map_tensors, to_device
from geta_hf.utils.module_state import HALVES, devices_of
from geta_hf.utils.process_state import random_state_kept

_Runs = list[tuple[str, list[Tensor]]]  # path of a module, what it returned

_IMPLEMENTATIONS = ("_attn_implementation_internal", "_experts_implementation_internal")
"""What a config holds and a folder does not: it changes how a model computes, not what."""

_FILLER = 1e4  # from here on an output is a filler of masked positions, which is no scale to compare by
_AMPLIFIED_TOLERANCE = 1e-5  # rounding in single precision, through all layers, relative to the largest output
_BUILDS = 24  # copies that are built in search of a remedy
_CODE_REMEDY = "Remove it, or make it part of the forward of the model's class"
_NAMED = 3  # departures that an error names


@dataclass(frozen=True)
class _Departure:
    """Where a model is not as its config builds it.

    Attributes:
        place: path of the module.
        text: names what is there.
        by_code: whether it is code that no config could name, such as a hook.
    """

    place: str
    text: str
    by_code: bool = False


@torch.no_grad()
def check_rebuilds(model: PreTrainedModel, batch: Batch, quantized: Iterable[str] = ()) -> None:
    """Check that a folder of this model would compute what the model does.

    The copy has to have the same tensors, and the same outputs in evaluation mode. Outputs that are the same bit by bit
    settle it. Where they differ by no more than rounding, or the model has parameters that the copy lacks, both are
    compared again on random weights, so that weights near zero hide nothing. Without its weights, or spread over
    several devices, only the tensors are compared.

    Args:
        model: without quantizers; left unchanged.
        batch: keyword arguments of its forward.
        quantized: paths of the layers that are, or will be, stored in packed form.

    Raises:
        GETAError: the model's class and config build something else. The message names the module, and how the config
            could say it where a number or an activation function of it can.
    """
    twin = _built(model)
    _check_tensors(model, twin, quantized)
    tensors = (*model.parameters(), *model.buffers())
    if len({tensor.device for tensor in tensors}) > 1 or any(tensor.is_meta for tensor in tensors):
        return
    _share_tensors(model, twin)
    inputs = cast_floats(to_device(batch, model.device), model.dtype)
    try:
        expected = _outputs(model, inputs)
    except Exception as error:
        _blame_departures(model, twin, inputs, error)
        return
    autocast = _autocast_within(model, inputs)
    try:
        with _without_global_hooks():
            found = _outputs(twin, inputs, autocast)
    except Exception as error:
        raise GETAError(
            f"{type(model).__name__} runs the batch, but a copy that is built from its config does not: "
            f"{_line(error)}. {_departures_text(find_departures(model, twin))}"
        ) from error
    share = _difference(expected, found)
    added = dict(model.named_parameters()).keys() - dict(twin.named_parameters()).keys()
    if share == 0.0 and _say_something(expected) and not added:
        return
    # 16 bits hide a small difference in rounding, and an untrained model hides one in the smallness of its outputs.
    # An added parameter may be zero at first, and training would change it.
    if share <= TOLERANCE[model.dtype]:
        with _random_weights(model, twin):
            wide = _widened(inputs)
            expected = _outputs(model, wide)
            with _without_global_hooks():
                share = _difference(expected, _outputs(twin, wide, autocast))
        if share <= _AMPLIFIED_TOLERANCE:
            return
    raise GETAError(_refusal(model, twin, inputs, autocast))


def _blame_departures(model: PreTrainedModel, twin: PreTrainedModel, inputs: Batch, error: Exception) -> None:
    """Raise GETAError where a model cannot run the batch and its copy can.

    Where neither can, recording the model on the batch says so in its own words.
    """
    replaced = [each.text for each in find_departures(model, twin) if each.by_code]
    if not inputs and replaced:
        # The arguments of the forward decide which inputs a model is given, and a replaced one may name none.
        raise GETAError(
            f"{type(model).__name__} is given no inputs: {'; '.join(replaced[:_NAMED])}. {_CODE_REMEDY}"
        ) from error
    try:
        with _without_global_hooks():
            _outputs(twin, inputs)
    except Exception:
        return
    raise GETAError(
        f"{type(model).__name__} cannot run the batch, but a copy that is built from its config can: {_line(error)}. "
        f"{_departures_text(find_departures(model, twin))}"
    ) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _built(model: PreTrainedModel) -> PreTrainedModel:
    """Build the model's class from its config as a folder holds it; parameters are on meta."""
    return build_empty(type(model), _as_stored(model.config), dtype=model.dtype)


def _as_stored(config: PreTrainedConfig) -> PreTrainedConfig:
    kind = config.__class__
    try:
        stored = json.loads(config.to_json_string())
    except (TypeError, ValueError) as error:
        raise GETAError(
            f"{kind.__name__} can't be written to config.json ({error}); hold only numbers, text, lists and dicts in it"
        ) from error
    read = kind.from_dict(kind._decode_special_floats(stored))
    parts = dict(nested_configs(config))
    for path, own in nested_configs(read):
        for name in _IMPLEMENTATIONS:
            if path in parts and name in vars(parts[path]):
                vars(own)[name] = vars(parts[path])[name]
    return read


# --- tensors ------------------------------------------------------------------------------------------------------


def _check_tensors(model: PreTrainedModel, twin: PreTrainedModel, quantized: Iterable[str]) -> None:
    """Raise GETAError for tensors that a folder of the model would lack, or hold in another shape."""
    own, built = _shapes(model), _shapes(twin)
    kind = type(model).__name__
    unsaved = set(model._keys_to_ignore_on_save or ())
    for name, shape in built.items():
        if name in own and own[name] != shape:
            raise GETAError(
                f"{name} of the {kind} has shape {own[name]}, but {shape} in what its config builds, so an export "
                f"could not be loaded. {_remedy(model, twin)}"
            )
        if name not in own and name not in unsaved:
            raise GETAError(
                f"the {kind} has no tensor {name}, which its config builds, so an export could not be loaded. "
                f"{_parametrization(model, name) or _remedy(model, twin)}"
            )
    modules = dict(twin.named_modules())
    for path in quantized:
        if path not in modules:
            raise GETAError(
                f"{path} is to be quantized, but the config of the {kind} builds no such module, so an export could "
                f"not be loaded. {_remedy(model, twin)}"
            )


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    state = model.state_dict(keep_vars=True)
    return {name: tuple(value.shape) for name, value in state.items() if isinstance(value, Tensor)}


def _parametrization(model: nn.Module, name: str) -> str | None:
    path, _, leaf = name.rpartition(".")
    try:
        found = removal_of(model.get_submodule(path), path, leaf)
    except AttributeError:
        return None
    return None if found is None else f"{found[0]} computes it from others; call {found[1]} first"


def _share_tensors(model: nn.Module, twin: nn.Module) -> None:
    """Give the copy the model's tensors: all that a folder holds, and buffers that were made again alike."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, module in twin.named_modules():
        own = modules.get(path)
        if own is None:
            continue
        for leaf, parameter in module._parameters.items():
            if parameter is not None:  # a linear layer without a bias has one that is None
                module._parameters[leaf] = own._parameters.get(leaf)
        for leaf, buffer in module._buffers.items():
            theirs = own._buffers.get(leaf)
            if buffer is None or theirs is None:
                continue
            stored = leaf not in module._non_persistent_buffers_set
            # A buffer that no folder holds is made by the constructor, on another device with another rounding.
            alike = stored or _alike(theirs, buffer)
            module._buffers[leaf] = theirs if alike else buffer.to(theirs.device)


def _alike(theirs: Tensor, made: Tensor) -> bool:
    if theirs.shape != made.shape:
        return False
    if not theirs.is_floating_point():
        return torch.equal(theirs.cpu(), made.cpu())
    tolerance = TOLERANCE.get(theirs.dtype, 0.0)
    return torch.allclose(theirs.cpu().double(), made.cpu().double(), rtol=tolerance, atol=0.0, equal_nan=True)


# --- outputs ------------------------------------------------------------------------------------------------------


def _outputs(model: PreTrainedModel, inputs: Batch, autocast: torch.dtype | None = None) -> list[Tensor]:
    """Return all floating-point tensors that a call of the model returns, hooks and replaced methods included.

    It is run under `autocast`, or under none; what its forward enters by itself is added.
    """
    with ExitStack() as stack:
        stack.enter_context(comparison_mode(model))
        stack.enter_context(_without_compiled_calls(model))
        # Some draw what they mask in evaluation, too.
        stack.enter_context(random_state_kept(devices_of(model), seed=0))
        if autocast is not None:
            stack.enter_context(torch.autocast(model.device.type, dtype=autocast))
        return [tensor for tensor in _tensors(model(**inputs)) if tensor.is_floating_point()]


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for item in output.values():
            yield from _tensors(item)
    elif isinstance(output, list | tuple):
        for item in output:
            yield from _tensors(item)


@contextmanager
def _without_compiled_calls(model: nn.Module) -> Iterator[None]:
    """Let modules run their own code where torch.compile laid another call over it: only rounding may differ."""
    compiled = [part for part in model.modules() if vars(part).get("_compiled_call_impl") is not None]
    before = [part._compiled_call_impl for part in compiled]
    for part in compiled:
        part._compiled_call_impl = None
    try:
        yield
    finally:
        for part, call in zip(compiled, before, strict=True):
            part._compiled_call_impl = call


def _autocast_within(model: PreTrainedModel, inputs: Batch) -> torch.dtype | None:
    """Return the type that the model's forward, as it is called, casts to by itself; None if it does not.

    accelerate puts autocast around the forward of an instance. That is how the model is run and not what it computes,
    so the copy is run in the same way.
    """
    found: list[torch.dtype] = []
    device = model.device.type

    def look(module: nn.Module, args: Any) -> None:
        if torch.is_autocast_enabled(device):
            found.append(torch.get_autocast_dtype(device))

    if "forward" not in vars(model):
        return None
    handles = [module.register_forward_pre_hook(look) for module in model.modules() if module is not model]
    try:
        _outputs(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


@contextmanager
def _without_global_hooks() -> Iterator[None]:
    """Run modules without the hooks that are registered for all modules of the process, as in a folder."""
    hooks = (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)
    before = [dict(each) for each in hooks]
    for each in hooks:
        each.clear()
    try:
        yield
    finally:
        for each, content in zip(hooks, before, strict=True):
            each.update(content)


def _difference(expected: list[Tensor], found: list[Tensor]) -> float:
    """Return the largest difference as a share of the largest element of its output; inf where shapes differ."""
    if [tensor.shape for tensor in expected] != [tensor.shape for tensor in found]:
        return math.inf
    shares = [0.0]
    for one, other in zip(expected, found, strict=True):
        if not one.numel() or _same(one, other):
            continue
        size = one.double().abs()
        scale = float(torch.where(size < _FILLER, size, 0.0).max())
        gap = torch.where(_equal(one, other), 0.0, (one.double() - other.double()).abs())
        share = float(gap.max()) / (scale or 1.0)
        shares.append(math.inf if math.isnan(share) else share)
    return max(shares)


def _equal(one: Tensor, other: Tensor) -> Tensor:
    return (one == other) | (one.isnan() & other.isnan())


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(_equal(one, other).all())


def _say_something(outputs: list[Tensor]) -> bool:
    """Return whether every output has an element that is neither zero nor NaN, so that a difference would show."""
    return all(bool(((tensor != 0) & ~tensor.isnan()).any()) for tensor in outputs if tensor.numel())


@contextmanager
def _random_weights(model: nn.Module, twin: nn.Module) -> Iterator[None]:
    """Let both models compute on the same random weights in single precision for a while.

    Weights are large enough that activation functions and attention are far from linear, whatever they were before.
    """
    generator = torch.Generator().manual_seed(0)
    tensors: dict[int, Tensor] = {id(tensor): tensor for part in (model, twin) for tensor in part.parameters()}
    buffers: dict[int, Tensor] = {id(tensor): tensor for part in (model, twin) for tensor in part.buffers()}
    narrow = [tensor for tensor in buffers.values() if tensor.dtype in HALVES]
    changed = [tensor for tensor in tensors.values() if tensor.is_floating_point()]
    before = [(tensor, tensor.data) for tensor in (*changed, *narrow)]
    try:
        for tensor in changed:
            dtype = torch.float32 if tensor.dtype in HALVES else tensor.dtype
            tensor.data = _random_values(tensor.shape, generator).to(tensor.device, dtype)
        for tensor in narrow:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, data in before:
            tensor.data = data


def _random_values(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Return fp32 values: vectors around 1, and matrices that double the size of activations."""
    if len(shape) < 2:
        return 0.5 + torch.rand(shape, generator=generator)
    return 2 * torch.randn(shape, generator=generator) / math.prod(shape[1:]) ** 0.5


def _widened(inputs: Batch) -> dict[str, Any]:
    def widen(tensor: Tensor) -> Tensor:
        return tensor.float() if tensor.dtype in HALVES else tensor

    return {name: map_tensors(widen, item) for name, item in inputs.items()}


# --- what differs -------------------------------------------------------------------------------------------------


def _refusal(model: PreTrainedModel, twin: PreTrainedModel, inputs: Batch, autocast: torch.dtype | None) -> str:
    own = _outputs_by_module(model, inputs)
    with _without_global_hooks():
        place = _first_difference(own, _outputs_by_module(twin, inputs, autocast))
    found = _closest(find_departures(model, twin), place)
    what = "; ".join(each.text for each in found[:_NAMED]) or f"{place or 'its forward'} computes something else"
    by_code = bool(found) and all(each.by_code for each in found)
    remedy = _CODE_REMEDY if by_code else _remedy(model, twin)
    return (
        f"{type(model).__name__} computes something else than a copy that is built from its config with the same "
        f"weights, and an export holds no more than those: {what}. {remedy}"
    )


def _departures_text(found: list[_Departure]) -> str:
    texts = [each.text for each in found[:_NAMED]]
    return f"They differ: {'; '.join(texts)}" if texts else "Let the config hold all that the forward needs"


def find_departures(model: nn.Module, twin: nn.Module) -> list[_Departure]:
    """Return every difference in structure between a model and a copy built from its config."""
    built = dict(twin.named_modules())
    found: list[_Departure] = []
    for path, module in model.named_modules():
        other = built.get(path)
        if other is not None:
            found += _module_departures(path, module, other)
        elif path.rpartition(".")[0] in built:
            found.append(_Departure(path, f"{path} ({type(module).__name__}) is not in the copy"))
    paths = dict(model.named_modules(remove_duplicate=False))
    for path in built:
        if path not in paths and path.rpartition(".")[0] in paths:
            found.append(_Departure(path, f"{path} is missing"))
    for hooks in (torch_module._global_forward_pre_hooks, torch_module._global_forward_hooks):
        for hook in hooks.values():
            found.append(_Departure("", f"the hook {_name_of(hook)} on all modules of torch", True))
    return found


def _module_departures(path: str, module: nn.Module, other: nn.Module) -> Iterator[_Departure]:
    where = path or f"the {type(module).__name__}"
    for what, own, theirs in (
        ("forward pre-hook", module._forward_pre_hooks, other._forward_pre_hooks),
        ("forward hook", module._forward_hooks, other._forward_hooks),
    ):
        known = {_name_of(hook) for hook in theirs.values()}
        for hook in own.values():
            if _name_of(hook) not in known:
                yield _Departure(path, f"the {what} {_name_of(hook)} on {where}", True)
    if type(module) is not type(other):
        yield _Departure(path, f"{where} is a {type(module).__name__}, and a {type(other).__name__} in the copy")
    for name, value in vars(module).items():
        built = vars(other).get(name)
        if callable(value) and callable(getattr(type(module), name, None)) and built is None:
            yield _Departure(path, f"{where} has its method {name} replaced by {_name_of(value)}", True)
        elif name == "training" or name.startswith("_") or name not in vars(other):
            continue
        elif _comparable(value) and _unlike(value, built):
            yield _Departure(path, f"{where} has {name} = {_short(value)}, and {_short(built)} in the copy")
    for leaf, parameter in module._parameters.items():
        if parameter is not None and other._parameters.get(leaf) is None:
            yield _Departure(path, f"the parameter {leaf} of {where} is not in the copy")
    for leaf, buffer in module._buffers.items():
        made = other._buffers.get(leaf)
        if buffer is not None and made is not None and buffer is not made and not _alike(buffer, made):
            yield _Departure(path, f"the buffer {leaf} of {where} has other values than in the copy")


def _comparable(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_comparable, value))
    return value is None or isinstance(value, bool | int | float | str | Tensor) or callable(value)


def _unlike(value: Any, other: Any) -> bool:
    if isinstance(value, Tensor):
        return not (isinstance(other, Tensor) and _alike(value, other))
    if isinstance(value, partial) or isinstance(other, partial):
        return _described(value) != _described(other)
    if callable(value) and not isinstance(value, type):
        return _name_of(value) != _name_of(other)
    if isinstance(value, list | tuple) and isinstance(other, list | tuple):
        return len(value) != len(other) or any(_unlike(one, two) for one, two in zip(value, other, strict=True))
    return bool(value != other)


def _described(value: Any) -> Any:
    if isinstance(value, partial):
        return _name_of(value.func), repr(value.args), repr(value.keywords)
    return _name_of(value)


def _name_of(value: Any) -> str:
    if isinstance(value, partial):
        return _name_of(value.func)
    return str(getattr(value, "__qualname__", type(value).__name__))


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return _name_of(value) if callable(value) else repr(value)[:60]


def _first_difference(own: _Runs, built: _Runs) -> str:
    """Return the path of the first module, in the order in which they finish, whose output differs."""
    seen: dict[str, list[list[Tensor]]] = {}
    for path, tensors in built:
        seen.setdefault(path, []).append(tensors)
    for path, tensors in own:
        runs = seen.get(path)
        if not runs:
            return path
        theirs = runs.pop(0)
        if len(theirs) != len(tensors) or not all(_same(*pair) for pair in zip(tensors, theirs, strict=True)):
            return path
    return ""


def _outputs_by_module(model: PreTrainedModel, inputs: Batch, autocast: torch.dtype | None = None) -> _Runs:
    found: _Runs = []

    def keep(path: str, module: nn.Module, args: Any, output: Any) -> None:
        found.append((path, [tensor.detach().cpu().clone() for tensor in _tensors(output)]))

    # Registered last, so that the user's own hooks have run.
    handles = [module.register_forward_hook(partial(keep, path)) for path, module in model.named_modules()]
    try:
        _outputs(model, inputs, autocast)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _closest(departures: list[_Departure], place: str) -> list[_Departure]:
    """Return the departures that are closest to where outputs begin to differ: there, inside, or around it."""

    def distance(each: _Departure) -> float:
        if each.place == place:
            return 0.0
        if each.place.startswith(f"{place}.") or not place:
            return 1.0  # a module reads attributes of its children
        if not each.place or place.startswith(f"{each.place}."):
            return 2.0 + place.count(".") - each.place.count(".") + (not each.place)
        return math.inf

    nearest = min(map(distance, departures), default=math.inf)
    return [each for each in departures if distance(each) == nearest] if nearest < math.inf else departures


# --- how the config could say it ----------------------------------------------------------------------------------

_Structure = dict[tuple[str, str], Any]
_Path = tuple[str, ...]


def _remedy(model: PreTrainedModel, twin: PreTrainedModel) -> str:
    """Return what to change, in one sentence: the values of the config that build the model, where there are some."""
    wanted = _structure(model)
    config, values = _as_stored(model.config), dict[str, Any]()
    now = _structure(twin)
    for _ in range(_NAMED):
        better = _improvement(type(model), config, now, wanted)
        if better is None:
            break
        config, now, name, value = better
        values[name] = value
    if not values:
        return "Undo the change, or let the config, or a class of your own, say it"
    named = ", ".join(f"{name}={value!r}" for name, value in values.items())
    return f"Give the config {named} before the model is built from it"


def _structure(model: nn.Module) -> _Structure:
    """Return all that a config could decide: shapes, lengths of lists, types of modules and their plain attributes."""
    found: _Structure = {("shape", name): shape for name, shape in _shapes(model).items()}
    for path, module in model.named_modules():
        found["type", path] = type(module)
        if isinstance(module, nn.ModuleList | nn.Sequential):
            found["length", path] = len(module)
        for name, value in vars(module).items():
            if name != "training" and not name.startswith("_") and isinstance(value, bool | int | float | str):
                found["attribute", f"{path}.{name}"] = value
    return found


def _improvement(
    kind: type[PreTrainedModel], config: PreTrainedConfig, now: _Structure, wanted: _Structure
) -> tuple[PreTrainedConfig, _Structure, str, Any] | None:
    """Return the config with the one value changed that brings its model closest to what is wanted; None for none."""
    best = None
    least = len(_unequal(now, wanted))
    for path, name, value in list(_candidates(config, now, wanted))[:_BUILDS]:
        # A model leaves its config as it is, but a constructor of the user's own may not.
        tried = config.__class__.from_dict(config.to_dict())
        try:
            _change(dict(nested_configs(tried))[path], name, value)
            built = _structure(build_empty(kind, tried))
        except Exception:  # each class has its own way to refuse a value
            continue
        count = len(_unequal(built, wanted))
        if count < least:
            least, best = count, (tried, built, name, value)
    return best


def _unequal(one: _Structure, other: _Structure) -> list[tuple[Any, Any]]:
    missing = object()
    keys = dict.fromkeys((*one, *other))
    pairs = [(one.get(key, missing), other.get(key, missing)) for key in keys]
    return [pair for pair in pairs if pair[0] != pair[1]]


def _candidates(config: PreTrainedConfig, now: _Structure, wanted: _Structure) -> Iterator[tuple[_Path, str, Any]]:
    """Yield values to try: a value of the config that equals what was built becomes what was wanted."""
    pairs: dict[tuple[Any, Any], None] = {}
    for built, found in _unequal(now, wanted):
        if isinstance(built, tuple) and isinstance(found, tuple) and len(built) == len(found):
            pairs |= dict.fromkeys(pair for pair in zip(built, found, strict=True) if pair[0] != pair[1])
        elif type(built) is type(found) or {type(built), type(found)} == {int, float}:
            pairs[built, found] = None
    for path, own in nested_configs(config):
        for name, value in {"num_labels": getattr(own, "num_labels", None), **vars(own)}.items():
            for built, found in pairs:
                if isinstance(built, type) and isinstance(value, str) and value in ACT2CLS:
                    yield from ((path, name, key) for key in ACT2CLS if type(ACT2FN[key]) is found)
                elif type(value) is type(built) and value == built and not name.startswith("_"):
                    yield path, name, found


def _change(config: PreTrainedConfig, name: str, value: Any) -> None:
    before = getattr(config, name)
    if type(value) is int:
        # Lists with an entry for every layer have to be as long as there are layers.
        for other, items in vars(config).items():
            if isinstance(items, list | tuple) and len(items) == before and value < before:
                setattr(config, other, items[:value])
    setattr(config, name, value)
