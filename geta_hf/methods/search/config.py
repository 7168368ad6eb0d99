"""The config of a differentiable search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from geta_hf.config import (
    FOUR_LEVELS_HELP,
    LENGTHS,
    Check,
    CompressionConfig,
    Duration,
    Integers,
    Pair,
    above,
    at_least,
    between,
    document_attributes,
    inside,
    is_duration,
    setting,
)
from geta_hf.costs.hardware import MPIC_MACS
from geta_hf.errors import GETAError
from geta_hf.methods.search.choices import Granularity
from geta_hf.methods.search.sampling import Sampling

Cost = Literal["none", "size", "bitops", "mpic_cycles", "mpic_energy", "ne16_cycles", "latency"]
"""The hardware costs of `costs.hardware` that may be added to the loss."""

_DURATION = "steps, a share of training, or text such as '1.5 epochs'; not negative, and a share below 1"
_MOST_BITS = 8
_RATE, _HIGHEST_RATE = 0.05, 0.5
_PATH = 3.0


@document_attributes
@dataclass
class SearchConfig(CompressionConfig):
    """The settings of a differentiable search of widths in which 0 bits means removed (arXiv 2407.01054).

    Each group has the choice between removal and remaining, each quantized weight that of its width. Both are trained
    by gradients together with the weights, and then moved as little as the targets require.

    >>> from geta_hf import SearchConfig
    >>> config = SearchConfig(target_bops=0.1, bit_choices=[0, 2, 4, 8])
    >>> config.method, config.widths
    ('search', [2, 4, 8])

    Raises:
        GETAError: a value of the wrong type or out of range, or settings that contradict each other.
    """

    method: ClassVar[str] = "search"
    introductions: ClassVar[Mapping[str, str]] = {
        "Stages": "Training starts with warm-up, followed by the search; fine-tuning takes the remaining steps. "
        f"{LENGTHS}",
        "Search": "The choices, the loss that trains them, and the cost that the loss charges.",
    }

    wants_removal = False  # no annotation, so that it is no field
    """Whether 0 is among `bit_choices`; of an instance, and not saved."""

    bits: Pair = (2, 8)
    per_channel: bool = True
    warmup: Duration = setting(
        0.1,
        "Length of the warm-up stage, at 16 bits; 0 leaves it out.",
        Check(is_duration),
        section="Stages",
        expected=_DURATION,
    )
    search: Duration = setting(
        0.3,
        "Length of the search. Fine-tuning, with the choices fixed, takes the remaining steps.",
        Check(is_duration),
        section="Stages",
        expected=_DURATION,
    )
    granularity: Granularity = setting(
        "layer",
        "What has a width of its own: each `layer`; each `group`, with all of its rows and columns (in a layer whose "
        "columns alone belong to groups, a step size belongs to a column); or each output `row`.",
        section="Search",
    )
    activation_choices: Integers | None = setting(
        None,
        "The only widths allowed of layers' inputs, such as [2, 4, 8], with the ends of `activation_bits`. None allows "
        "every integer between them.",
        section="Widths",
    )
    unsigned_inputs: bool = setting(
        True,
        "Inputs that are nowhere negative in calibration, such as those after a ReLU, have no negative codes but twice "
        "as many others, as in PACT; what is negative later becomes 0.",
        section="Quantizers",
    )
    sampling: Sampling = setting(
        "softmax",
        "How shares are computed from logits: `softmax`; `hard`, its argmax with the gradient of the softmax; `gumbel` "
        "and `gumbel_hard`, both with noise; `annealed`, a softmax that is clipped to exactly 0 and 1; "
        "`hard_concrete`, clipped gates with noise from each width to the next, best at a constant τ of 0.67.",
        section="Search",
    )
    temperature: float = setting(1.0, "τ in the first step of the search.", inside(1e-30, 1e30), section="Search")
    final_temperature: float = setting(
        0.05,
        "τ in its last step; between them it falls by the same factor in every step.",
        inside(1e-30, 1e30),
        section="Search",
    )
    initial_keep: float = setting(
        0.9, "The probability with which each group remains at the start.", inside(0, 1), section="Search"
    )
    choice_learning_rate: float | None = setting(
        None,
        "Learning rate of Adam on the choices, which follows the run's learning rate scheduler. A logit moves by at "
        "most this much a step. None is 0.05, and more for a search of fewer than 60 steps: 3 divided by its steps, up "
        "to 0.5.",
        above(0),
        section="Search",
    )
    architecture_data: float = setting(
        0.0,
        "Share of the training rows that choices alone are trained on, in every other step of the search, in place of "
        "that step's batch; weights are trained on the other rows in the other steps. With 0 both are trained on "
        "all rows in all steps.",
        between(0, 1),
        section="Search",
    )
    strength: float = setting(
        5.0,
        "λ of the hinge to the targets: what is added to the loss where a target is exceeded by 100 %. It rises over "
        "the first half of the search.",
        above(0),
        section="Search",
    )
    cost: Cost = setting(
        "none",
        "A hardware cost that is added to the loss: `size`, `bitops`, cycles or energy on MPIC, cycles on NE16, or a "
        "measured `latency`.",
        section="Search",
    )
    cost_weight: float = setting(
        1.0,
        "λ of `cost`: what is added to the loss for the cost of the full model at the widest width. It rises as "
        "`strength` does.",
        at_least(0),
        section="Search",
    )
    target_cost: float | None = setting(
        None,
        "The most of `cost` that remains, relative to the full model at the widest width: a hinge in the search, and "
        "met exactly when it ends. Alone, or with a target for size.",
        inside(0, 1),
        section="Targets",
    )
    latency_table: str | None = setting(
        None,
        "Path of the table for `cost='latency'`, as `geta-hf measure` writes it.",
        section="Search",
    )
    four_levels: bool = setting(True, FOUR_LEVELS_HELP, section="Quantizers")
    quantizer_learning_rate: float = setting(
        1e-3,
        "Relative step size of clipping values in fine-tuning, which follows the run's learning rate scheduler; 0 "
        "keeps them.",
        at_least(0),
        section="Quantizers",
    )

    def check_widths(self) -> None:
        """Raise GETAError for widths above 8 bits, or without any but 0, which stands for removal."""
        if self.bit_choices is not None:
            nonzero = [width for width in self.bit_choices if width != 0]
            self.wants_removal = len(nonzero) < len(self.bit_choices)
            self._check(bool(nonzero), "bit_choices", "widths of which at least one is not 0")
            # Removal is a choice of groups: of those alone that may be pruned, and as far as the targets ask for it.
            self.bit_choices = nonzero
        self._check(self.bits[1] <= _MOST_BITS, "bits", f"a pair (b_l, b_u) of integers in 2..{_MOST_BITS}, b_l <= b_u")
        super().check_widths()
        if self.activation_choices is not None:
            self._check(self.activation_bits is not None, "activation_choices", "None where activation_bits is None")
            lower, upper = self.activation_bits or (0, 0)
            self.activation_choices = sorted(set(self.activation_choices))
            own = self.activation_choices
            fits = bool(own) and lower == own[0] and own[-1] == upper
            self._check(fits, "activation_choices", f"widths from {lower} to {upper}, the ends of `activation_bits`")
        if self.granularity != "layer" and self.grid != "channel":
            raise GETAError(
                f"granularity = {self.granularity!r} gives rows widths, but with grid = {str(self.grid)!r} they have "
                f"no step sizes of their own; leave grid out, or set it to 'channel'"
            )
        if (self.cost == "latency") != (self.latency_table is not None):
            raise GETAError(
                f"cost = {self.cost!r} and latency_table = {self.latency_table!r}: a table is given with "
                f"cost='latency', and with it alone"
            )
        if self.cost.startswith("mpic"):
            unknown = [width for width in (*self.widths, *self.input_widths) if width not in MPIC_MACS]
            if unknown:
                raise GETAError(
                    f"cost = {self.cost!r} knows widths of {sorted(MPIC_MACS)} bits alone, not {unknown[0]}; set them "
                    f"by bit_choices and activation_bits"
                )
        if self.final_temperature > self.temperature:
            raise GETAError(
                f"final_temperature = {self.final_temperature} is above temperature = {self.temperature}; τ falls in "
                f"a search, so give one that is no higher"
            )

    def check_targets(self) -> None:
        """Raise GETAError for targets that contradict each other."""
        super().check_targets()
        if self.target_cost is None:
            return
        if self.cost == "none":
            raise GETAError(f"target_cost = {self.target_cost} limits `cost`, which is none; choose one")
        others = [
            name for name in ("target_sparsity", "target_parameters", "mean_bits") if getattr(self, name) is not None
        ]
        if others:
            raise GETAError(
                f"target_cost = {self.target_cost} decides how much is pruned and how wide weights are, and so does "
                f"{others[0]}; give one of them"
            )

    @property
    def input_widths(self) -> list[int]:
        """The integer widths that a layer's input may end with, ascending; none where inputs are not quantized."""
        return super().input_widths if self.activation_choices is None else list(self.activation_choices)

    @property
    def has_target(self) -> bool:
        """Whether a target for pruning, size or the hardware cost is given."""
        return super().has_target or self.target_cost is not None

    @property
    def wanted_mean_bits(self) -> float | None:
        """As in every config; None where the hardware cost decides."""
        return None if self.target_cost is not None else super().wanted_mean_bits

    def choice_rate(self, steps: int) -> float:
        """Return the learning rate of the choices in a search of so many steps.

        >>> SearchConfig().choice_rate(1000), SearchConfig().choice_rate(20)
        (0.05, 0.15)
        """
        if self.choice_learning_rate is not None:
            return self.choice_learning_rate
        # A logit can then move by 3 in all: a group that remains with 90 % starts at 2.2.
        return max(_RATE, min(_PATH / max(steps, 1), _HIGHEST_RATE))

    @property
    def splits_in_training(self) -> bool:
        """Whether a size alone is given, of which the search decides the split between pruning and widths."""
        return self.size_alone
