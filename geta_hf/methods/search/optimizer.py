"""The optimizer of a search: it wraps any torch optimizer, trains the choices next to it, and then fixes them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from geta_hf.costs.bit_allocation import BitChoices, LearnedBits
from geta_hf.costs.ledger import Ledger
from geta_hf.costs.quantizer_table import Quantizers
from geta_hf.costs.selection import Limits
from geta_hf.costs.sensitivity import RoundingErrors, measure_errors
from geta_hf.costs.targets import Target
from geta_hf.errors import GETAError
from geta_hf.methods.qasso.checks import check_base, check_covered
from geta_hf.methods.qasso.equations import relative_step
from geta_hf.methods.qasso.slices import Slice, build_slices, group_sums, zero_moments, zero_slices
from geta_hf.methods.rounding import bits_of_entries, fit_four_levels, keep_off_zero, set_four_levels, write_bits
from geta_hf.methods.search.assign import Assignment, Learned, Problem, Rows, assign, likeliest_inputs
from geta_hf.methods.search.choices import WidthChoices, sorted_weights
from geta_hf.methods.search.config import SearchConfig
from geta_hf.methods.search.cost_target import CostTarget
from geta_hf.methods.search.objective import Objective
from geta_hf.methods.search.sampling import one_hot, price_at, sample, temperature_at
from geta_hf.methods.search.schedule import FINETUNING, SEARCH, SearchSchedule
from geta_hf.qadg.group_labels import GroupLabels, family_of_group, family_starts
from geta_hf.qadg.group_types import Family
from geta_hf.quantization.functional import step_size
from geta_hf.quantization.maths import FOUR_LEVEL_BITS
from geta_hf.quantization.quantizer import Quantizer
from geta_hf.utils.shards import from_first_process, shard_of

logger = logging.getLogger(__name__)

Named = dict[str, Tensor]

BOTH, WEIGHTS, CHOICES = "both", "weights", "choices"
"""What a step trains."""

_KEY = "search"
"""Entry of a state dict with all that a search remembers."""


@dataclass(frozen=True)
class Shares:
    """The probabilities of one pass.

    Attributes:
        widths: of each width of each choice, fp32, shape (choices, widths).
        keep: that each group remains, fp32, shape (groups,).
        inputs: of each width of each layer's input, fp32, shape (inputs, widths); None where there is one for all.
        entries: those of `widths` that each row or column follows, shape (entries, widths); None where each layer has
            one choice.
    """

    widths: Tensor
    keep: Tensor
    inputs: Tensor | None = None
    entries: Tensor | None = None


class Search(torch.optim.Optimizer):
    """Warm-up, search and fine-tuning around a base optimizer.

    Args:
        base: any torch optimizer over all trained parameters of the model, quantizers' included.
        names: the model's name of every parameter in `base`.
        families: those that may lose groups.
        quantizers: prefix of the quantizer of each quantized weight.
        schedule: the stages in steps.
        config: rules and limits.
        ledger, target: of the run.
        objective: what the choices are charged for.
        outside: slices that no factor multiplies.
        input_quantizers: prefixes of the quantizers of layers' inputs.
        channel_dims: prefix -> the weight's dimension along which its quantizer has a step size each.
        input_clips: clipping values of inputs at each width that they may have, relative to the present ones, shape
            (inputs, widths); None where all have one width.
        unsigned: prefixes of the quantizers of inputs without negative codes.
        modules: prefix -> the quantizer of a weight itself, which may get four levels. Default None: none may.

    Attributes:
        removed: bool, shape (groups,), on CPU: groups that are exactly zero for good.
        weight_bits: the widths of the quantized weights once they are chosen, the widest of several; before, empty.
        entry_bits: int64, shape (entries,), on CPU: the width of each row or column, where those of a weight differ.
        input_bits: the widths of the quantized inputs once they are chosen.
        clips: clipping values of each quantizer at each width, shape (entries, widths); None before the search.
        four_levels: whether each weight has four levels at 2 bits; in the search those that lose less on them, and
            after it those that ended so.

    Raises:
        GETAError: a base optimizer or a parameter that can't be wrapped, or shards, as under FSDP.
    """

    def __init__(
        self,
        base: torch.optim.Optimizer,
        names: Mapping[Tensor, str],
        families: Sequence[Family],
        quantizers: Mapping[str, str],
        schedule: SearchSchedule,
        config: SearchConfig,
        ledger: Ledger,
        target: Target,
        objective: Objective,
        outside: Sequence[GroupLabels] = (),
        input_quantizers: Sequence[str] = (),
        channel_dims: Mapping[str, int] | None = None,
        input_clips: Tensor | None = None,
        unsigned: Collection[str] = (),
        modules: Mapping[str, Quantizer] | None = None,
    ) -> None:
        super().__init__(base.param_groups, {})
        self.base = base
        self.config = config
        self.schedule = schedule
        self.families = tuple(families)
        self.ledger = ledger
        self.target = target
        self.objective = objective
        for group in base.param_groups:
            group["param_names"] = [names[parameter] for parameter in group["params"]]
        named = self._named()
        check_base(base, named)
        check_covered(named, self.families, quantizers, input_quantizers)
        self._check_complete(named)
        self.quantizers = Quantizers(
            quantizers, input_quantizers, named, channel_dims, unsigned=unsigned, modules=modules
        )
        self.width_choices = WidthChoices.of(config.granularity, self.quantizers, ledger)
        device = next(iter(named.values())).device
        self.widths = list(config.widths)
        # As in the paper's code: the widest width is the likeliest at first.
        start = torch.tensor([width / self.widths[-1] for width in self.widths], device=device)
        self.width_logits = start.repeat(self.width_choices.count, 1).requires_grad_()
        odds = config.initial_keep / (1 - config.initial_keep)
        self.keep_logits = torch.full((ledger.groups,), odds, device=device).log_().requires_grad_()
        # Each process may have measured its inputs on batches of its own.
        self.input_clips = None if input_clips is None else from_first_process(input_clips)
        self.input_logits: Tensor | None = None
        if input_clips is not None:
            widths = config.input_widths
            start = torch.tensor([width / widths[-1] for width in widths], device=device)
            self.input_logits = start.repeat(len(input_clips), 1).requires_grad_()
        self.choices = torch.optim.Adam(self._logits, lr=config.choice_rate(schedule.search))
        choices = ["search.widths", "search.keep", "search.inputs"]
        self.choices.param_groups[0]["param_names"] = choices[: len(self._logits)]
        self._share_base()
        if (cost := self._cost_target()) is not None:
            if input_clips is not None:
                objective.input_shares = one_hot(torch.zeros(len(input_clips), len(config.input_widths)))
            cost.check(narrower=bool(target.budgets))
        self.step_count = 0
        self.removed = ledger.nothing
        self.weight_bits: list[int] = []
        self.entry_bits: Tensor | None = None
        # Until widths are chosen, the widest one, with which inputs are rounded in the warm-up.
        self.input_bits: list[int] = config.input_widths[-1:] * len(self.quantizers.input_prefixes)
        self.clips: Tensor | None = None
        self.four_levels = [False] * self.quantizers.weight_layers
        self.shares: Shares | None = None
        self._outside = list(outside)
        self._family = family_of_group(self.families)
        self._slices: list[Slice] | None = None
        self._entry_bits: Tensor | None = None  # the width of each quantizer's entry, once it is fixed

    @property
    def _logits(self) -> list[Tensor]:
        """The logits of all choices."""
        logits = [self.width_logits, self.keep_logits]
        return logits if self.input_logits is None else [*logits, self.input_logits]

    @staticmethod
    def _check_complete(named: Named) -> None:
        for name, parameter in named.items():
            if shard_of(parameter, name) is not None:
                raise GETAError(
                    f"{name} is split over processes, which the search can't follow; train with DDP instead of FSDP, "
                    f"or use a GETAConfig"
                )

    def _share_base(self) -> None:
        # load_state_dict replaces these containers. Choices are a group as well, so that schedulers and scalers of
        # losses treat them as all others, but the base optimizer does not know it.
        self.param_groups = [*self.base.param_groups, *self.choices.param_groups]
        self.state = self.base.state
        self.defaults = self.base.defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse groups after the start, except those of torch's own constructor."""
        if hasattr(self, "base"):
            raise GETAError("a search takes no further parameters once it has started; give them to the base optimizer")
        super().add_param_group(param_group)

    # --- the forward pass ---------------------------------------------------------------------------------------------

    @property
    def stage(self) -> str:
        """The stage of the next step."""
        return self.schedule.stage(self.step_count)

    @property
    def finished(self) -> bool:
        """True once choices are fixed."""
        return bool(self.weight_bits)

    @property
    def _searched(self) -> int:
        """The number of steps of the search that are done."""
        return max(self.step_count - self.schedule.warmup, 0)

    @property
    def trains(self) -> str:
        """What the next step trains: BOTH, WEIGHTS or CHOICES."""
        if self.stage != SEARCH:
            return WEIGHTS
        if not self.config.architecture_data:
            return BOTH
        return CHOICES if self._searched % 2 else WEIGHTS

    @property
    def temperature(self) -> float:
        """τ of the next step."""
        steps = self.schedule.search
        return temperature_at(self._searched, steps, self.config.temperature, self.config.final_temperature)

    def draw(self) -> Shares:
        """Draw shares for one forward pass; their gradients go on to the choices by themselves."""
        self._follow_device()
        self._measure_clips()
        widths = sample(self.width_logits, self.temperature, self.config.sampling)
        self.shares = Shares(
            _passed_on(widths, self.width_logits),
            _passed_on(sample(self._keep_options, self.temperature, self.config.sampling)[:, 1], self.keep_logits),
        )
        if not self.width_choices.by_layer:
            # Once for all layers: the gradient of each layer's own selection would be a table of all choices.
            entries = _passed_on(widths[self.width_choices.of_entry], self.width_logits)
            self.shares = replace(self.shares, entries=entries)
        if self.input_logits is not None:
            inputs = sample(self.input_logits, self.temperature, self.config.sampling)
            self.shares = replace(self.shares, inputs=_passed_on(inputs, self.input_logits))
        return self.shares

    @property
    def _keep_options(self) -> Tensor:
        """Logits of removal and of remaining, shape (groups, 2)."""
        return torch.stack([torch.zeros_like(self.keep_logits), self.keep_logits], dim=1)

    def likeliest(self) -> Shares:
        """Return the likeliest choice, without gradients."""
        self._follow_device()
        self._measure_clips()
        inputs = None if self.input_logits is None else one_hot(self.input_logits)
        widths = one_hot(self.width_logits)
        entries = None if self.width_choices.by_layer else widths[self.width_choices.of_entry]
        return Shares(widths, (self.keep_logits.detach() > 0).float(), inputs, entries)

    def expected(self) -> Shares:
        """Return the present probabilities, without noise and gradients."""
        self._follow_device()
        widths = sample(self.width_logits.detach(), self.temperature)
        inputs = None if self.input_logits is None else sample(self.input_logits.detach(), self.temperature)
        return Shares(widths, sample(self._keep_options.detach(), self.temperature)[:, 1], inputs)

    def chosen_inputs(self) -> Tensor | None:
        """Return the widths of inputs that are fixed as shares, shape (inputs, widths); None where there is one."""
        if self.input_logits is None:
            return None
        steps = torch.searchsorted(torch.tensor(self.config.input_widths), torch.tensor(self.input_bits))
        shares = torch.nn.functional.one_hot(steps, self.input_logits.shape[1])
        return shares.float().to(self.input_logits.device)

    def chosen_widths(self) -> Tensor:
        """Return the widths that are fixed as shares of the choices, shape (choices, widths)."""
        bits = torch.tensor(self.weight_bits, dtype=torch.int64)
        choices = self.width_choices
        if not choices.by_layer:
            entries = bits[choices.layer.cpu()] if self.entry_bits is None else self.entry_bits
            bits = torch.full((choices.count,), self.widths[0])
            bits[choices.of_entry.cpu()] = entries
        steps = torch.searchsorted(torch.tensor(self.widths), bits)
        return torch.nn.functional.one_hot(steps, len(self.widths)).float().to(self.width_logits.device)

    def loss(self) -> Tensor | None:
        """Return what is added to the loss, 0-d; None where choices are not trained."""
        if self.trains == WEIGHTS or self.shares is None:
            return None
        ramp = price_at(self._searched, self.schedule.search, 1.0)
        shares = self.width_choices.by_weight(self.shares.keep, self.shares.widths)
        self.objective.input_shares = self.shares.inputs
        return self.objective.loss(self.shares.keep, shares, ramp)

    def _measure_clips(self) -> None:
        """Search clipping values for every width, once, when the search starts; waits for the device."""
        if self.clips is None:
            named = self._named()
            _, q_m, _ = self.quantizers.read(named)
            found = self._rounding_errors(named, self.config.four_levels)
            factors = found.clips.to(q_m.device)
            self.clips = q_m[: len(factors), None] * factors
            if found.four_levels is not None:
                self.four_levels = found.four_levels.tolist()

    def _rounding_errors(self, named: Named, four_levels: bool = False) -> RoundingErrors:
        values = self.quantizers.read(named)
        search = self.config.clipping == "mse"
        return measure_errors(self.quantizers, values, named.get, self.widths, search, four_levels)

    # --- steps --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Do one update of weights and choices; fix the choices after the last step of the search.

        Args:
            closure: re-evaluates the loss, as in torch.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        named = self._named()
        self._follow_device()
        stage = self.stage
        trains = self.trains
        if trains != WEIGHTS:
            self._step_choices(named)
        # Gradients of choices that are not trained in this step; Trainer sets those of the model alone to zero.
        self.choices.zero_grad()
        if stage == FINETUNING:
            self._step_with_clipping(named)
        elif trains != CHOICES:
            for name in self._quantizer_names(named):
                named[name].grad = None  # a base optimizer skips what has no gradient
            self.base.step()
        self.shares = None
        self.step_count += 1
        if self.step_count == self.schedule.decided_after:
            self._decide(named)
        elif self.finished:
            zero_slices(self._removed_slices(named), named)
        return loss

    def _step_choices(self, named: Named) -> None:
        if self._outside and self.keep_logits.grad is not None:
            inner = group_sums(self._outside, named, self.ledger.groups, torch.mul)
            keep = torch.sigmoid(self.keep_logits / self.temperature)
            # Gradients of weights are averaged over processes already, and so is this; those below are not yet.
            own = inner * keep * (1 - keep) / self.temperature
        else:
            own = None
        for logits in self._logits:
            if logits.grad is not None:
                _average_over_processes(logits.grad)
        if own is not None and self.keep_logits.grad is not None:
            self.keep_logits.grad += own
        self.choices.step()

    def _step_with_clipping(self, named: Named) -> None:
        """Step weights, and each q_m with d in proportion, so that widths remain what they are."""
        names = [prefix for prefix in self.quantizers.prefixes if named[f"{prefix}.q_m"].grad is not None]
        clips = [named[f"{prefix}.q_m"] for prefix in names]
        before = [clip.detach().clone() for clip in clips]
        for prefix, clip in zip(names, clips, strict=True):
            d = named[f"{prefix}.d"]
            assert clip.grad is not None
            # ∂f/∂(log q_m) at a fixed width, which d follows; the base optimizer's step is then a share of q_m.
            of_log = clip.grad * clip
            if d.grad is not None:
                of_log = of_log + d.grad * d
            clip.grad = of_log
            d.grad = None
            clip.detach().zero_()  # from 0 the base optimizer arrives at its step itself
        try:
            self.base.step()
        except BaseException:
            for clip, value in zip(clips, before, strict=True):
                clip.detach().copy_(value)
            raise
        for clip, value in zip(clips, before, strict=True):
            clip.detach().copy_(relative_step(value, clip.detach()))
        if clips:
            self._set_step_sizes(named)

    def _set_step_sizes(self, named: Named) -> None:
        """Set each d to the step size of its width."""
        _, q_m, t = self.quantizers.read(named)
        if self._entry_bits is None or self._entry_bits.device != q_m.device:
            bits = bits_of_entries(self.quantizers, self.weight_bits, self.input_bits, self.entry_bits)
            self._entry_bits = bits.to(q_m.device)
        self.quantizers.write_step_sizes(step_size(self._entry_bits + self.quantizers.extra, q_m, t), named)

    def _quantizer_names(self, named: Named) -> list[str]:
        return [name for leaf in ("d", "q_m", "t") for name in self.quantizers.names[leaf] if name in named]

    # --- the decision -------------------------------------------------------------------------------------------------

    def _decide(self, named: Named) -> None:
        """Fix the choices within the targets, and make the model what they say; waits for the device."""
        self.check_finite()
        found = self._assignment(named)
        chosen, four_levels = found.bits, None
        if self.config.four_levels and FOUR_LEVEL_BITS in self.widths:
            chosen, four_levels = fit_four_levels(
                self.quantizers, named, named.get, chosen, self.config.clipping == "mse"
            )
        write_bits(self.quantizers, named, chosen, four_levels)
        self.four_levels = self._levels_of_quantizers()
        keep_off_zero(self.quantizers, named)
        self.weight_bits = list(found.bits.weight_bits)
        self.entry_bits = found.bits.entry_bits
        self.input_bits = list(found.bits.input_bits)
        self.removed = found.removed
        self._slices = None
        slices = self._removed_slices(named)
        zero_slices(slices, named)
        zero_moments(slices, named, self.state)
        self.clips = None
        logger.info("%d of %d groups are removed", int(self.removed.sum()), self.ledger.groups)

    def _levels_of_quantizers(self) -> list[bool]:
        modules = self.quantizers.modules
        prefixes = self.quantizers.prefixes[: self.quantizers.weight_layers]
        found = [modules.get(prefix) for prefix in prefixes]
        return [own is not None and (own.four_levels or own.some_four_levels) for own in found]

    def _assignment(self, named: Named) -> Assignment:
        bits = self.quantizers.bits(named).cpu().double()
        count = self.quantizers.weight_layers
        inputs = self._chosen_inputs(bits[count:])
        problem = Problem(
            self.families,
            Limits.of(self.config),
            self.ledger,
            self.target,
            Learned.of(self.width_logits, self.keep_logits),
            self._rounding_errors(named),
            BitChoices(self.widths, self.config.input_widths or self.widths),
            LearnedBits(bits[:count], inputs, self.quantizers.input_positions()),
            self._rows(),
        )
        return assign(problem, self._input_factors(inputs), self._cost_target())

    def _rows(self) -> Rows | None:
        """Return what is needed to choose a width for each row or column; None where each layer has one choice."""
        if self.width_choices.by_layer:
            return None
        self.width_choices.to(torch.device("cpu"))
        weights = dict(zip(self.quantizers.own_weights, self.quantizers.prefixes, strict=False))
        spans = {weight: self.quantizers.spans[prefix] for weight, prefix in weights.items()}
        return Rows(self.width_choices, spans, sorted_weights(self.families, self.width_choices, self.quantizers))

    def _chosen_inputs(self, present: Tensor) -> Tensor:
        """Return the widths of inputs, float64, shape (inputs,): the likeliest ones of the planned mean at most."""
        if self.input_logits is None:
            return present
        logits = from_first_process(self.input_logits.detach()).cpu().double()
        bits = likeliest_inputs(logits, self.config.input_widths, self.target.input_bits)
        steps = torch.searchsorted(torch.tensor(self.config.input_widths, dtype=torch.float64), bits)
        self.objective.to(torch.device("cpu"))
        self.objective.input_shares = torch.nn.functional.one_hot(steps, logits.shape[1]).float()
        return bits

    def _input_factors(self, bits: Tensor) -> Tensor:
        """Return what each input's q_m is to be multiplied by for its width, shape (inputs,)."""
        if self.input_clips is None:
            return torch.ones(len(bits))
        steps = torch.searchsorted(torch.tensor(self.config.input_widths, dtype=torch.float64), bits)
        return self.input_clips.cpu()[torch.arange(len(bits)), steps]

    def _cost_target(self) -> CostTarget | None:
        """Return what a hardware cost allows, on CPU; None where nothing limits it."""
        if self.objective.target_cost is None:
            return None
        self.objective.to(torch.device("cpu"))
        self.width_choices.to(torch.device("cpu"))
        return CostTarget(self.families, Limits.of(self.config), self.ledger, self.objective, self.width_choices)

    def _removed_slices(self, named: Named) -> list[Slice]:
        if self._slices is None:
            labels = [cut for cut in self.ledger.labels if cut.tensor in named]
            self._slices = build_slices(labels, self.removed, self._family, named)
        return self._slices

    @torch.no_grad()
    def restore(self) -> None:
        """Set removed groups to zero, and every quantizer to its width, again."""
        named = self._named()
        self._follow_device()
        zero_slices(self._removed_slices(named), named)
        bits = bits_of_entries(self.quantizers, self.weight_bits, self.input_bits, self.entry_bits)
        set_four_levels(self.quantizers, bits, torch.tensor(self.four_levels))
        self._set_step_sizes(named)

    def masks(self) -> dict[str, Tensor]:
        """Return by family, bool, shape (groups,): which groups are exactly zero for good."""
        starts = family_starts(self.families)
        pairs = zip(self.families, starts, strict=True)
        return {family.name: self.removed[start : start + family.size] for family, start in pairs}

    # --- guards and devices -------------------------------------------------------------------------------------------

    def check_finite(self) -> None:
        """Raise GETAError where a choice became NaN or infinite; waits for the device."""
        for what, logits in zip(("widths", "groups", "widths of inputs"), self._logits, strict=False):
            if not bool(torch.isfinite(logits).all()):
                raise GETAError(
                    f"the search's choice of {what} was NaN or infinite by step {self.step_count}. Lower "
                    f"choice_learning_rate or the learning rate, and resume from a checkpoint of an earlier step"
                )

    def _named(self) -> Named:
        return {
            name: parameter
            for group in self.base.param_groups
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
        }

    def _follow_device(self) -> None:
        """Bring the choices to where the parameters are; a model may be moved before the first step."""
        device = next(iter(self.base.param_groups[0]["params"])).device
        self.quantizers.to(device)
        self.objective.to(device)
        self.width_choices.to(device)
        for logits in self._logits:
            if logits.device != device:
                logits.data = logits.data.to(device)
                for name, value in self.choices.state.get(logits, {}).items():
                    if isinstance(value, Tensor) and value.dim():
                        self.choices.state[logits][name] = value.to(device)
        if self.clips is not None:
            self.clips = self.clips.to(device)
        if self.input_clips is not None:
            self.input_clips = self.input_clips.to(device)

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state, with that of the search next to it."""
        own = {
            "schedule": list(astuple(self.schedule)),
            "step": self.step_count,
            "widths": self.width_logits.detach().clone(),
            "keep": self.keep_logits.detach().clone(),
            "inputs": None if self.input_logits is None else self.input_logits.detach().clone(),
            "input_bits": list(self.input_bits),
            "choices": self.choices.state_dict(),
            "removed": self.removed.clone(),
            "weight_bits": list(self.weight_bits),
            "entry_bits": None if self.entry_bits is None else self.entry_bits.clone(),
            "clips": None if self.clips is None else self.clips.clone(),
            "four_levels": list(self.four_levels),
        }
        return {**self.base.state_dict(), _KEY: own}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore exactly. Raise GETAError where the state is of another method, model or schedule."""
        own = state_dict.get(_KEY)
        if own is None:
            raise GETAError("the optimizer state is not that of a search; resume with the config that it was saved by")
        ours = list(astuple(self.schedule))
        if own["schedule"] != ours:
            raise GETAError(
                f"the optimizer state has stages {own['schedule']}, this run {ours} (warm-up, search, total steps); "
                f"resume with the same length of training and the same stages"
            )
        for name, mine in zip(("widths", "keep", "inputs"), self._logits, strict=False):
            theirs = own.get(name)
            if theirs is None or theirs.shape != mine.shape:
                raise GETAError(
                    f"the optimizer state has choices of {name} of shape "
                    f"{None if theirs is None else tuple(theirs.shape)}, not {tuple(mine.shape)}: it is of another "
                    f"model or config"
                )
            mine.detach().copy_(theirs)
        self.input_bits = list(own.get("input_bits", self.input_bits))
        self.base.load_state_dict({name: value for name, value in state_dict.items() if name != _KEY})
        self.choices.load_state_dict(own["choices"])
        self._share_base()
        self.step_count = own["step"]
        self.removed = own["removed"].cpu()
        self.weight_bits = list(own["weight_bits"])
        entries = own.get("entry_bits")  # checkpoints of before have none
        self.entry_bits = None if entries is None else entries.cpu()
        self._entry_bits = None
        self.four_levels = list(own.get("four_levels", self.four_levels))
        clips = own["clips"]
        self.clips = None if clips is None else clips.to(self.width_logits.device)
        self.shares = None
        self._slices = None


def _passed_on(values: Tensor, logits: Tensor) -> Tensor:
    """Return values as a leaf whose gradient goes on to the logits whenever there is some.

    Activation checkpointing runs a backward pass for each part of the model, and each of them would free the graph that
    leads from the logits to the values, which all parts share.
    """
    leaf = values.detach().requires_grad_()

    def pass_on(done: Tensor) -> None:
        (grad,) = torch.autograd.grad(values, logits, done.grad, retain_graph=True)
        done.grad = None
        logits.grad = grad if logits.grad is None else logits.grad + grad

    leaf.register_post_accumulate_grad_hook(pass_on)
    return leaf


def _average_over_processes(grad: Tensor) -> None:
    """Average a gradient over all processes, in place, as DDP does for those of the model's parameters."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(grad)
        grad /= dist.get_world_size()
