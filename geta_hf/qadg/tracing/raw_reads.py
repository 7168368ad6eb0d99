"""Find weights that something other than their own layer's forward reads.

A quantizer acts in the forward of its layer. Code that takes the weight itself, such as `F.linear(x, layer.weight)` or
a fused kernel, gets the unquantized values: it would train, or evaluate, another model than the one that is exported.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from geta_hf.qadg.tracing.graph import Graph
from geta_hf.qadg.tracing.record_forward import unchanged
from geta_hf.utils.module_state import eval_mode, running


def find_raw_reads(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batch: Mapping[str, Any],
    modes: Sequence[bool] = (False, True),
) -> list[str]:
    """Return the layers whose weight is read past their own forward, in evaluation or in training.

    The model runs the batch once in each mode, without gradients. A mode that it cannot run finds nothing: some models
    train on labels only. The model and all random states are as before afterwards.

    Args:
        model: with its weights, on any device.
        layers: layers of the model by name, quantized or not. Each has a `weight`.
        batch: keyword arguments of the model's forward, on its device.
        modes: values of `training` to run the model with. Default: evaluation and training.

    Returns:
        Names of layers, in the order of `layers`.
    """
    reads = _Reads(layers)
    for training in modes:
        with ExitStack() as stack:
            stack.enter_context(_same_state(model))
            # Both, since what a model cached in evaluation mode is only dropped in training mode.
            model.train().train(training)
            for name, layer in layers.items():
                stack.enter_context(running(layer, partial(reads.run, name, layer.forward)))
            try:
                with reads:
                    model(**batch)
            except Exception:  # a model's own code may fail in any way, and does so again where it matters
                continue
    return [name for name in layers if name in reads.found]


def recorded_raw_reads(graph: Graph, model: nn.Module, layers: Mapping[str, nn.Module]) -> list[str]:
    """Return what `find_raw_reads` finds, as far as a recording shows it, which needs no weights.

    A recording is of evaluation mode and without torch's fast paths.

    Args:
        graph: a recording of the model, its branches merged or not.
        model: what was recorded; it may be on meta.
        layers: layers of the model by name.
    """
    found: set[str] = set()
    for node in graph.nodes:
        for call in (node, *node.body):
            for value in call.refs():
                owners = {name.removesuffix(".weight") for name in graph.values[value].names} & set(layers)
                running_now = model.get_submodule(call.module)
                if not any(layers[name] is running_now for name in owners):
                    found |= owners
    return [name for name in layers if name in found]


class _Reads(TorchDispatchMode):
    """Note the layers whose weight an operator gets while the layer's own forward is not running.

    Below autograd every operator is seen, the fused ones as well. Torch's fast paths are not taken under function modes
    or hooks on modules, but they are under this one.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.active: list[str] = []
        # By storage: `layer.weight.data` and views are other tensors. Layers whose weights are tied share an entry.
        self.owners: dict[int, set[str]] = {}
        for name, layer in layers.items():
            self.owners.setdefault(_storage(layer.weight), set()).add(name)

    def run(self, name: str, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the layer's own forward."""
        self.active.append(name)
        try:
            return forward(*args, **kwargs)
        finally:
            self.active.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for item in tree_leaves((args, kwargs)):
            if isinstance(item, Tensor):
                owners = self.owners.get(_storage(item))
                if owners is not None and owners.isdisjoint(self.active):
                    self.found |= owners
        return func(*args, **kwargs)


def _storage(tensor: Any) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse and distributed tensors have none
        return id(tensor)


@contextmanager
def _same_state(model: nn.Module) -> Iterator[None]:
    """Restore everything that a forward in training mode may change: statistics, caches, flags, random states."""
    states = random.getstate(), np.random.get_state()
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        with eval_mode(model), unchanged(model):
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        random.setstate(states[0])
        np.random.set_state(states[1])
