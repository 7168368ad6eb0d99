"""The config of a run that prunes in training and rounds after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from geta_hf.config import GETAConfig
from geta_hf.errors import GETAError


@dataclass
class PostTrainingConfig(GETAConfig):
    """The settings of QASSO, with weights kept at `initial_bits` until training ends.

    Groups are scored and forgotten as under a `GETAConfig`. The widths in `bits`, and the clipping values for them, are
    chosen after the last step, by `bit_rule` and under the same targets. Activations, where `activation_bits` is given,
    are rounded in training as ever.

    >>> config = PostTrainingConfig(target_parameters=0.5, bits=(3, 8), mean_bits=4)
    >>> config.method
    'post-training'
    """

    method: ClassVar[str] = "post-training"

    def check_targets(self) -> None:
        """Raise GETAError for contradicting targets, or for widths that training decides."""
        super().check_targets()
        if self.split not in (None, "even"):
            raise GETAError(f"split = {self.split!r} decides widths in training, but they follow it here; use 'even'")

    @property
    def split_rule(self) -> Literal["even", "early", "late"]:
        """`even`: training decides no widths."""
        return "even"
