"""Rounding after training as a `Method`: what the joint training of QASSO is to be compared with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from geta_hf.config import GETAConfig
from geta_hf.costs.targets import Target
from geta_hf.errors import GETAError
from geta_hf.methods.base import CompressionResult, Run
from geta_hf.methods.qasso.method import QASSOMethod
from geta_hf.methods.qasso.optimizer import bit_choices

_ROUNDED_AT = "post_training_rounded_at"
"""Entry of `param_groups[0]`, which checkpoints keep: the step after which weights were rounded."""


class PostTrainingMethod(QASSOMethod):
    """Prune as QASSO does, with weights at `initial_bits`, and round them once the last step is done.

    Args:
        config: a PostTrainingConfig.
    """

    _last_step = 0
    _target: Target

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
            rounding="nearest",
        )

    def wrap_optimizer(
        self, base: torch.optim.Optimizer, names: Mapping[Tensor, str], model: nn.Module, run: Run
    ) -> torch.optim.Optimizer:
        """Return a QASSO that rounds weights in the last step of the run, so that the last checkpoint is rounded."""
        # Inputs are rounded in training, so their widths are final when the joint stage ends. What BOPs allow cannot be
        # shared out then, while weights are wide: inputs get the mean that is planned, and weights what remains.
        optimizer = super().wrap_optimizer(base, names, model, replace(run, target=replace(run.target, budgets={})))
        self._target = run.target
        self._last_step = run.total_steps
        optimizer.register_step_post_hook(self._round_after_last_step)
        return optimizer

    @torch.no_grad()
    def _round_after_last_step(self, *_: object) -> None:
        """Choose the final widths and set (d, q_m) to them, in place; waits for the device."""
        if self.step_count == self._last_step:
            self.finish()

    @torch.no_grad()
    def finish(self) -> None:
        """Round weights now, if pruning is over; waits for the device."""
        if self.optimizer is None or not self.optimizer.finished or self.finished:
            return
        self.optimizer.target = self._target
        self.optimizer.fix_bits(bit_choices(self.config), choose_inputs=False, rounding=self.config.rounding)
        self.optimizer.param_groups[0][_ROUNDED_AT] = self.step_count

    @property
    def finished(self) -> bool:
        """True once weights are rounded: with the last step, or where training ended."""
        if self.optimizer is None or not super().finished:
            return False
        return self.optimizer.param_groups[0].get(_ROUNDED_AT) == self.step_count

    def result(self) -> CompressionResult:
        """Return removed groups by family and integer widths by module path.

        Raises:
            GETAError: the last step is not done.
        """
        if super().finished and not self.finished:
            raise GETAError(
                f"weights are rounded in the last step, {self._last_step}, and this is step {self.step_count}; "
                f"train to the end"
            )
        return super().result()
