"""QASSO (arXiv 2502.16638, Algorithm 2): a wrapper around any torch optimizer, and one itself.

All per-step logic sits in `step`, where gradients are clipped, accumulated and unscaled, once per update. The four
stages are four methods, each with the line numbers of Algorithm 2.

The base optimizer owns `param_groups` and `state`. What QASSO adds are numbers in `param_groups[0]` and the vectors of
`QASSOState`, so a checkpoint holds plain tensors and numbers only. Parameters are found by the names in
`param_groups[i]["param_names"]` at every step, since Accelerate may replace the tensors.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from geta_hf.config import GETAConfig
from geta_hf.costs.bit_allocation import BitAllocation, BitChoices
from geta_hf.costs.input_sensitivity import InputErrors, input_errors
from geta_hf.costs.ledger import Ledger
from geta_hf.costs.quantizer_table import Quantizers
from geta_hf.costs.selection import Chunks, Limits, find_chunks
from geta_hf.costs.sensitivity import measure_errors
from geta_hf.costs.targets import GROUPS, MEAN_BITS, Target, solve_target, take_due
from geta_hf.errors import GETAError
from geta_hf.methods.compensation import Compensation
from geta_hf.methods.frozen_weights import FrozenWeights
from geta_hf.methods.qasso.checks import (
    check_base,
    check_covered,
    note_bad,
    refuse_bad,
    squared_gradients,
    warn_of_equal_scores,
)
from geta_hf.methods.qasso.equations import (
    fisher_scores,
    hesso_scores,
    project_step_size,
    relative_step,
    taylor_scores,
)
from geta_hf.methods.qasso.frozen import GradientSums, check_rules, forget_frozen
from geta_hf.methods.qasso.joint_step import RedundantSlices
from geta_hf.methods.qasso.schedule import COOLDOWN, JOINT, PROJECTION, WARMUP, Phase, Schedule, note_short_run
from geta_hf.methods.qasso.silent_gradients import check_learned
from geta_hf.methods.qasso.slices import Product, Slice, build_slices, group_sums, zero_moments, zero_slices
from geta_hf.methods.qasso.split import Averages, decide_split
from geta_hf.methods.qasso.state import REDUNDANT, REMOVED, QASSOState, restore_vectors, store_vectors
from geta_hf.methods.rounding import keep_off_zero, round_bits, settle_bits
from geta_hf.qadg.group_labels import (
    GroupLabels,
    consumers,
    family_of_group,
    family_starts,
    find_group_labels,
    marked,
)
from geta_hf.qadg.group_types import Family
from geta_hf.qadg.space import PruningSpace
from geta_hf.quantization.clipping import Histogram
from geta_hf.quantization.functional import FLOAT_BITS
from geta_hf.quantization.maths import FOUR_LEVEL_BITS
from geta_hf.quantization.quantizer import Quantizer
from geta_hf.utils.shards import from_first_process, local

logger = logging.getLogger(__name__)

_STEP = "qasso_step"
_SCHEDULE = "qasso_schedule"

Named = dict[str, Tensor]


_SIZE_MARGIN = 0.98
"""Share of a size that the lowest widths may take, since widths are allocated in steps of an entire layer."""


def bit_choices(config: GETAConfig) -> BitChoices:
    """Return the final widths that a config allows, and its rule."""
    # A search looks for q_m at t = 1. Under the paper's q_m = max|W| there is nothing to search for.
    search = config.clipping == "mse" and not config.learn_exponent
    return BitChoices.of(config, config.bit_rule == "sensitivity", search, config.four_levels)


def _shaped(parts: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """Return vectors in the shapes of other tensors."""
    return [part.view(other.shape) for part, other in zip(parts, like, strict=True)]


class QASSO(torch.optim.Optimizer):
    """Warm-up, projection, joint stage and cool-down around a base optimizer.

    Args:
        base: any torch optimizer over all trainable parameters of the model, quantizers' included.
        names: the model's name of every parameter in `base`, keyed by the parameter.
        space: the pruning space; every member of a prunable family must be in `base`.
        quantizers: prefix of the quantizer of each quantized weight: {"…query.weight": "…query.weight_quantizer"}.
        schedule: the stages in steps.
        config: rules and limits.
        input_quantizers: prefixes of the quantizers of layers' inputs.
        ledger: sizes of the full model; by default of what is in `base`, which is enough for all targets but bytes.
        channel_dims: prefix -> the weight's dimension along which its quantizer has a step size each.
        blocks: prefix -> the quantizer itself, where each block of inputs has a step size.
        modules: prefix -> the quantizer of a weight itself, which may get four levels. Default None: none may.
        compensation: the model and its calibration data, for `compensate` and `rounding`; None does without.
        frozen: what is cut or quantized, but not trained; see `qasso.frozen`.
        target: that of the plan; by default the config's targets are solved here.
        goal: the former name of `target`.
        histograms: prefix -> magnitudes of a layer's input, by which widths of inputs are chosen.

    Attributes:
        target: what the run is to end with.
        gamma: forgetting rates of the latest joint step, shape (families,); NaN where a family lost no group.

    Raises:
        GETAError: a target that can't be reached, a member of a prunable family or a quantizer that is not in `base`, a
            base optimizer or a kind of parameter that can't be wrapped.

    >>> import torch
    >>> from geta_hf import GETAConfig, QASSO, PruningSpace, Schedule, attach_quantizers
    >>> model = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([torch.nn.Linear(4, 4)])})
    >>> _ = attach_quantizers(model)
    >>> names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    >>> config = GETAConfig(target_sparsity=0.0, mean_bits=5)
    >>> optimizer = QASSO(
    ...     torch.optim.SGD(list(names), lr=0.01),
    ...     names,
    ...     PruningSpace(families=()),
    ...     {"blocks.0.weight": "blocks.0.weight_quantizer"},
    ...     Schedule.from_config(config, total_steps=50, steps_per_epoch=50),
    ...     config,
    ... )
    >>> for _ in range(50):
    ...     model["blocks"][0](torch.ones(2, 4)).sum().backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    >>> optimizer.finished, round(optimizer.bits()["blocks.0.weight_quantizer"])
    (True, 5)
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
        blocks: Mapping[str, Quantizer] | None = None,
        modules: Mapping[str, Quantizer] | None = None,
        frozen: FrozenWeights | None = None,
        target: Target | None = None,
        goal: Target | None = None,
        histograms: Mapping[str, Histogram] | None = None,
        compensation: Compensation | None = None,
    ) -> None:
        super().__init__(base.param_groups, {})
        self.base = base
        self.schedule = schedule
        self.config = config
        note_short_run(schedule, config)
        if compensation is None and config.compensates:
            raise GETAError(
                "compensate=True and rounding='compensated' measure inputs of layers; pass compensation, with the "
                "model and calibration batches"
            )
        self.families: tuple[Family, ...] = space.trainable
        self._share_base()
        for group in self.param_groups:
            # Names travel in the groups: a map from names to tensors would go stale when Accelerate replaces the
            # tensors.
            group["param_names"] = [names[parameter] for parameter in group["params"]]
        # Plain numbers in a group are part of every checkpoint, so a resumed run goes on at its step.
        self.param_groups[0].setdefault(_STEP, 0)
        self.param_groups[0][_SCHEDULE] = list(dataclasses.astuple(schedule))
        named = self._named()
        check_base(base, named)
        check_covered(named, self.families, quantizers, input_quantizers)
        self.quantizers = Quantizers(quantizers, input_quantizers, named, channel_dims, blocks, modules=modules)
        self._histograms = [(histograms or {}).get(prefix) for prefix in self.quantizers.input_prefixes]
        self.ledger = ledger or Ledger.of_tensors(self.families, named, self.quantizers.own_weights)
        self.target: Target = target or goal or solve_target(config, self.families, self.ledger)
        self.qasso_state = QASSOState.start(
            self.ledger.groups, self.quantizers.weight_layers, len(self.quantizers.prefixes), len(self.quantizers.layer)
        )
        self._learned_by = schedule.first_start_after(2)
        self.gamma: Tensor | None = None
        self.frozen = frozen or FrozenWeights()
        self._compensation = compensation
        self._scored = self._scored_slices(named)
        self._gradient_sums = self._sum_frozen_gradients(named) if self.frozen.names else None
        self._family = family_of_group(self.families)
        self._labels: list[GroupLabels] | None = None
        self._redundant: RedundantSlices | None = None
        self._removed: list[Slice] = []
        self._final_quantizers: Named = {}
        self._final_levels: dict[str, bool] = {}
        self._resumed = False

    def _scored_slices(self, named: Named) -> Sequence[GroupLabels]:
        """Return the slices over which ⟨g, x⟩ of a group is taken."""
        # What is compared with rounding must be an expected loss; over all slices it counts one derivative several
        # times.
        if self.config.saliency != "mask_fisher" and self.config.split_rule == "even":
            return self.ledger.labels
        # With y = W (m ∘ a), ∂f/∂m of a mask m = 1 on a group's output a is ⟨g, W⟩ over the columns that read it.
        without = [family.name for family in self.families if not any(member.consumer for member in family.members)]
        if without:
            logger.warning(
                "no weight is known to read the output of %s, so all slices of its groups count",
                ", ".join(without),
            )
        return find_group_labels(
            consumers(self.families), {name: tuple(tensor.shape) for name, tensor in named.items()}
        )

    def _sum_frozen_gradients(self, named: Named) -> GradientSums:
        check_rules(self.config)
        device = local(next(iter(named.values()))).device
        # These weights have no gradient after the backward pass, so the sums that scores need are taken during it.
        return GradientSums(self.frozen, self._scored, self.ledger.groups, self.quantizers.own_weights, device)

    def _share_base(self) -> None:
        # load_state_dict of the base replaces both containers; they are always shared, never copied.
        self.param_groups = self.base.param_groups
        self.state = self.base.state
        # Some of Trainer's schedulers read the initial learning rate here.
        self.defaults = self.base.defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters to the base optimizer, by name: `{"params": [("head.weight", tensor)], "lr": 1e-3}`.

        They are updated in every stage. What is pruned or quantized has to be there from the start.

        Args:
            param_group: as torch takes it, with the model's names.

        Raises:
            GETAError: parameters without names.
        """
        if not hasattr(self, "base"):  # torch's own __init__, which adds the groups of the base
            super().add_param_group(param_group)
            return
        given = param_group["params"]
        params = [given] if isinstance(given, Tensor) else list(given)
        if "param_names" not in param_group and not all(isinstance(item, tuple) for item in params):
            raise GETAError(
                "add_param_group needs the names of the parameters, by which stages and checkpoints find them; pass "
                "them as (name, tensor) pairs, such as model.named_parameters() gives"
            )
        self.base.add_param_group({**param_group, "params": params})
        self._invalidate_index()

    # --- Algorithm 2 --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Do one update of all parameters, in the stage that it falls into.

        Args:
            closure: re-evaluates the loss, as in torch.

        Raises:
            GETAError: at the first step of a stage or period, where something became NaN or infinite before.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        phase = self.phase
        named = self._named()
        self._follow_device(named)
        self._note_bad(phase, named)
        # γ exists in the joint stage only; that of an earlier step must not be logged again.
        self.gamma = None
        if phase.stage == WARMUP:
            self._warm_up_step(phase, named)
        elif phase.stage == PROJECTION:
            self._projection_step(phase, named)
        elif phase.stage == JOINT:
            self._joint_step(phase, named)
        else:
            self._cool_down_step(phase, named)
        self.param_groups[0][_STEP] += 1
        if self.step_count == self.schedule.decided_after:
            if self.schedule.joint == 0:
                self._remove_at_once(named)
            self.fix_bits(bit_choices(self.config))  # (d*, q_m*, t*) of line 22
        return loss

    def _warm_up_step(self, phase: Phase, named: Named) -> None:
        """Do one of the K_w steps of line 2: x, d, q_m and t by the base optimizer.

        2: x <- x - u;  (d, q_m, t) <- (d, q_m, t) - their step

        The paper steps (d, q_m, t) by SGD here. They take the step of Algorithm 3 instead, as in every later stage, so
        that bits are inside [b_l, initial bits] from the first step on.
        """
        self._average_gradients(phase, named)  # where no projection stage follows
        self._base_step(named)

    def _projection_step(self, phase: Phase, named: Named) -> None:
        """Do one step k of a projection period (lines 4 to 7).

        4: b_u <- b_u - b_r            at the period's first step: `bit_bounds`
        6: x <- x - u
        7: (d, q_m, t) by Algorithm 3
        """
        self._average_gradients(phase, named)  # so that line 11 has an average to read when the joint stage begins
        self._base_step(named)

    def _joint_step(self, phase: Phase, named: Named) -> None:
        """Do one step k of a pruning period (lines 11 to 19).

        11: saliency of every group    at the period's first step
        12: G_R <- the groups of least saliency that are due, G_I <- the others
        14: (t, q_m) by the base optimizer, and d with them
        15: ∇_x f is in the parameters' gradients
        16: γ by Eq. 13
        17: d by Eq. 14
        18: x^Q by Eq. 2, as rewritten in Eq. 9
        19: [x]_I <- [x]_I - [u]_I                        (Eq. 5)
            [x]_R <- [x]_R - [u]_R - γ [x^Q]_R            (Eq. 6)

        Under `compensate` G_R is removed in the first step, and what reads it makes up for it.
        """
        self._average_gradients(phase, named)
        if phase.starts:
            if phase.period == 0:
                self._settle_two_bits(named)
            self._partition(named, phase.period + 1, self.schedule.pruning_periods)  # 11, 12
            if self._removes_at_once:
                self._base_step(named)
                self._remove(self._index_slices(named), named)
                zero_slices(self._removed, named)
                return
        redundant = self._index_slices(named)
        if self._gradient_sums is None:
            # Eqs. 9 to 13 speak of x and g before the update. Under LoRA W takes no step, so nothing has to be kept.
            redundant.remember(named, self.config)
        self._base_step(named)  # 14, 15, and of 19 what is subtracted from all groups alike
        if redundant.slices:
            self.gamma = self._forget(redundant, phase, named)  # 16 to 19
        zero_slices(self._removed, named)  # momentum and weight decay would bring removed groups back
        if phase.ends:
            self._remove(redundant, named)

    def _cool_down_step(self, phase: Phase, named: Named) -> None:
        """Do one step of line 22: with (d*, q_m*, t*) fixed, train x in the important groups.

        22: [x]_I <- [x]_I - [u]_I
        """
        self._average_gradients(phase, named)  # where no stage came before
        # After a resume nothing is listed yet, and the removed slices have to be zeroed below.
        self._index_slices(named)
        if self._resumed:
            self._note_final_quantizers(named)  # again, where the model was loaded after the optimizer
            self._resumed = False
        for parameter in self._trained_quantizers(named):
            parameter.grad = None  # a base optimizer skips what has no gradient
        self.base.step()
        keep_off_zero(self.quantizers, named, self.frozen.names)
        zero_slices(self._removed, named)

    # --- lines 6, 7, 14 and 15: the base step, and Algorithm 3 --------------------------------------------------------

    def _base_step(self, named: Named) -> None:
        """Step x by the base optimizer, and (d, q_m, t) by Algorithm 3 (PPSG), all at once.

        2: p <- p · exp(-u_p) for p in (d, q_m, t); u_p is the base optimizer's step on p · ∂f/∂p, the gradient of log p
        3: d_min, d_max from (q_m, t) and the bounds in force
        4: d <- min(max(d, d_min), d_max), so that every layer's width is inside its bounds at every step (Eq. 4c)
        """
        trained = self._trained_quantizers(named)
        values = [local(parameter.detach()) for parameter in trained]
        sizes = [value.numel() for value in values]
        if values:
            # ∂f/∂(log p) = p · ∂f/∂p, so the base optimizer sees the gradient of log p and its step is a share of p.
            gradients = [local(parameter.grad) for parameter in trained if parameter.grad is not None]
            torch._foreach_mul_(gradients, values)
            # A copy, while `values` are views into the parameters.
            before = torch.cat([value.reshape(-1) for value in values])
            # From 0 the base optimizer arrives at its step itself, to full precision whatever the size of p.
            torch._foreach_zero_(values)
        try:
            self.base.step()
        except BaseException:
            if values:
                torch._foreach_copy_(values, _shaped(before.split(sizes), values))
            raise
        if values:
            stepped = relative_step(before, torch.cat([value.reshape(-1) for value in values]))
            torch._foreach_copy_(values, _shaped(stepped.split(sizes), values))
        # In every stage, warm-up too, where the bounds are [b_l, initial bits]. d alone is projected: the paper reports
        # that projecting q_m or t makes training unstable (Sec. 5.1).
        self._project_step_sizes(named)
        keep_off_zero(self.quantizers, named, self.frozen.names)

    def _project_step_sizes(self, named: Named) -> None:
        d, q_m, t = self.quantizers.read(named)
        lower, upper = self._entry_bounds()
        self.quantizers.write_step_sizes(project_step_size(d, q_m, t, lower, upper), named)

    def _trained_quantizers(self, named: Named) -> list[Tensor]:
        """Return all d, q_m and t that have a gradient."""
        names = [name for leaf in ("d", "q_m", "t") for name in self.quantizers.names[leaf]]
        leaves = [named[name] for name in names if name in named]
        return [leaf for leaf in leaves if leaf.grad is not None]

    @property
    def bit_bounds(self) -> tuple[float, float]:
        """(b_l, b_u) of weights in force at the next step."""
        return self._bounds(self.config.bits[0], self.config.final_upper_bits)

    @property
    def input_bit_bounds(self) -> tuple[float, float]:
        """(b_l, b_u) of the layers' inputs in force at the next step; they fall evenly, since b_r is for weights."""
        lower, upper = self.config.activation_bits or self.config.bits
        return self._bounds(lower, upper)

    def _bounds(self, lower: int, final: float) -> tuple[float, float]:
        """Return the bounds; the upper one falls to `final` in equal parts, one for each projection period (line 4)."""
        phase = self.phase
        periods = self.schedule.projection_periods
        if phase.stage == WARMUP:
            share = 0.0
        elif phase.stage == PROJECTION:
            share = (phase.period + 1) / periods
        else:
            # Without a projection stage the bound is what it was, until widths are decided.
            share = 1.0 if periods or phase.stage == COOLDOWN else 0.0
        return lower, self.config.initial_bits - (self.config.initial_bits - final) * share

    def _entry_bounds(self) -> tuple[Tensor, Tensor]:
        """Return b_l and b_u of every entry of the quantizer table, shape (entries,) each."""
        lower_of_weights, upper_of_weights = self.bit_bounds
        lower_of_inputs, upper_of_inputs = self.input_bit_bounds
        # The flat vectors list weights first and inputs after them, and the two have ranges of their own.
        is_input = self.quantizers.layer >= self.quantizers.weight_layers
        lower = torch.where(is_input, lower_of_inputs, lower_of_weights)
        upper = torch.where(is_input, upper_of_inputs, upper_of_weights)
        # Widths that are decided already are trained at; 0 stands for those that are not.
        decided = self.qasso_state.decided_bits[self.quantizers.layer]
        return torch.where(decided > 0, decided, lower), torch.where(decided > 0, decided, upper)

    # --- lines 11 and 12: saliency and partition ----------------------------------------------------------------------

    def _average_gradients(self, phase: Phase, named: Named) -> None:
        """Update the moving averages that scores and bit allocation read, with λ = `saliency_decay`.

        m_g <- λ m_g + (1 - λ) ⟨g, x⟩_g²      of every group, as long as a partition follows
        v_l <- λ v_l + (1 - λ) ‖g_l‖²         of every quantized weight, in the last pruning period
        s_i <- λ s_i + (1 - λ) ⟨g, x^Q - x⟩²  of every quantized input, in that period too

        Where pruning and widths share a size, all three are averaged over the same steps.
        """
        if not self.schedule.averages(phase):
            return
        state = self.qasso_state
        decay = self.config.saliency_decay
        # The last partition is made when the last period of the joint stage starts. Then widths are what remains to be
        # decided, and the averages for these are of a model that has nearly lost its groups already.
        in_last_period = self.schedule.in_last_period(phase)
        partition_follows = phase.stage != JOINT or not in_last_period or phase.starts
        of_groups: Tensor | float = 0.0
        of_layers: Tensor | float = 0.0
        if self._gradient_sums is not None:
            # Taken in every step, used or not, since taking also sets the sums to 0.
            of_groups, of_layers = self._gradient_sums.take()
        if partition_follows and self.config.saliency != "hesso":  # HESSO's score reads the present gradient only
            trained = [cut for cut in self._scored if cut.tensor in named and named[cut.tensor].grad is not None]
            # ⟨g, x⟩ of all slices together is the first-order change in loss, so opposite signs cancel before squaring.
            inner = group_sums(trained, named, self.ledger.groups, torch.mul) + of_groups
            state.mean_square.mul_(decay).add_(inner**2, alpha=1 - decay)
        of_widths = in_last_period or self.config.split_rule != "even"
        if of_widths and self.config.bit_rule == "sensitivity" and self.quantizers.prefixes:
            squares = squared_gradients(self.quantizers, named) + of_layers
            state.curvature.mul_(decay).add_(squares, alpha=1 - decay)
            if len(state.input_square):
                state.input_square.mul_(decay).add_(self.quantizers.input_squares(named), alpha=1 - decay)

    def _scores(self, named: Named, by_size: bool = False) -> Tensor:
        """Return the saliency of every group by the rule of the config, shape (groups,).

        Args:
            named: parameters by name.
            by_size: divide by a group's parameters even where the target counts groups.
        """
        if self.target.unit == GROUPS and self.config.saliency != "hesso" and not by_size:
            # The K groups of least loss are those of the K lowest losses. Per parameter, large groups would be removed
            # first, and K of them take far more than K small ones.
            cost = torch.ones_like(self.qasso_state.mean_square)
        else:
            cost = self._sums(named, lambda x, g: torch.ones_like(x))
        if self.config.saliency in ("fisher", "mask_fisher"):
            return fisher_scores(self.qasso_state.mean_square, cost)
        if self.config.saliency == "taylor":
            return taylor_scores(self.qasso_state.mean_square, cost)
        # HESSO's sum is not divided by cost as the two above: on a small language model that ended at 2.245 nats
        # instead of 1.755, at equal parameters removed.
        inner = self._sums(named, torch.mul)
        grad_square = self._sums(named, lambda x, g: g * g)
        square = self._sums(named, lambda x, g: x * x)
        return hesso_scores(inner, grad_square, square, cost)

    def _sums(self, named: Named, product: Product) -> Tensor:
        """Return Σ of product(x, g) over each group; a parameter without a gradient counts as g = 0."""
        return group_sums(self._labels or (), named, self.ledger.groups, product)

    def _partition(self, named: Named, done: int, periods: int) -> None:
        """Choose G_R, so that `done` of `periods` of the way is done once it is removed; waits for the device."""
        if not self.families:
            return
        # Processes must agree on every group, but sums in another order may differ in the last digit.
        scores = from_first_process(self._scores(named)).cpu()
        finite = torch.isfinite(scores)
        if not bool(finite.all()):
            worst = self.families[int(self._family[int(finite.logical_not().nonzero()[0])])]
            raise GETAError(
                f"the saliency of {worst.name} is not finite at step {self.step_count}: its weights or gradients "
                f"are NaN or infinite; go back to the last checkpoint with a lower learning rate"
            )
        # Removed groups are out; all others compete again, whatever an earlier period scored them.
        removed = self.removed_mask
        if self.config.split_rule == "even":
            chunks = find_chunks(self.families, scores, removed, Limits.of(self.config))
            if self.target.unit == GROUPS and self._misses_size(chunks, removed):
                # The K groups of least loss are too small for the size that is wanted too.
                scores = from_first_process(self._scores(named, by_size=True)).cpu()
                chunks = find_chunks(self.families, scores, removed, Limits.of(self.config))
            # Line 12: of K groups (p + 1) / P are due at the end of period p, so each period adds about K / P.
            taken = take_due(self.target, self.ledger, chunks, removed, done, periods)
        else:
            taken = self._take_decided(named, scores, removed, done, periods)
        warn_of_equal_scores(self.families, scores, removed, taken)
        self.qasso_state.status[taken] = REDUNDANT
        self._invalidate_slices()

    def _misses_size(self, chunks: Chunks, removed: Tensor) -> bool:
        """Return whether a size that the target sets too is out of reach once all of K are taken in this order."""
        sizes = {unit: budget for unit, budget in self.target.budgets.items() if unit != MEAN_BITS}
        if not sizes:
            return False
        without = removed.clone()
        without[take_due(self.target, self.ledger, chunks, removed, 1, 1)] = True
        lowest = float(self.config.widths[0])
        inputs = torch.tensor(float(self.config.input_widths[0] if self.config.input_widths else FLOAT_BITS))
        return any(
            self.target.spent(unit, self.ledger, without, lowest, inputs) > _SIZE_MARGIN * budget
            for unit, budget in sizes.items()
        )

    def _take_decided(self, named: Named, scores: Tensor, removed: Tensor, done: int, periods: int) -> Tensor:
        """Return the groups that are due of those that the split of the size removes; decide it where it is due.

        Args:
            named: parameters by name.
            scores: of groups, on CPU.
            removed: groups that are removed already.
            done: periods that will be over once these groups are removed.
            periods: of the run.
        """
        first = done == 1
        if first or self.config.split_rule == "late":
            self._decide_split(named, removed)
        wanted = self.qasso_state.decided
        due = math.ceil(int(wanted.sum()) * done / periods) - int(removed.sum())
        left = torch.nonzero(wanted & ~removed).flatten()
        return left[torch.sort(scores[left], stable=True).indices[: max(due, 0)]]

    def _decide_split(self, named: Named, removed: Tensor) -> None:
        """Decide what is removed by the end, and with `early` at which widths the run is trained from now on."""
        choices = bit_choices(self.config)
        state = self.qasso_state
        rounding = measure_errors(
            self.quantizers,
            self.quantizers.read(named),
            self._weight_of(named),
            choices.weights,
            choices.search_clipping,
            choices.four_levels,
        )
        split = decide_split(
            self.families,
            Limits.of(self.config),
            self.ledger,
            self.target,
            Averages(state.mean_square, state.curvature),
            rounding,
            choices,
            self._input_errors(named, choices),
            self.quantizers.input_positions(),
            removed,
            self.config.exchange_rate,
        )
        state.decided = split.removed
        count = int(split.removed.sum())
        logger.info("%d of %d groups are to be removed", count, self.ledger.groups)
        if self.config.split_rule != "early":
            return
        # Inputs of which only the mean is limited are decided when the joint stage ends, as ever.
        inputs = split.bits.input_bits or [0] * len(self.quantizers.input_prefixes)
        self._train_at(dataclasses.replace(split.bits, input_bits=inputs), named, choices)

    def _settle_two_bits(self, named: Named) -> None:
        """Train on the four levels of the end from now on, where weights of 2 bits are all that is allowed."""
        choices = bit_choices(self.config)
        if list(choices.weights) != [FOUR_LEVEL_BITS] or not choices.four_levels or not self.quantizers.prefixes:
            return
        layers, inputs = self.quantizers.weight_layers, len(self.quantizers.input_prefixes)
        bits = BitAllocation([FOUR_LEVEL_BITS] * layers, torch.ones(layers), [0] * inputs, torch.ones(inputs))
        self._train_at(bits, named, choices)

    def _train_at(self, bits: BitAllocation, named: Named, choices: BitChoices) -> None:
        """Train at these widths from now on, 0 standing for an input whose width is decided in the end."""
        decided = torch.tensor([*bits.weight_bits, *bits.input_bits], dtype=torch.float32)
        self.qasso_state.decided_bits = decided.to(self.quantizers.layer.device)
        # At once on the levels of the end, too: what is trained on three has to start anew on four.
        settle_bits(self.quantizers, named, self._weight_of(named), bits, choices)

    # --- lines 16 to 19: forgetting -----------------------------------------------------------------------------------

    def _forget(self, redundant: RedundantSlices, phase: Phase, named: Named) -> Tensor:
        """Forget redundant groups by one step, and return γ, shape (families,)."""
        steps_remaining = phase.length - phase.step  # K_p - k
        if self._gradient_sums is not None:
            # Without a step u there is no Eq. 13; `check_rules` refuses it, so that γ is uniform here.
            return forget_frozen(redundant.slices, named, steps_remaining, len(self.families))
        values = self.quantizers.read(named)
        return redundant.forget(named, values, steps_remaining, self.bit_bounds, self.config)

    @property
    def _removes_at_once(self) -> bool:
        return self.config.compensate

    def _remove(self, redundant: RedundantSlices, named: Named) -> None:
        """Set redundant groups to exactly zero for good, with the base optimizer's state of them."""
        if self._compensation is not None and self._removes_at_once and redundant.slices:
            state = self.qasso_state
            self._compensation.refit(self.ledger.labels, self.families, state.redundant, state.removed)
        zero_slices(redundant.slices, named)
        # Momentum of a zero weight would move it at the next step, and a checkpoint would carry it on.
        zero_moments(redundant.slices, named, self.state)
        status = self.qasso_state.status
        status[status == REDUNDANT] = REMOVED
        self._invalidate_slices()

    def _remove_at_once(self, named: Named) -> None:
        """Remove all that is to be removed, where there is no joint stage to forget it in."""
        self._partition(named, done=1, periods=1)
        self._remove(self._index_slices(named), named)

    # --- line 22: fixing the quantizers -------------------------------------------------------------------------------

    @torch.no_grad()
    def fix_bits(self, choices: BitChoices, choose_inputs: bool = True, rounding: str | None = None) -> None:
        """Give every layer an integer width that meets the target, by these choices; waits for the device.

        Args:
            choices: allowed widths, and the rules.
            choose_inputs: whether widths of inputs are chosen as well; otherwise each is rounded to the nearest.
            rounding: how weights are rounded, as in the config; by default that of the config.

        Raises:
            GETAError: something became NaN or infinite before.
        """
        if not self.quantizers.prefixes:
            return
        named = self._named()
        self._follow_device(named)
        self.check_finite()
        self._form_blocks(named)
        inputs = self._input_errors(named, choices) if choose_inputs else None
        target = self.target
        decided = self.qasso_state.decided_bits
        trained_at = bool((decided > 0).any())
        if trained_at:
            # The run was trained at these widths, so that each is the nearest to the present one.
            target = dataclasses.replace(target, budgets={})
            if bool((decided > 0).all()):
                inputs = None
        round_bits(
            self.quantizers,
            named,
            self._weight_of(named),
            self.curvature,
            self.ledger,
            target,
            self.removed_mask,
            choices,
            inputs,
            levels_decided=trained_at,
        )
        keep_off_zero(self.quantizers, named, self.frozen.names)
        self._index_slices(named)  # lists the removed ones, which are to remain zero
        zero_slices(self._removed, named)
        if self._compensation is not None and (rounding or self.config.rounding) == "compensated":
            self._compensation.round(self.quantizers.own_weights, self.ledger.labels, self.removed_mask)
        self._note_final_quantizers(named)

    def _weight_of(self, named: Named) -> Callable[[str], Tensor | None]:
        """Return what gives a weight by name as the model computes with it; None for one that is not trained."""
        return lambda name: self.frozen.merged(name, named) if name in named else None

    def _form_blocks(self, named: Named) -> None:
        """Form blocks of 32 over the inputs that remain of each weight; nothing changes where they are so already."""
        for prefix, weight in zip(self.quantizers.prefixes, self.quantizers.own_weights, strict=False):
            own = self.quantizers.blocks.get(prefix)
            if own is None or own.channel_dim is None or own.order is None:
                continue
            removed = torch.zeros(len(own.order), dtype=torch.bool)
            for cut in self.ledger.labels:
                if cut.tensor == weight and cut.dim == 1 - own.channel_dim:
                    removed |= marked(cut.label, self.removed_mask)
            self.quantizers.form_blocks(prefix, removed, named)

    def _input_errors(self, named: Named, choices: BitChoices) -> InputErrors | None:
        """Return what rounding inputs is expected to cost at each width; None where none is quantized."""
        if not len(self.qasso_state.input_square):
            return None
        bits = self.quantizers.bits(named)[self.quantizers.weight_layers :]
        search = self.config.clipping == "mse" and not self.config.learn_activation_exponent
        return input_errors(self.qasso_state.input_square, bits, choices.inputs, self._histograms, search)

    def _note_final_quantizers(self, named: Named) -> None:
        names = [name for leaf in ("d", "q_m", "t") for name in self.quantizers.names[leaf] if name in named]
        self._final_quantizers = {name: local(named[name].detach()).clone() for name in names}
        self._final_levels = {prefix: own.four_levels for prefix, own in self.quantizers.modules.items()}

    @torch.no_grad()
    def restore(self) -> None:
        """Set the removed groups to zero again, and d, q_m and t to `(d*, q_m*, t*)` of line 22.

        For weights that were averaged, or otherwise changed, after the joint stage.
        """
        named = self._named()
        self._follow_device(named)
        # Frozen weights too: an average over the run holds what they were before they were removed.
        labels = self.frozen.with_adapters(self._labels or ())
        zero_slices(build_slices(labels, self.qasso_state.removed, self._family, named), named)
        self._form_blocks(named)
        for name, value in self._final_quantizers.items():
            local(named[name].detach()).copy_(value)
        for prefix, four_levels in self._final_levels.items():
            self.quantizers.modules[prefix].set_four_levels(four_levels)

    # --- guards -------------------------------------------------------------------------------------------------------

    def _note_bad(self, phase: Phase, named: Named) -> None:
        """Note values that are not finite, and gradients of zero; raise for them where a stage or period starts."""
        state = self.qasso_state
        cooling = phase.stage == COOLDOWN
        if self.quantizers.prefixes:
            # A frozen weight has no gradient here. That of its B is a product with the same activations and errors.
            stand_ins = {weight: own.b for weight, own in self.frozen.adapters.items()}
            if cooling:  # quantizers are frozen
                gradient = self.quantizers.of_weights(squared_gradients(self.quantizers, named, stand_ins))
            else:
                # A gradient of d sums over the entire weight's, so that one bad value there shows, and d is one number.
                gradient = self.quantizers.gather("d", named, 0.0, gradient=True)
            state.bad_step = note_bad(state.bad_step, self.step_count, self.quantizers, named, gradient)
            if self.step_count <= self._learned_by and not cooling:
                state.learned |= gradient != 0  # NaN counts as learned; `refuse_bad` is there for it
        if phase.starts:
            self.check_finite()
        if self.quantizers.prefixes and self.step_count == self._learned_by:
            self._check_learned(named, stand_ins)

    def _check_learned(self, named: Named, stand_ins: Mapping[str, str]) -> None:
        following = self.schedule.first_start_after(self.step_count + 1)
        done = check_learned(
            self.qasso_state.learned,
            self.quantizers,
            named,
            self.state,
            self.step_count,
            stand_ins,
            adapters={name for own in self.frozen.adapters.values() for name in (own.a, own.b)},
            # In the cool-down quantizers have no gradients.
            last=following < 0 or self.schedule.at(following).stage == COOLDOWN,
        )
        if not done:
            self._learned_by = following

    def check_finite(self) -> None:
        """Raise GETAError when a gradient or a quantizer was NaN or infinite; waits for the device."""
        refuse_bad(self.qasso_state.bad_step, self.quantizers.prefixes)

    # --- where things are ---------------------------------------------------------------------------------------------

    def watch_frozen(self) -> None:
        """Sum gradients of frozen tensors in the stages that score groups; to be called before each backward pass."""
        if self._gradient_sums is not None:
            self._gradient_sums.set_active(self.schedule.averages(self.phase), self._named())

    def _named(self) -> Named:
        return {
            name: parameter
            for group in self.param_groups
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
        }

    def _follow_device(self, named: Named) -> None:
        """Bring what every step reads to where the parameters are, once after the start or a resume."""
        if self._labels is not None:
            return
        device = local(next(iter(named.values()))).device
        # Not in `__init__`, since a model may be moved between there and the first step.
        self._labels = [cut for cut in self.ledger.labels if cut.tensor in named]
        self.quantizers.to(device)
        self.qasso_state.to(device)

    def _index_slices(self, named: Named) -> RedundantSlices:
        """Return the redundant slices, and list them and the removed ones again where the status has changed."""
        if self._redundant is None:
            # Status changes at period boundaries alone, so the indices are made once a period and not in every step.
            labels = self.frozen.with_adapters(self._labels or ())
            slices = build_slices(labels, self.qasso_state.redundant, self._family, named)
            self._redundant = RedundantSlices.of(slices, len(self.families), self.quantizers, self.config)
            # Nothing steps a frozen weight, so it remains zero by itself; its adapters are trained on.
            trained = [cut for cut in labels if cut.tensor not in self.frozen.names]
            self._removed = build_slices(trained, self.qasso_state.removed, self._family, named)
        return self._redundant

    def _invalidate_index(self) -> None:
        """Drop everything derived from the status and the device; it is made again at the next step."""
        self._labels = None
        self._invalidate_slices()

    def _invalidate_slices(self) -> None:
        self._redundant = None
        self._removed = []

    # --- what others read ---------------------------------------------------------------------------------------------

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
        """True once the joint stage is over: all that was to be removed is zero, and widths are integers."""
        return self.step_count >= self.schedule.decided_after

    @property
    def status(self) -> Tensor:
        """uint8, shape (groups,), on CPU: IMPORTANT, REDUNDANT or REMOVED of `qasso.state`."""
        return self.qasso_state.status

    @property
    def mean_square(self) -> Tensor:
        """Moving average of ⟨g, x⟩² of every group, shape (groups,)."""
        return self.qasso_state.mean_square

    @property
    def curvature(self) -> Tensor:
        """Moving average of ‖g‖² of every quantized weight, shape (layers,)."""
        return self.qasso_state.curvature

    @property
    def removed_mask(self) -> Tensor:
        """bool, shape (groups,), on CPU: which groups are exactly zero for good."""
        return self.qasso_state.removed

    @property
    def gone(self) -> Tensor:
        """The former name of `removed_mask`."""
        return self.removed_mask

    @property
    def goal(self) -> Target:
        """The former name of `target`."""
        return self.target

    @property
    def removed(self) -> dict[str, Tensor]:
        """Per family, bool (groups,): which groups are exactly zero for good."""
        removed = self.removed_mask
        starts = family_starts(self.families)
        return {f.name: removed[start : start + f.size] for f, start in zip(self.families, starts, strict=True)}

    @property
    def removed_groups(self) -> int:
        """The number of groups that are exactly zero for good."""
        return int(self.removed_mask.sum())

    @property
    def target_groups(self) -> int | None:
        """K; None where the target is not a number of groups."""
        return self.ledger.groups - int(self.target.amount) if self.target.unit == GROUPS else None

    def bits(self) -> dict[str, float]:
        """Return the present width of every quantizer by its prefix; weights' first. Waits for the device."""
        named = self._named()  # may be asked before the first step
        self.quantizers.to(local(next(iter(named.values()))).device)
        return dict(zip(self.quantizers.prefixes, self.quantizers.bits(named).tolist(), strict=True))

    def mean_gamma(self) -> float:
        """Return the mean forgetting rate of the latest step over families with redundant groups; 0 where none had."""
        if self.gamma is None:
            return 0.0
        active = torch.isfinite(self.gamma)
        return float(self.gamma[active].mean())

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state with QASSO's vectors in that of the first parameter."""
        return store_vectors(self.base.state_dict(), self.qasso_state.vectors())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore exactly. Raise GETAError when the checkpoint is of another space or schedule."""
        ours = self.param_groups[0][_SCHEDULE]
        theirs = state_dict["param_groups"][0].get(_SCHEDULE)
        if theirs != ours:
            raise GETAError(
                f"the optimizer state has stages {theirs}, this run {ours} (warm-up, projection, joint, total steps, "
                f"periods); resume with the same length of training and the same stages"
            )
        # The vectors come out first, as the base optimizer would take them for tensors of its own.
        rest, vectors = restore_vectors(state_dict, self.qasso_state.vectors())
        self.base.load_state_dict(rest)
        self.qasso_state = QASSOState(**vectors)
        self._share_base()
        # Weights are usually loaded before the optimizer's state, and no step may follow.
        self._final_quantizers = {}
        self._resumed = self.finished
        if self._resumed:
            self._note_final_quantizers(self._named())
        # The status is another one now, so the slices listed from the former are stale.
        self._invalidate_index()
