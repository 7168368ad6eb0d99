"""The search as a `Method`, with its functions in the order in which a trainer calls them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from geta_hf.config import CompressionConfig
from geta_hf.costs.expected_sizes import ExpectedSizes
from geta_hf.costs.hardware import LatencyTable, LayerShape
from geta_hf.costs.input_sensitivity import error_shares
from geta_hf.costs.targets import BOPS
from geta_hf.errors import GETAError
from geta_hf.methods.base import Batches, CompressionResult, Method, Run, StepMemory
from geta_hf.methods.parameter_groups import (
    add_quantizer_group,
    check_names,
    quantizer_parameters,
    weight_quantizers,
)
from geta_hf.methods.search.choices import find_by_input
from geta_hf.methods.search.config import SearchConfig
from geta_hf.methods.search.keep_factors import KeepFactor, Sides, place_factors
from geta_hf.methods.search.objective import HardwareCost, InputChoices, Objective, layer_cost
from geta_hf.methods.search.optimizer import CHOICES, Search, Shares
from geta_hf.methods.search.schedule import FINETUNING, SEARCH, STAGES, SearchSchedule
from geta_hf.qadg import PruningSpace
from geta_hf.quantization import (
    attach_input_quantizers,
    attach_quantizers,
    freeze_quantizers,
    input_quantizer_prefixes,
    quantized_layers,
    quantizer_prefixes,
    select_layers,
)
from geta_hf.quantization.clipping import Histogram
from geta_hf.quantization.fixed import output_dim
from geta_hf.quantization.functional import FLOAT_BITS
from geta_hf.quantization.layer_types import CONVOLUTIONS
from geta_hf.quantization.mixture import Mixture, levels_of
from geta_hf.quantization.quantizer import Quantizer
from geta_hf.utils.module_state import eval_mode

_INITIAL_BITS = 16


class SearchMethod(Method):
    """Choose removed groups and widths by gradients, then fine-tune (arXiv 2407.01054).

    Args:
        config: a SearchConfig.

    Attributes:
        optimizer: None before `wrap_optimizer`.
    """

    stages = STAGES
    follows_shards = False

    def __init__(self, config: CompressionConfig) -> None:
        super().__init__(config)
        if not isinstance(config, SearchConfig):
            raise GETAError(f"a search is set by a SearchConfig, not by a {type(config).__name__}")
        self.config: SearchConfig = config
        self.optimizer: Search | None = None
        self._table = None if config.latency_table is None else LatencyTable.load(config.latency_table)
        self._positions: dict[str, tuple[int, int]] = {}
        self._mixtures: dict[str, list[Any]] = {}
        self._input_layers: dict[str, Any] = {}
        # Of inputs with a sign, and of those without.
        self._input_levels: tuple[Tensor, Tensor] | None = None
        self._factors: list[KeepFactor] = []
        self._labels: list[Tensor] = []
        # Of weights with whole steps, and of those with four levels at 2 bits.
        self._levels: tuple[Tensor, Tensor] | None = None
        self._space: PruningSpace | None = None
        self._stage: str | None = None

    # --- before training ----------------------------------------------------------------------------------------------

    def check_stages(self, total_steps: int, steps_per_epoch: float) -> None:
        """Raise GETAError where the stages do not fit into a run of this length."""
        unknown = math.isnan(steps_per_epoch)
        if unknown and any("epoch" in str(stage) for stage in (self.config.warmup, self.config.search)):
            return
        SearchSchedule.of(self.config, total_steps, steps_per_epoch)

    def attach(self, model: nn.Module, batches: Batches | None) -> None:
        """Put quantizers on weights, and on layers' inputs where the config gives activations a width, in place.

        Args:
            model: dense.
            batches: where ranges of inputs and sizes of outputs are measured; without, they start at 1.
        """
        config = self.config
        if self._table is not None:
            # Before anything is changed on the model.
            self._table.check(self._shapes_of(model), config.widths)
        attach_quantizers(
            model,
            include=config.include,
            exclude=config.exclude,
            initial_bits=_INITIAL_BITS,
            target_bits=config.bits[1],
            clipping=config.clipping,
            per_channel=config.per_channel,
            by_input=self._find_by_input(model),
        )
        if config.activation_bits is not None:
            self._attach_inputs(model, batches, config.input_widths[-1])
        freeze_quantizers(model)
        if batches is not None and config.cost != "none":
            self._positions = _output_sizes(model, batches)

    def prepare(self, space: PruningSpace) -> None:
        """Take the groups, whose columns have widths of their own where the config says so."""
        self._space = space

    def _find_by_input(self, model: nn.Module) -> list[str]:
        """Return the layers that have a step size for each input: those whose inputs alone belong to groups."""
        if self.config.granularity != "group":
            return []
        if self._space is None:
            return list(self.by_input)
        layers = select_layers(model, self.config.include, self.config.exclude)
        dims = {f"{name}.weight": output_dim(layer) for name, layer in layers.items()}
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        families = self._space.trainable
        members = [
            replace(family, members=tuple(member for member in family.members if member.tensor in shapes))
            for family in families
        ]
        found = find_by_input([family for family in members if family.members], shapes, dims)
        # A depthwise or grouped convolution has no column for each input.
        grouped = {f"{name}.weight" for name, layer in layers.items() if getattr(layer, "groups", 1) > 1}
        return [name.removesuffix(".weight") for name in found - grouped]

    def _attach_inputs(self, model: nn.Module, batches: Batches | None, bits: int) -> None:
        if batches is not None:
            given = batches(self.config.calibration_batches)
            attach_input_quantizers(
                model,
                given,
                initial_bits=bits,
                target_bits=bits,
                clipping=self.config.clipping,
                unsigned=self.config.unsigned_inputs,
            )
            return
        for name, layer in quantized_layers(model).items():
            start = torch.ones(1, device=layer.weight.device)  # the shapes are all that is asked for
            layer.input_quantizer = Quantizer(start, bits, device=start.device, unsigned=name in self.unsigned)

    def memory(self, model: nn.Module, space: PruningSpace, removed_groups: int) -> StepMemory:
        """Count the choices with Adam's state, the clipping values, and the histogram of one weight at a time."""
        layers = quantized_layers(model)
        entries = sum(layer.weight_quantizer.d.numel() for layer in layers.values())
        groups = sum(family.size for family in space.trainable)
        widths = len(self.config.widths)
        choices = {"layer": len(layers), "group": len(layers) + groups, "row": entries}[self.config.granularity]
        of_inputs = len(layers) * len(self.config.input_widths) if len(self.config.input_widths) > 1 else 0
        # A logit has its gradient and Adam's two moments with it; a table says which choice each entry follows.
        kept = 4 * (entries * widths + 4 * (choices * widths + groups + of_inputs))
        if self.config.granularity != "layer":
            kept += 3 * 8 * entries
        return StepMemory(kept, max((layer.weight.numel() * 16 for layer in layers.values()), default=0))

    # --- in training --------------------------------------------------------------------------------------------------

    def wrap_optimizer(
        self, base: torch.optim.Optimizer, names: Mapping[Tensor, str], model: nn.Module, run: Run
    ) -> torch.optim.Optimizer:
        """Return a Search around `base`, with quantizers in a parameter group of their own.

        Raises:
            GETAError: stages that do not fit into the run, or an optimizer that can't be wrapped.
        """
        config = self.config
        check_names(base, names)
        add_quantizer_group(base, quantizer_parameters(model), config.quantizer_learning_rate)
        families = run.space.trainable
        if config.wants_removal and not families:
            raise GETAError(
                "bit_choices has 0, which removes groups, but no family may be pruned; leave 0 out, or name families "
                "by prune"
            )
        prefixes = quantizer_prefixes(model)
        layers = quantized_layers(model)
        first = {prefix: weight for weight, prefix in reversed(list(prefixes.items()))}
        # Layers whose weights are tied share the choice of the first one.
        own_weight = {f"{name}.weight": first[prefixes[f"{name}.weight"]] for name in layers}
        sides = {f"{name}.weight": _sides(layer) for name, layer in layers.items()}
        factors, outside = place_factors(families, run.ledger.shapes, sides)
        self._factors = factors
        self._mixtures = {}
        for name, layer in layers.items():
            self._mixtures.setdefault(own_weight[f"{name}.weight"], []).append(layer)
        channel_dims = {
            f"{name}.weight_quantizer": layer.weight_quantizer.channel_dim
            for name, layer in layers.items()
            if layer.weight_quantizer.channel_dim is not None
        }
        inputs = list(input_quantizer_prefixes(model).values())
        self._input_layers = {prefix: layers[name] for name, prefix in input_quantizer_prefixes(model).items()}
        places = {name: position for position, name in enumerate(input_quantizer_prefixes(model))}
        own_inputs = [places.get(layer.weight.removesuffix(".weight"), -1) for layer in run.ledger.layers]
        sizes = ExpectedSizes(families, run.ledger, bool(inputs))
        self.optimizer = Search(
            base,
            names,
            families,
            prefixes,
            SearchSchedule.of(config, run.total_steps, run.steps_per_epoch),
            config,
            run.ledger,
            run.target,
            Objective(
                sizes,
                run.target,
                config.widths,
                config.strength,
                self._hardware(model, run),
                config.cost_weight,
                config.target_cost,
                self._input_choices(own_inputs, run),
            ),
            outside,
            inputs,
            channel_dims,
            self._input_clips(model, inputs),
            [prefix for prefix in inputs if model.get_submodule(prefix).unsigned],
            weight_quantizers(model),
        )
        self._stage = None
        self.optimizer.register_step_post_hook(lambda *_: self._show_likeliest())
        return self.optimizer

    def _input_choices(self, inputs: Sequence[int], run: Run) -> InputChoices | None:
        """Return the choices of widths of inputs; None where all have one.

        Args:
            inputs: for each quantized weight the position of its layer's input; -1 where it is float.
            run: with the target.
        """
        widths = self.config.input_widths
        if len(widths) < 2:
            return None
        mean = None if self.config.wanted_mean_input_bits is None else run.target.input_bits
        values = torch.tensor([float(width) for width in widths])
        return InputChoices(values, torch.tensor(list(inputs), dtype=torch.int64), mean)

    def _input_clips(self, model: nn.Module, prefixes: Sequence[str]) -> Tensor | None:
        """Return the clipping values of inputs at each width, relative to the present ones, shape (inputs, widths)."""
        widths = self.config.input_widths
        if len(widths) < 2:
            return None
        clips = torch.ones(len(prefixes), len(widths))
        for position, prefix in enumerate(prefixes):
            own: Any = model.get_submodule(prefix)
            if isinstance(own.histogram, Histogram):
                steps = [width + own.unsigned for width in widths]
                clips[position] = error_shares(own.histogram, steps, self.config.clipping == "mse")[1]
        return clips

    def _hardware(self, model: nn.Module, run: Run) -> HardwareCost | None:
        if self.config.cost == "none":
            return None
        if self._table is not None:
            self._table.check(self._shapes_of(model), self.config.widths)
        shapes = {f"{shape.name}.weight": shape for shape in self._shapes_of(model)}
        own = [shapes[layer.weight] for layer in run.ledger.layers]
        input_bits = FLOAT_BITS if self.config.activation_bits is None else self.config.input_widths[-1]
        dims = {f"{name}.weight": output_dim(layer) for name, layer in quantized_layers(model).items()}
        cost = layer_cost(self.config.cost, input_bits, self._table)
        return HardwareCost(cost, own, dims)

    def _shapes_of(self, model: nn.Module) -> list[LayerShape]:
        """Return the shapes of the layers that are quantized, or would be."""
        layers = quantized_layers(model) or select_layers(model, self.config.include, self.config.exclude)
        return [_shape_of(name, layer, self._positions.get(name, (1, 1))) for name, layer in layers.items()]

    def before_backward(self, model: nn.Module) -> None:
        """Put the shares of one forward pass on the layers.

        Args:
            model: the plain one, not a wrapper.
        """
        optimizer = self.optimizer
        if optimizer is None:
            return
        self._follow_stage(model)
        if optimizer.stage == SEARCH:
            self._show(optimizer.draw())

    def _follow_stage(self, model: nn.Module) -> None:
        """Let clipping values learn in fine-tuning; at the change alone, as it walks all modules."""
        optimizer = self.optimizer
        if optimizer is None or optimizer.stage == self._stage:
            return
        self._stage = optimizer.stage
        learns = self._stage == FINETUNING and self.config.quantizer_learning_rate > 0
        freeze_quantizers(model, not learns)
        if self._stage != SEARCH:
            self._hide()

    def _show_likeliest(self) -> None:
        """Let layers compute on the likeliest choice until the next training pass, as in an evaluation."""
        optimizer = self.optimizer
        if optimizer is None:
            return
        if optimizer.stage == SEARCH:
            self._show(optimizer.likeliest())
        elif self._stage == SEARCH:
            self._hide()

    def _hide(self) -> None:
        for layers in self._mixtures.values():
            for layer in layers:
                layer.mixture = None
        for layer in self._input_layers.values():
            layer.input_mixture = None

    def _show(self, shares: Shares) -> None:
        optimizer = self.optimizer
        assert optimizer is not None and optimizer.clips is not None
        device = shares.keep.device
        if self._levels is None or self._levels[0].device != device:
            whole, four = (levels_of(self.config.widths, device, four_levels) for four_levels in (False, True))
            self._levels = (whole, four)
            self._labels = [factor.label.to(device) for factor in self._factors]
        if shares.inputs is not None:
            self._show_inputs(shares.inputs)
        # One entry more, for indices that belong to no group and remain.
        keep = torch.cat([shares.keep, shares.keep.new_ones(1)])
        factors: dict[tuple[str, bool], Tensor] = {}
        for factor, label in zip(self._factors, self._labels, strict=True):
            factors[factor.weight, factor.outputs] = keep[label]
        table = optimizer.quantizers
        by_weight = _by_weight(shares, [table.spans[table.weights[weight]] for weight in table.own_weights])
        rows = zip(table.own_weights, by_weight, optimizer.four_levels, strict=True)
        for weight, own_shares, four_levels in rows:
            prefix = table.weights[weight]
            span = table.spans[prefix]
            areas = self._mixtures[weight][0].weight[0, 0].numel()
            along = partial(_along_weight, dim=table.channel_dims.get(prefix), area=areas)
            mixture = Mixture(
                own_shares.view(-1, 1, 1) if shares.entries is None else along(own_shares),
                along(optimizer.clips[span]),
                self._levels[four_levels],
                factors.get((weight, False)),
                factors.get((weight, True)),
            )
            for layer in self._mixtures[weight]:
                layer.mixture = mixture

    def _show_inputs(self, shares: Tensor) -> None:
        """Let layers round their inputs to the mixture of their widths."""
        optimizer = self.optimizer
        assert optimizer is not None and optimizer.input_clips is not None
        if self._input_levels is None or self._input_levels[0].device != shares.device:
            signed = levels_of(self.config.input_widths, shares.device)
            unsigned = levels_of([width + 1 for width in self.config.input_widths], shares.device)
            self._input_levels = (signed, unsigned)
        for position, layer in enumerate(self._input_layers.values()):
            own = layer.input_quantizer
            clips = optimizer.input_clips[position] * own.q_m.detach()
            levels = self._input_levels[own.unsigned]
            layer.input_mixture = Mixture(shares[position].view(-1, 1, 1), clips.view(-1, 1, 1), levels)

    def extra_loss(self, model: nn.Module) -> Tensor | None:
        """Return what the choices are charged for, 0-d; None outside of the search."""
        return None if self.optimizer is None else self.optimizer.loss()

    @property
    def held_out_share(self) -> float:
        """The share of the training rows that choices alone are trained on."""
        return self.config.architecture_data

    @property
    def on_held_out_rows(self) -> bool:
        """Whether the next step trains choices alone."""
        return self.optimizer is not None and self.optimizer.trains == CHOICES

    def check_finite(self) -> None:
        """Raise GETAError where a choice became NaN or infinite; waits for the device."""
        if self.optimizer is not None:
            self.optimizer.check_finite()

    @property
    def step_count(self) -> int:
        """The number of optimizer steps done so far."""
        return 0 if self.optimizer is None else self.optimizer.step_count

    @property
    def finished(self) -> bool:
        """True once the choices are fixed: groups are zero and widths are integers."""
        return self.optimizer is not None and self.optimizer.finished

    @property
    def removed_groups(self) -> int:
        """The number of groups that are zero for good by now."""
        return 0 if self.optimizer is None else int(self.optimizer.removed.sum())

    @property
    def stage(self) -> str:
        """The stage of the next step: `warm-up`, `search` or `fine-tuning`."""
        return STAGES[0] if self.optimizer is None else self.optimizer.stage

    def metrics(self) -> dict[str, float]:
        """Return the names of QASSO's metrics, and while choices are open `excess` of the targets and `temperature`.

        `stage` is 1 in warm-up, 2 in the search and 3 in fine-tuning. Until choices are fixed, `sparsity`, widths and
        BOPs are those that their probabilities let expect. Waits for the device.

        Raises:
            GETAError: training has not started.
        """
        optimizer = self.optimizer
        if optimizer is None:
            raise GETAError("training has not started, so there is no compression state")
        objective = optimizer.objective
        expected = optimizer.expected()
        keep, shares = expected.keep, expected.widths
        if optimizer.finished:
            keep = (~optimizer.removed).float().to(keep.device)
            shares = optimizer.chosen_widths()
        shares = optimizer.width_choices.by_weight(keep, shares)
        objective.input_shares = expected.inputs if not optimizer.finished else optimizer.chosen_inputs()
        bits = objective.bits(shares)
        used = self._used_widths(shares)
        weights = objective.sizes.weights(keep)
        found = {
            "stage": STAGES.index(self.stage) + 1,
            "sparsity": round(1 - float(keep.sum()) / max(len(keep), 1), 4),
            "mean_bits": round(float((weights * bits).sum() / weights.sum()), 3),
            "min_bits": used[0] if optimizer.finished else round(float(bits.min()), 3),
            "max_bits": used[1] if optimizer.finished else round(float(bits.max()), 3),
            "relative_bops": round(float(objective.sizes.amount(BOPS, keep, bits, objective.bits_of_inputs())), 5),
        }
        if objective.hardware is not None:
            found["relative_cost"] = round(float(objective.hardware_cost(keep, shares)), 5)
        if objective.inputs is not None and objective.input_shares is not None:
            found["mean_input_bits"] = round(float((objective.input_shares @ objective.inputs.widths).mean()), 3)
        if not optimizer.finished:
            found["excess"] = round(float(objective.excess(keep, shares).sum()), 4)
            found["temperature"] = round(optimizer.temperature, 4)
        return found

    def _used_widths(self, shares: Tensor) -> tuple[float, float]:
        """Return the narrowest and the widest width that any row or column has a share of."""
        used = torch.nonzero(shares.sum(0) > 0).flatten().tolist()
        return float(self.config.widths[used[0]]), float(self.config.widths[used[-1]])

    # --- after training -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        """Set removed groups to zero and quantizers to their widths again, in place.

        Raises:
            GETAError: the choices are not fixed yet.
        """
        optimizer = self._finished_optimizer()
        for name, parameter in quantizer_parameters(model, trained=False).items():
            if name.endswith(".t"):
                parameter.fill_(1.0)  # exponents are not learned
        optimizer.restore()

    def result(self) -> CompressionResult:
        """Return removed groups by family and integer widths by module path.

        Raises:
            GETAError: the choices are not fixed yet.
        """
        optimizer = self._finished_optimizer()
        table = optimizer.quantizers
        bits = dict(zip(table.prefixes, optimizer.weight_bits, strict=False))
        channels = {}
        for weight, prefix in table.weights.items():
            own = None if optimizer.entry_bits is None else optimizer.entry_bits[table.spans[prefix]]
            if own is not None and len(own.unique()) > 1:
                channels[weight.removesuffix(".weight")] = own.clone()
        return CompressionResult(
            removed=optimizer.masks(),
            weight_bits={weight.removesuffix(".weight"): bits[prefix] for weight, prefix in table.weights.items()},
            input_bits={
                prefix.removesuffix(".input_quantizer"): width
                for prefix, width in zip(table.input_prefixes, optimizer.input_bits, strict=True)
            },
            channel_bits=channels,
        )

    def _finished_optimizer(self) -> Search:
        optimizer = self.optimizer
        if optimizer is None or not optimizer.finished:
            raise GETAError(
                f"the search is at step {self.step_count}, before its choices are fixed; train on (steps that an fp16 "
                f"scaler skipped do not count). A callback that stops early has to wait until trainer.method.finished "
                f"is true"
            )
        return optimizer


def _by_weight(shares: Shares, spans: Sequence[slice]) -> Sequence[Tensor]:
    """Return the shares of each weight, shape (widths,), or of each of its rows or columns, shape (entries, widths).

    Args:
        shares: of one pass.
        spans: of each weight among all entries, one after the other.
    """
    if shares.entries is None:
        return shares.widths[: len(spans)].unbind()
    # By one operator, whose gradient is one table of all entries and not one for each weight.
    return shares.entries.split([span.stop - span.start for span in spans])


def _along_weight(values: Tensor, dim: int | None, area: int) -> Tensor:
    """Return values of the entries of a quantizer, (entries, widths), in a shape that broadcasts over a flat weight.

    Args:
        values: see above.
        dim: of the weight that entries run along; None for one entry.
        area: the number of elements of a kernel, which are columns of the flat weight.
    """
    # In order: a kernel reads the values of columns along with the weight's, some at once.
    by_width = values.t().contiguous()
    if dim != 1:
        return by_width[:, :, None]
    columns = by_width[:, None, :]
    return columns.repeat_interleave(area, 2) if area > 1 else columns


def _sides(layer: nn.Module) -> Sides:
    outputs = output_dim(layer)
    # The columns of a grouped convolution are inputs of several groups at once.
    grouped = isinstance(layer, CONVOLUTIONS) and layer.groups > 1
    return Sides(outputs, None if grouped else 1 - outputs)


def _shape_of(name: str, layer: Any, positions: tuple[int, int]) -> LayerShape:
    weight = layer.weight
    outputs = output_dim(layer)
    # That of a Conv1d is one row high; linear layers have none.
    kernel: tuple[int, int] = (1, 1, *map(int, weight.shape[2:]))[-2:]  # type: ignore[assignment]
    depthwise = isinstance(layer, CONVOLUTIONS) and layer.groups > 1 and weight.shape[1] == 1
    return LayerShape(name, weight.shape[outputs], weight.shape[1 - outputs], kernel, positions, depthwise)


def _output_sizes(model: nn.Module, batches: Batches) -> dict[str, tuple[int, int]]:
    """Return height and width of each convolution's output, and the tokens of a row for other layers, on one batch."""
    found: dict[str, tuple[int, int]] = {}

    def note(name: str, layer: nn.Module, output: Tensor) -> None:
        if isinstance(layer, CONVOLUTIONS):
            height = int(output.shape[-2]) if isinstance(layer, nn.Conv2d) else 1
            found[name] = (height, int(output.shape[-1]))
        else:
            found[name] = (max(output.numel() // (output.shape[-1] * max(output.shape[0], 1)), 1), 1)

    layers = quantized_layers(model)
    hooks = [
        layer.register_forward_hook(lambda own, _inputs, output, name=name: note(name, own, output))
        for name, layer in layers.items()
    ]
    try:
        with torch.no_grad(), eval_mode(model):
            model(**batches(1)[0])
    finally:
        for hook in hooks:
            hook.remove()
    return found
