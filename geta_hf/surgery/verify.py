"""Gate 4: after surgery the Hugging Face model itself, with its own code, computes what the masked model did.

Gates 2 and 3 (`geta_hf.qadg.verify`) prove the groups on the recorded graph. They cannot see what the model's Python
code does with sizes: that shows only when the code runs on the cut tensors.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from geta_hf.errors import GETAError
from geta_hf.qadg.group_types import Family
from geta_hf.qadg.replay import Replay, ReplayError, double
from geta_hf.qadg.space import PruningSpace, kept_indices
from geta_hf.surgery.compare_outputs import WIDENED, Outputs, attention_outputs, comparison_mode, prove_equal
from geta_hf.surgery.other_paths import OtherPath, PathError, compare_path, other_paths
from geta_hf.surgery.record import Recordings, other_shape, record_path, record_sizes, stepping
from geta_hf.surgery.size_equations import RefusalError
from geta_hf.surgery.size_trace import SizeTrace, SlicedTrace
from geta_hf.surgery.slice import slice_model
from geta_hf.surgery.solve_attributes import Values, solve
from geta_hf.utils.copies import copy_module
from geta_hf.utils.model_io import Batch, cast_floats
from geta_hf.utils.module_state import in_next_precision

Removal = dict[str, Tensor]

_NEW_TOKENS = 3


def verify_surgery(model: PreTrainedModel, batch: Batch, space: PruningSpace, seed: int = 0) -> None:
    """Check that a model passes gate 4: cut for real, with different counts in every layer, it still computes the same.

    Runs on a copy with random weights, biases and norm weights away from 0 and 1, in double precision where the model
    fixes no types of its own. From every prunable family another number of groups is removed (never all; families that
    exclude each other in turn), the tensors are sliced and the modules' attributes solved for. Then the model's own
    forward must give what it gave with the removed slices at zero, within 1e-6 of the scale of the outputs: on the
    batch with eager and with sdpa attention, on another shape, and in generation with and without a cache, if it can.
    Families that a norm runs over are compared with the recorded graph on the sliced tensors instead.

    Args:
        model: on any device, with real tensors; left unchanged.
        batch: one batch of real inputs; a small one will do.
        space: what to check; only its prunable families are.
        seed: of the random weights and of what is removed.

    Raises:
        GETAError: naming the families and what went wrong.

    Example:
        >>> import torch
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> sizes = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 32, "num_hidden_layers": 1}
        >>> model = BertForSequenceClassification(BertConfig(vocab_size=30, **sizes))
        >>> batch = {"input_ids": torch.arange(1, 9)[None]}
        >>> from geta_hf import build_space, verify_surgery
        >>> space = build_space(model, batch)
        >>> verify_surgery(model, batch, space)  # silent where the model's own code follows every cut
    """
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise GETAError(f"gate 4 runs {type(model).__name__} itself, but it is on meta; pass a model with real tensors")
    generator = torch.Generator().manual_seed(seed)
    trial = SurgeryTrial(_randomized(model, batch, space, seed), batch, space)
    for removal in _removals(space.prunable, generator):
        reason = trial.refusal(removal)
        if reason is None:
            continue
        # Families were removed together, to save time. Name the one that fails alone; where none does, it takes them
        # all.
        for name, mask in removal.items():
            if len(removal) > 1 and (own := trial.refusal({name: mask})) is not None:
                raise GETAError(f"{name} fails gate 4 (surgery): {own}; mark it unprunable")
        raise GETAError(f"{' with '.join(removal)} fails gate 4 (surgery): {reason}; mark it unprunable")


class SurgeryTrial:
    """A model whose groups are removed in trial, and what was recorded of it.

    Args:
        model: unchanged afterwards.
        batch: one batch of real inputs.
        space: the pruning space of the model.
        recordings: of this very model on this batch; made here when None.
        labels: entries that only training passes, to compare in training mode as well.

    Raises:
        GETAError: the model cannot run the batch.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batch: Batch,
        space: PruningSpace,
        recordings: Recordings | None = None,
        labels: Batch | None = None,
    ) -> None:
        self.model = model
        self.space = space
        self.families = {family.name: family for family in space.families}
        self.batches = [cast_floats(batch, model.dtype)]
        self.generates = model.can_generate()
        self.recordings = record_sizes(model, self.batches[0]) if recordings is None else recordings
        other = other_shape(model, self.batches[0])
        # Some models take one shape only, such as images of a fixed size: those are compared on the batch alone.
        if _attempt(lambda: attention_outputs(model, other, every=False)) is not None:
            self.batches.append(other)
        self.paths = other_paths(model, self.batches[0], None if labels is None else cast_floats(labels, model.dtype))
        self._recorded: dict[str, tuple[SizeTrace, ...]] = {}

    def refusal(self, removal: Removal) -> str | None:
        """Return why the groups cannot be cut away, or None where they can."""
        shown: dict[str, tuple[SizeTrace, ...]] = {}
        while True:
            try:
                self._check(removal, shown)
                return None
            except PathError as error:
                # Only a path that fails is worth its recording, which shows the attributes that are read on it alone.
                if error.path.name in shown:
                    return str(error)
                shown[error.path.name] = self._record(error.path)
            except GETAError as error:
                return str(error)

    def _record(self, path: OtherPath) -> tuple[SizeTrace, ...]:
        if path.name not in self._recorded:
            self._recorded[path.name] = record_path(self.model, path)
        return self._recorded[path.name]

    def unsolvable(self, removal: Removal) -> str | None:
        """Return why no attributes of the model make up for a cut of the groups, or None; nothing is cut."""
        return unsolvable(self.space, self.recordings, removal)

    def _check(self, removal: Removal, shown: Mapping[str, tuple[SizeTrace, ...]]) -> None:
        try:
            self._compare(removal, shown)
        except PathError:  # which is compared in higher precision already
            raise
        except GETAError:
            if self.model.dtype not in WIDENED:
                raise
            with in_next_precision(self.model):  # what differs may be rounding alone
                self._compare(removal, shown)

    def _compare(self, removal: Removal, shown: Mapping[str, tuple[SizeTrace, ...]]) -> None:
        kept = kept_indices(self.space, removal)
        # Everything from here on is what an export does, so that a trial refuses what an export would refuse.
        attributes = solve_with_paths(self.recordings.traces, shown, kept)
        batches = [cast_floats(batch, self.model.dtype) for batch in self.batches]
        # Parameters are shared, since only those that are cut are replaced: a trial takes their memory and no more.
        compressed = copy_module(self.model, {id(parameter): parameter for parameter in self.model.parameters()})
        slice_model(compressed, kept, attributes)
        if norm_coupled(self.space, removal):
            # A norm divides by its width: zeros count in it, removed channels do not, so masking proves nothing here.
            prove_replay(self.recordings.traces[0], kept, compressed, batches[0])
            for path in self.paths:
                compare_path(self.model, compressed, path, shown, equal=False)
            return
        with masked_groups(self.model, self.families.values(), removal):
            for batch in batches:
                # Eager and sdpa attention read different sizes of the modules, whatever the shape of the batch.
                every = batch is batches[0]
                reference = attention_outputs(self.model, batch, every)
                prove_equal(reference, attention_outputs(compressed, batch, every), self.model.dtype, "cut")
            if self.generates:
                check_generation(self.model, compressed, batches[0])
            for path in self.paths:
                compare_path(self.model, compressed, path, shown)


def unsolvable(space: PruningSpace, recordings: Recordings, removal: Removal) -> str | None:
    """Return why no attributes of a model make up for a cut of the groups, or None; its weights are not read."""
    try:
        solve(recordings.traces, kept_indices(space, removal))
    except GETAError as error:
        return str(error)
    return None


def solve_with_paths(
    traces: Sequence[SizeTrace],
    paths: Mapping[str, Sequence[SizeTrace]],
    kept: Mapping[str, Mapping[int, Tensor]],
) -> Values:
    """Find the attributes that change, by the recordings of a batch and of other paths.

    Args:
        traces: of the batch, at least one.
        paths: name of a path -> what was recorded on it.
        kept: as in `solve`.

    Raises:
        RefusalError: as `solve`; names the path that adds what cannot be met.
    """
    values = solve(traces, kept)
    known = tuple(traces)
    for name, more in paths.items():
        known = (*known, *more)
        try:
            values = solve(known, kept)
        except RefusalError as error:
            raise RefusalError(f"{name}: {error}") from error
    return values


def prove_replay(
    trace: SizeTrace,
    kept: Mapping[str, Mapping[int, Tensor]],
    compressed: PreTrainedModel,
    batch: Batch,
    outputs: Outputs | None = None,
    decoded: Mapping[str, Tensor] | None = None,
) -> float:
    """Compare a cut model with the recorded graph on its tensors, whose norms and means run over what remains.

    Args:
        trace: of the model before it was cut, without quantizers.
        kept: what it was cut to.
        compressed: the cut model.
        batch: what was recorded.
        outputs: of the cut model on the batch, where they are at hand.
        decoded: the values of tensors that the cut model holds in another form, such as codes, by name.

    Returns:
        The largest absolute difference.

    Raises:
        GETAError: an output differs by more than the tolerance, or the graph does not run.
    """
    tensors = dict(compressed.named_parameters()) | dict(compressed.named_buffers()) | dict(decoded or {})
    # The graph is that of the model before the cut; on sliced tensors its means and norms divide by the new widths.
    values = [(place, v) for place, v in enumerate(trace.flow.graph.values) if v.role in ("parameter", "buffer")]
    weights = {place: partial(_wide, tensors[value.names[0]]) for place, value in values if trace.flow.known(place)}
    try:
        expected = Replay(trace.flow, SlicedTrace(trace, kept).removed).run(weights)
    except ReplayError as error:
        raise GETAError(f"the recorded graph does not run on what remains: {error}") from error
    differences = []
    # Outputs of the graph have no names, so each is compared with the closest output of its shape.
    outputs = attention_outputs(compressed, batch) if outputs is None else outputs
    for implementation, found in outputs.items():
        for tensor in expected:
            alike = [output.cpu() for output in found.values() if output.shape == tensor.shape]
            if alike and tensor.is_floating_point():
                closest = min(alike, key=lambda output: float((output - tensor).abs().max()))
                replayed = {implementation: {"output": tensor}}
                computed = {implementation: {"output": closest}}
                differences.append(prove_equal(replayed, computed, compressed.dtype, "cut"))
    if not differences:
        raise GETAError(f"no output of {type(compressed).__name__} has the shape that the recorded graph gives it")
    return max(differences)


def _wide(tensor: Tensor) -> Tensor:
    # Moved first: in double precision one embedding may be a fifth of a model in 16 bits.
    return double(tensor.cpu())


def norm_coupled(space: PruningSpace, removal: Mapping[str, Tensor]) -> bool:
    """Return whether a norm or a mean runs over something that is removed, so that zeros do not do what a cut does."""
    return any("norm" in f.couplings and bool(removal[f.name].any()) for f in space.families if f.name in removal)


@torch.no_grad()
def mask_groups(model: nn.Module, families: Iterable[Family], removal: Removal) -> None:
    """Set the groups to zero that `removal` names."""
    for tensor, dim, index in _slices(model, families, removal):
        tensor.index_fill_(dim, index, 0)


@contextmanager
def masked_groups(model: nn.Module, families: Iterable[Family], removal: Removal) -> Iterator[None]:
    """Set the groups to zero for a while, then restore their values; takes the memory of the groups alone."""
    before: list[tuple[Tensor, int, Tensor, Tensor]] = []
    with torch.no_grad():
        try:
            for tensor, dim, index in _slices(model, families, removal):
                before.append((tensor, dim, index, tensor.index_select(dim, index)))
                tensor.index_fill_(dim, index, 0)
            yield
        finally:
            for tensor, dim, index, values in reversed(before):  # where two overlap, the first one saw the values
                tensor.index_copy_(dim, index, values)


def _slices(model: nn.Module, families: Iterable[Family], removal: Removal) -> Iterator[tuple[Tensor, int, Tensor]]:
    """Yield tensor, dim and indices of everything that is removed."""
    # A member names a tied tensor by any one of its names, so each of them must be found.
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for family in families:
        if family.name not in removal:
            continue
        for member in family.members:
            tensor = tensors[member.tensor]
            # member.index has a row for each group: (4, 8) for 4 heads of 8 rows of a query's weight.
            yield tensor, member.dim, member.index[removal[family.name]].flatten().to(tensor.device)


def check_generation(masked: PreTrainedModel, compressed: PreTrainedModel, batch: Batch) -> None:
    """Compare the last logits from a cache, and tokens generated with a cache and without, as far as the model can.

    A cache has shapes of its own (heads, head size, number of layers), which a plain forward never touches.
    """
    with comparison_mode(masked), comparison_mode(compressed):
        for what, run in (("step by step", _last_logits), ("with a cache", _tokens(True)), ("without", _tokens(False))):
            reference = _attempt(partial(run, masked, batch))
            if reference is None:
                continue
            try:
                found = run(compressed, batch)
            except Exception as error:
                raise GETAError(f"the cut model cannot generate {what} any more: {error}") from error
            prove_equal({what: {"generation": reference}}, {what: {"generation": found}}, masked.dtype, "cut")


def _last_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    with stepping(model):
        return model(**batch)


def _tokens(cached: bool) -> Callable[[PreTrainedModel, Batch], Tensor]:
    def run(model: PreTrainedModel, batch: Batch) -> Tensor:
        if not model.config.is_encoder_decoder and _masks_tokens(model, batch):
            # Tokens go on at the right, where a training batch is padded; without a mask transformers would guess one.
            batch = {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}
        tokens = model.generate(**batch, max_new_tokens=_NEW_TOKENS, do_sample=False, use_cache=cached)  # type: ignore[operator]
        return tokens.double()

    return run


def _masks_tokens(model: PreTrainedModel, batch: Batch) -> bool:
    return "input_ids" in batch and "attention_mask" in inspect.signature(model.forward).parameters


def _attempt(run: Callable[[], Any]) -> Any:
    """Return the result, or None where a model cannot do what is asked of it: that shows in many kinds of errors."""
    try:
        return run()
    except Exception:
        return None


@torch.no_grad()
def _randomized(model: PreTrainedModel, batch: Batch, space: PruningSpace, seed: int) -> PreTrainedModel:
    """Return a copy with random weights, in double precision where the model runs in it.

    Trained or freshly initialized weights would hide errors: biases are often 0 and norm weights 1, so that a slice at
    wrong indices changes nothing.
    """
    wide = _with_random_weights(model, space, seed).double()
    outputs = _attempt(lambda: attention_outputs(wide, cast_floats(batch, wide.dtype))) or {}
    # A filler that single precision rounds to its lowest number may be beyond it here, and make NaN.
    sound = [not tensor.isnan().any() for tensors in outputs.values() for tensor in tensors.values()]
    return wide if sound and all(sound) else _with_random_weights(model, space, seed)


def _with_random_weights(model: PreTrainedModel, space: PruningSpace, seed: int) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(seed)
    copied = copy_module(model)
    cut = {member.tensor for family in space.families for member in family.members}
    buffers = [buffer for name, buffer in copied.named_buffers() if name in cut and buffer.is_floating_point()]
    for tensor in (*copied.parameters(), *buffers):
        if tensor.dim() == 1 and tensor.numel() > 1:
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
        elif tensor.numel() > 1:
            # Large enough for attention that is far from even, where a wrong head would not show.
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / math.prod(tensor.shape[1:]) ** 0.5)
    return copied


def _removals(families: Iterable[Family], generator: torch.Generator) -> Iterator[Removal]:
    """Yield removals that together touch every family; each of them from many at once, another number from each.

    Equal counts everywhere would pass where the code uses one layer's size for another, as it may with a shared config.
    """
    remaining = [family for family in families if family.size > 1]
    while remaining:
        norm = "norm" in remaining[0].couplings
        chosen: dict[str, Family] = {}
        for family in remaining:
            # Families under a norm are compared by replay and the others by masking, so no removal mixes them.
            if ("norm" in family.couplings) == norm and not chosen.keys() & set(family.excludes):
                chosen[family.name] = family
        remaining = [family for family in remaining if family.name not in chosen]
        yield {name: _some(family.size, place, generator) for place, (name, family) in enumerate(chosen.items())}


def _some(size: int, place: int, generator: torch.Generator) -> Tensor:
    mask = torch.zeros(size, dtype=torch.bool)
    # From 1 to size - 1 groups, by turns: another number for each family, and never all of them.
    mask[torch.randperm(size, generator=generator)[: 1 + place % (size - 1)]] = True
    return mask
