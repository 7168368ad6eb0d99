"""Run a model in ways that its batch does not: shorter and longer, with other optional inputs, in training mode.

A model's code may branch on any of these. A branch that nothing ran reads attributes that no recording has shown, so a
cut can leave it broken, or wrong, while all that was recorded is right.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.utils import logging

from geta_hf.errors import GETAError
from geta_hf.qadg.tracing.record_forward import unchanged
from geta_hf.surgery.compare_outputs import GROWN, WIDENED, comparison_mode, prove_equal, widened
from geta_hf.utils.model_io import Batch, float_tensors, to_device
from geta_hf.utils.module_state import HALVES, devices_of
from geta_hf.utils.process_state import random_state_kept
from geta_hf.utils.residence import visiting

_SHORT = (1, 8)
"""Tokens of the shorter texts: a model's full attention, a window or a table may begin or end at any length."""

_LONG = 64
"""Tokens that a longer text has at least, where the model's positions reach as far."""

_FEW = 16
"""Tokens on which optional inputs are tried: what they decide does not depend on the length of the text."""

_SMALL = 1e-3
"""Least scale of outputs that are compared closely; below it, rounding of what they are computed from shows."""

_FLAGS = ("output_hidden_states", "output_attentions")
"""Flags that a forward takes among its keyword arguments without naming them."""

_BY_NAME = ("return_dict", "use_cache")
"""Flags that are compared elsewhere: outputs have to be named here, and a cache is part of generation."""


class PathError(GETAError):
    """A cut model fails, or computes something else, on a path that its batch does not take.

    Attributes:
        path: the path.
    """

    def __init__(self, path: OtherPath, reason: str) -> None:
        remedy = "; train on batches that have these inputs, so that they are taken into account" if path.adds else ""
        super().__init__(f"{path.name}: {reason}{remedy}")
        self.path = path


@dataclass(frozen=True)
class OtherPath:
    """Another way to run a model.

    Attributes:
        name: for messages, such as `on text of 8 tokens`.
        batch: keyword arguments of the forward.
        embedded: the name of the tokens that are replaced by `inputs_embeds`; None where they remain.
        training: whether the model is in training mode, with every dropout switched off.
        adds: whether it has inputs that the batch lacks.
        instead: what is tried where the model does not run this path, such as each of several inputs alone.
    """

    name: str
    batch: Mapping[str, Any] = field(repr=False)
    embedded: str | None = None
    training: bool = False
    adds: bool = False
    instead: tuple[OtherPath, ...] = field(default=(), repr=False)

    def call(self, model: nn.Module, forward: Callable[..., Any], inputs: Mapping[str, Any]) -> Any:
        """Run `forward` of the model on the inputs in this way; the state of the model may change."""
        arguments = dict(inputs)
        if self.embedded is not None:
            # The cut model may have narrower embeddings, so each model makes its own.
            arguments["inputs_embeds"] = model.get_input_embeddings()(arguments.pop(self.embedded))  # type: ignore[operator]
        if not self.training:
            return forward(**arguments)
        model.train()
        # The shapes of what is dropped shrink with a cut, so the same seed would drop something else.
        with _WithoutDropout():
            return forward(**arguments)


# --- the paths ----------------------------------------------------------------------------------------------------


def other_paths(model: PreTrainedModel, batch: Batch, labels: Batch | None = None) -> list[OtherPath]:
    """Make the paths to try. Not every model runs every one; `path_outputs` returns None for those.

    Args:
        model: whose forward's signature tells which inputs are optional.
        batch: what the model was recorded on.
        labels: entries that only training passes; without them there is no path in training mode.
    """
    main = batch.get(model.main_input_name)
    paths = [*_lengths(model, batch), *_options(model, batch)]
    if isinstance(main, Tensor) and main.dim() == 4:
        cropped = {**batch, model.main_input_name: main[..., : main.shape[2] // 2, : main.shape[3] // 2]}
        paths.append(OtherPath("on pictures of half the size", cropped))
    if labels:
        everything = {**batch, **labels}
        text = isinstance(main, Tensor) and main.dim() == 2
        # Pictures may meet batch norms, which need several rows.
        inputs = _first_row(everything) if text else everything
        paths.append(OtherPath("in training mode, with labels", inputs, training=True))
    return paths


def _lengths(model: PreTrainedModel, batch: Batch) -> Iterator[OtherPath]:
    main = batch.get(model.main_input_name)
    if not isinstance(main, Tensor) or main.dim() != 2:
        return
    length = main.shape[1]
    if main.is_floating_point():  # sound
        yield OtherPath("on half the sound", _of_length(batch, length, length // 2))
        yield OtherPath("on sound of twice the length", _of_length(batch, length, 2 * length))
        return
    for tokens in _SHORT:
        if tokens < length:
            yield OtherPath(f"on text of {_tokens(tokens)}", _of_length(batch, length, tokens))
    longest = max(2 * length, _LONG)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(limit, int) and limit > 0:
        # Positions of RoBERTa begin behind the padding's, so its table is two rows longer than its texts.
        longest = min(longest, limit - 2 if limit - 2 > length else limit)
    if longest > length:
        # A single row, since memory grows with the length, perhaps by its square.
        yield OtherPath(f"on text of {_tokens(longest)}", _first_row(_of_length(batch, length, longest)))


def _tokens(count: int) -> str:
    return "1 token" if count == 1 else f"{count} tokens"


def _of_length(batch: Batch, old: int, new: int) -> dict[str, Any]:
    """Return the batch with everything that has a place for each token shortened, or repeated to the new length."""

    def change(item: Any) -> Any:
        if not isinstance(item, Tensor) or item.dim() < 2 or item.shape[1] != old:
            return item
        return torch.cat([item] * -(-new // old), dim=1)[:, :new]

    return {name: change(item) for name, item in batch.items()}


def _first_row(batch: Batch) -> dict[str, Any]:
    rows = {item.shape[0] for item in batch.values() if isinstance(item, Tensor) and item.dim()}
    # Patches of all pictures in one tensor are not indexed by row.
    if len(rows) != 1:
        return dict(batch)
    return {name: item[:1] if isinstance(item, Tensor) and item.dim() else item for name, item in batch.items()}


def _options(model: PreTrainedModel, batch: Batch) -> Iterator[OtherPath]:
    """Yield the batch without its optional inputs, with flags that it lacks, and with inputs that it lacks."""
    small = _first_row(_of_length(batch, *_some_tokens(model, batch)))
    arguments = inspect.signature(type(model).forward).parameters
    optional = {name: argument for name, argument in arguments.items() if argument.default in (None, False)}
    given = [name for name in small if name in optional and name != model.main_input_name]
    yield from _together("without", [(small, [name], {}) for name in given])
    flags = {name for name, argument in optional.items() if "bool" in str(argument.annotation)}
    if any(argument.kind is argument.VAR_KEYWORD for argument in arguments.values()):
        flags.update(_FLAGS)
    new = sorted(flags.difference(small, _BY_NAME))
    yield from _together("with", [(small, [], {name: True}) for name in new])
    main = small.get(model.main_input_name)
    if not isinstance(main, Tensor) or main.dim() != 2 or main.is_floating_point():
        return
    if "inputs_embeds" in optional:
        yield OtherPath("with inputs_embeds", small, embedded=model.main_input_name)
    # One entry for each head would have another shape after a cut.
    lacking = [name for name in optional if name.endswith(("_ids", "_mask")) and "head" not in name]
    more = {name: _made_up(name, main) for name in lacking if name not in small and name not in flags}
    yield from _together("with", [(small, [], {name: item}) for name, item in more.items()], _related(small, more))


def _some_tokens(model: PreTrainedModel, batch: Batch) -> tuple[int, int]:
    """Return how many tokens the batch has, and how many are enough for its options."""
    main = batch.get(model.main_input_name)
    length = main.shape[1] if isinstance(main, Tensor) and main.dim() == 2 and not main.is_floating_point() else 0
    return length, min(length, _FEW)


_Change: TypeAlias = tuple[Batch, Sequence[str], Mapping[str, Any]]
"""A batch, what it loses and what it gains."""


def _together(word: str, changes: Sequence[_Change], others: Sequence[_Change] = ()) -> Iterator[OtherPath]:
    """Yield one path with all changes of a batch; where a model does not run it, each of them, and others, alone."""
    if not changes:
        return
    alone = tuple(_changed(word, change) for change in (*changes, *others))
    if len(changes) == 1:
        yield alone[0]
        return
    lost = [name for _, names, _ in changes for name in names]
    gained = {name: item for _, _, items in changes for name, item in items.items()}
    everything = _changed(word, (changes[0][0], lost, gained))
    yield replace(everything, instead=alone)


def _changed(word: str, change: _Change) -> OtherPath:
    batch, lost, gained = change
    rest = {name: item for name, item in batch.items() if name not in lost}
    # A flag can't be part of a batch of a data set, but tensors can.
    adds = any(isinstance(item, Tensor) for item in gained.values())
    return OtherPath(f"{word} {', '.join((*lost, *gained))}", {**rest, **gained}, adds=adds)


def _related(batch: Batch, more: Mapping[str, Tensor]) -> list[_Change]:
    """Return the inputs that belong together by the first word of their names, such as those of entities."""
    found: list[_Change] = []
    for prefix in dict.fromkeys(name.partition("_")[0] for name in more):
        items = {name: item for name, item in more.items() if name.partition("_")[0] == prefix}
        if len(items) < 2:
            continue
        # An entity is a span of several tokens, whose positions are one dim more.
        wider = {name: item[..., None] for name, item in items.items() if name.endswith("position_ids")}
        found += [(batch, (), items), (batch, (), {**items, **wider})]
    return found


def _made_up(name: str, main: Tensor) -> Tensor:
    if name.endswith("position_ids"):
        return torch.arange(main.shape[1], device=main.device).expand(main.shape)
    if name.endswith("_mask"):
        mask = torch.ones_like(main)
        mask[-1, main.shape[1] - main.shape[1] // 3 :] = 0
        return mask
    return torch.zeros_like(main)


# --- running and comparing ----------------------------------------------------------------------------------------


def path_outputs(
    model: PreTrainedModel, path: OtherPath, seed: int = 0, device: torch.device | None = None
) -> dict[str, Tensor]:
    """Return the floating-point outputs of a model on a path. The model is unchanged afterwards, buffers included.

    Args:
        model: any Hugging Face model.
        path: the way to run it.
        seed: of whatever random numbers the forward draws.
        device: as in `attention_outputs`.

    Raises:
        Exception: whatever the forward raises.
    """
    with ExitStack() as stack:
        stack.enter_context(visiting(model, device))
        inputs = to_device(path.batch, model.device)
        stack.enter_context(quietly())
        stack.enter_context(comparison_mode(model))
        # BigBird, for one, replaces its attention modules for good when a text is short.
        stack.enter_context(unchanged(model))
        stack.enter_context(_same_buffers(model))
        stack.enter_context(_seeded(seed, devices_of(model)))
        if model.device.type != "cpu":
            stack.enter_context(_CheckedIndices())
        # The class's forward: accelerate wraps an instance's own in autocast, which the copies do not have.
        found = float_tensors(path.call(model, lambda **given: type(model).forward(model, **given), inputs))
        return found if device is None else to_device(found, "cpu")


def compare_path(
    trained: PreTrainedModel,
    cut: PreTrainedModel,
    path: OtherPath,
    recorded: Collection[str] = (),
    equal: bool = True,
    device: torch.device | None = None,
) -> None:
    """Compare a cut model with the trained one on a path, where the trained one runs it.

    Args:
        trained: the reference, with the removed groups at zero.
        cut: the cut model.
        path: the way to run them.
        recorded: names of the paths that were recorded. Until then small outputs have to agree as closely as large
            ones: the weights of a new model are so small that a wrong cut hardly shows, and a recording tells.
        equal: whether the outputs have to be equal. Where a norm runs over what was removed, zeros do not do what a
            cut does, and the cut model only has to run.
        device: as in `attention_outputs`; the models take turns there.

    Raises:
        PathError: the cut model does not run, or an output differs by more than the tolerance.
    """
    reference = _attempt(trained, path, device=device)
    if reference is None:
        for other in path.instead:
            compare_path(trained, cut, other, recorded, equal, device)
        return
    try:
        found = path_outputs(cut, path, device=device)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise PathError(path, f"the cut model does not run, which the full one does: {reason}") from error
    if not equal:
        return
    scale = 1.0 if path.name in recorded else _SMALL
    try:
        prove_equal({"own": reference}, {"own": found}, trained.dtype, "cut", scale)
    except GETAError as error:
        if not _is_rounding(trained, cut, path, reference, scale) and not _is_random(
            trained, path, reference, scale, device
        ):
            raise PathError(path, str(error)) from error


def _attempt(
    model: PreTrainedModel, path: OtherPath, seed: int = 0, device: torch.device | None = None
) -> dict[str, Tensor] | None:
    """Return the outputs, or None where the model does not run the path or has no sound output on it."""
    try:
        found = path_outputs(model, path, seed, device)
    except Exception:  # each model has its own way to refuse
        return None
    return None if any(bool(tensor.isnan().any()) for tensor in found.values()) else found


def _is_rounding(
    trained: PreTrainedModel, cut: PreTrainedModel, path: OtherPath, outputs: dict[str, Tensor], scale: float
) -> bool:
    """Return whether the outputs of two models are equal in the next higher precision."""
    if trained.dtype not in WIDENED:
        return False
    with widened(trained):
        reference = _attempt(trained, path)
    with widened(cut):
        found = _attempt(cut, path)
    if reference is None or found is None:
        return False
    try:
        if trained.dtype not in HALVES:
            prove_equal({"own": outputs}, {"own": reference}, torch.float32, "widened", tolerance=GROWN)
        prove_equal({"own": reference}, {"own": found}, torch.float32, "cut", scale)
    except GETAError:
        return False
    return True


def _is_random(
    model: PreTrainedModel,
    path: OtherPath,
    reference: Mapping[str, Tensor],
    scale: float,
    device: torch.device | None = None,
) -> bool:
    """Return whether the outputs of one model depend on chance: then they say nothing about another model's."""
    again = _attempt(model, path, seed=1, device=device)
    if again is None:
        return True
    try:
        prove_equal({"own": dict(reference)}, {"own": again}, model.dtype, "cut", scale)
    except GETAError:
        return True
    return False


@contextmanager
def quietly() -> Iterator[None]:
    """Silence the remarks of transformers for a while: nobody asked for the runs that they are about."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextmanager
def _same_buffers(model: nn.Module) -> Iterator[None]:
    """Restore the content of the buffers afterwards, which training mode may change: running means, counters."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, content in before:
            buffer.copy_(content)


@contextmanager
def _seeded(seed: int, devices: Iterable[torch.device]) -> Iterator[None]:
    """Seed all generators that models on these devices draw from, and restore their states."""
    python, numpy = random.getstate(), np.random.get_state()
    with random_state_kept(devices, seed):
        try:
            random.seed(seed)
            np.random.seed(seed)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


class _WithoutDropout(TorchFunctionMode):
    """Let nothing be dropped in training mode, whether a module, a function or the attention does it."""

    _dropouts = (
        functional.dropout,
        functional.dropout1d,
        functional.dropout2d,
        functional.dropout3d,
        functional.alpha_dropout,
        functional.feature_alpha_dropout,
        torch.dropout,
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in self._dropouts:
            return args[0] if args else kwargs["input"]
        if func is functional.scaled_dot_product_attention:
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
            kwargs |= {"dropout_p": 0.0} if "dropout_p" in kwargs else {}
        if func is Tensor.bernoulli_:  # a mask of what is kept
            return args[0].fill_(1)
        return func(*args, **kwargs)


class _CheckedIndices(TorchFunctionMode):
    """Raise IndexError before an index beyond its table reaches a GPU, where it would end the process."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for index, size in _indexed(func, args, kwargs):
            # Only `tensor[index]` counts from the end.
            least = -size if func is Tensor.__getitem__ else 0
            if index.numel() and not (least <= int(index.min()) and int(index.max()) < size):
                raise IndexError(f"indices {int(index.min())} to {int(index.max())} reach beyond {size} entries")
        return func(*args, **kwargs)


def _indexed(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Iterator[tuple[Tensor, int]]:
    """Yield the tensors of indices of a call, each with the size of the dim that they are for."""
    if func is functional.embedding or func is torch.embedding:
        first, second = (*args, *(kwargs[name] for name in ("input", "weight", "indices") if name in kwargs))[:2]
        index, table = (first, second) if func is functional.embedding else (second, first)
        yield index, table.shape[0]
    elif func in (torch.gather, Tensor.gather, torch.index_select, Tensor.index_select):
        tensor, dim, index = (*args, *(kwargs[name] for name in ("input", "dim", "index") if name in kwargs))[:3]
        yield index, tensor.shape[dim]
    elif func is Tensor.__getitem__ and getattr(args[1], "dtype", None) in (torch.int32, torch.int64):  # no mask
        yield args[1], args[0].shape[0]
