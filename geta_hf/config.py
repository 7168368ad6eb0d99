"""`GETAConfig`: the one dataclass that says everything about a run. Saved beside the model as `geta_config.json`."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from geta_hf.errors import GETAError
from geta_hf.utils.files import write_whole

CONFIG_NAME = "geta_config.json"

Duration = int | float | str

_CHOICES = {
    "saliency": ("fisher", "taylor", "hesso"),
    "forgetting": ("uniform", "paper"),
    "bit_rule": ("sensitivity", "ppsg", "paper"),
    "clipping": ("mse", "max"),
}


_PRUNING = ("target_sparsity", "target_parameters")
_SIZES = ("target_bops", "target_bytes")
_RANGES: list[tuple[str, float, float]] = [
    ("target_sparsity", 0, 1),
    ("target_parameters", 0, 1),
    ("target_bytes", 1, math.inf),
    ("projection_periods", 1, math.inf),
    ("pruning_periods", 1, math.inf),
    ("calibration_batches", 1, math.inf),
    ("multiple_of", 1, math.inf),
    ("bit_reduction", 0, math.inf),
    ("quantizer_learning_rate", 0, math.inf),
    ("saliency_decay", 0, 1),
    ("epsilon", 0, 1),
    ("distill_logits", 0, math.inf),
    ("distill_hidden", 0, math.inf),
]
_SHARES = ("eta", "xi", "target_bops")


class _Kind(NamedTuple):
    holds: Callable[[Any], bool]
    wanted: str


def _whole(value: Any) -> bool:
    return type(value) is int


def _real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(_whole(b) and 2 <= b <= 16 for b in value)


def _list_of(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list | tuple) and all(type(item) is kind for item in value)


_WHOLE, _REAL = _Kind(_whole, "a whole number"), _Kind(_real, "a number")
_PAIR, _FLAG = _Kind(_pair, "a pair (b_l, b_u) of whole numbers in 2..16"), _Kind(lambda v: type(v) is bool, "a bool")
_PATTERNS = _Kind(_list_of(str), "a list of regular expressions")
_DEPTH = _Kind(lambda v: (_whole(v) and v >= 0) or _list_of(str)(v), "a number of layers, or a list of their paths")
_POLICY = _Kind(_list_of(str), "a list of kinds, couplings or patterns")
_KINDS: dict[str, _Kind] = {
    **dict.fromkeys(("projection_periods", "pruning_periods", "initial_bits"), _WHOLE),
    **dict.fromkeys(("target_bytes", "multiple_of", "calibration_batches", "embedding_bits"), _WHOLE),
    **dict.fromkeys(("target_sparsity", "target_parameters", "target_bops", "mean_bits", "bit_reduction"), _REAL),
    **dict.fromkeys(("quantizer_learning_rate", "saliency_decay", "eta", "xi", "epsilon", "min_kept"), _REAL),
    **dict.fromkeys(("distill_logits", "distill_hidden", "distill_temperature"), _REAL),
    **dict.fromkeys(("bits", "activation_bits"), _PAIR),
    **dict.fromkeys(("per_channel", "uniform", "learn_exponent", "learn_activation_exponent"), _FLAG),
    **dict.fromkeys(("include", "exclude"), _PATTERNS),
    **dict.fromkeys(("prune", "keep"), _POLICY),
    "drop_layers": _DEPTH,
    "bit_choices": _Kind(_list_of(int), "a list of whole numbers"),
}
_OPTIONAL = frozenset((*_PRUNING, *_SIZES, "mean_bits", "bit_choices", "activation_bits", "bit_reduction"))
_OPTIONAL |= {"include", "embedding_bits"}


@dataclass
class GETAConfig:
    """Limits, stages and rules of one compression run.

    How much to prune is said by `target_sparsity` or `target_parameters`, how small the model shall be by
    `target_bops` or `target_bytes`, and the widths by `bits` and `mean_bits`. What is left out is solved for before
    training (`geta_hf.training.plan`); of pruning, size and `mean_bits` at most two are given. Without any target half
    of the groups go.

    Attributes:
        target_sparsity: share of the prunable groups to remove, in [0, 1); K = round(share · groups) in the paper.
        bits: (b_l, b_u), the widths that every quantized layer must end within, each in 2..16.
        target_parameters: share of the parameters in prunable groups to remove, in [0, 1).
        target_bops: BOPs of the quantized layers, relative to the dense model at 32 · 32 bits, in (0, 1).
        target_bytes: bytes of the exported model.safetensors.
        mean_bits: mean width over the weights that stay, at most; beside a size, both hold. None is the middle of
            `bits` for the `sensitivity` rule where no size is asked for, and whatever the rule learns for the others.
        bit_choices: the only widths allowed, such as [4, 8], inside `bits`; None allows every whole number.
        activation_bits: (b_l, b_u) of the quantizers on the layers' inputs; None leaves activations float.
        embedding_bits: 2 to 8: the vocabulary's embedding is rounded to it when the model is exported; None leaves it.
        per_channel: one (d, q_m) an output channel instead of one a layer.
        calibration_batches: batches that the clipping values of activations are measured on.
        min_kept: what every family keeps at least: a count, or below 1 a share.
        multiple_of: kept channels of every family are a multiple of this.
        uniform: remove equally many groups from every family of like kind and size. With it, or with `multiple_of`, K
            groups may be out of reach; then up to one chunk fewer go.
        initial_bits: width before the projection stage, at least b_u.
        bit_reduction: b_r, bits taken off the upper bound in each projection period. None spreads
            initial_bits - b_u over the periods; a number of your own must end inside `bits`.
        warmup, projection, joint: lengths of the stages; cool-down is the rest. An int is steps, a float below 1 a
            share of training, a string such as "1.5 epochs" or "200 steps" says its unit.
        projection_periods: B, periods of the projection stage.
        pruning_periods: P, periods of the joint stage.
        saliency: `fisher` ranks groups by the EMA of <g, x>² per parameter removed, `taylor` by its root per parameter,
            `hesso` by the paper's score.
        forgetting: `uniform` shrinks redundant groups by γ = 1 / (steps left), `paper` by Eq. 13.
        bit_rule: who decides the widths. `sensitivity` spends `mean_bits`, or the size asked for, where one more bit
            lowers the expected loss most, at the joint stage's end. `ppsg` learns d under projection alone, which in
            practice leaves layers at or near b_u; `paper` sets d by Eq. 14 in the joint stage, which sends most layers
            that lose groups to b_l. Widths that these two learned are moved together where a target asks for others.
        clipping: where q_m starts: `mse` for least squared error at b_u bits, `max` for max|W|.
        learn_exponent: train t of weights; otherwise t = 1.
        learn_activation_exponent: train t of activations; otherwise t = 1, which kernels for inference expect.
        quantizer_learning_rate: relative step of (d, q_m, t), under the run's own scheduler. At most 3e-3 is advised.
        saliency_decay: decay of the saliency's moving average, in [0, 1).
        eta, xi, epsilon: η and ξ of Eqs. 13-14, in (0, 1), and the magnitude below which a group counts as forgotten.
        distill_logits, distill_hidden: weights of the teacher's logits and hidden states in the loss; see
            `geta_hf.training.distillation`.
        distill_temperature: softens both distributions, above 0.
        include, exclude: regular expressions over module names that choose the layers to quantize.
        drop_layers: whole layers to remove before anything else: how many, chosen one by one as those without which
            the loss on `calibration_batches` is lowest, or their paths (`model.layers.3`). A run notes the paths.
        prune, keep: families to make prunable beside heads and channels, and families to keep whole: kinds
            (`residual`), couplings (`norm`) or patterns of names (`*.layers.0.*`); see `geta_hf.qadg.apply_policy`.
    """

    target_sparsity: float | None = None
    bits: tuple[int, int] = (4, 8)
    target_parameters: float | None = None
    target_bops: float | None = None
    target_bytes: int | None = None
    mean_bits: float | None = None
    bit_choices: list[int] | None = None
    activation_bits: tuple[int, int] | None = None
    embedding_bits: int | None = None
    per_channel: bool = False
    calibration_batches: int = 8
    min_kept: float = 1
    multiple_of: int = 1
    uniform: bool = False
    initial_bits: int = 16
    bit_reduction: float | None = None
    warmup: Duration = 0.1
    projection: Duration = 0.1
    joint: Duration = 0.4
    projection_periods: int = 4
    pruning_periods: int = 5
    saliency: str = "fisher"
    forgetting: str = "uniform"
    bit_rule: str = "sensitivity"
    clipping: str = "mse"
    learn_exponent: bool = False
    learn_activation_exponent: bool = False
    quantizer_learning_rate: float = 1e-3
    saliency_decay: float = 0.95
    eta: float = 0.999
    xi: float = 0.999
    epsilon: float = 1e-8
    distill_logits: float = 0.0
    distill_hidden: float = 0.0
    distill_temperature: float = 2.0
    include: list[str] | None = None
    exclude: list[str] = dataclasses.field(default_factory=list)
    drop_layers: int | list[str] = 0
    prune: list[str] = dataclasses.field(default_factory=list)
    keep: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self._check_types()
        self.bits = (self.bits[0], self.bits[1])
        self.include = None if self.include is None else list(self.include)
        self.exclude, self.prune, self.keep = list(self.exclude), list(self.prune), list(self.keep)
        if not any(getattr(self, name) is not None for name in (*_PRUNING, *_SIZES)):
            self.target_sparsity = 0.5
        self._check_bits()
        self._check_targets()
        for name, low, high in _RANGES:
            value = getattr(self, name)
            _check(value is None or low <= value < high, name, value, f"in [{low}, {high})")
        for name in _SHARES:
            value = getattr(self, name)
            _check(value is None or 0 < value < 1, name, value, "in (0, 1)")
        for name, choices in _CHOICES.items():
            _check(getattr(self, name) in choices, name, getattr(self, name), f"one of {', '.join(choices)}")
        _check(self.min_kept > 0, "min_kept", self.min_kept, "a count of at least 1, or a share above 0")
        whole = self.min_kept < 1 or float(self.min_kept).is_integer()
        _check(whole, "min_kept", self.min_kept, "a whole count, or a share below 1")
        _check(self.distill_temperature > 0, "distill_temperature", self.distill_temperature, "above 0")

    def _check_types(self) -> None:
        """Tuples become lists and back through JSON, so both are taken; text never stands for a number or a list."""
        for name, value in vars(self).items():
            kind = _KINDS.get(name)
            if kind is not None and not (value is None and name in _OPTIONAL):
                _check(kind.holds(value), name, value, kind.wanted)

    def _check_targets(self) -> None:
        """At most one way to say how much is pruned and one to say how small the model is, and no contradiction."""
        given = [[name for name in names if getattr(self, name) is not None] for names in (_PRUNING, _SIZES)]
        for names in given:
            if len(names) > 1:
                raise GETAError(f"{' and '.join(names)} say the same thing twice; leave one of them out")
        if all(given) and self.mean_bits is not None:
            raise GETAError(
                f"{given[0][0]}, {given[1][0]} and mean_bits can't all hold; leave one out, and it is solved for"
            )

    def _check_bits(self) -> None:
        lower, upper = self.bits
        _check(lower <= upper, "bits", self.bits, "(b_l, b_u) with b_l <= b_u")
        _check(upper <= self.initial_bits <= 16, "initial_bits", self.initial_bits, f"in {upper}..16")
        if self.bit_choices is not None:
            inside = bool(self.bit_choices) and all(lower <= b <= upper for b in self.bit_choices)
            _check(inside, "bit_choices", self.bit_choices, f"widths in {lower}..{upper}, as `bits`")
            self.bit_choices = sorted(set(self.bit_choices))
        if self.mean_bits is not None:
            low, high, limit = self.widths[0], self.widths[-1], "bits" if self.bit_choices is None else "bit_choices"
            _check(low <= self.mean_bits <= high, "mean_bits", self.mean_bits, f"in {low}..{high}, as `{limit}`")
        if self.activation_bits is not None:
            low, high = self.activation_bits
            self.activation_bits = (low, high)
            fits = low <= high <= self.initial_bits
            _check(fits, "activation_bits", self.activation_bits, f"(b_l, b_u) with b_l <= b_u <= {self.initial_bits}")
        if self.embedding_bits is not None:
            _check(2 <= self.embedding_bits <= 8, "embedding_bits", self.embedding_bits, "in 2..8")
        if self.per_channel and self.bit_rule == "paper":
            raise GETAError("Eq. 14 sets one d a layer; with per_channel choose bit_rule='sensitivity' or 'ppsg'")
        if self.bit_reduction is not None:
            self._check_reduction()

    def _check_reduction(self) -> None:
        lower, upper = self.bits
        end = self.final_upper_bits
        sum_text = f"{self.initial_bits} - {self.projection_periods} · {self.bit_reduction} = {end}"
        if end < lower:
            raise GETAError(
                f"b_u - B·b_r = {sum_text} is below b_l = {lower}; lower bit_reduction or projection_periods"
            )
        if end > upper:
            raise GETAError(f"b_u - B·b_r = {sum_text} stays above the {upper} bits asked for; raise bit_reduction")
        if self.widths[0] > end:
            raise GETAError(
                f"b_u - B·b_r = {sum_text} is below all of bit_choices = {self.widths}; lower bit_reduction"
            )

    @property
    def widths(self) -> list[int]:
        """The whole widths that a layer may end with, ascending."""
        if self.bit_choices is not None:
            return self.bit_choices
        return list(range(self.bits[0], self.bits[1] + 1))

    @property
    def wanted_mean_bits(self) -> float | None:
        """`mean_bits`, or the middle of `bits` where the rule needs one and no size is asked for."""
        sized = self.target_bops is not None or self.target_bytes is not None
        if self.mean_bits is not None or sized or self.bit_rule != "sensitivity":
            return self.mean_bits
        return (self.widths[0] + self.widths[-1]) / 2

    @property
    def reduction(self) -> float:
        """b_r, given or derived, in bits a period."""
        if self.bit_reduction is not None:
            return self.bit_reduction
        return (self.initial_bits - self.bits[1]) / self.projection_periods

    @property
    def final_upper_bits(self) -> float:
        """b_u after the projection stage: initial_bits - B·b_r."""
        return self.initial_bits - self.projection_periods * self.reduction

    @classmethod
    def paper(cls, **changes: Any) -> GETAConfig:
        """The paper to the letter: HESSO saliency, Eqs. 13-14, q_m = max|W|, learned t. Fields may be changed."""
        rules: dict[str, Any] = {
            "saliency": "hesso",
            "forgetting": "paper",
            "bit_rule": "paper",
            "clipping": "max",
            "learn_exponent": True,
        }
        return cls(**{**rules, **changes})

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` gives an equal config back."""
        pairs = {"bits": list(self.bits), "activation_bits": self.activation_bits and list(self.activation_bits)}
        return {**dataclasses.asdict(self), **pairs}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GETAConfig:
        """Build from plain data. Raises GETAError for a key that is not a field."""
        fields = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - fields)
        if unknown:
            raise GETAError(f"unknown GETAConfig keys {unknown}; known are {sorted(fields)}")
        numbers = {name for name, kind in _KINDS.items() if kind is _REAL}
        # YAML 1.1 reads `1e-8`, without a dot, as text.
        plain: dict[str, Any] = {k: _number(v) if k in numbers else v for k, v in values.items()}
        return cls(**plain)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON or YAML, by the file's ending; written beside and renamed, so never half a file."""
        target = Path(path)
        text = json.dumps(self.to_dict(), indent=2) + "\n" if target.suffix == ".json" else _yaml(self.to_dict())
        write_whole(target, text)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> GETAConfig:
        """Read JSON or YAML. Raises GETAError for a file that is not a mapping of GETAConfig's fields."""
        try:
            text = Path(path).read_text(encoding="utf-8")
            values = json.loads(text) if Path(path).suffix == ".json" else yaml.safe_load(text)
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise GETAError(f"{path} can't be read as a GETAConfig: {error}") from error
        if not isinstance(values, dict):
            raise GETAError(f"{path} holds {type(values).__name__}, not the mapping of a GETAConfig")
        return cls.from_dict(values)


def _number(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _yaml(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False)


def _check(holds: bool, name: str, value: Any, wanted: str) -> None:
    if not holds:
        raise GETAError(f"GETAConfig.{name} = {value!r} must be {wanted}")
