"""Measure the covariance of what comes into layers, Σ = E[x xᵀ], while a model runs calibration batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from geta_hf.errors import GETAError
from geta_hf.quantization.by_block import Batch, counted_tokens, find_blocks, uncached
from geta_hf.quantization.fixed import output_dim
from geta_hf.quantization.layer_types import CONVOLUTIONS
from geta_hf.utils.module_state import eval_mode

_CHUNK = 1 << 24
"""Elements of a layer's input that are converted to single precision at once."""


def as_rows(layer: nn.Module, weight: Tensor) -> Tensor:
    """Return a weight with a row for each output, shape (out, inputs of one output); a view where there is one.

    Args:
        layer: a linear layer, a Conv1D or a convolution.
        weight: of it, or a tensor of the same shape.
    """
    if output_dim(layer) == 1:
        return weight.t()
    return weight.flatten(1)


def like_weight(layer: nn.Module, rows: Tensor) -> Tensor:
    """Return what `as_rows` made of a weight in the shape of the weight again."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return rows.t() if output_dim(layer) == 1 else rows.reshape(weight.shape)


def has_covariance(layer: nn.Module) -> bool:
    """Return whether all outputs of a layer read the same inputs, which those of a grouped convolution do not."""
    return getattr(layer, "groups", 1) == 1


def input_rows(layer: nn.Module, x: Tensor) -> Tensor:
    """Return what a layer multiplies its weight with, one row for each use of the weight, shape (uses, inputs).

    Args:
        layer: a linear layer, a Conv1D or a convolution.
        x: its input.
    """
    if not isinstance(layer, CONVOLUTIONS):
        return x.reshape(-1, x.shape[-1])
    if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        # As the layer pads by itself before it convolves; these amounts are (left, right, top, bottom).
        x = F.pad(
            x,
            layer._reversed_padding_repeated_twice,
            "constant" if layer.padding_mode == "zeros" else layer.padding_mode,
        )
        padding: Any = 0
    else:
        padding = layer.padding
    sizes = (layer.kernel_size, layer.dilation, padding, layer.stride)
    if isinstance(layer, nn.Conv1d):
        # A picture of one row, in which nothing is padded above and below.
        x = x.unsqueeze(-2)
        padding = (padding,) if isinstance(padding, int) else padding
        sizes = ((1, *layer.kernel_size), (1, *layer.dilation), (0, *padding), (1, *layer.stride))
    patches = F.unfold(x, *sizes)
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])


class Covariance:
    """The sum of x xᵀ over what came into one layer.

    Args:
        dense: what came into it in the dense model, as `recording` gives it. Default None: not known.

    Attributes:
        total: fp32, shape (inputs, inputs); None before the first input.
        count: how many x were added up.
        drift: the sum of (x' - x) xᵀ, with x' what came in in the dense model; None where that is not known.
    """

    def __init__(self, dense: Sequence[Tensor] | None = None) -> None:
        self.total: Tensor | None = None
        self.count = 0
        self.drift: Tensor | None = None
        self._dense = None if dense is None else iter(dense)

    def add(self, rows: Tensor) -> None:
        """Add inputs of shape (uses, inputs), in any dtype."""
        if self.total is None:
            self.total = torch.zeros(rows.shape[1], rows.shape[1], device=rows.device)
            self.drift = None if self._dense is None else torch.zeros_like(self.total)
        size = max(1, _CHUNK // max(rows.shape[1], 1))
        parts = rows.split(size)
        dense: Sequence[Tensor | None] = [None] * len(parts)
        if self._dense is not None:
            dense = next(self._dense).split(size)
        for part, other in zip(parts, dense, strict=True):
            part = part.float()
            self.total += part.t() @ part
            if other is not None and self.drift is not None:
                self.drift += (other.float() - part).t() @ part
        self.count += len(rows)

    def mean(self, name: str) -> Tensor | None:
        """Return Σ, or None where nothing came in.

        Args:
            name: path of the layer, for the error.

        Raises:
            GETAError: it is not finite.
        """
        if self.total is None or not self.count:
            return None
        if not bool(torch.isfinite(self.total).all()):
            raise GETAError(
                f"the inputs of {name} overflow on the calibration data; load the model in float32 or bfloat16, or "
                f"exclude the layer"
            )
        return self.total / self.count

    def mean_drift(self) -> Tensor | None:
        """Return E[(x' - x) xᵀ], fp32, or None where it is not known or not finite."""
        if self.drift is None or not bool(torch.isfinite(self.drift).all()):
            return None
        return self.drift / self.count


@contextmanager
def collecting(
    layers: Mapping[str, nn.Module],
    shared: Mapping[str, str],
    mask: Sequence[Tensor | None],
    dense: Mapping[str, Sequence[Tensor]] | None = None,
) -> Iterator[dict[str, Covariance]]:
    """Collect the covariances of layers' inputs while a model runs within the context.

    Args:
        layers: by path.
        shared: path -> path of the layer whose inputs it shares, itself where it has its own.
        mask: one entry: which tokens of the present batch count, bool, shape (batch, tokens); None for all of them.
        dense: path -> what came in in the dense model, on the same batches, of some of them; see `recording`.

    Returns:
        Path -> covariance, of the layers that `shared` names.
    """
    known = dense or {}
    owners = {shared[name] for name in layers}
    found = {name: Covariance(known.get(name)) for name in owners}
    with _watching({name: layers[name] for name in owners}, mask, lambda name, _, rows: found[name].add(rows)):
        yield found


@contextmanager
def recording(layers: Mapping[str, nn.Module], mask: Sequence[Tensor | None]) -> Iterator[dict[str, list[Tensor]]]:
    """Keep what comes into layers while a model runs within the context, to compare another run with it.

    Layers that read a flat list of tokens are left out: in a mixture of experts, which tokens these are may differ
    between two runs.

    Args:
        layers: by path.
        mask: as in `collecting`.

    Returns:
        Path -> for each use of the layer its inputs, shape (uses, inputs), in their own dtype.
    """
    found: dict[str, list[Tensor]] = {}

    def keep(name: str, x: Tensor, rows: Tensor) -> None:
        if x.dim() > 2:
            found.setdefault(name, []).append(rows)

    with _watching(layers, mask, keep):
        yield found


@contextmanager
def _watching(
    layers: Mapping[str, nn.Module], mask: Sequence[Tensor | None], note: Callable[[str, Tensor, Tensor], None]
) -> Iterator[None]:
    """Call `note` with path, input and counted rows of the input, each time that one of the layers runs."""

    def watch(name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = (args[0] if args else next(iter(kwargs.values()))).detach()
        counted = x
        if mask[0] is not None and x.shape[:2] == mask[0].shape and not isinstance(layer, CONVOLUTIONS):
            counted = x[mask[0]]
        note(name, x, input_rows(layer, counted))

    with ExitStack() as stack:
        for name, layer in layers.items():
            hook = layer.register_forward_pre_hook(
                lambda layer, args, kwargs, name=name: watch(name, layer, args, kwargs), with_kwargs=True
            )
            stack.callback(hook.remove)
        yield


def measure_covariances(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    limit: float = math.inf,
    progress: Callable[[Sequence[Batch]], Iterable[Batch]] = iter,
) -> Iterator[dict[str, Tensor | None]]:
    """Run batches in evaluation mode, and yield the covariances of layers' inputs, of some layers at a time.

    Layers that read the same tensor share one. Where several processes run, each one gives batches of its own, and all
    get the covariance of all. A layer may be changed as soon as its covariance is there; the next ones are then those
    of the changed model.

    Args:
        model: any module.
        layers: by path, in any order.
        batches: keyword arguments of its forward, on its device.
        limit: bytes that covariances take at a time; a single one may take more. Default: all at once.
        progress: wraps the batches of each run.

    Yields:
        Path -> Σ, fp32, shape (inputs, inputs); None where no input came in, or where not all outputs read the same.
    """
    unknown = [name for name, layer in layers.items() if not has_covariance(layer)]
    if unknown:
        yield dict.fromkeys(unknown)
    known = {name: layer for name, layer in layers.items() if name not in unknown}
    if not known:
        return
    stages = [stage for block in find_blocks(model, known, batches[0]) for stage in block.stages]
    for part in _parts(stages, known, limit):
        shared = {name: stage[0] for stage in part for name in stage}
        mask: list[Tensor | None] = [None]
        own = {name: known[name] for name in shared}
        with collecting(own, shared, mask) as found, eval_mode(model), uncached(model):
            for batch in progress(batches):
                mask[0] = counted_tokens(model, batch)
                model(**batch)
        for name, one in found.items():
            _add_up_processes(one, known[name])
        means = {name: one.mean(name) for name, one in found.items()}
        yield {name: means[owner] for name, owner in shared.items()}


def covariance_bytes(layer: nn.Module) -> int:
    """Return what the covariance of a layer's inputs takes."""
    return 4 * as_rows(layer, layer.weight).shape[1] ** 2  # type: ignore[arg-type]


def _parts(stages: Iterable[list[str]], layers: Mapping[str, nn.Module], limit: float) -> list[list[list[str]]]:
    """Return the stages in parts whose covariances fit into a limit; the layers of a stage share one."""
    parts: list[list[list[str]]] = []
    used = math.inf
    for stage in stages:
        size = covariance_bytes(layers[stage[0]])
        if not parts or used + size > limit:
            parts.append([])
            used = 0
        parts[-1].append(stage)
        used += size
    return parts


def _add_up_processes(found: Covariance, layer: nn.Module) -> None:
    """Add up what came into a layer on all processes, on each of them."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    weight: Tensor = layer.weight  # type: ignore[assignment]
    inputs = as_rows(layer, weight).shape[1]
    if found.total is None:  # an expert that no token of this process reached
        found.total = torch.zeros(inputs, inputs, device=weight.device)
    count = torch.tensor(float(found.count), device=weight.device)
    dist.all_reduce(found.total)
    dist.all_reduce(count)
    found.count = int(count)
