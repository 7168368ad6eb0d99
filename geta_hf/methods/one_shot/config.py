"""The config of compression without training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from geta_hf.config import (
    FOUR_LEVELS_HELP,
    SECTIONS,
    Check,
    CompressionConfig,
    Pair,
    above,
    document_attributes,
    setting,
)
from geta_hf.errors import GETAError


@document_attributes
@dataclass
class OneShotConfig(CompressionConfig):
    """The settings of compression without training, as `geta_hf.compress` does it.

    Without a target for pruning or size no group is removed.

    Weights have a step size for each output channel by default (`grid`): below 8 bits one for a layer costs far more
    than it saves, where no training makes up for it.

    >>> from geta_hf import OneShotConfig
    >>> config = OneShotConfig(target_bytes=1_000_000)
    >>> config.method, config.bits, config.grid
    ('one-shot', (2, 8), 'channel')

    Raises:
        GETAError: a value of the wrong type or out of range, settings that contradict each other, or rounded inputs.
    """

    method: ClassVar[str] = "one-shot"
    default_sparsity: ClassVar[float] = 0.0
    introductions: ClassVar[Mapping[str, str]] = {
        "Rules": "The defaults are the rules that measured best.",
        "Widths": f"{SECTIONS['Widths']} `activation_bits` has to stay None: inputs are not rounded without training.",
    }

    bits: Pair = (2, 8)
    per_channel: bool = True
    saliency: Literal["mask_fisher", "magnitude", "activation"] = setting(
        "mask_fisher",
        "What removing and rounding are expected to cost: `mask_fisher` is the mean of <g, change>² by gradients, over "
        "the slices alone that read a group's output; `magnitude` is the squared change, without gradients; "
        "`activation` is the share of a layer's output that is lost, by the mean squares of its inputs, for models "
        "whose gradients do not fit: one block at a time is in memory on top of the weights.",
        section="Rules",
    )
    compensation: bool = setting(
        True,
        "Let the remaining weights make up for removed inputs and for rounding; otherwise weights are set to zero and "
        "rounded to nearest.",
        section="Rules",
    )
    four_levels: bool = setting(True, FOUR_LEVELS_HELP, section="Quantizers")
    damping: float = setting(
        0.01,
        "Share of the mean square of a layer's inputs that is added to the diagonal of their covariance.",
        above(0),
        section="Rules",
    )
    by_activation: bool = setting(
        True,
        "Round the inputs of a layer with the largest mean square first; otherwise in their order.",
        section="Rules",
    )
    by_block: bool = setting(
        True,
        "Calibrate each block on the outputs of the compressed ones before it; otherwise all on the dense model.",
        section="Rules",
    )
    follow_dense: float = setting(
        0.5,
        "Change each layer, before it is rounded, so that on the inputs it gets from the compressed layers before it "
        "its outputs come nearer to the dense model's: 0 not at all, 1 all the way, which fits the calibration data "
        "too closely. Only with `by_block`; not with `saliency='activation'`, since it takes more memory.",
        Check(lambda value: 0 <= value <= 1, "from 0 to 1"),
        section="Rules",
    )

    @property
    def frugal(self) -> bool:
        """Whether one block at a time is all that may be in memory on top of the weights."""
        return self.saliency == "activation"

    def check_targets(self) -> None:
        """Raise GETAError for what compression without training does not do, too."""
        super().check_targets()
        sizes = [name for name in ("target_bytes", "target_bops") if getattr(self, name) is not None]
        if sizes and self.mean_bits is not None:
            raise GETAError(f"{sizes[0]} and mean_bits both bound the widths; give only one of them")
        self._check(
            self.activation_bits is None, "activation_bits", "None, since inputs are not rounded without training"
        )
        self._check(
            self.by_block or not self.frugal, "by_block", "True with saliency='activation', which keeps one block"
        )
        self._check(not self.drop_layers, "drop_layers", "0, since no layers are dropped without training")
