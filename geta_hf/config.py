"""`GETAConfig`: the one dataclass that says everything about a run. Saved beside the model as `geta_config.json`."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from geta_hf.errors import GETAError

CONFIG_NAME = "geta_config.json"

Duration = int | float | str

_CHOICES = {
    "saliency": ("taylor", "hesso"),
    "forgetting": ("uniform", "paper"),
    "bit_rule": ("ppsg", "paper"),
    "clipping": ("mse", "max"),
}


@dataclass
class GETAConfig:
    """Limits, stages and rules of one compression run.

    `target_sparsity` and `bits` are enough; everything else has a default.

    Attributes:
        target_sparsity: share of the prunable groups to remove, in [0, 1); K = round(share · groups) in the paper.
        bits: (b_l, b_u), the widths that every quantized layer must end within, each in 2..16.
        initial_bits: width before the projection stage, at least b_u.
        bit_reduction: b_r, bits taken off the upper bound in each projection period. None spreads
            initial_bits - b_u over the periods; a number of your own must end inside `bits`.
        warmup, projection, joint: lengths of the stages; cool-down is the rest. An int is steps, a float below 1 a
            share of training, a string such as "1.5 epochs" or "200 steps" says its unit.
        projection_periods: B, periods of the projection stage.
        pruning_periods: P, periods of the joint stage.
        saliency: `taylor` ranks groups by sqrt(EMA of <g, x>²) per parameter removed, `hesso` by the paper's score.
        forgetting: `uniform` shrinks redundant groups by γ = 1 / (steps left), `paper` by Eq. 13.
        bit_rule: `ppsg` learns d under projection alone, which in practice leaves layers at or near b_u; `paper` sets d
            by Eq. 14 in the joint stage, which sends most layers that lose groups to b_l.
        clipping: where q_m starts: `mse` for least squared error at b_u bits, `max` for max|W|.
        learn_exponent: train t; otherwise t = 1.
        quantizer_learning_rate: relative step of (d, q_m, t), under the run's own scheduler. At most 3e-3 is advised.
        saliency_decay: decay of the saliency's moving average, in [0, 1).
        eta, xi, epsilon: η and ξ of Eqs. 13-14, in (0, 1), and the magnitude below which a group counts as forgotten.
        include, exclude: regular expressions over module names that choose the layers to quantize.
        prune, keep: families to make prunable beside heads and channels, and families to keep whole: kinds
            (`residual`), couplings (`norm`) or patterns of names (`*.layers.0.*`); see `geta_hf.qadg.apply_policy`.
    """

    target_sparsity: float = 0.5
    bits: tuple[int, int] = (4, 8)
    initial_bits: int = 16
    bit_reduction: float | None = None
    warmup: Duration = 0.1
    projection: Duration = 0.1
    joint: Duration = 0.4
    projection_periods: int = 4
    pruning_periods: int = 5
    saliency: str = "taylor"
    forgetting: str = "uniform"
    bit_rule: str = "ppsg"
    clipping: str = "mse"
    learn_exponent: bool = False
    quantizer_learning_rate: float = 1e-3
    saliency_decay: float = 0.95
    eta: float = 0.999
    xi: float = 0.999
    epsilon: float = 1e-8
    include: list[str] | None = None
    exclude: list[str] = dataclasses.field(default_factory=list)
    prune: list[str] = dataclasses.field(default_factory=list)
    keep: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self._check_types()
        self.bits = (self.bits[0], self.bits[1])
        self.include = None if self.include is None else list(self.include)
        self.exclude, self.prune, self.keep = list(self.exclude), list(self.prune), list(self.keep)
        self._check_bits()
        _check(0 <= self.target_sparsity < 1, "target_sparsity", self.target_sparsity, "in [0, 1)")
        _check(self.projection_periods >= 1, "projection_periods", self.projection_periods, "at least 1")
        _check(self.pruning_periods >= 1, "pruning_periods", self.pruning_periods, "at least 1")
        _check(self.quantizer_learning_rate >= 0, "quantizer_learning_rate", self.quantizer_learning_rate, "at least 0")
        _check(0 <= self.saliency_decay < 1, "saliency_decay", self.saliency_decay, "in [0, 1)")
        _check(0 < self.eta < 1, "eta", self.eta, "in (0, 1)")
        _check(0 < self.xi < 1, "xi", self.xi, "in (0, 1)")
        _check(0 <= self.epsilon < 1, "epsilon", self.epsilon, "in [0, 1)")
        for name, choices in _CHOICES.items():
            _check(getattr(self, name) in choices, name, getattr(self, name), f"one of {', '.join(choices)}")

    def _check_types(self) -> None:
        """Tuples become lists and back through JSON, so both are taken; text never stands for a number or a list."""
        for name in ("projection_periods", "pruning_periods", "initial_bits"):
            _check(type(getattr(self, name)) is int, name, getattr(self, name), "a whole number")
        for name in ("target_sparsity", "quantizer_learning_rate", "saliency_decay", "eta", "xi", "epsilon"):
            value = getattr(self, name)
            _check(isinstance(value, int | float) and not isinstance(value, bool), name, value, "a number")
        pair = isinstance(self.bits, list | tuple) and len(self.bits) == 2
        _check(pair, "bits", self.bits, "a pair (b_l, b_u)")
        for name in ("include", "exclude", "prune", "keep"):
            value = getattr(self, name)
            listed = isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
            kind = "a list of regular expressions" if "clude" in name else "a list of kinds, couplings or patterns"
            _check(listed or (name == "include" and value is None), name, value, kind)

    def _check_bits(self) -> None:
        lower, upper = self.bits
        _check(all(isinstance(b, int) and 2 <= b <= 16 for b in self.bits), "bits", self.bits, "two integers in 2..16")
        _check(lower <= upper, "bits", self.bits, "(b_l, b_u) with b_l <= b_u")
        _check(upper <= self.initial_bits <= 16, "initial_bits", self.initial_bits, f"in {upper}..16")
        if self.bit_reduction is None:
            return
        _check(self.bit_reduction >= 0, "bit_reduction", self.bit_reduction, "at least 0")
        end = self.final_upper_bits
        sum_text = f"{self.initial_bits} - {self.projection_periods} · {self.bit_reduction} = {end}"
        if end < lower:
            raise GETAError(
                f"b_u - B·b_r = {sum_text} is below b_l = {lower}; lower bit_reduction or projection_periods"
            )
        if end > upper:
            raise GETAError(f"b_u - B·b_r = {sum_text} stays above the {upper} bits asked for; raise bit_reduction")

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
        return {**dataclasses.asdict(self), "bits": list(self.bits)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GETAConfig:
        """Build from plain data. Raises GETAError for a key that is not a field."""
        fields = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - fields)
        if unknown:
            raise GETAError(f"unknown GETAConfig keys {unknown}; known are {sorted(fields)}")
        numbers = {f.name for f in dataclasses.fields(cls) if isinstance(f.default, float) and f.type == "float"}
        # YAML 1.1 reads `1e-8`, without a dot, as text.
        plain: dict[str, Any] = {k: _number(v) if k in numbers else v for k, v in values.items()}
        return cls(**plain)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON or YAML, by the file's ending; written beside and renamed, so never half a file."""
        target = Path(path)
        text = json.dumps(self.to_dict(), indent=2) + "\n" if target.suffix == ".json" else _yaml(self.to_dict())
        beside = target.with_name(target.name + ".tmp")
        beside.write_text(text, encoding="utf-8")
        beside.replace(target)

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
