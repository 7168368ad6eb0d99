"""QASSO (paper Alg. 2): a wrapper around any torch optimizer, and one itself.

All per-step logic sits in `step`, where gradients are clipped, accumulated and unscaled, once per update. The base
optimizer owns `param_groups` and `state`; what QASSO adds are numbers in `param_groups[0]` and three vectors over all
groups and layers that travel in the state of one parameter, so a checkpoint holds plain tensors and numbers only.
Parameters are found by the names in `param_groups[i]["param_names"]` at every step: Accelerate may replace the tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from geta_hf.config import GETAConfig
from geta_hf.costs import bit_allocation as finish
from geta_hf.costs.ledger import Ledger
from geta_hf.costs.quantizer_table import Quantizers
from geta_hf.costs.selection import Limits, find_chunks
from geta_hf.costs.targets import GROUPS, Target, solve_target, take_due
from geta_hf.errors import GETAError
from geta_hf.methods.qasso.checks import check_base, check_covered
from geta_hf.methods.qasso.frozen import Frozen, Watch, check_rules, forget
from geta_hf.methods.qasso.joint_step import Pairs, Redundant, find_pairs, needs_gradients
from geta_hf.methods.qasso.nan_guard import note_bad, refuse_bad, squared_gradients
from geta_hf.methods.qasso.projection import project_step_size, relative_step
from geta_hf.methods.qasso.saliency import fisher_scores, group_sums, hesso_scores, taylor_scores
from geta_hf.methods.qasso.schedule import COOLDOWN, JOINT, PROJECTION, WARMUP, Phase, Schedule
from geta_hf.methods.qasso.slices import Slice, build_slices, remember, zero_moments, zero_slices
from geta_hf.methods.qasso.state import put_vectors, take_vectors
from geta_hf.qadg.group_labels import Cut, family_of_group, family_starts
from geta_hf.qadg.space import Family, PruningSpace
from geta_hf.utils.shards import agree, local

IMPORTANT, REDUNDANT, REMOVED = 0, 1, 2
_STEP = "qasso_step"
_SCHEDULE = "qasso_schedule"
_VECTORS = ("status", "mean_square", "curvature", "bad_step")

Named = dict[str, Tensor]
Values = tuple[Tensor, Tensor, Tensor]


class QASSO(torch.optim.Optimizer):
    """Warm-up, projection, joint and cool-down around a base optimizer.

    Args:
        base: any torch optimizer over all trainable parameters of the model, quantizers' included.
        names: the model's name of every parameter in `base`, keyed by the parameter.
        space: the pruning space; every member of a prunable family must be in `base`.
        quantizers: prefix of the quantizer of each quantized weight: {"…query.weight": "…query.weight_quantizer"}.
        schedule: the stages in steps.
        config: rules and limits.
        input_quantizers: prefixes of the quantizers of layers' inputs.
        ledger: sizes of the whole model; by default of what is in `base`, which is enough for all targets but bytes.
        channel_dims: prefix -> the weight's dimension along which its quantizer has a step size each.
        frozen: what is cut or quantized, but not trained; see `qasso.frozen`.
        goal: that of the plan; by default the config's targets are solved here.

    Attributes:
        goal: what the run shall end with.
        gamma: forgetting rates of the latest joint step, shape (families,); NaN where a family lost no group.

    Raises:
        GETAError: a target that can't be reached, a member of a prunable family or a quantizer that is not in `base`, a
            base optimizer or a kind of parameter that can't be wrapped.
    """

    def __init__(
        self,
        base: torch.optim.Optimizer,
        names: Mapping[Tensor, str],
        space: PruningSpace,
        quantizers: Mapping[str, str],
        schedule: Schedule,
        config: GETAConfig,
        *,
        input_quantizers: Sequence[str] = (),
        ledger: Ledger | None = None,
        channel_dims: Mapping[str, int] | None = None,
        frozen: Frozen | None = None,
        goal: Target | None = None,
    ) -> None:
        super().__init__(base.param_groups, {})
        self.base, self.schedule, self.config = base, schedule, config
        self.families: tuple[Family, ...] = space.trainable
        self._follow_base()
        for group in self.param_groups:
            group["param_names"] = [names[parameter] for parameter in group["params"]]
        self.param_groups[0].setdefault(_STEP, 0)
        self.param_groups[0][_SCHEDULE] = list(dataclasses.astuple(schedule))
        named = self._named()
        check_base(base, named)
        check_covered(named, self.families, quantizers, input_quantizers)
        self.quantizers = Quantizers(quantizers, input_quantizers, named, channel_dims)
        self.ledger = ledger or Ledger.of_tensors(self.families, named, self.quantizers.own_weights)
        self.goal: Target = goal or solve_target(config, self.families, self.ledger)
        groups, layers = self.ledger.groups, len(self.quantizers.prefixes)
        self.status = torch.zeros(groups, dtype=torch.uint8)
        self.mean_square = torch.zeros(groups)
        self.curvature = torch.zeros(self.quantizers.weight_layers)
        self.bad_step = torch.full((2, layers), -1, dtype=torch.int64)
        self.gamma: Tensor | None = None
        self.frozen = frozen or Frozen()
        self._watch = self._make_watch(named) if self.frozen.names else None
        self._family = family_of_group(self.families)
        self._forget_index()

    def _make_watch(self, named: Named) -> Watch:
        check_rules(self.config)
        device = local(next(iter(named.values()))).device
        return Watch(self.frozen, self.ledger.cuts, self.ledger.groups, self.quantizers.own_weights, device)

    def _follow_base(self) -> None:
        # load_state_dict of the base replaces both containers; they are always shared, never copied.
        self.param_groups, self.state = self.base.param_groups, self.base.state

    def _forget_index(self) -> None:
        """Drop everything derived from `status` and devices; it is rebuilt at the next step."""
        self._cuts: list[Cut] | None = None
        self._drop_slices()

    def _drop_slices(self) -> None:
        self._redundant: list[Slice] | None = None
        self._removed: list[Slice] = []
        self._pairs: Pairs | None = None

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
    def finished(self) -> bool:
        """Whether the joint stage is over: all groups that were to go are zero, and widths are whole."""
        return self.phase.stage == COOLDOWN

    @property
    def bit_bounds(self) -> tuple[float, float]:
        """(b_l, b_u) of weights in force at the next step."""
        return self._bounds(self.config.bits[0], self.config.reduction)

    @property
    def input_bit_bounds(self) -> tuple[float, float]:
        """(b_l, b_u) of the layers' inputs in force at the next step; they fall evenly, since b_r is for weights."""
        lower, upper = self.config.activation_bits or self.config.bits
        return self._bounds(lower, (self.config.initial_bits - upper) / self.config.projection_periods)

    def _bounds(self, lower: int, reduction: float) -> tuple[float, float]:
        """The upper one has come down by `reduction` in each projection period that has begun (Alg. 3)."""
        phase, all_periods = self.phase, self.config.projection_periods
        periods = {WARMUP: 0, PROJECTION: phase.period + 1}.get(phase.stage, all_periods)
        return lower, self.config.initial_bits - periods * reduction

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of all parameters. `closure` re-evaluates the loss, as in torch."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        phase, named, self.gamma = self.phase, self._named(), None
        self._prepare(phase, named)
        if self._watch is None:
            remember(self._redundant or [], named, needs_gradients(self.config))
        values, before = self._scale_gradients(phase, named)
        self.base.step()
        self._step_quantizers(phase, named, values, before)
        if phase.stage == JOINT:
            self._forget(phase, named)
        zero_slices(self._removed, named)
        if phase.stage == JOINT and phase.ends:
            self._remove(named)
        self.param_groups[0][_STEP] += 1
        if phase.stage != COOLDOWN and self.finished and self.quantizers.prefixes:
            self.check_finite()
            finish.settle_widths(self, named)
        return loss

    def watch_frozen(self) -> None:
        """To be called before each backward pass: frozen tensors are watched in the stages that score groups."""
        if self._watch is not None:
            self._watch.follow(self.phase.stage in (PROJECTION, JOINT), self._named())

    def _named(self) -> Named:
        return {
            name: parameter
            for group in self.param_groups
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
        }

    def _prepare(self, phase: Phase, named: Named) -> None:
        """What is measured and chosen before the base step."""
        if self._cuts is None:
            self._move(named)
        cooling = phase.stage == COOLDOWN
        if not cooling:
            self._measure(phase, named)
        if self.quantizers.prefixes:
            stand_ins = {weight: own.b for weight, own in self.frozen.adapters.items()}
            self.bad_step = note_bad(self.bad_step, self.step_count, self.quantizers, named, cooling, stand_ins)
        if phase.starts:
            self.check_finite()
        if phase.stage == JOINT and phase.starts:
            self._partition(phase, named)
        if self._redundant is None:
            self._index(named)

    def _move(self, named: Named) -> None:
        """Bring what every step reads to where the parameters are."""
        device = local(next(iter(named.values()))).device
        self._cuts = [replace(cut, label=cut.label.to(device)) for cut in self.ledger.cuts if cut.tensor in named]
        self.quantizers.to(device)
        self.mean_square = self.mean_square.to(device)
        self.curvature, self.bad_step = self.curvature.to(device), self.bad_step.to(device)

    def _index(self, named: Named) -> None:
        assert self._cuts is not None
        cuts = self.frozen.with_adapters(self._cuts)
        self._redundant = build_slices(cuts, self.status == REDUNDANT, self._family, named)
        trained = [cut for cut in cuts if cut.tensor not in self.frozen.names]
        self._removed = build_slices(trained, self.status == REMOVED, self._family, named)
        if self.config.bit_rule == "paper":
            self._pairs = find_pairs(self._redundant, len(self.families), self.quantizers)

    # --- saliency and partition -----------------------------------------------------------------------------------

    def _measure(self, phase: Phase, named: Named) -> None:
        """Update the moving averages of ⟨g, x⟩² of groups and of ‖g‖² of layers."""
        last = phase.stage == JOINT and phase.period == self.schedule.pruning_periods - 1
        decay = self.config.saliency_decay
        of_frozen = (0.0, 0.0) if self._watch is None else self._watch.take()
        if self.config.saliency != "hesso" and phase.stage != WARMUP and not (last and not phase.starts):
            trained = [cut for cut in self._cuts or () if named[cut.tensor].grad is not None]
            inner = group_sums(trained, named, self.ledger.groups, torch.mul) + of_frozen[0]
            self.mean_square.mul_(decay).add_(inner**2, alpha=1 - decay)
        if last and self.config.bit_rule == "sensitivity" and self.quantizers.prefixes:
            squares = squared_gradients(self.quantizers, named) + of_frozen[1]
            self.curvature.mul_(decay).add_(squares, alpha=1 - decay)

    def check_finite(self) -> None:
        """Raises GETAError when a gradient or a quantizer was NaN or infinite; waits for the device."""
        refuse_bad(self.bad_step, self.quantizers.prefixes)

    def _sums(self, named: Named, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Σ over each group of product(x, g); a parameter without a gradient counts as g = 0."""
        assert self._cuts is not None
        return group_sums(self._cuts, named, self.ledger.groups, product)

    def _scores(self, named: Named) -> Tensor:
        cost = self._sums(named, lambda x, g: torch.ones_like(x))
        if self.config.saliency == "fisher":
            return fisher_scores(self.mean_square, cost)
        if self.config.saliency == "taylor":
            return taylor_scores(self.mean_square, cost)
        products = (torch.mul, lambda x, g: g * g, lambda x, g: x * x)
        inner, grad_square, square = (self._sums(named, product) for product in products)
        return hesso_scores(inner, grad_square, square, cost)

    def _partition(self, phase: Phase, named: Named) -> None:
        """Choose redundant groups so that (p+1)/P of the way is gone at the period's end; a host sync once a period."""
        if not self.families:
            return
        scores = agree(self._scores(named)).cpu()
        if not bool(torch.isfinite(scores).all()):
            worst = self.families[int(self._family[int(torch.isfinite(scores).logical_not().nonzero()[0])])]
            raise GETAError(
                f"the saliency of {worst.name} is not finite at step {self.step_count}: its weights or gradients "
                f"are NaN or infinite; go back to the last checkpoint with a lower learning rate"
            )
        chunks = find_chunks(self.families, scores, self.gone, Limits.of(self.config))
        taken = take_due(self.goal, self.ledger, chunks, self.gone, phase.period + 1, self.schedule.pruning_periods)
        self.status[taken] = REDUNDANT
        self._drop_slices()

    # --- quantizers -----------------------------------------------------------------------------------------------

    def _quantizer_tensors(self, named: Named) -> list[Tensor]:
        """All trained (d, q_m, t) that have a gradient."""
        names = [name for leaf in ("d", "q_m", "t") for name in self.quantizers.names[leaf]]
        leaves = [named[name] for name in names if name in named]
        return [leaf for leaf in leaves if leaf.grad is not None]

    def _scale_gradients(self, phase: Phase, named: Named) -> tuple[list[Tensor], Tensor | None]:
        """Make gradients those of log p and return p as it is; in cool-down take them away, which freezes p."""
        parameters = self._quantizer_tensors(named)
        if phase.stage == COOLDOWN:
            for parameter in parameters:
                parameter.grad = None
            return [], None
        values = [local(parameter.detach()) for parameter in parameters]
        if not values:
            return [], None
        torch._foreach_mul_([local(p.grad) for p in parameters if p.grad is not None], values)
        return values, torch.cat(values)

    def _step_quantizers(self, phase: Phase, named: Named, values: list[Tensor], before: Tensor | None) -> None:
        """Turn the base step of (d, q_m, t) into one of their logarithms, then put d inside its bounds (Eq. 4c)."""
        if before is not None:
            stepped = relative_step(before, torch.cat(values))
            torch._foreach_copy_(values, stepped.split([value.numel() for value in values]))
        if phase.stage != COOLDOWN:
            d, q_m, t = self.quantizers.read(named)
            self.quantizers.write_step_sizes(project_step_size(d, q_m, t, *self._entry_bounds()), named)

    def _entry_bounds(self) -> tuple[Tensor, Tensor]:
        """(b_l, b_u) of every entry, shape (entries,)."""
        ours, theirs = self.bit_bounds, self.input_bit_bounds
        of_input = self.quantizers.layer >= self.quantizers.weight_layers
        lower, upper = (torch.where(of_input, theirs[i], ours[i]) for i in (0, 1))
        return lower, upper

    # --- forgetting -----------------------------------------------------------------------------------------------

    def _forget(self, phase: Phase, named: Named) -> None:
        """Eqs. 13-14 on every family with redundant groups, by the rules of the config."""
        if self._redundant and self._watch is not None:
            self.gamma = forget(self._redundant, named, phase.length - phase.step, len(self.families))
        elif self._redundant:
            d = self.quantizers.read(named)
            redundant = Redundant(self._redundant, self._pairs, len(self.families), self.quantizers)
            self.gamma = redundant.forget(named, d, phase.length - phase.step, self.bit_bounds, self.config)

    def _remove(self, named: Named) -> None:
        """At a period's end redundant groups are exactly zero for good, with the base optimizer's state of them."""
        zero_slices(self._redundant or [], named)
        zero_moments(self._redundant or [], named, self.state)
        self.status[self.status == REDUNDANT] = REMOVED
        self._drop_slices()

    # --- what is logged -------------------------------------------------------------------------------------------

    @property
    def gone(self) -> Tensor:
        """bool, shape (groups,), on CPU: which groups are exactly zero for good."""
        return self.status == REMOVED

    @property
    def removed(self) -> dict[str, Tensor]:
        """Per family, bool (groups,): which groups are exactly zero for good."""
        starts = family_starts(self.families)
        return {f.name: self.gone[start : start + f.size] for f, start in zip(self.families, starts, strict=True)}

    @property
    def removed_groups(self) -> int:
        """How many groups are exactly zero for good."""
        return int(self.gone.sum())

    @property
    def target_groups(self) -> int | None:
        """K; None where the target is not a number of groups."""
        return self.ledger.groups - int(self.goal.amount) if self.goal.unit == GROUPS else None

    def bits(self) -> dict[str, float]:
        """Present width of every quantizer, by its prefix; weights' first, inputs' after. Waits for the device."""
        named = self._named()
        self.quantizers.to(local(next(iter(named.values()))).device)
        return dict(zip(self.quantizers.prefixes, self.quantizers.bits(named).tolist(), strict=True))

    def mean_gamma(self) -> float:
        """Mean forgetting rate of the latest step over families that had redundant groups; 0 where none had."""
        if self.gamma is None:
            return 0.0
        active = torch.isfinite(self.gamma)
        return float(self.gamma[active].mean())

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state with QASSO's vectors in that of the first parameter."""
        return put_vectors(self.base.state_dict(), {name: getattr(self, name) for name in _VECTORS})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore exactly. Raises GETAError when the checkpoint is not of this space."""
        ours, theirs = self.param_groups[0][_SCHEDULE], state_dict["param_groups"][0].get(_SCHEDULE)
        if theirs != ours:
            raise GETAError(
                f"the optimizer state has stages {theirs}, this run {ours} (warm-up, projection, joint, total steps, "
                f"periods); resume with the same length of training and the same stages"
            )
        rest, vectors = take_vectors(state_dict, {name: getattr(self, name) for name in _VECTORS})
        self.base.load_state_dict(rest)
        for name, value in vectors.items():
            setattr(self, name, value)
        self._follow_base()
        self._forget_index()
