"""Find the configuration of a model with fewer blocks by building models from it, not by the names of its fields."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from geta_hf.errors import GETAError
from geta_hf.qadg.tracing.dummy_inputs import empty_model

Path = tuple[str, ...]
Kept = Mapping[str, Sequence[int]]
"""Path of a list of modules -> the places of those that remain."""


class Change(NamedTuple):
    """An attribute of a module of the shorter model, or of the configuration that `path` leads to from there."""

    module: str
    path: Path
    name: str
    value: Any


def shorter_changes(model: PreTrainedModel, kept: Kept) -> list[Change]:
    """Return every attribute that differs in what the shorter configuration builds.

    Raises:
        GETAError: no configuration builds the remaining blocks just as they are.
    """
    config = copy.deepcopy(model.config)
    # empty_model takes the class from here, and a loaded configuration may name another head than the model has.
    config.architectures = [type(model).__name__]
    dense = empty_model(config)
    for series, places in kept.items():
        config = _shorter_config(config, series, places)
    short = empty_model(config)
    _check_tensors(dense, short, kept)
    changes: list[Change] = []
    for place, twin in short.named_modules():
        origin = dense.get_submodule(_before(place, kept))
        _check_alike(origin, twin, place)
        changes += differences(origin, twin, place)
    return changes


def _before(place: str, kept: Kept) -> str:
    """Return the path that a module of the shorter model had in the dense one."""
    for series, places in kept.items():
        if place.startswith(f"{series}."):
            number, dot, rest = place.removeprefix(f"{series}.").partition(".")
            return f"{series}.{places[int(number)]}{dot}{rest}"
    return place


def _check_tensors(dense: nn.Module, short: nn.Module, kept: Kept) -> None:
    theirs = {name: tuple(tensor.shape) for name, tensor in dense.state_dict().items()}
    built = {_before(name, kept): tuple(tensor.shape) for name, tensor in short.state_dict().items()}
    removed = tuple(
        f"{series}.{place}." for series, places in kept.items() for place in _missing(dense, series, places)
    )
    for name in dict.fromkeys((*theirs, *built)):
        if theirs.get(name) != built.get(name) and not name.startswith(removed):
            raise GETAError(
                f"{name} has shape {theirs.get(name, 'none')}, but {built.get(name, 'none')} in what the shorter "
                f"configuration builds; drop other layers, or set drop_layers to 0"
            )


def _missing(model: nn.Module, series: str, kept: Sequence[int]) -> list[int]:
    return [place for place in range(len(model.get_submodule(series)._modules)) if place not in kept]


def _check_alike(origin: nn.Module, twin: nn.Module, place: str) -> None:
    """Raise GETAError where the shorter configuration builds another module than the one that is there."""
    # Tensors are cut out of the dense model with their values, but buffers made by a constructor are not loaded: one
    # that depends on the place of its layer would be another after a reload.
    buffers = dict(origin.named_buffers(recurse=False))
    same = type(origin) is type(twin) and all(
        name in buffers and (buffer.is_meta or torch.equal(buffer, buffers[name]))
        for name, buffer in twin.named_buffers(recurse=False)
    )
    if not same:
        raise GETAError(
            f"the shorter configuration builds {place or 'the model'} otherwise ({type(twin).__name__} for a "
            f"{type(origin).__name__}, or other buffers); drop other layers, or set drop_layers to 0"
        )


def differences(origin: Any, twin: Any, place: str, path: Path = ()) -> Iterator[Change]:
    """Yield what differs between a module and its smaller twin: integers and lists are taken over.

    Args:
        origin: the module, or a configuration within it.
        twin: what another configuration builds in its place.
        place: path of the module.
        path: the way from the module to the configuration.

    Raises:
        GETAError: anything else differs.
    """
    for name, value in vars(twin).items():
        before = vars(origin).get(name)
        if isinstance(value, PreTrainedConfig) and isinstance(before, PreTrainedConfig):
            yield from differences(before, value, place, (*path, name))
        elif _plain(value) and _plain(before) and value != before:
            # Integers follow the place, as `layer_idx` does, by which a cache finds its keys. A float or a string (a
            # layer's dropout, its kind of attention) says that the layer that remains is built as another one.
            if not isinstance(value, int | list | tuple | dict) or isinstance(value, bool):
                raise GETAError(
                    f"{name} of {place} is {before!r}, but {value!r} in what the shorter configuration builds; drop "
                    f"other layers, or set drop_layers to 0"
                )
            yield Change(place, path, name, value)


def _plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return value is None or isinstance(value, int | float | str)


def _shorter_config(config: PreTrainedConfig, series: str, kept: Sequence[int]) -> PreTrainedConfig:
    """Return the configuration that builds fewer blocks in one list, found by trying every number of that size.

    Lists with an entry for every block, such as `layer_types`, are cut in the configuration that holds that number.
    """
    dense = empty_model(config)
    count = len(dense.get_submodule(series)._modules)
    # A number that shortens the decoder along with the encoder is not the one that is wanted.
    wanted = {**_lengths(dense, series), series: len(kept)}
    for path, own in nested_configs(config):
        for name, number in vars(own).items():
            # The number has another name in each architecture (num_hidden_layers, n_layer, encoder_layers), and other
            # numbers may equal it: BERT has 12 layers and 12 heads. What each one does shows when it is changed.
            if type(number) is not int or number != count:
                continue
            tried = copy.deepcopy(config)
            changed = dict(nested_configs(tried))[path]
            for other, value in vars(own).items():
                if isinstance(value, list | tuple) and len(value) == count:
                    setattr(changed, other, type(value)(value[place] for place in kept))
            setattr(changed, name, len(kept))
            if _builds(tried, series, wanted):
                return tried
    raise GETAError(
        f"no number in {type(config).__name__} makes {series} {len(kept)} layers long, so the shorter model could not "
        f"be loaded again; set drop_layers to 0"
    )


def nested_configs(config: PreTrainedConfig, path: Path = ()) -> Iterator[tuple[Path, PreTrainedConfig]]:
    """Yield a configuration and all those nested in it, each with the names that lead there."""
    yield path, config
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from nested_configs(value, (*path, name))


def _builds(config: PreTrainedConfig, series: str, wanted: Mapping[str, int]) -> bool:
    try:
        short = empty_model(config)
    except GETAError:
        return False
    found = _lengths(short, series)
    return {**found, series: len(short.get_submodule(series)._modules)} == wanted


def _lengths(model: nn.Module, series: str) -> dict[str, int]:
    """Return the lengths of all lists of modules but those within `series`."""
    lists = {path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    return {path: len(module) for path, module in lists.items() if not path.startswith(f"{series}.")}
