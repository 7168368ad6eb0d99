"""The seam between training and methods: what a `Method` offers, what it is given, and what it ends with.

A trainer, LoRA, distillation, checkpoints, the plan, the memory estimate, surgery and export know these names only.
The type of the config chooses the method. Its class declares a name, by which saved files are read back:

    @dataclass
    class MyConfig(CompressionConfig):
        method: ClassVar[str] = "mine"

    METHODS[MyConfig] = MyMethod
    method = make_method(MyConfig(target_sparsity=0.3))
"""

# ruff: noqa: B027 - hooks that do nothing by default, which a method may leave out

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from geta_hf.config import CompressionConfig, read_config
from geta_hf.costs.ledger import Ledger
from geta_hf.costs.targets import Target
from geta_hf.errors import GETAError
from geta_hf.methods.frozen_weights import FrozenWeights
from geta_hf.qadg import PruningSpace

AVERAGES = "keeps an average of the weights, in which removed groups are not zero; use AdamW or SGD"
"""Why no method can remove groups under a schedule-free optimizer."""

Batches = Callable[[int], Sequence[Mapping[str, Any]]]
"""Return the first N batches of the training data, without labels, on the model's device."""


@dataclass(frozen=True)
class CompressionResult:
    """What a method decided, as plain data: all that surgery and export read of it.

    Attributes:
        removed: family name -> bool, shape (groups,), on CPU: True where a group is to be cut away. Every parameter
            slice of such a group is exactly zero in the model. Families that lose nothing may be left out.
        weight_bits: module path of every quantized layer -> integer width of its weight in bits, the widest of several.
        input_bits: module path -> integer width of the layer's input, for the layers that round it.
        channel_bits: module path -> int64, the width of each entry of the weight's quantizer, on CPU; where they
            differ.
    """

    removed: Mapping[str, Tensor]
    weight_bits: Mapping[str, int]
    input_bits: Mapping[str, int] = field(default_factory=dict)
    channel_bits: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def removed_groups(self) -> int:
        """The number of removed groups over all families."""
        return sum(int(mask.sum()) for mask in self.removed.values())


@dataclass(frozen=True)
class Run:
    """What a training run tells its method before the first step.

    Attributes:
        space: the pruning space of the model.
        ledger: sizes of everything that groups and widths change.
        target: what the run is to end with, solved before training.
        total_steps: optimizer steps of the run.
        steps_per_epoch: optimizer steps of one epoch; NaN where the data has no length.
        frozen: weights that are cut or quantized but not trained, as under LoRA.
    """

    space: PruningSpace
    ledger: Ledger
    target: Target
    total_steps: int
    steps_per_epoch: float
    frozen: FrozenWeights = field(default_factory=FrozenWeights)


@dataclass(frozen=True)
class StepMemory:
    """Bytes that a method takes in a training step on top of weights, gradients and the base optimizer's state.

    Attributes:
        kept: bytes that live from step to step.
        temporary: the most bytes that are alive at once within a step.
    """

    kept: int = 0
    temporary: int = 0


class Method(ABC):
    """One way to compress a model while it is trained.

    The calls come in this order: `check`, `prepare`, `attach`, `wrap_optimizer`; then for each step `before_backward`,
    `extra_loss` and the optimizer's own `step`, in which all that a method does per step happens, the first and the
    last one included; then `result`. Whatever a resumed run needs must be in the optimizer's `state_dict` or in the
    model's parameters.

    Args:
        config: the limits, and the method's own rules.
    """

    stages: ClassVar[tuple[str, ...]] = ("training",)
    """The stages by name, in order; `metrics` logs the number of the present one, from 1."""

    by_input: Collection[str] = ()
    """Layers whose weights have a step size for each input, where a checkpoint says so and no space is at hand."""

    unsigned: Collection[str] = ()
    """Layers whose inputs have no negative codes, where a checkpoint says so and no data is at hand."""

    def __init__(self, config: CompressionConfig) -> None:
        self.config = config

    # --- before training ----------------------------------------------------------------------------------------------

    def check(self, frozen_weights: bool) -> None:
        """Raise GETAError for rules that cannot work in this run.

        Args:
            frozen_weights: whether the weights are frozen and adapters trained, as under LoRA. A method has to say
                that it can score and remove groups of such weights; by default it cannot.
        """
        if frozen_weights:
            raise GETAError(f"{type(self).__name__} needs trained weights; leave peft_config out")

    def check_stages(self, total_steps: int, steps_per_epoch: float) -> None:
        """Raise GETAError where the stages do not fit into a run of this length. By default every length fits.

        Args:
            total_steps: optimizer steps of the run.
            steps_per_epoch: NaN where it is not known yet; stages in epochs are then not checked.
        """

    def prepare(self, space: PruningSpace) -> None:
        """Take the pruning space of the model that `attach` gets next. By default it is not needed.

        Args:
            space: found before quantizers are attached.
        """

    @abstractmethod
    def attach(self, model: nn.Module, batches: Batches | None) -> None:
        """Put quantizers, and whatever else is trained, on the model, in place.

        Args:
            model: dense; its parameters keep their names.
            batches: where ranges of inputs are measured; None where only shapes count, as on a model without data.
        """

    def memory(self, model: nn.Module, space: PruningSpace, removed_groups: int) -> StepMemory:
        """Estimate what the method takes in a step, for `plan_memory`. By default nothing.

        Args:
            model: with its quantizers, on any device or on meta.
            space: its pruning space.
            removed_groups: how many groups the plan removes.
        """
        return StepMemory()

    # --- in training --------------------------------------------------------------------------------------------------

    @abstractmethod
    def wrap_optimizer(
        self, base: torch.optim.Optimizer, names: Mapping[Tensor, str], model: nn.Module, run: Run
    ) -> torch.optim.Optimizer:
        """Return the optimizer of the run; all per-step logic sits in its `step`.

        Args:
            base: over all trained parameters, quantizers' included.
            names: the model's name of every parameter.
            model: as it is after `attach`.
            run: what is known of the run.
        """

    def before_backward(self, model: nn.Module) -> None:
        """Prepare for one forward and backward pass. By default nothing."""

    def extra_loss(self, model: nn.Module) -> Tensor | None:
        """Return a term to add to the loss, 0-d, or None."""
        return None

    @property
    def held_out_share(self) -> float:
        """The share of the training rows that weights are not trained on; by default 0."""
        return 0.0

    @property
    def on_held_out_rows(self) -> bool:
        """Whether the next step reads the rows that are held out; by default none does."""
        return False

    def check_finite(self) -> None:
        """Raise GETAError where something became NaN or infinite; may wait for the device. By default nothing."""

    @property
    @abstractmethod
    def step_count(self) -> int:
        """The number of optimizer steps done so far."""

    @property
    @abstractmethod
    def finished(self) -> bool:
        """True once all that is to be removed is exactly zero and widths are final: the model can be exported."""

    @property
    def removed_groups(self) -> int:
        """The number of groups that are permanently zero by now; by default those of `result`, and none before.

        Checkpoints ask for it on one process, so it must not wait for the others.
        """
        return self.result().removed_groups if self.finished else 0

    @property
    def stage(self) -> str:
        """The name of the present stage, one of `stages`."""
        return self.stages[0]

    def metrics(self) -> dict[str, float]:
        """Return what is logged next to the loss. By default the number of the stage."""
        return {"stage": self.stages.index(self.stage) + 1}

    # --- after training -----------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Complete what the last step was to do, where training ended before it; by default nothing.

        Called once training has ended, on every process. An fp16 scaler skips steps, so the optimizer may have done
        fewer than planned.
        """

    def restore(self, model: nn.Module) -> None:
        """Set removed groups to zero and widths to their final values again, where something changed them afterwards.

        Args:
            model: the plain one, not a wrapper.

        Raises:
            GETAError: by default, since only a method knows what it decided.
        """
        raise GETAError(f"{type(self).__name__} can't restore its result; export before the weights are changed")

    @abstractmethod
    def result(self) -> CompressionResult:
        """Return what was decided; every process calls it. Raise GETAError before `finished`."""


METHODS: dict[type[CompressionConfig], type[Method]] = {}
"""The method that each type of config chooses."""


def _check_readable_again(config: CompressionConfig) -> None:
    """Raise GETAError for a config that checkpoints and exports could write, but nobody could read."""
    saved = config.to_dict()
    try:
        same = read_config(saved).to_dict() == saved
    except GETAError:
        same = False
    if not same:
        raise GETAError(
            f"{type(config).__name__} could not be read back from a checkpoint or an export; declare a name of its own "
            f'in the class: `method: ClassVar[str] = "a name"`'
        )


def make_method(config: CompressionConfig) -> Method:
    """Make the method that a config chooses by its type, or by the nearest type that it inherits from.

    Raises:
        GETAError: no method is entered in `METHODS` for this type, or what it saves could not be read back.
    """
    _check_readable_again(config)
    # A user's subclass of GETAConfig, which only changes defaults, still means QASSO.
    for kind in type(config).__mro__:
        if kind in METHODS:
            return METHODS[kind](config)
    known = ", ".join(kind.__name__ for kind in METHODS)
    raise GETAError(f"no method is known for a {type(config).__name__}; there are methods for {known}")
