"""Plan a run before training: how much is removed, at which bit widths, and what that amounts to."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from geta_hf.config import CompressionConfig
from geta_hf.costs.ledger import LayerEntry, Ledger, RoundedRows
from geta_hf.costs.model_costs import forward_uses
from geta_hf.costs.selection import Limits
from geta_hf.costs.targets import BYTES, GROUPS, SplitBounds, Target, even_removal, solve_target, split_bounds
from geta_hf.errors import GETAError
from geta_hf.qadg import PruningSpace
from geta_hf.qadg.group_labels import family_starts
from geta_hf.qadg.missing_heads import missing_heads
from geta_hf.quantization import quantized_layers
from geta_hf.quantization.quantizer import BY_INPUT, UNSIGNED, Quantizer
from geta_hf.reporting.graph_page import gather
from geta_hf.serialization.bitpack import BYTE_BITS
from geta_hf.serialization.embeddings import input_embedding, weight_names
from geta_hf.serialization.sizes import stored_names
from geta_hf.utils.tables import format_table

_NAMED = 4
"""Number of modules without a quantizer that a plan names."""


@dataclass(frozen=True)
class PlanRow:
    """Families of the same kind and size.

    Attributes:
        kind: such as `heads`.
        families: how many there are.
        groups: groups of each.
        removed: groups that each would lose if all lost the same share.
    """

    kind: str
    families: int
    groups: int
    removed: int


@dataclass(frozen=True)
class Plan:
    """Hold what a run will end with.

    Attributes:
        rows: the prunable families. Training chooses which of them lose more and which less.
        target: the targets as amounts.
        removed_groups: K where the target counts groups, otherwise as if all families lost the same share.
        exact: whether training removes just that many: K without `uniform`, `multiple_of` or `serve`, under which up to
            one chunk fewer may go.
        groups: prunable groups.
        kept_parameters: share of the prunable parameters that would remain.
        mean_bits: planned mean width of the weights; None where it is learned without a budget.
        input_bits: planned mean width of the layers' inputs; None where they are not quantized.
        relative_bops: of the quantized layers, against 32 · 32 bits.
        bytes: of the exported model.safetensors.
        unquantized: modules in the model's lists of layers with a matrix that no quantizer covers, numbers as `*`,
            the largest first.
        unquantized_share: their share of all matrix weights in those lists.
        left_float: layers on which a quantizer would have no effect; numbers as `*`.
        untouched: parameters that the recorded forward did not read: nothing of them is pruned, and no proof covers
            them.
        not_vanilla: why the result cannot be written in the format `vanilla`; empty if it can, None if not known.
        without_heads: a sentence for each kind of module that counts heads of which none is found, with the reason.
        serving: what the program that `serve` names asks of the result, in sentences.
        embedding: bytes of the vocabulary's embedding in the export, and its bytes under `embedding_bits=8`; None where
            that would not save a tenth of the export.
        bounds: between what training decides, where it splits a size between pruning and widths; the other figures are
            then those of an even split. None where they are planned.

    Example:
        >>> import torch
        >>> from transformers import BertConfig, TrainingArguments
        >>> from geta_hf import GETAConfig, dry_run
        >>> sizes = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 32, "num_hidden_layers": 1}
        >>> config = BertConfig(vocab_size=30, architectures=["BertForSequenceClassification"], **sizes)
        >>> batch = {"input_ids": torch.ones(2, 8, dtype=torch.long), "labels": torch.zeros(2, dtype=torch.long)}
        >>> plan = dry_run(config, batch, TrainingArguments("run", use_cpu=True), GETAConfig(target_sparsity=0.5)).plan
        >>> plan.removed_groups, plan.groups, plan.mean_bits
        (18, 36, 6.0)
    """

    rows: tuple[PlanRow, ...]
    target: Target
    removed_groups: int
    exact: bool
    groups: int
    kept_parameters: float
    mean_bits: float | None
    relative_bops: float
    bytes: int
    input_bits: float | None = None
    unquantized: tuple[str, ...] = ()
    unquantized_share: float = 0.0
    left_float: tuple[str, ...] = ()
    untouched: tuple[str, ...] = ()
    not_vanilla: str | None = None
    without_heads: tuple[str, ...] = ()
    bounds: SplitBounds | None = None
    embedding: tuple[int, int] | None = None
    serving: tuple[str, ...] = ()

    @property
    def most_removed_groups(self) -> int:
        """The most groups that training may remove, about."""
        return self.removed_groups if self.bounds is None else max(self.removed_groups, self.bounds.most)

    def __str__(self) -> str:
        header = ("families", "number", "groups of each", "to remove if even", "kept")
        table = [(r.kind, f"{r.families}", f"{r.groups}", f"{r.removed}", f"{r.groups - r.removed}") for r in self.rows]
        bits = "learned" if self.mean_bits is None else f"{self.mean_bits:.2f}"
        inputs = "" if self.input_bits is None else f", of inputs {self.input_bits:.2f}"
        about = "" if self.exact else "about "
        lines = [
            format_table(header, table),
            f"groups to remove: {about}{self.removed_groups:,} of {self.groups:,}; prunable parameters kept: "
            f"{self.kept_parameters:.1%}",
            f"mean bits: {bits}{inputs}; relative BOPs: {self.relative_bops:.2%}; "
            f"exported model: {self.bytes / 1e6:,.2f} MB",
        ]
        if self.embedding is not None:
            now, then = self.embedding
            lines.append(
                f"of that, {now / 1e6:,.2f} MB are the vocabulary's embedding; embedding_bits=8 stores it in "
                f"{then / 1e6:,.2f} MB"
            )
        if self.bounds is not None:
            ends = self.bounds
            lines.append(
                f"decided in training, by expected loss: from about {ends.fewest:,} groups removed at "
                f"{ends.narrowest:.2f} mean bits to about {ends.most:,} at {ends.widest:.2f}; the above is an even "
                f"split"
            )
        if self.unquantized:
            more = len(self.unquantized) - _NAMED
            names = ", ".join(self.unquantized[:_NAMED]) + (f" and {more} more" if more > 0 else "")
            lines.append(f"not quantized: {self.unquantized_share:.1%} of the layers' matrix weights ({names})")
        if self.left_float:
            lines.append(
                f"left in floating point, as a quantizer would have no effect on them: {', '.join(self.left_float)}"
            )
        if self.untouched:
            lines.append(
                f"not read by the batch's forward, so not pruned and not proved: {', '.join(gather(self.untouched))}"
            )
        if self.not_vanilla is not None:
            vanilla = f"not vanilla: {self.not_vanilla}" if self.not_vanilla else "also vanilla, without geta_hf"
            lines.append(f"formats of the result: geta; {vanilla}")
        return "\n".join((*lines, *self.without_heads, *self.serving))


def make_plan(
    config: CompressionConfig,
    space: PruningSpace,
    ledger: Ledger,
    model: nn.Module | None = None,
    left_float: tuple[str, ...] = (),
) -> Plan:
    """Solve the targets of a config for a model.

    Args:
        config, space, ledger: of the model.
        model: with its quantizers attached, to say which weights have none; without it nothing is said of that.
        left_float: as in `Plan`.

    Raises:
        GETAError: a target that can't be reached; says what can.
    """
    families = space.trainable
    target = solve_target(config, families, ledger)
    limits = Limits.of(config)
    removal = even_removal(target, families, ledger, limits)
    if target.unit == GROUPS and any(limits.restricted(family) for family in families):
        # Few counts are allowed, so K itself may be far from any of them.
        target = replace(target, amount=ledger.groups - int(removal.sum()))
    removed = ledger.groups - int(target.amount) if target.unit == GROUPS else int(removal.sum())
    before = ledger.prunable_parameters(ledger.nothing)
    stored = int(target.spent(BYTES, ledger, removal, target.bits))
    unquantized, share = ((), 0.0) if model is None else _unquantized(model)
    return Plan(
        rows=_rows(space, removal),
        target=target,
        removed_groups=removed,
        exact=target.unit == GROUPS and not config.uniform and config.multiple_of == 1 and config.serve is None,
        groups=ledger.groups,
        kept_parameters=ledger.prunable_parameters(removal) / max(before, 1),
        mean_bits=target.bits if target.budgets else None,
        relative_bops=ledger.relative_bops(removal, target.bits, target.input_bits),
        bytes=stored,
        input_bits=None if config.activation_bits is None else target.input_bits,
        unquantized=unquantized,
        unquantized_share=share,
        left_float=left_float,
        untouched=space.untouched,
        without_heads=() if model is None else missing_heads(model, space),
        embedding=None if model is None else _embedding_bytes(config, model, stored),
        bounds=split_bounds(target, config, families, ledger) if config.splits_in_training else None,
    )


def _embedding_bytes(config: CompressionConfig, model: nn.Module, stored: int) -> tuple[int, int] | None:
    """Return the bytes of the embedding as it is and at 8 bits, if that would save a tenth of `stored` bytes."""
    if config.embedding_bits is not None or config.serve is not None:
        return None
    try:
        _, layer = input_embedding(model, BYTE_BITS)
    except GETAError:
        return None
    # One that shares its weight with a quantized layer is stored at that layer's width.
    if any(other.weight is layer.weight for other in quantized_layers(model).values()):
        return None
    rows, columns = layer.weight.shape
    now, then = rows * columns * layer.weight.element_size(), rows * (columns + 4)
    return (now, then) if now - then >= stored / 10 else None


def _unquantized(model: nn.Module) -> tuple[tuple[str, ...], float]:
    """Find modules in lists of layers whose matrices no quantizer covers, and their share of all matrices there."""
    base: nn.Module = getattr(model, "base_model", model)
    # Embeddings and heads outside these lists usually stay float on purpose. Inside, experts that are stored as one
    # stacked parameter are easily overlooked.
    inside = {id(part) for blocks in base.modules() if isinstance(blocks, nn.ModuleList) for part in blocks.modules()}
    matrices = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]  # no norms, no biases
    covered = {id(layer.weight) for layer in quantized_layers(model).values()}
    bare = Counter[str]()
    total = 0
    for path, module in model.named_modules():
        if id(module) not in inside or isinstance(module, nn.Embedding):
            continue
        for name, tensor in module.named_parameters(path, recurse=False):
            if tensor.ndim >= 2 and name in matrices:
                total += tensor.numel()
                bare[re.sub(r"\b\d+\b", "*", path)] += 0 if id(tensor) in covered else tensor.numel()
    return tuple(path for path, count in bare.most_common() if count), sum(bare.values()) / max(total, 1)


def _rows(space: PruningSpace, removal: Tensor) -> tuple[PlanRow, ...]:
    counts: dict[tuple[str, int, int], int] = {}
    for start, family in zip(family_starts(space.trainable), space.trainable, strict=True):
        key = (family.kind, family.size, int(removal[start : start + family.size].sum()))
        counts[key] = counts.get(key, 0) + 1
    return tuple(PlanRow(kind, number, size, removed) for (kind, size, removed), number in counts.items())


def make_ledger(
    model: nn.Module,
    space: PruningSpace,
    uses: Mapping[str, float] | None = None,
    embedding: RoundedRows | None = None,
    dropped: float = 0.0,
) -> Ledger:
    """Measure everything that an export would store of a model that is about to be trained.

    Args:
        model: with its quantizers attached, complete in this process.
        space: its pruning space.
        uses: of `layer_uses`; by default every weight is used equally often.
        embedding: how the export rounds the input embedding; None where it does not.
        dropped: of `geta_hf.surgery.drop_layers`, the work of layers that were removed before.

    Raises:
        GETAError: an embedding that is to be rounded, of a model that has none.
    """
    quantizers = (n for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, Quantizer))
    own = {f"{name}.{leaf}" for name in quantizers for leaf in ("d", "q_m", "t", "order", "levels", BY_INPUT, UNSIGNED)}
    shapes, item_bytes, seen = {}, {}, set()
    # keep_vars gives the tensors themselves: detached ones would be new objects, and tied weights would count twice.
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in own and id(tensor) not in seen:
            seen.add(id(tensor))
            shapes[name], item_bytes[name] = tuple(tensor.shape), tensor.element_size()
    layers = []
    for name, layer in quantized_layers(model).items():
        if f"{name}.weight" in shapes:
            quantizer = layer.weight_quantizer
            blocks = quantizer.grid == "block32"
            layers.append(LayerEntry(f"{name}.weight", (uses or {}).get(name, 1.0), quantizer.channel_dim, blocks))
    # Groups are counted over parameters and buffers alike, since an export cuts both.
    rounded = _embedding_weight(model, embedding, shapes)
    # What a constructor makes and no file holds, such as a vector of multipliers, is cut but costs nothing.
    families = [
        replace(family, members=tuple(member for member in family.members if member.tensor in shapes))
        for family in space.prunable
    ]
    ledger = Ledger.of(families, shapes, layers, item_bytes, space.buffers, rounded)
    return replace(ledger, dropped=dropped, stored_as=_stored_names(model, ledger))


def _stored_names(model: nn.Module, ledger: Ledger) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """Map names of tensors and their step sizes to the names that a file uses, where these differ."""
    if not isinstance(model, PreTrainedModel):
        return {}
    # A file's header holds the names, so their lengths count where the target is in bytes.
    packed = [layer.weight for layer in ledger.layers]
    scales = [f"{name}_scale" for name in (*packed, *ledger.rounded)]
    inputs = [f"{name.removesuffix('weight')}input_scale" for name in packed]
    return stored_names(model, {**ledger.shapes, **dict.fromkeys((*scales, *inputs), (1,))})


def _embedding_weight(model: nn.Module, rows: RoundedRows | None, shapes: Collection[str]) -> dict[str, RoundedRows]:
    """Map the name under which the input embedding's weight is stored, perhaps that of a tied tensor, to `rows`."""
    if rows is None:
        return {}
    _, layer = input_embedding(model, rows.bits)
    return {name: rows for name in weight_names(model, layer) if name in shapes}


def embedding_rows(config: CompressionConfig) -> RoundedRows | None:
    """Return how a config has the input embedding rounded; None where it does not."""
    if config.embedding_bits is None:
        return None
    return RoundedRows(config.embedding_bits, config.embedding_grid == "block32")


def layer_uses(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, float]:
    """Count how often each quantized weight is used in one forward pass, relative to the most used one.

    Layers that the batch does not reach, such as experts, count as 1.
    """
    uses = forward_uses(model, quantized_layers(model), batch)
    most = max(uses.values(), default=0) or 1
    return {name: (count or most) / most for name, count in uses.items()}
