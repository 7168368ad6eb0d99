"""What methods share: which groups go at a share, pairs of width and share within a budget, rounding and recovery."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from eval.compare.job import Job
from eval.compare.method import Compressed
from eval.compare.scores import Choice
from geta_hf.costs.ledger import Ledger
from geta_hf.errors import GETAError
from geta_hf.methods import OneShotConfig, OneShotMethod
from geta_hf.methods.one_shot.choice import Candidate
from geta_hf.methods.qasso.slices import build_slices, zero_slices
from geta_hf.qadg.group_labels import GroupLabels, family_of_group, family_starts
from geta_hf.qadg.group_types import Family
from geta_hf.training.distillation import kl

MOST_REMOVED = 0.7
"""No pair with a larger share is tried: what remains of a language model then says nothing about methods."""

# --- which groups ---------------------------------------------------------------------------------------------------


def block_of(family: Family) -> int | None:
    """Return the number of the block that a family stands in; None outside of numbered modules."""
    found = re.search(r"\.(\d+)\.", family.members[0].tensor)
    return None if found is None else int(found[1])


def spared_blocks(families: Sequence[Family], spared: tuple[int, int], of: int = 32) -> set[int]:
    """Return the numbers of the blocks at both ends that keep everything.

    Args:
        families: all of them.
        spared: how many at the start and at the end, in a model of `of` blocks; the same share of others, rounded down.
        of: blocks of the model that `spared` speaks of.
    """
    numbers = sorted({number for family in families if (number := block_of(family)) is not None})
    first, last = (count * len(numbers) // of for count in spared)
    return set(numbers[:first]) | set(numbers[len(numbers) - last :])


def remove_lowest(families: Sequence[Family], scores: Tensor, fraction: float, choice: Choice) -> Tensor:
    """Return the groups of the lowest scores, bool, shape (groups,); every family keeps one at least.

    Args:
        families: those that may lose groups.
        scores: shape (groups,).
        fraction: of the groups that the choice may take, 0 to 1; rounded down in each family where all lose alike.
        choice: of which kinds and blocks, and whether families lose alike.
    """
    removed = torch.zeros(len(scores), dtype=torch.bool)
    spared = spared_blocks(families, choice.spared)
    order: list[tuple[float, int]] = []
    for start, family in zip(family_starts(families), families, strict=True):
        if family.kind not in choice.kinds or block_of(family) in spared:
            continue
        own = torch.sort(scores[start : start + family.size], stable=True).indices[: family.size - 1] + start
        if choice.alike:
            removed[own[: math.floor(fraction * family.size + 1e-9)]] = True
        order += [(float(scores[place]), int(place)) for place in own]
    if not choice.alike:
        order.sort()
        removed[[place for _, place in order[: math.floor(fraction * len(order) + 1e-9)]]] = True
    return removed


def share_of(removed: Tensor, ledger: Ledger) -> float:
    """Return the share of the prunable parameters that a removal takes."""
    return 1 - ledger.prunable_parameters(removed) / max(ledger.prunable_parameters(ledger.nothing), 1)


def find_pairs(job: Job, scores: Tensor, choice: Choice, widths: Sequence[int] = (2, 3, 4, 5, 6, 8)) -> list[Candidate]:
    """Return for each width the smallest removal that meets the budget: the pairs that a method may choose from.

    Args:
        job: with the budget.
        scores: of all groups, shape (groups,).
        choice: how they are taken.
        widths: that all weights may have; the budget's own where it has one.

    Raises:
        GETAError: no pair meets the budget.
    """
    families = job.space.trainable
    ladder: dict[int, Tensor] = {}

    def at(step: int) -> Tensor:
        if step not in ladder:
            ladder[step] = remove_lowest(families, scores, step / 1000, choice)
        return ladder[step]

    found = []
    for bits in widths if job.budget.bits is None else (job.budget.bits,):

        def fits(step: int, bits: int = bits) -> bool:
            return job.ledger.stored_bytes(at(step), bits) <= job.budget.bytes

        step = _first(fits, 1000)
        if step is None or (share := share_of(at(step), job.ledger)) > MOST_REMOVED:
            continue
        found.append(Candidate(share, at(step), [bits] * len(job.ledger.layers)))
    # Of widths that all fit without pruning the largest is better than the others.
    unpruned = [one for one in found if not bool(one.removed.any())]
    found = [*unpruned[-1:], *(one for one in found if bool(one.removed.any()))]
    if not found:
        raise GETAError(f"{job.budget.name} can't be reached with at most {MOST_REMOVED:.0%} removed; raise the budget")
    return found


def _first(fits: Callable[[int], bool], last: int) -> int | None:
    """Return the first step from 0 to `last` that fits, given that all after it fit as well."""
    if not fits(last):
        return None
    low = 0
    high = last
    while low < high:
        middle = (low + high) // 2
        if fits(middle):
            high = middle
        else:
            low = middle + 1
    return low


# --- pruning and rounding -------------------------------------------------------------------------------------------


def round_with(
    job: Job,
    candidates: Sequence[Candidate] | None,
    model: Any = None,
    target: dict[str, Any] | None = None,
    **settings: Any,
) -> Compressed:
    """Remove groups and round with the pipeline of `geta_hf.compress`: least squares, then GPTQ, block after block.

    Args:
        job: with budget and data.
        candidates: pairs to try on held-back data; None for those of the pipeline itself.
        model: to start from; the dense one by default.
        target: fields of the config that take the place of the budget in bytes, where the pipeline chooses.
        **settings: other fields of the config, such as `compensation=False`.
    """
    target = {"target_bytes": job.budget.bytes} if target is None else target
    config = OneShotConfig(**target, grid=job.grid, **settings)
    method = OneShotMethod(config)
    model = job.load() if model is None else model
    outcome = method.compress(model, job.data, job.space, job.ledger, candidates=candidates)
    trial = outcome.trials[outcome.chosen]
    removed = torch.cat([*outcome.result.removed.values(), torch.zeros(0, dtype=torch.bool)])
    widths = [outcome.result.weight_bits[layer.weight.removesuffix(".weight")] for layer in job.ledger.layers]
    return Compressed(
        model=model,
        share=trial.share,
        mean_bits=trial.mean_bits,
        bytes=job.ledger.stored_bytes(removed, torch.tensor(widths)),
        removed=removed,
        result=outcome.result,
        config=config,
        trials=[(one.share, one.mean_bits, one.loss) for one in outcome.trials],
    )


def slices_of(job: Job, model: nn.Module, removed: Tensor) -> Callable[[], None]:
    """Return a function that sets all slices of removed groups of a model to zero."""
    named = dict(model.named_parameters(remove_duplicate=False))
    labels: list[GroupLabels] = [cut for cut in job.ledger.labels if cut.tensor in named]
    slices = build_slices(labels, removed, family_of_group(job.space.trainable), named)

    @torch.no_grad()
    def zero() -> None:
        zero_slices(slices, named)

    return zero


# --- training -------------------------------------------------------------------------------------------------------


def recover(job: Job, compressed: Compressed) -> None:
    """Train a compressed model on what the dense one predicts, in place: widths, grids and removed groups stay.

    Weights learn through rounding (straight through), by the divergence of the model's predictions from the dense
    model's. Every method gets the same batches, steps and rates.
    """
    model = compressed.model
    trained = [
        parameter
        for name, parameter in model.named_parameters()
        if "weight_quantizer" not in name and parameter.is_floating_point()
    ]
    zero = (lambda: None) if compressed.removed is None else slices_of(job, model, compressed.removed)
    train(job, model, trained, teacher=job.load(), after=zero)
    compressed.tokens += job.training_tokens()


def train(
    job: Job,
    model: nn.Module,
    trained: Sequence[nn.Parameter],
    *,
    teacher: nn.Module | None = None,
    after: Callable[[], None] = lambda: None,
    rate: float = 1.0,
) -> None:
    """Run the job's steps: AdamW without decay, a tenth of warm-up, then a cosine to zero, gradients clipped to 1.

    Args:
        job: with steps, batches and the learning rate.
        model: left in eval mode.
        trained: parameters that learn; all others do not.
        teacher: whose predictions are learned; the next token where there is none.
        after: called after every step.
        rate: factor of the learning rate, such as 10 for low-rank matrices.
    """
    chosen = {id(parameter) for parameter in trained}
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(id(parameter) in chosen)
    optimizer = torch.optim.AdamW(trained, lr=rate * job.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, job.steps))
    model.eval()  # without dropout, as the teacher
    for step in range(job.steps):
        batch = job.batch(step)
        if teacher is None:
            loss = model(**batch, use_cache=False).loss
        else:
            with torch.no_grad():
                expected = teacher(input_ids=batch["input_ids"], use_cache=False).logits
            loss = kl(model(input_ids=batch["input_ids"], use_cache=False).logits, expected, None, 1.0)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        after()
    for parameter, flag in flags:
        parameter.requires_grad_(flag)


def _rate(step: int, steps: int) -> float:
    warmup = max(steps // 10, 1)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


class LowRank(nn.Module):
    """A weight plus a product of two thin matrices (LoRA, arXiv 2106.09685) where a mask allows it.

    Args:
        mask: bool, shape (out, in): elements of removed groups are False, and stay as they are.
        rank: of the product.
        scale: alpha / r.
    """

    def __init__(self, mask: Tensor, rank: int = 8, scale: float = 2.0) -> None:
        super().__init__()
        out, inputs = mask.shape
        self.register_buffer("mask", mask)
        self.a = nn.Parameter(torch.randn(rank, inputs) / inputs**0.5)
        self.b = nn.Parameter(torch.zeros(out, rank))
        self.scale = scale

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight that the layer computes with."""
        return weight + self.mask * (self.scale * self.b @ self.a)


def train_low_rank(job: Job, model: nn.Module, removed: Tensor, after: Callable[[int], None] | None = None) -> None:
    """Recover a pruned float model by LoRA on every quantized layer, and merge; next-token loss, as LLM-Pruner does."""
    ones = {entry.weight: model.get_parameter(entry.weight) for entry in job.ledger.layers}
    masks = {name: torch.ones(tuple(weight.shape), dtype=torch.bool) for name, weight in ones.items()}
    labels = [cut for cut in job.ledger.labels if cut.tensor in masks]
    for cut in labels:
        gone = torch.cat([removed, torch.zeros(1, dtype=torch.bool)])[cut.label]
        masks[cut.tensor].movedim(cut.dim, 0)[gone] = False
    generator = torch.random.get_rng_state()
    torch.manual_seed(job.seed)
    added: list[LowRank] = []
    for name, mask in masks.items():
        added.append(LowRank(mask))
        parametrize.register_parametrization(model.get_submodule(name.removesuffix(".weight")), "weight", added[-1])
    torch.random.set_rng_state(generator)
    train(job, model, [item for part in added for item in (part.a, part.b)], rate=10.0)
    for name in masks:
        parametrize.remove_parametrizations(model.get_submodule(name.removesuffix(".weight")), "weight")
