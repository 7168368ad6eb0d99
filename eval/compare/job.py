"""Say as plain data what one cell of a comparison is given: a model, a budget, and the same data for every method."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from geta_hf.costs.ledger import Ledger
from geta_hf.errors import GETAError
from geta_hf.methods.one_shot import Calibration
from geta_hf.qadg.space import PruningSpace


@dataclass(frozen=True)
class Budget:
    """What a result may weigh.

    Attributes:
        name: as it was asked for and as tables show it, such as `B=3.2` or `30%@8`.
        bytes: of the folder's safetensors file, at most.
        bits: the only width that methods of one width may choose; None leaves them the choice of width and share.
    """

    name: str
    bytes: int
    bits: int | None = None


def read_budget(text: str, ledger: Ledger) -> Budget:
    """Return the budget that a text asks for.

    Args:
        text: `B=3.2`, 3.2 bits stored for each weight of the original layers, step sizes counted; or `30%@8`, the size
            of a file with 30 % of the prunable parameters removed and 8 bits (2 to 8) for each of the rest.
        ledger: sizes of the model, with its quantizers.

    Raises:
        GETAError: neither of these.
    """
    try:
        if text.startswith("B="):
            return Budget(text, bytes_for(ledger, float(text[2:])))
        share, _, bits = text.partition("%@")
        if not (0 <= float(share) < 100 and 2 <= int(bits) <= 8):
            raise ValueError(text)
        return Budget(text, bytes_after(ledger, float(share) / 100, int(bits)), int(bits))
    except ValueError as error:
        raise GETAError(
            f"budget {text!r} must be like B=3.2 (bits for each weight) or 30%@8 (removed@2 to 8)"
        ) from error


def bytes_for(ledger: Ledger, bits: float) -> int:
    """Return the size of a file that stores `bits` for each weight of the original layers, step sizes counted."""
    weights = float(ledger.weights(ledger.nothing).sum())
    rest = ledger.stored_bytes(ledger.nothing, 0.0) - ledger.scale_bytes()
    return math.floor(rest + bits * weights / 8)


def bytes_after(ledger: Ledger, share: float, bits: int) -> int:
    """Return the size of a file after a share of the prunable parameters is removed, with one width for the rest."""
    full = ledger.stored_bytes(ledger.nothing, bits)
    least = ledger.stored_bytes(~ledger.nothing, bits)
    return math.floor(full - share * (full - least))


@dataclass(frozen=True)
class Job:
    """All that a method is given.

    Attributes:
        load: returns the dense model, afresh, in float32 and eval mode.
        space: its pruning space.
        ledger: its sizes, with quantizers of `grid`.
        budget: at most so much.
        data: calibration batches, the same for every method; held-back ones to choose by.
        training: int64, shape (blocks, length): text for methods that train, and for recovery.
        steps: of recovery, or of a method's own training; 0 allows none.
        rows: blocks of a training step.
        learning_rate: its peak.
        grid: what has a step size of its own.
        tokenizer: of the model, for packages that ask for one.
        bf16: whether steps of training compute in bfloat16 (autocast); weights and optimizer stay in float32.
        seed: of everything random.
        memory: what methods keep from one budget to the next, such as scores, which do not depend on it.
    """

    load: Callable[[], PreTrainedModel]
    space: PruningSpace
    ledger: Ledger
    budget: Budget
    data: Calibration
    training: Tensor
    steps: int = 0
    rows: int = 4
    learning_rate: float = 1e-4
    grid: str = "channel"
    tokenizer: Any = None
    bf16: bool = False
    seed: int = 0
    memory: dict[str, Any] = field(default_factory=dict)

    def remember(self, name: str, make: Callable[[], Any]) -> Any:
        """Return what was kept under a name; made by the first call."""
        if name not in self.memory:
            self.memory[name] = make()
        return self.memory[name]

    def precision(self) -> torch.autocast:
        """Return the context for the forward passes of training."""
        return torch.autocast(self.training.device.type, torch.bfloat16, enabled=self.bf16)

    def batch(self, step: int) -> dict[str, Tensor]:
        """Return the batch of a training step, the same for every method."""
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(self.training), generator=generator)
        places = torch.arange(step * self.rows, (step + 1) * self.rows) % len(order)
        rows = self.training[order[places]]
        return {"input_ids": rows, "labels": rows}

    def calibration_tokens(self) -> int:
        """Return the tokens of the calibration data, the held-back ones too."""
        parts = (*self.data.covariances, *self.data.held_back)
        return sum(batch["input_ids"].numel() for batch in parts)

    def training_tokens(self) -> int:
        """Return the tokens that `steps` read."""
        return self.steps * self.rows * self.training.shape[1]


def batches_of(blocks: Tensor, rows: int = 4) -> list[dict[str, Tensor]]:
    """Return blocks of tokens as batches with labels."""
    return [{"input_ids": part, "labels": part} for part in blocks.split(rows)]


@torch.no_grad()
def loss_of_each(model: PreTrainedModel, blocks: Tensor, rows: int = 4) -> Tensor:
    """Return the mean loss in nats a token of every block, float64, shape (blocks,)."""
    found = []
    for part in blocks.split(rows):
        logits = model(input_ids=part, use_cache=False).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), part[:, 1:], reduction="none")
        found.append(losses.double().mean(1).cpu())
    return torch.cat(found)


Line = Mapping[str, Any]
Trials = Sequence[tuple[float | None, ...]]
"""Pairs that were tried: share of the prunable parameters removed, mean bits, and loss on the held-back data; of our
method also the loss with all that is done, where that was measured."""
