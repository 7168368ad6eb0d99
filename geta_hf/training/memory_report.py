"""Hold a memory estimate, by part and moment, and print it as a table."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from geta_hf.utils.tables import format_table

PARTS = {
    "weights": "weights and buffers",
    "quantizers": "quantizers (d, q_m, t)",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "pruning": "slices being removed",
    "teacher": "teacher",
    "activations": "activations, temporaries",
}


@dataclass(frozen=True)
class Moment:
    """Bytes alive at one moment of training, by what they are for; gradients are those that exist just then."""

    weights: int = 0
    quantizers: int = 0
    gradients: int = 0
    optimizer: int = 0
    pruning: int = 0
    teacher: int = 0
    activations: int = 0

    @property
    def total(self) -> int:
        """The sum of all parts in bytes."""
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True)
class MemoryPlan:
    """The moments that may hold the most memory, of one process on its device.

    Attributes:
        preparation: while GETATrainer is made, with the copies of the trial cut; empty for a plain run.
        backward: the highest level of forward and backward, in the joint stage, once the optimizer has its state.
        step: the highest level of the optimizer's step, QASSO's own part included.
        notes: what could not be counted.

    Example:
        >>> import torch
        >>> from transformers import BertConfig, TrainingArguments
        >>> from geta_hf import dry_run
        >>> sizes = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 32, "num_hidden_layers": 1}
        >>> config = BertConfig(vocab_size=30, architectures=["BertForSequenceClassification"], **sizes)
        >>> batch = {"input_ids": torch.ones(2, 8, dtype=torch.long), "labels": torch.zeros(2, dtype=torch.long)}
        >>> memory = dry_run(config, batch, TrainingArguments("run", use_cpu=True)).memory
        >>> memory.peak >= memory.backward.total
        True
    """

    preparation: Moment
    backward: Moment
    step: Moment
    notes: tuple[str, ...] = ()

    @property
    def peak(self) -> int:
        """The most bytes that the run needs at any moment, without the allocator's own overhead."""
        return max(moment.total for moment in (self.preparation, self.backward, self.step))

    def __str__(self) -> str:
        moments = (self.preparation, self.backward, self.step)
        unit, scale = ("GB", 1e9) if self.peak >= 1e9 else ("MB", 1e6)
        sizes = [(text, [getattr(moment, part) / scale for moment in moments]) for part, text in PARTS.items()]
        sizes.append(("in all", [moment.total / scale for moment in moments]))
        # A part that is zero at all moments, such as a teacher that there is not, gets no row.
        rows = [(text, *(f"{value:,.2f}" for value in values)) for text, values in sizes if any(values)]
        table = format_table((f"memory, {unit}", "before", "forward and backward", "optimizer's step"), rows)
        return "\n".join((table, f"peak: {self.peak / scale:,.2f} {unit}", *self.notes))
