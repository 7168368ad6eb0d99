"""What methods share: which groups go at a share, pairs of width and share within a budget, rounding and recovery."""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainingArguments, default_data_collator

from eval.compare.job import Job
from eval.compare.method import Compressed
from eval.compare.scores import CHOICES, Choice
from geta_hf import GETATrainer
from geta_hf.config import CompressionConfig
from geta_hf.costs.ledger import Ledger
from geta_hf.errors import GETAError
from geta_hf.methods import OneShotConfig, OneShotMethod
from geta_hf.methods.compensation import Compensation, leave_middles
from geta_hf.methods.one_shot.choice import Candidate
from geta_hf.methods.qasso.slices import build_slices, zero_slices
from geta_hf.qadg.group_labels import GroupLabels, family_of_group, family_starts, marked
from geta_hf.qadg.group_types import Family
from geta_hf.training.distillation import kl

MOST_REMOVED = 0.5
"""No pair with a larger share is tried: what remains of a language model then says nothing about methods."""

LOW_RANK_RATE = 10.0
"""Factor of the learning rate for LoRA's matrices, as is usual."""

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
    candidates = []
    for start, family in zip(family_starts(families), families, strict=True):
        if family.kind not in choice.kinds or block_of(family) in spared:
            continue
        own = torch.sort(scores[start : start + family.size], stable=True).indices[: family.size - 1] + start
        if choice.alike:
            removed[own[: math.floor(fraction * family.size + 1e-9)]] = True
        candidates.append(own)
    if not choice.alike and candidates:
        # In ascending order, of which the first of equals are taken.
        places = torch.cat(candidates).sort().values
        order = places[torch.sort(scores[places], stable=True).indices]
        removed[order[: math.floor(fraction * len(order) + 1e-9)]] = True
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
    found = []
    for bits in widths if job.budget.bits is None else (job.budget.bits,):

        def fits(removed: Tensor, bits: int = bits) -> bool:
            return job.ledger.stored_bytes(removed, bits) <= job.budget.bytes

        removed = least_removed(job.space.trainable, scores, choice, fits)
        if removed is None or (share := share_of(removed, job.ledger)) > MOST_REMOVED:
            continue
        found.append(Candidate(share, removed, [bits] * len(job.ledger.layers)))
    # Of widths that all fit without pruning the largest is better than the others.
    unpruned = [one for one in found if not bool(one.removed.any())]
    found = [*unpruned[-1:], *(one for one in found if bool(one.removed.any()))]
    if not found:
        raise GETAError(f"{job.budget.name} can't be reached with at most {MOST_REMOVED:.0%} removed; raise the budget")
    return found


def least_removed(
    families: Sequence[Family], scores: Tensor, choice: Choice, fits: Callable[[Tensor], bool], steps: int = 1000
) -> Tensor | None:
    """Return the smallest removal that fits, of those that a choice makes at 0 / steps to steps / steps of the groups.

    Args:
        families, scores, choice: as in `remove_lowest`.
        fits: whether a removal, bool, shape (groups,), is large enough; true for all that are larger than one that is.
        steps: how finely shares are tried.

    Returns:
        None where even the largest does not fit.
    """
    low = 0
    high = steps
    found = remove_lowest(families, scores, 1.0, choice)
    if not fits(found):
        return None
    while low < high:
        middle = (low + high) // 2
        removed = remove_lowest(families, scores, middle / steps, choice)
        if fits(removed):
            high, found = middle, removed
        else:
            low = middle + 1
    return found


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
        trials=[(one.share, one.mean_bits, one.loss, one.loss_in_full) for one in outcome.trials],
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


def prune_then_round(job: Job, name: str, compensation: bool = True) -> Compressed:
    """Try all pairs of one width and share within the budget by a score, and keep the best on held-back data.

    The best pair is remembered: methods that train start from it, since training every pair would cost too much.

    Args:
        job: with budget and data.
        name: of the score, in `CHOICES`.
        compensation: least squares and GPTQ; otherwise zeros, and rounding to nearest.
    """
    choice = CHOICES[name]
    scores = job.remember(name, lambda: choice.score(job.load(), job.space.trainable, job.data.scores))
    compressed = round_with(job, find_pairs(job, scores, choice), compensation=compensation)
    assert compressed.removed is not None and compressed.result is not None
    widths = [compressed.result.weight_bits[entry.weight.removesuffix(".weight")] for entry in job.ledger.layers]
    job.memory[_pair_name(job, name)] = Candidate(compressed.share, compressed.removed, widths)
    return compressed


def best_pair(job: Job, name: str) -> Candidate:
    """Return the pair that `prune_then_round` keeps, from memory where it has run at this budget."""
    if _pair_name(job, name) not in job.memory:
        prune_then_round(job, name)
    found: Candidate = job.memory[_pair_name(job, name)]
    return found


def _pair_name(job: Job, name: str) -> str:
    return f"{name} at {job.budget.name}"


def pruned_model(job: Job, removed: Tensor) -> PreTrainedModel:
    """Return the dense model in float without some groups, what reads them refitted by least squares."""
    model = job.load()
    families = job.space.trainable
    labels = [cut for cut in job.ledger.labels if cut.tensor in dict(model.named_parameters(remove_duplicate=False))]
    Compensation(model, job.data.covariances).refit(labels, families, removed, job.ledger.nothing)
    slices_of(job, model, removed)()
    return model


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
    teacher = job.load()
    leave_middles(model, teacher)
    zero()
    train(job, model, trained, teacher=teacher, after=zero)
    compressed.tokens += job.training_tokens()


def train(
    job: Job,
    model: nn.Module,
    trained: Sequence[nn.Parameter],
    *,
    teacher: nn.Module | None = None,
    watch: Callable[[int], None] = lambda step: None,
    after: Callable[[], None] = lambda: None,
    rate: float = 1.0,
) -> None:
    """Run the job's steps: AdamW without decay, a tenth of warm-up, then a cosine to zero, gradients clipped to 1.

    Args:
        job: with steps, batches and the learning rate.
        model: left in eval mode.
        trained: parameters that learn; all others do not.
        teacher: whose predictions are learned; the next token where there is none.
        watch: called before every step with its number, while gradients are there.
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
        with job.precision():
            loss = _loss(model, batch, teacher)
        loss.backward()
        watch(step)
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        after()
    for parameter, flag in flags:
        parameter.requires_grad_(flag)


def _loss(model: nn.Module, batch: Mapping[str, Any], teacher: nn.Module | None) -> Tensor:
    """Return the loss of the next token, or the divergence from a teacher's predictions."""
    if teacher is None:
        loss: Tensor = model(**batch, use_cache=False).loss
        return loss
    with torch.no_grad():
        expected = teacher(input_ids=batch["input_ids"], use_cache=False).logits
    return kl(model(input_ids=batch["input_ids"], use_cache=False).logits, expected, None, 1.0)


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
        # Drawn on CPU, so that every device starts from the same.
        self.a = nn.Parameter(torch.randn(rank, inputs).to(mask.device) / inputs**0.5)
        self.b = nn.Parameter(torch.zeros(out, rank, device=mask.device))
        self.scale = scale

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight that the layer computes with."""
        return weight + self.mask * (self.scale * self.b @ self.a)


@contextmanager
def low_rank(job: Job, model: nn.Module, removed: Tensor) -> Iterator[dict[str, LowRank]]:
    """Put LoRA on every quantized layer, yield it by the name of the weight, and merge it in the end.

    Args:
        job: with the seed, from which the matrices start.
        model: pruned, in float.
        removed: bool, shape (groups,): what stays zero.
    """
    masks = remaining_elements(job, removed)
    state = torch.random.get_rng_state()
    torch.manual_seed(job.seed)
    added = {name: LowRank(mask.to(model.get_parameter(name).device)) for name, mask in masks.items()}
    torch.random.set_rng_state(state)
    for name, part in added.items():
        parametrize.register_parametrization(model.get_submodule(name.removesuffix(".weight")), "weight", part)
    try:
        yield added
    finally:
        for name in added:
            parametrize.remove_parametrizations(model.get_submodule(name.removesuffix(".weight")), "weight")


def remaining_elements(job: Job, removed: Tensor) -> dict[str, Tensor]:
    """Return which elements of each quantized weight no removed group takes, bool, by the name of the weight."""
    names = [entry.weight for entry in job.ledger.layers]
    masks = {name: torch.ones(job.ledger.shapes[name], dtype=torch.bool) for name in names}
    for cut in job.ledger.labels:
        if cut.tensor in masks:
            masks[cut.tensor].movedim(cut.dim, 0)[marked(cut.label, removed)] = False
    return masks


def train_low_rank(job: Job, model: nn.Module, removed: Tensor) -> None:
    """Recover a pruned float model by LoRA on every quantized layer, and merge; next-token loss, as LLM-Pruner does."""
    with low_rank(job, model, removed) as added:
        train(job, model, [item for part in added.values() for item in (part.a, part.b)], rate=LOW_RANK_RATE)


class Blocks(Dataset[dict[str, Tensor]]):
    """Hold the batches of a job one after the other, for a `Trainer` that reads them in order.

    Args:
        job: with the steps.
    """

    def __init__(self, job: Job) -> None:
        self.rows = torch.cat([job.batch(step)["input_ids"] for step in range(job.steps)])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[place], "labels": self.rows[place]}


@dataclass(frozen=True)
class ByTrainer:
    """A method that trains with `GETATrainer`, and is all said by a config.

    Attributes:
        config: from a job to the config, with the budget in it.
    """

    name: str
    config: Callable[[Job], CompressionConfig]
    needs: str = "training"
    packages: tuple[str, ...] = ()
    recovers: bool = True

    def run(self, job: Job) -> Compressed:
        """Compress."""
        return train_by_trainer(job, self.config(job))


def train_by_trainer(job: Job, config: CompressionConfig) -> Compressed:
    """Train and compress with `GETATrainer` under a config, on the same batches as all others.

    Args:
        job: with the steps.
        config: with the budget in it.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=job.steps,
            per_device_train_batch_size=job.rows,
            learning_rate=job.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            weight_decay=0.0,
            adam_beta2=0.95,
            train_sampling_strategy="sequential",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.accelerator.is_available(),
            bf16=job.bf16,
            seed=job.seed,
        )
        trainer = GETATrainer(
            model=job.load(),
            args=arguments,
            train_dataset=Blocks(job),
            data_collator=default_data_collator,
            geta_config=config,
        )
        trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
    result = trainer.method.result()
    removed = torch.cat([result.removed[family.name].cpu() for family in job.space.trainable])
    widths = torch.tensor([result.weight_bits[entry.weight.removesuffix(".weight")] for entry in job.ledger.layers])
    weights = job.ledger.weights(removed)
    return Compressed(
        model=model,
        share=share_of(removed, job.ledger),
        mean_bits=float((weights * widths).sum() / weights.sum()),
        bytes=job.ledger.stored_bytes(removed, widths),
        removed=removed,
        result=result,
        config=config,
        tokens=job.training_tokens(),
        trained=True,
    )
