"""Rounding after training as a `Method`: what the joint training of QASSO is to be compared with."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from geta_hf.config import GETAConfig
from geta_hf.errors import GETAError
from geta_hf.methods.base import CompressionResult
from geta_hf.methods.qasso.method import QASSOMethod
from geta_hf.methods.qasso.optimizer import bit_choices


class PostTrainingMethod(QASSOMethod):
    """Prune as QASSO does, with weights at `initial_bits`, and round them once the last step is done.

    Args:
        config: a PostTrainingConfig.
    """

    _rounded = False

    @property
    def _training_config(self) -> GETAConfig:
        # One width only, so that quantizers cost next to nothing and nothing is allocated when the joint stage ends.
        # The plan has solved the targets already; here they would contradict that width.
        bits = self.config.initial_bits
        return replace(
            self.config,
            bits=(bits, bits),
            bit_choices=None,
            bit_reduction=None,
            mean_bits=None,
            target_bops=None,
            target_bytes=None,
        )

    def before_backward(self, model: nn.Module) -> None:
        """Prepare for one more step, after which weights are to be rounded again."""
        self._rounded = False
        super().before_backward(model)

    @property
    def finished(self) -> bool:
        """True once the joint stage is over and weights are rounded."""
        return self._rounded and super().finished

    @torch.no_grad()
    def finish(self, model: nn.Module) -> None:
        """Choose the final widths and set (d, q_m) to them, in place; waits for the device.

        A run that was stopped before the end of its joint stage stays as it is.
        """
        optimizer = self.optimizer
        if optimizer is None or not optimizer.finished:
            return
        optimizer.fix_bits(bit_choices(self.config))
        self._rounded = True

    def result(self) -> CompressionResult:
        """Return removed groups by family and integer widths by module path.

        Raises:
            GETAError: the joint stage is not over, or `finish` was not called after the last step.
        """
        if self.optimizer is not None and self.optimizer.finished and not self._rounded:
            raise GETAError("weights are rounded after the last step; train to the end")
        return super().result()
