"""QASSO (paper Alg. 2): a wrapper around any torch optimizer, and one itself.

All per-step logic sits in `step`, where gradients are clipped, accumulated and unscaled, once per update. The base
optimizer owns `param_groups` and `state`; what QASSO adds is one counter in `param_groups[0]` and, per family, two
tensors that travel in the state of the family's first parameter, so a checkpoint holds plain tensors and numbers only.
Parameters are found by the names in `param_groups[i]["param_names"]` at every step: Accelerate may replace the tensors.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from geta_hf.config import GETAConfig
from geta_hf.errors import GETAError
from geta_hf.qadg.groups import Family, PruningSpace
from geta_hf.qasso.projection import project_step_size, relative_step
from geta_hf.qasso.saliency import group_sums, hesso_scores, taylor_scores
from geta_hf.qasso.schedule import COOLDOWN, JOINT, PROJECTION, WARMUP, Phase, Schedule
from geta_hf.qasso.selection import select_redundant, target_groups
from geta_hf.qasso.slices import Slice, build_slices, decide, forget, mean_clip, measure, remember, zero_slices
from geta_hf.quantization.functional import bit_width, step_size

IMPORTANT, REDUNDANT, REMOVED = 0, 1, 2
_STEP = "qasso_step"
_SCHEDULE = "qasso_schedule"
_PREFIX = "qasso."

Named = dict[str, Tensor]


class QASSO(torch.optim.Optimizer):
    """Warm-up, projection, joint and cool-down around a base optimizer.

    Args:
        base: any torch optimizer over all trainable parameters of the model, quantizers' included.
        names: the model's name of every parameter in `base`, keyed by the parameter.
        space: the pruning space; every member of a prunable family must be in `base`.
        quantizers: prefix of the quantizer of each quantized weight: {"…query.weight": "…query.weight_quantizer"}.
        schedule: the stages in steps.
        config: rules and limits.

    Raises:
        GETAError: K can't be reached, a member of a prunable family or a quantizer is not in `base`.
    """

    def __init__(
        self,
        base: torch.optim.Optimizer,
        names: Mapping[Tensor, str],
        space: PruningSpace,
        quantizers: Mapping[str, str],
        schedule: Schedule,
        config: GETAConfig,
    ) -> None:
        super().__init__(base.param_groups, {})
        self.base, self.schedule, self.config = base, schedule, config
        self.families: tuple[Family, ...] = space.trainable
        self.quantizers = dict(quantizers)
        self._follow_base()
        for group in self.param_groups:
            group["param_names"] = [names[parameter] for parameter in group["params"]]
        self.param_groups[0].setdefault(_STEP, 0)
        self.param_groups[0][_SCHEDULE] = list(dataclasses.astuple(schedule))
        self._check_covered()
        self.target = target_groups(config.target_sparsity, [family.size for family in self.families])
        self.status = [torch.zeros(family.size, dtype=torch.uint8) for family in self.families]
        self.mean_square = [torch.zeros(family.size) for family in self.families]
        self.gamma: list[Tensor] = []
        self._forget_index()

    def _follow_base(self) -> None:
        # load_state_dict of the base replaces both containers; they are always shared, never copied.
        self.param_groups, self.state = self.base.param_groups, self.base.state

    def _forget_index(self) -> None:
        """Drop everything derived from `status` and devices; it is rebuilt at the next step."""
        self._slices: list[Slice] | None = None
        self._removed: list[Slice] | None = None
        self._indices: dict[tuple[str, int], Tensor] = {}

    def _check_covered(self) -> None:
        known = {name for group in self.param_groups for name in group["param_names"]}
        for family in self.families:
            for member in family.members:
                if member.tensor not in known:
                    raise GETAError(
                        f"{family.name} cuts {member.tensor}, which is not trained; "
                        f"set its requires_grad or mark the family unprunable"
                    )
        for weight, prefix in self.quantizers.items():
            if f"{prefix}.d" not in known or f"{prefix}.q_m" not in known:
                raise GETAError(f"the quantizer of {weight} is not in the base optimizer; add {prefix}.d and .q_m")

    # --- one step -------------------------------------------------------------------------------------------------

    @property
    def step_count(self) -> int:
        """Updates done so far."""
        return self.param_groups[0][_STEP]

    @property
    def phase(self) -> Phase:
        """The phase of the next step."""
        return self.schedule.at(self.step_count)

    @property
    def bit_bounds(self) -> tuple[float, float]:
        """(b_l, b_u) in force at the next step."""
        lower, phase = self.config.bits[0], self.phase
        if phase.stage == WARMUP:
            return lower, self.config.initial_bits
        if phase.stage == PROJECTION:
            return lower, self.config.initial_bits - (phase.period + 1) * self.config.reduction
        return lower, self.config.final_upper_bits

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of all parameters. `closure` re-evaluates the loss, as in torch."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        phase, named = self.phase, self._named()
        if phase.stage != COOLDOWN and (phase.starts or self.schedule.at(self.step_count + 1).stage == COOLDOWN):
            self._check_finite(named)
        self._measure_saliency(phase, named)
        if phase.stage == JOINT and phase.starts:
            self._partition(phase, named)
        removed, slices = self._removed_slices(named), self._redundant_slices(named)
        for piece in removed:
            zero_slices([named[piece.tensor].grad], piece.dim, piece.index)
        remember(slices, named)
        before = self._prepare_quantizers(phase, named)
        self.base.step()
        for name, old in before.items():
            named[name].copy_(relative_step(old, named[name]))
        if phase.stage != COOLDOWN:
            self._project(named)
        self._forget(phase, named, slices)
        self._hold_zero(phase, named, removed, slices)
        self.param_groups[0][_STEP] += 1
        if phase.stage != COOLDOWN and self.phase.stage == COOLDOWN:
            self._snap_bits(named)
        return loss

    def _named(self) -> Named:
        return {
            name: parameter
            for group in self.param_groups
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
        }

    # --- saliency and partition -----------------------------------------------------------------------------------

    def _index(self, family: Family, named: Named) -> list[Tensor]:
        for member in family.members:
            key = (member.tensor, member.dim)
            if key not in self._indices:
                self._indices[key] = member.index.to(named[member.tensor].device)
        return [self._indices[member.tensor, member.dim] for member in family.members]

    def _sums(self, family: Family, named: Named, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Σ over each group of product(x, g); a parameter without a gradient counts as g = 0."""
        tensors = [named[member.tensor] for member in family.members]
        values = [product(x, x.grad if x.grad is not None else torch.zeros_like(x)) for x in tensors]
        return group_sums(values, [member.dim for member in family.members], self._index(family, named))

    def _measure_saliency(self, phase: Phase, named: Named) -> None:
        """Update the moving average of ⟨g, x⟩², from the projection stage to the last partition."""
        last_period = phase.stage == JOINT and phase.period == self.schedule.pruning_periods - 1
        done = phase.stage == COOLDOWN or (last_period and not phase.starts)
        if self.config.saliency != "taylor" or phase.stage == WARMUP or done:
            return
        decay = self.config.saliency_decay
        for position, family in enumerate(self.families):
            inner = self._sums(family, named, torch.mul)
            old = self.mean_square[position].to(inner.device)
            self.mean_square[position] = decay * old + (1 - decay) * inner**2

    def _scores(self, named: Named) -> list[Tensor]:
        costs = [self._sums(family, named, lambda x, g: torch.ones_like(x)) for family in self.families]
        if self.config.saliency == "taylor":
            return [taylor_scores(mean, cost) for mean, cost in zip(self.mean_square, costs, strict=True)]
        inner, grad_square, square = (
            torch.cat([self._sums(family, named, product) for family in self.families])
            for product in (torch.mul, lambda x, g: g * g, lambda x, g: x * x)
        )
        scores = hesso_scores(inner, grad_square, square, torch.cat(costs))
        return list(scores.split([family.size for family in self.families]))

    def _partition(self, phase: Phase, named: Named) -> None:
        """Choose redundant groups so that K·(p+1)/P are gone at the period's end; a host sync once a period."""
        if not self.families:
            return
        gone = list(self.removed.values())
        due = (self.target * (phase.period + 1)) // self.schedule.pruning_periods
        scores = self._scores(named)
        for family, score in zip(self.families, scores, strict=True):
            if not bool(torch.isfinite(score).all()):
                raise GETAError(
                    f"the saliency of {family.name} is not finite at step {self.step_count}: its weights or gradients "
                    f"are NaN or infinite; go back to the last checkpoint with a lower learning rate"
                )
        chosen = select_redundant(scores, gone, due - sum(int(mask.sum()) for mask in gone))
        for status, mask in zip(self.status, chosen, strict=True):
            status[mask] = REDUNDANT
        self._slices = self._removed = None

    def _check_finite(self, named: Named) -> None:
        for weight, prefix in self.quantizers.items():
            for part in ("d", "q_m", "t"):
                value = float(named.get(f"{prefix}.{part}", 1.0))
                if not math.isfinite(value):
                    raise GETAError(
                        f"{part} of the quantizer of {weight} is {value} at step {self.step_count}; "
                        f"go back to the last checkpoint with a lower learning rate"
                    )

    def _slices_of(self, kind: int, named: Named) -> list[Slice]:
        return build_slices(self.families, [status == kind for status in self.status], named)

    def _redundant_slices(self, named: Named) -> list[Slice]:
        if self._slices is None:
            self._slices = self._slices_of(REDUNDANT, named)
        return self._slices

    def _removed_slices(self, named: Named) -> list[Slice]:
        if self._removed is None:
            self._removed = self._slices_of(REMOVED, named)
        return self._removed

    # --- quantizers -----------------------------------------------------------------------------------------------

    def _prepare_quantizers(self, phase: Phase, named: Named) -> dict[str, Tensor]:
        """Make gradients those of log p and return p as it is; in cool-down take them away, which freezes p."""
        before = {}
        for prefix in set(self.quantizers.values()):
            for name in (f"{prefix}.d", f"{prefix}.q_m", f"{prefix}.t"):
                parameter = named.get(name)
                if parameter is None or parameter.grad is None:
                    continue
                if phase.stage == COOLDOWN:
                    parameter.grad = None
                else:
                    parameter.grad.mul_(parameter)
                    before[name] = parameter.detach().clone()
        return before

    def _project(self, named: Named) -> None:
        """Put every d inside its own layer's bounds (Eq. 4c)."""
        lower, upper = self.bit_bounds
        for prefix in self.quantizers.values():
            d, q_m, t = self._quantizer(prefix, named)
            d.copy_(project_step_size(d, q_m, t, lower, upper))

    def _quantizer(self, prefix: str, named: Named) -> tuple[Tensor, Tensor, Tensor]:
        d, q_m = named[f"{prefix}.d"], named[f"{prefix}.q_m"]
        return d, q_m, named.get(f"{prefix}.t", torch.ones_like(d))

    def _snap_bits(self, named: Named) -> None:
        """Whole bits inside [b_l, b_u], d recomputed; from here on (d, q_m, t) stand still."""
        lower, upper = self.config.bits[0], math.floor(self.config.final_upper_bits + 1e-6)
        for prefix in self.quantizers.values():
            d, q_m, t = self._quantizer(prefix, named)
            bits = bit_width(d, q_m, t).round().clamp(lower, upper)
            d.copy_(step_size(bits, q_m, t))

    # --- forgetting -----------------------------------------------------------------------------------------------

    def _forget(self, phase: Phase, named: Named, slices: Sequence[Slice]) -> None:
        """Eqs. 13-14 on every family with redundant groups, by the rules of the config."""
        self.gamma = []
        if phase.stage != JOINT:
            return
        for family in sorted({piece.family for piece in slices}):
            pieces = [piece for piece in slices if piece.family == family]
            parts = [measure(piece, named, self.quantizers) for piece in pieces]
            magnitude = mean_clip(parts)
            rate, sizes = decide(parts, magnitude, named, phase.length - phase.step, self.bit_bounds, self.config)
            forget(parts, magnitude <= self.config.epsilon, named, rate, sizes)
            for prefix, size in sizes.items():
                named[f"{prefix}.d"].copy_(size)
            self.gamma.append(rate)

    def _hold_zero(self, phase: Phase, named: Named, removed: Sequence[Slice], slices: Sequence[Slice]) -> None:
        """Keep removed groups at zero; at a period's end the redundant ones join them, optimizer state included."""
        for piece in removed:
            zero_slices([named[piece.tensor]], piece.dim, piece.index)
        if phase.stage != JOINT or not phase.ends:
            return
        for piece in slices:
            parameter = named[piece.tensor]
            zero_slices([parameter, *self._like(parameter)], piece.dim, piece.index)
        for status in self.status:
            status[status == REDUNDANT] = REMOVED
        self._slices = self._removed = None

    def _like(self, parameter: Tensor) -> list[Tensor]:
        """The base optimizer's state tensors that have the parameter's shape: moments and momentum."""
        values = self.state.get(parameter, {}).values()
        return [value for value in values if isinstance(value, Tensor) and value.shape == parameter.shape]

    # --- what is logged -------------------------------------------------------------------------------------------

    @property
    def removed(self) -> dict[str, Tensor]:
        """Per family, bool (groups,): which groups are exactly zero for good."""
        return {family.name: status == REMOVED for family, status in zip(self.families, self.status, strict=True)}

    @property
    def removed_groups(self) -> int:
        """How many groups are exactly zero for good."""
        return sum(int(mask.sum()) for mask in self.removed.values())

    def mean_gamma(self) -> float:
        """Mean forgetting rate of the latest step over families with redundant groups; 0 where there is none."""
        return float(torch.stack(self.gamma).mean()) if self.gamma else 0.0

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def _anchors(self) -> list[int]:
        """Position of each family's first parameter in the packed state, where the family's tensors travel."""
        names = [name for group in self.param_groups for name in group["param_names"]]
        return [names.index(family.members[0].tensor) for family in self.families]

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state with two tensors a family added."""
        packed = self.base.state_dict()
        state = {position: dict(values) for position, values in packed["state"].items()}
        for anchor, family, status, mean in zip(
            self._anchors(), self.families, self.status, self.mean_square, strict=True
        ):
            values = state.setdefault(anchor, {})
            values[f"{_PREFIX}status.{family.name}"] = status.clone()
            values[f"{_PREFIX}mean_square.{family.name}"] = mean.clone()
        return {**packed, "state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore exactly. Raises GETAError when the checkpoint is not of this space."""
        ours, theirs = self.param_groups[0][_SCHEDULE], state_dict["param_groups"][0].get(_SCHEDULE)
        if theirs != ours:
            raise GETAError(
                f"the optimizer state has stages {theirs}, this run {ours} (warm-up, projection, joint, total steps, "
                f"periods); resume with the same length of training and the same stages"
            )
        state = {position: dict(values) for position, values in state_dict["state"].items()}
        for position, (anchor, family) in enumerate(zip(self._anchors(), self.families, strict=True)):
            values = state.get(anchor, {})
            for kind, store in (("status", self.status), ("mean_square", self.mean_square)):
                key = f"{_PREFIX}{kind}.{family.name}"
                if key not in values or values[key].shape != (family.size,):
                    raise GETAError(
                        f"the optimizer state lacks {key} of {family.size} groups: it is of another model or config"
                    )
                store[position] = values.pop(key).clone()
            self.status[position] = self.status[position].cpu()
        leftover = [key for values in state.values() for key in values if str(key).startswith(_PREFIX)]
        if leftover:
            raise GETAError(f"the optimizer state has {leftover[0]}, which this pruning space lacks")
        # What the base holds for an anchor alone would look like an initialised parameter to it.
        state = {position: values for position, values in state.items() if values}
        self.base.load_state_dict({**state_dict, "state": state})
        self._follow_base()
        self._forget_index()
