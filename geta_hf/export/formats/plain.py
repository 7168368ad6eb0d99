"""The ordinary configuration that says what a cut model is, found without knowing any architecture.

A number in a configuration is what it does: the model's class is built on meta with the number changed, and the tensors
whose sizes follow are those it stands for. What a model works out for itself though its configuration could say it
(`head_dim` from the hidden size and the heads) is written into the configuration first, so that it stays as it is.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from geta_hf.errors import GETAError
from geta_hf.quantization.experts import MARK, restack_experts, unstacked_experts
from geta_hf.serialization.encode import dense_weight
from geta_hf.serialization.hf_quantizer import GETAQuantizationConfig
from geta_hf.serialization.packed_layers import PackedLayer, packed_layers
from geta_hf.surgery.config_view import is_config
from geta_hf.surgery.fixes import read_attribute
from geta_hf.utils.copies import copy_module

Place = tuple[str | int, ...]
"""The way to one number in config.json: keys of objects, places in lists."""
Changes = dict[Place, int]
Sizes = dict[str, tuple[int, ...]]
"""Shapes by tensor name, size attributes by module path and name."""
Dim = tuple[str, int]
Wrong = dict[Dim, tuple[int, int]]
"""Dims in which two models differ, -1 for a tensor that one of them lacks -> (size it has, size it should have)."""

LEFT_OUT = (
    "quantization_config",
    "auto_map",
    "per_layer_config",
    "allow_global_per_layer_attribute_access",
    "_heterogeneity_spec",
    MARK,
)
"""Keys of config.json, and attributes of a configuration, of our own format; no other format repeats them."""

_NAMED = 8
"""Number of layers that an error lists."""


def plain_models(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Yield models that ordinary configurations describe, with the tensors of a cut model.

    There is more than one where sizes alone leave a choice (half the heads, or half of each head): the outputs tell.

    Args:
        model: compressed or plain, on any device; not changed.

    Yields:
        Models of the same class as `model` that share its (decoded) tensors, to be saved and not to be run: buffers
        that folders do not hold are on meta.

    Raises:
        GETAError: no configuration gives the tensors their shapes; the message says why.
    """
    model = _stacked(model)
    search = ConfigSearch(model)
    for changes in search.solutions():
        yield _filled(search.build(changes), model)


def _stacked(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model whose experts are in stacked tensors, which is what its class builds from an ordinary config."""
    if not unstacked_experts(model):
        return model
    copied = copy_module(model, {id(parameter): parameter for parameter in model.parameters()})
    restack_experts(copied, lambda layer: dense_weight(layer) if isinstance(layer, PackedLayer) else layer.weight)
    return copied


def _filled(plain: PreTrainedModel, model: PreTrainedModel) -> PreTrainedModel:
    state = model.state_dict()
    for name, layer in packed_layers(model).items():
        state[f"{name}.weight"] = dense_weight(layer)
    # Assigned, since tensors on meta have no memory to copy into. That gives every name a tensor of its own, so ties
    # have to be made again.
    plain.load_state_dict(state, assign=True)
    plain.tie_weights()
    # Its own file, which the configuration does not contain: without it a chat model would lose its stop tokens.
    if model.can_generate():
        plain.generation_config = copy.deepcopy(model.generation_config)
    return plain.eval()


class ConfigSearch:
    """Builds a model's class from changed configurations until the sizes are those of the model.

    Args:
        model: the cut model; its configuration still says what it was before.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._class, self._config_class = type(model), model.config.__class__
        self._values = {key: value for key, value in model.config.to_dict().items() if key not in LEFT_OUT}
        self._attributes = _fixed_attributes(model)
        self._known: dict[frozenset[tuple[Place, int]], Sizes | None] = {}
        self._refused: dict[frozenset[tuple[Place, int]], str] = {}
        self._target = {**_tensor_sizes(model), **_attribute_sizes(model, self._attributes)}
        dense = self._sizes({})
        if dense is None:
            kind = self._class.__name__
            raise GETAError(f"{kind} cannot be built from its own configuration: {self._refused[frozenset()]}")
        # Packed layers hold helpers, such as scales, that a plain model does not have.
        self._target = {name: size for name, size in self._target.items() if name in dense}
        self._pins = self._found_pins(dense)

    def build(self, changes: Changes) -> PreTrainedModel:
        """Build the model's class on meta, from the configuration with these changes, as a folder would give it."""
        with torch.device("meta"):
            return self._class(self._config(changes))

    def solutions(self) -> Iterator[Changes]:
        """Yield every set of changes that gives the sizes of the model.

        Raises:
            GETAError: there is none.
        """
        wrong = self._wrong(self._pins) or {}
        touching = self._touching(wrong)
        found = False
        for changes in self._extended(self._pins, wrong, touching, wrong, set()):
            found = True
            yield self._without_idle(changes)
        if not found:
            raise GETAError(self._reason(wrong, touching))

    def value(self, place: Place) -> Any:
        """Return what the configuration has in a place; None where it is open."""
        holder: Any = self._values
        for part in place:
            # A number that is open may have no key at all.
            holder = holder.get(part) if isinstance(holder, dict) else holder[part]
        return holder

    def accepts(self, changes: Changes, build: bool) -> bool:
        """Return whether the configuration class accepts the changes; where `build`, the model's class as well."""
        try:
            self._config(changes)
        except Exception as error:  # each class has its own way to refuse a number
            self._refused[frozenset(changes.items())] = " ".join(str(error).split())
            return False
        return not build or self._sizes(changes) is not None

    def _config(self, changes: Changes) -> PreTrainedConfig:
        values = copy.deepcopy(self._values)
        for place, value in changes.items():
            holder: Any = values
            for part in place[:-1]:
                holder = holder[part]
            holder[place[-1]] = value
        return self._config_class.from_dict(values)

    def _sizes(self, changes: Changes) -> Sizes | None:
        """Return the sizes that a configuration leads to; None where the configuration or the model refuses it."""
        key = frozenset(changes.items())
        # The search reaches the same changes by many paths, and building a large model takes long even on meta.
        if key not in self._known:
            try:
                model = self.build(changes)
            except Exception as error:  # each class has its own way to refuse a number
                self._refused[key], self._known[key] = " ".join(str(error).split()), None
            else:
                attributes = _attribute_sizes(model, self._attributes)
                self._known[key] = {**_own_numbers(model), **_tensor_sizes(model), **attributes}
        return self._known[key]

    def _wrong(self, changes: Changes) -> Wrong | None:
        sizes = self._sizes(changes)
        return None if sizes is None else _differences(sizes, self._target)

    def _found_pins(self, dense: Sizes) -> Changes:
        """Return what all modules hold alike under a name that their configuration leaves open, if it has an effect."""
        # Models derive head_dim as hidden_size / heads where the config leaves it open. With fewer heads it would
        # grow, so it is fixed at its present value (a pin) before heads are changed. A name counts only if the model
        # reads it: its own value changes nothing, and twice the value does.
        model = self.build({})
        places = {id(config): place for place, config in _parts(model.config)}
        found: dict[Place, set[int]] = {}
        for module in model.modules():
            config: Any = vars(module).get("config")
            if id(config) not in places:
                continue
            for name, value in _numbers_of(module):
                if _is_open(config, name):
                    found.setdefault((*places[id(config)], name), set()).add(value)
        alike = {place: values.pop() for place, values in found.items() if len(values) == 1}
        return {
            place: value
            for place, value in alike.items()
            if value > 0 and self._sizes({place: value}) == dense != self._sizes({place: 2 * value})
        }

    def _touching(self, wrong: Wrong) -> dict[Place, tuple[int | None, set[Dim]]]:
        """Find the numbers on which only dims of a wrong size depend: each with its value, and with those dims."""
        touching = {}
        for place, value in _numbers(self._config(self._pins)):
            # Several values are tried, since a class may refuse one (heads that do not divide the hidden size). The
            # first that can be built tells what depends on the number.
            for new in dict.fromkeys(_scaled(value, *sizes) for sizes in wrong.values()):
                now = None if new is None else self._wrong({**self._pins, place: new})
                if now is not None:
                    dims = {dim for dim in wrong if now.get(dim) != wrong[dim]}
                    # A number that also moves a size that is right, such as the hidden size, cannot be the one.
                    if dims and now.keys() <= wrong.keys():
                        touching[place] = (value, dims)
                    break
        return touching

    def _extended(
        self,
        changes: Changes,
        wrong: Wrong,
        touching: Mapping[Place, tuple[int | None, set[Dim]]],
        start: Wrong,
        seen: set[frozenset[tuple[Place, int]]],
    ) -> Iterator[Changes]:
        """Yield changes with others added until nothing is wrong, each of which rights a dim and spoils none."""
        if not wrong:
            yield changes
        for dim in wrong:
            steps = []
            for place, (value, dims) in touching.items():
                new = _scaled(value, *start[dim]) if dim in dims and place not in changes else None
                now = None if new is None else self._wrong({**changes, place: new})
                if new is not None and now is not None and dim not in now and now.keys() <= wrong.keys():
                    steps.append(({**changes, place: new}, now))
            # Every solution rights this dim by one of these steps, so the other dims need no branches of their own.
            for step, now in steps:
                # The same changes in another order lead to the same configuration.
                if (key := frozenset(step.items())) not in seen:
                    seen.add(key)
                    yield from self._extended(step, now, touching, start, seen)
            if steps:
                return

    def _without_idle(self, changes: Changes) -> Changes:
        """Return the changes without the pins that do nothing."""
        for place in self._pins:
            # A pin that changes no size would only clutter config.json.
            fewer = {other: value for other, value in changes.items() if other != place}
            if self._sizes(fewer) == self._sizes(changes):
                changes = fewer
        return changes

    def _reason(self, wrong: Wrong, touching: Mapping[Place, Any]) -> str:
        kind = self._config_class.__name__
        before = self._sizes(self._pins) or {}
        # The usual reason comes first, since its remedy is one option of the run.
        if uneven := _uneven(before, self._target, wrong):
            return (
                f"layers differ in what they kept, and a {kind} has one number for all: {uneven}; train with "
                f"uniform=True in GETAConfig, or export in the geta format"
            )
        covered = {dim for _, dims in touching.values() for dim in dims}
        name, dim = next((dim for dim in wrong if dim not in covered), next(iter(wrong)))
        have, want = before.get(name), self._target[name]
        refused = "".join(f" ({refusal})" for refusal in self._refusals(*wrong[name, dim])[:1])
        return (
            f"no number in {kind} makes {name} {want}, which it makes {have}{refused}; keep another "
            f"number of such groups, or export in the geta format"
        )

    def _refusals(self, have: int, want: int) -> list[str]:
        """Return why the numbers that might have been changed for a size were refused."""
        reasons = []
        for place, value in _numbers(self._config(self._pins)):
            new = None if value is None else _scaled(value, have, want)
            error = None if new is None else self._refused.get(frozenset({**self._pins, place: new}.items()))
            if error is not None:
                reasons.append(f"{'.'.join(map(str, place))} = {new} is refused: {error}")
        return reasons


def _fixed_attributes(model: PreTrainedModel) -> list[tuple[str, str]]:
    """Return module path and name of every attribute that surgery changed."""
    quantization = getattr(model.config, "quantization_config", None)
    attributes = quantization.fixes["attrs"] if isinstance(quantization, GETAQuantizationConfig) else {}
    # Those of layers of experts are gone where these are stacked.
    present = dict(model.named_modules())
    return [(path, name) for path, names in attributes.items() if path in present for name in names]


def _attribute_sizes(model: nn.Module, attributes: list[tuple[str, str]]) -> Sizes:
    modules, sizes = dict(model.named_modules()), {}
    for path, name in attributes:
        value = read_attribute(modules[path], name) if path in modules else None
        sizes[f"{path}.{name}"] = tuple(value) if isinstance(value, list | tuple) else (value,)
    return sizes


def _tensor_sizes(model: nn.Module) -> Sizes:
    names = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    return {name: tuple(tensor.shape) for name, tensor in names.items()}


def _own_numbers(model: nn.Module) -> Sizes:
    """Return the numbers that modules with a configuration keep."""
    modules = [(path, module) for path, module in model.named_modules() if is_config(vars(module).get("config"))]
    return {f"{path}.{name}": (value,) for path, module in modules for name, value in _numbers_of(module)}


def _numbers_of(holder: Any) -> Iterator[tuple[str, int]]:
    for name, value in vars(holder).items():
        if not name.startswith("_") and type(value) is int:
            yield name, value


def _is_open(config: PreTrainedConfig, name: str) -> bool:
    """Return whether a configuration has a place for the name, or could have one, and nothing in it."""
    # Configs have aliases (GPT-2's num_attention_heads is n_head), and a name that is a property of the class cannot
    # be set.
    own, name = vars(config), config.attribute_map.get(name, name)
    return own[name] is None if name in own else not hasattr(type(config), name)


def _parts(config: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Yield a configuration and all that are nested in it."""
    yield place, config
    for name, value in vars(config).items():
        if is_config(value):
            yield from _parts(value, (*place, name))


def _numbers(config: PreTrainedConfig) -> Iterator[tuple[Place, int | None]]:
    """Yield every number of a configuration, those in lists too, and every attribute that is None."""
    for place, part in _parts(config):
        for name, value in vars(part).items():
            if name.startswith("_") or name in LEFT_OUT:
                continue
            if isinstance(value, list | tuple):
                yield from (((*place, name, at), item) for at, item in enumerate(value) if type(item) is int)
            # None is a number that the model derives (num_key_value_heads, head_dim) and that may be stated instead.
            # A bool is an int to isinstance, but never a size.
            elif value is None or type(value) is int:
                yield (*place, name), value


def _scaled(value: int | None, have: int, want: int) -> int | None:
    """Scale a number that divides a size as the size must change; an open one becomes the size wanted."""
    if not have or not want:
        return None
    if value is None:
        return want
    # 768 channels in 12 heads, of which 8 remain: have 768, want 512, and 12 becomes 8. Only exact multiples count.
    return value * want // have if value > 1 and have % value == value * want % have == 0 else None


def _differences(sizes: Sizes, target: Sizes) -> Wrong:
    wrong: Wrong = {}
    for name, want in target.items():
        have = sizes.get(name)
        if have is None or None in have or len(have) != len(want):
            # Zeros, since no factor makes a missing tensor appear: `_scaled` then proposes nothing.
            wrong[name, -1] = (0, 0)
        else:
            wrong.update(
                {(name, dim): pair for dim, pair in enumerate(zip(have, want, strict=True)) if pair[0] != pair[1]}
            )
    return wrong


def _uneven(before: Sizes, after: Sizes, wrong: Wrong) -> str:
    """List tensors of like name that no longer have equal sizes, with what remains of each; empty if there are none."""
    for (wrong_name, dim), (have, _) in wrong.items():
        pattern = _pattern(wrong_name)
        alike = [name for name in after if _pattern(name) == pattern and before[name][dim : dim + 1] == (have,)]
        if len({after[name][dim] for name in alike}) > 1:
            named = [f"{name} has {after[name][dim]} of {have}" for name in alike]
            return ", ".join(named[:_NAMED] + ["..."] * (len(named) > _NAMED))
    return ""


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "*", name)
