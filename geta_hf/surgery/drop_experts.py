"""Remove entire experts from every layer of a mixture before anything else happens to it.

An expert whose weights are zero is not one that is gone: the router still sends tokens to it, and its share of the
softmax is lost to the others. So experts are no groups that training could shrink step by step. They are chosen by a
score on calibration data and cut out together with what the router knows of them; the configuration then says how many
there are, and every step after this one sees no other model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel

from geta_hf.errors import GETAError
from geta_hf.qadg.residual_blocks import uncached
from geta_hf.qadg.tracing.dummy_inputs import build_empty
from geta_hf.quantization.experts import UnstackedExperts, stacked_experts, unstacked_experts
from geta_hf.surgery.compare_outputs import attention_outputs, comparison_mode, prove_equal
from geta_hf.surgery.shorter_config import Change, differences, nested_configs
from geta_hf.surgery.undo import Undoable
from geta_hf.utils.model_io import Batch, to_device

SCORES = ("routed_norm", "tokens", "magnitude")
"""What an expert is kept for: Σ over tokens of router weight · norm of its output; its tokens; the norm of its
weights."""

_CASTS = ("to", "float", "type", "half", "bfloat16")


@dataclass
class DroppedExperts(Undoable):
    """Which experts a model lost.

    Attributes:
        removed: their module paths in the dense model.
        kept: path of every module of experts -> the dense places of those that remain.
        scores: path of every module of experts -> the score of each; empty where they were named.
        unreached: paths of experts that no token of the calibration data reached.
        parameters: elements of all parameters that are gone.
        bytes: their bytes.
    """

    removed: tuple[str, ...] = ()
    kept: dict[str, tuple[int, ...]] = field(default_factory=dict)
    scores: dict[str, tuple[float, ...]] = field(default_factory=dict)
    unreached: tuple[str, ...] = ()
    parameters: int = 0
    bytes: int = 0

    def __str__(self) -> str:
        count = sum(len(places) for places in self.kept.values()) + len(self.removed)
        text = f"experts removed: {', '.join(self.removed)} ({len(self.removed)} of {count})"
        if self.unreached:
            text += f"; no token of the calibration data reached {', '.join(self.unreached)}"
        return text


def drop_experts(
    model: nn.Module,
    wanted: int | Sequence[str],
    inputs: Batch,
    batches: Sequence[Batch] = (),
    score: str = "routed_norm",
    reduce: Callable[[Tensor], Tensor] = lambda total: total,
) -> DroppedExperts:
    """Remove equally many experts from every module of experts of a model, in place.

    The smaller model must be what its configuration builds with another number of experts, and give the outputs of the
    dense one whose router never chooses the experts that are gone.

    Args:
        model: dense, its experts apart (`geta_hf.quantization.experts.unstack_experts`); without quantizers.
        wanted: how many experts each of these modules loses, or paths such as `model.layers.0.mlp.experts.3`.
        inputs: one batch without labels, for the proof.
        batches: on which scores are measured; not needed for named experts.
        score: one of `SCORES`; experts of the least score are removed, the last of equal ones first.
        reduce: adds up a tensor over all processes, each of which has batches of its own.

    Raises:
        GETAError: a model without such experts, fewer left than each token goes to, layers that would differ, a path
            that is none, or a configuration that can't say how many there are. The model is then as before.
    """
    if not isinstance(model, PreTrainedModel) or not unstacked_experts(model):
        remedy = "take them apart by unstack_experts first" if stacked_experts(model) else "set it to 0"
        raise GETAError(f"drop_experts needs a mixture, whose experts {type(model).__name__} lacks; {remedy}")
    inputs = to_device(inputs, model.device)
    dropped = DroppedExperts()
    if isinstance(wanted, int):
        scores, tokens = expert_scores(model, batches, score, reduce)
        dropped.scores = {path: tuple(values.tolist()) for path, values in scores.items()}
        dropped.unreached = tuple(
            f"{path}.{place}"
            for path, counts in tokens.items()
            for place in torch.nonzero(counts == 0).flatten().tolist()
        )
        dropped.kept = _best(model, scores, wanted)
    else:
        dropped.kept = _named(model, wanted)
    dropped.removed = tuple(
        f"{path}.{place}"
        for path, module in unstacked_experts(model).items()
        for place in range(len(module.experts))
        if place not in dropped.kept[path]
    )
    cut = _plan(model, dropped.kept)
    expected = _masked_outputs(model, cut.dims, dropped.kept, inputs)
    before = _size(model)
    try:
        _cut(model, cut, dropped)
        dropped.parameters, dropped.bytes = (old - new for old, new in zip(before, _size(model), strict=True))
        prove_equal(expected, attention_outputs(model, inputs), model.dtype, "smaller")
    # An interrupt too must not leave a model whose experts and configuration disagree.
    except BaseException:
        dropped.restore()
        raise
    return dropped


def _size(model: nn.Module) -> tuple[int, int]:
    """Return the elements and the bytes of all parameters."""
    parameters = list(model.parameters())
    return sum(parameter.numel() for parameter in parameters), sum(parameter.nbytes for parameter in parameters)


def check_drop_experts(model: PreTrainedModel, wanted: int | Sequence[str]) -> None:
    """Check what prevents the removal of experts before there are weights; the rest shows only with them.

    Args:
        model: its experts apart, on any device or meta; left unchanged.
        wanted: as in `drop_experts`.

    Raises:
        GETAError: as `drop_experts`.
    """
    if isinstance(wanted, int):
        found = {path: torch.zeros(len(module.experts)) for path, module in unstacked_experts(model).items()}
        _plan(model, _best(model, found, wanted))
    else:
        _plan(model, _named(model, wanted))


# --- scores -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def expert_scores(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    score: str = "routed_norm",
    reduce: Callable[[Tensor], Tensor] = lambda total: total,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return for every module of experts the score of each expert, and how many tokens reached it; float64, on CPU.

    Args:
        model: its experts apart.
        batches: keyword arguments of its forward; padding does not count.
        score, reduce: see `drop_experts`.

    Raises:
        GETAError: an unknown score, or no batch.
    """
    if score not in SCORES:
        raise GETAError(f"expert_score = {score!r} must be one of {', '.join(SCORES)}")
    if not batches:
        raise GETAError("drop_experts chooses experts on calibration data; give some, or name the experts")
    found = unstacked_experts(model)
    sums = {path: torch.zeros(2, len(module.experts), dtype=torch.float64) for path, module in found.items()}
    mask: list[Tensor | None] = [None]

    def watch(path: str, module: UnstackedExperts, args: tuple[Tensor, ...]) -> None:
        hidden, chosen, weights = args
        if mask[0] is not None and mask[0].numel() == len(hidden):
            counted = mask[0].flatten()
            hidden, chosen, weights = hidden[counted], chosen[counted], weights[counted]
        for place, (norm, count) in enumerate(module.contributions(hidden, chosen, weights)):
            sums[path][0, place] += norm
            sums[path][1, place] += count

    hooks = [
        module.register_forward_pre_hook(lambda module, args, path=path: watch(path, module, args))
        for path, module in found.items()
    ]
    try:
        with comparison_mode(model):
            for batch in batches:
                held = batch.get("attention_mask")
                mask[0] = held.bool().to(model.device) if isinstance(held, Tensor) and held.dim() == 2 else None
                model(**to_device(batch, model.device), **uncached(model))
    finally:
        for hook in hooks:
            hook.remove()
    totals = {path: reduce(total.to(model.device)).cpu() for path, total in sums.items()}
    tokens = {path: total[1] for path, total in totals.items()}
    if score == "routed_norm":
        return {path: total[0] for path, total in totals.items()}, tokens
    if score == "tokens":
        return tokens, tokens
    sizes = {path: [_norm(expert) for expert in module.experts] for path, module in found.items()}
    return {path: torch.tensor(values, dtype=torch.float64) for path, values in sizes.items()}, tokens


def _norm(expert: nn.Module) -> float:
    return sum(float(parameter.double().square().sum()) for parameter in expert.parameters()) ** 0.5


# --- which experts ------------------------------------------------------------------------------------------------


def _best(model: nn.Module, scores: Mapping[str, Tensor], wanted: int) -> dict[str, tuple[int, ...]]:
    """Return the places of the experts of the highest scores, ascending, by module of experts."""
    kept = {}
    for path, values in scores.items():
        order = torch.argsort(values, descending=True, stable=True)
        kept[path] = tuple(sorted(order[: max(len(values) - wanted, 0)].tolist()))
    return _checked(model, kept)


def _named(model: nn.Module, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    found = unstacked_experts(model)
    known = [f"{path}.{place}" for path, module in found.items() for place in range(len(module.experts))]
    for name in names:
        if name not in known:
            raise GETAError(
                f"drop_experts names {name!r}, which is no expert; there are {', '.join(known[:8])}, ... A model that "
                f"lost experts before takes drop_experts = 0"
            )
    return _checked(
        model,
        {
            path: tuple(place for place in range(len(module.experts)) if f"{path}.{place}" not in names)
            for path, module in found.items()
        },
    )


def _checked(model: nn.Module, kept: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    counts = {len(module.experts) for module in unstacked_experts(model).values()}
    left = {len(places) for places in kept.values()}
    if len(counts) > 1 or len(left) > 1:
        raise GETAError(
            f"drop_experts leaves {', '.join(f'{len(places)} in {path}' for path, places in kept.items())}, but a "
            f"configuration has one number for all layers; remove equally many of each"
        )
    if not left or not min(left):
        raise GETAError(f"drop_experts removes all {max(counts, default=0)} experts of each layer; keep some")
    return kept


# --- the smaller model --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """What is cut beside the experts themselves.

    Attributes:
        dims: tensor name -> the path of the experts that it has entries for, and their dim.
        changes: attributes of modules and configurations.
    """

    dims: dict[str, tuple[str, int]]
    changes: list[Change]


def _plan(model: PreTrainedModel, kept: Mapping[str, Sequence[int]]) -> _Plan:
    """Find the number in the configuration that is the experts', by building models with fewer."""
    number = len(next(iter(kept.values())))
    count = _count(model)
    dense = build_empty(type(model), copy.deepcopy(model.config))
    for path, own in nested_configs(model.config):
        for name, value in vars(own).items():
            if type(value) is not int or value != count:
                continue
            tried = copy.deepcopy(model.config)
            setattr(dict(nested_configs(tried))[path], name, number)
            dims = _cut_dims(model, tried, kept, count, number)
            if dims is not None:
                short = build_empty(type(model), tried)
                changes = [
                    change
                    for place, twin in short.named_modules()
                    for change in differences(dense.get_submodule(place), twin, place)
                ]
                return _Plan(dims, changes)
    raise GETAError(
        f"no number in {type(model.config).__name__} makes {count} experts {number}, so the smaller model could not be "
        f"loaded again; set drop_experts to 0, or to another number"
    )


def _count(model: nn.Module) -> int:
    return len(next(iter(unstacked_experts(model).values())).experts)


def _cut_dims(
    model: PreTrainedModel, config: PreTrainedConfig, kept: Mapping[str, Sequence[int]], count: int, number: int
) -> dict[str, tuple[str, int]] | None:
    """Return which tensors a configuration makes smaller; None where it is not the experts alone that are fewer."""
    try:
        short = build_empty(type(model), copy.deepcopy(config))
    except GETAError:
        return None
    theirs, ours = _shapes(model), _shapes(short)
    inside = tuple(f"{path}.{place}." for path in kept for place in range(number, count))
    if set(theirs) - set(ours) != {name for name in theirs if name.startswith(inside)} or set(ours) - set(theirs):
        return None
    dims = {}
    for name, shape in ours.items():
        if shape == theirs[name]:
            continue
        # The router is a sibling of the experts, in the block that holds both.
        owner = next((path for path in kept if name.startswith(f"{path.rpartition('.')[0]}.")), None)
        other = [dim for dim, pair in enumerate(zip(theirs[name], shape, strict=True)) if pair[0] != pair[1]]
        if owner is None or len(other) != 1 or (theirs[name][other[0]], shape[other[0]]) != (count, number):
            return None
        dims[name] = (owner, other[0])
    return dims


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _cut(model: PreTrainedModel, plan: _Plan, dropped: DroppedExperts) -> None:
    for path, places in dropped.kept.items():
        dropped.cut_list(model.get_submodule(path), places)
    for name, (owner, dim) in plan.dims.items():
        _cut_tensor(model, name, dim, dropped.kept[owner], dropped)
    dropped.apply(plan.changes, model)


@torch.no_grad()
def _cut_tensor(model: nn.Module, name: str, dim: int, kept: Sequence[int], dropped: DroppedExperts) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    store: dict[str, Any] = module._parameters if leaf in module._parameters else module._buffers
    before = store[leaf]
    dropped.later(lambda: store.update({leaf: before}))
    smaller = before.detach().index_select(dim, torch.tensor(kept, device=before.device))
    store[leaf] = nn.Parameter(smaller, before.requires_grad) if isinstance(before, nn.Parameter) else smaller


# --- the proof ----------------------------------------------------------------------------------------------------


def _masked_outputs(
    model: PreTrainedModel, dims: Mapping[str, tuple[str, int]], kept: Mapping[str, Sequence[int]], inputs: Batch
) -> Any:
    """Return the dense model's outputs with a router that never chooses the experts to be removed.

    Raises:
        GETAError: fewer experts would remain than each token goes to.
    """
    count = _count(model)
    number = len(next(iter(kept.values())))

    def check(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        k = args[1].shape[-1]
        if number < k:
            raise GETAError(
                f"drop_experts leaves {number} of {count} experts, but each token goes to {k} of them; remove at most "
                f"{count - k}"
            )

    hooks = [module.register_forward_pre_hook(check) for module in unstacked_experts(model).values()]
    try:
        with _never_chosen(model, dims, kept):
            return attention_outputs(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _never_chosen(
    model: nn.Module, dims: Mapping[str, tuple[str, int]], kept: Mapping[str, Sequence[int]]
) -> Iterator[None]:
    """Let the logits of experts that are not kept be minus infinity, for a while."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    routers: dict[int, Tensor] = {}
    before = []
    for name, (owner, dim) in dims.items():
        tensor = named[name]
        gone = torch.tensor([place for place in range(tensor.shape[dim]) if place not in kept[owner]])
        if tensor.dim() == 1 and tensor.is_floating_point():
            # A bias, or what is added to scores before experts are chosen.
            before.append((tensor, tensor.detach().clone()))
            tensor.data[gone.to(tensor.device)] = -torch.inf
        elif dim == 0:
            routers[id(tensor)] = gone.to(tensor.device)
    try:
        with _MaskedLogits(routers):
            yield
    finally:
        for tensor, values in before:
            tensor.data.copy_(values)


class _MaskedLogits(TorchFunctionMode):
    """Set outputs of linear maps to minus infinity: which ones, by the id of the weight."""

    def __init__(self, routers: dict[int, Tensor]) -> None:
        super().__init__()
        self.routers = routers
        self.held: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if func is F.linear and len(args) > 1 and (gone := self.routers.get(id(args[1]))) is not None:
            return out.index_fill(-1, gone, -torch.inf)
        if name in _CASTS and args and id(args[0]) in self.routers:
            # Some routers compute in another type than their weight has. Held, since a freed id is used again.
            self.held.append(out)
            self.routers[id(out)] = self.routers[id(args[0])]
        return out
