"""The settings of a compression run: one class for the limits that every method shares, and one for each method.

Each setting is declared in one place, with its type, default, help, allowed values and section. Validation, `--help`
of the recipes, `help(GETAConfig)` and `docs/configuration.md` are derived from these declarations; only checks that
compare several settings are methods. The config of a run is saved with the model as `geta_config.json`.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import os
import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

import yaml

from geta_hf.errors import GETAError
from geta_hf.utils.files import write_whole
from geta_hf.utils.suggestions import did_you_mean

if TYPE_CHECKING:
    from typing_extensions import Self

CONFIG_NAME = "geta_config.json"

Duration = int | float | str
"""The length of a stage; see `is_duration`."""

Pair = tuple[int, int] | list[int]
Integers = list[int] | tuple[int, ...]
Texts = list[str] | tuple[str, ...]
"""What YAML and JSON write as lists may be given as tuples too, and pairs as lists. The first of each is what a config
holds: `_normalize` converts the others."""

GridName = Literal["layer", "channel", "block32"]
"""A field with a set of values names them in its annotation alone: checks, help and documentation read them there."""

EmbeddingGrid = Literal["channel", "block32"]
"""The values of `GridName` that an embedding may have: a step size for each row, or for every 32 elements of one."""

LENGTHS = (
    "A length is a number of steps (an integer), a share of training (a float below 1), or text with a unit, such as "
    "'1.5 epochs' or '200 steps'."
)
SECTIONS = {
    "Targets": "Set how much to prune with `target_sparsity` or `target_parameters`, the size of the model with "
    "`target_bops` or `target_bytes`, and the mean width with `mean_bits`: at most two of these three. The others are "
    "solved for before training. Without a target for pruning or size, `target_sparsity` is {default_sparsity:g}.",
    "Widths": "A width is the number of bits of each value; b_l and b_u are the lower and the upper bound.",
    "Quantizers": "A quantizer has a step size d, a clipping value q_m and an exponent t.",
    "Pruning limits": "A family is a set of groups of one kind, such as the attention heads of a layer.",
    "Serving": "What the result has to run in. All that follows is settled before training, and printed with the plan.",
    "Distillation": "A teacher adds terms to the loss. By default it is the model as it was before training.",
    "Selection": "The parts of the model that are quantized, pruned or removed.",
    "Stages": "Training starts with warm-up, followed by projection and the joint stage; cool-down takes the remaining "
    f"steps. {LENGTHS}",
    "Rules": "The defaults are the rules that measured best. `GETAConfig.paper()` selects those of the paper.",
}
"""The sections of the documentation -> their introduction. A method may name others, and introduce any by itself."""


# -------------------------------------------------------------------------------------------- how a setting is declared


class Check(NamedTuple):
    """A condition on one value.

    Attributes:
        holds: decides whether a value of the right type is allowed.
        text: continues "the value must be a number ..."; not needed where the setting has `expected`.
    """

    holds: Callable[[Any], bool]
    text: str = ""


def between(low: float, high: float) -> Check:
    """Return the check for the half-open interval [low, high)."""
    return Check(lambda value: low <= value < high, f"in [{low}, {high})")


def inside(low: float, high: float) -> Check:
    """Return the check for the open interval (low, high)."""
    return Check(lambda value: low < value < high, f"in ({low}, {high})")


def at_least(low: float) -> Check:
    """Return the check for values of `low` or more."""
    return Check(lambda value: value >= low, f"of at least {low}")


def above(low: float) -> Check:
    """Return the check for values greater than `low`."""
    return Check(lambda value: value > low, f"above {low}")


def setting(
    default: Any,
    help: str,
    check: Check | None = None,
    *,
    section: str,
    expected: str = "",
) -> Any:
    """Declare one field of a config class; its type is the annotation, and a `Literal` there lists the allowed strings.

    Args:
        default: the default value; a list is copied for every config.
        help: plain English for `--help` and the documentation.
        check: the range of values, if the type does not say it all. None as a value is never checked.
        section: one of `SECTIONS`, under which the field is documented.
        expected: replaces the generated description of the type and range in messages and documentation.
    """
    metadata = {"help": help, "check": check, "section": section, "expected": expected}
    # dataclasses refuse a list as a default, which all configs would share.
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Setting:
    """One field of a config class, as declared with `setting`.

    Attributes:
        name: of the field.
        hint: its annotation, resolved.
        default: its default value in this class.
        help, check, section, expected: see `setting`.
    """

    name: str
    hint: Any
    default: Any
    help: str = ""
    check: Check | None = None
    section: str = "Other"
    expected: str = ""

    @property
    def choices(self) -> tuple[str, ...]:
        """The allowed strings, where the annotation lists them."""
        return tuple(text for arm in _arms(self.hint) if get_origin(arm) is Literal for text in get_args(arm))

    @property
    def allowed(self) -> str:
        """The type and the range in words, without None."""
        if self.expected:
            return self.expected
        text = _type_name(self.hint)
        return text if self.check is None else f"{text} {self.check.text}"

    def accepts(self, value: Any) -> bool:
        """Return whether the type and the value are allowed."""
        if value is None and NoneType in _arms(self.hint):
            return True
        if not _has_type(value, self.hint):
            return False
        return self.check is None or self.check.holds(value)


def settings_of(kind: type[CompressionConfig]) -> dict[str, Setting]:
    """Return the fields of a config class by name, in their order.

    A subclass that redeclares a field with a plain value changes its default only.
    """
    # Annotations are text in this module, so dataclasses.fields has no types.
    hints = get_type_hints(kind)
    found = {}
    for field in dataclasses.fields(kind):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        found[field.name] = Setting(field.name, hints[field.name], default, **_metadata(kind, field.name))
    return found


def _metadata(kind: type, name: str) -> Mapping[str, Any]:
    # A plain value makes a field without metadata, so they are those of the class that declared it.
    for base in kind.__mro__:
        field = vars(base).get("__dataclass_fields__", {}).get(name)
        if field is not None and "help" in field.metadata:
            return field.metadata
    return {}


def sections_of(kind: type[CompressionConfig]) -> dict[str, list[Setting]]:
    """Return the fields of a config class by section, in the order of their first field."""
    found: dict[str, list[Setting]] = {}
    for one in settings_of(kind).values():
        found.setdefault(one.section, []).append(one)
    return found


def introduction_of(section: str, kind: type[CompressionConfig]) -> str:
    """Return what a config class or `SECTIONS` says of a section, with the numbers of the class."""
    return {**SECTIONS, **kind.introductions}.get(section, "").format(default_sparsity=kind.default_sparsity)


_NAMES = {bool: ("a bool", "bools"), int: ("an integer", "integers"), float: ("a number", "numbers")}
_NAMES |= {str: ("a string", "strings")}


def _arms(hint: Any) -> tuple[Any, ...]:
    """Return the types of a union, or the only type."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _has_type(value: Any, hint: Any) -> bool:
    """Compare strictly: a bool or NaN is no number, a string no list. Lists and tuples are alike, as JSON has one."""
    return any(_has_one_type(value, arm) for arm in _arms(hint))


def _has_one_type(value: Any, hint: Any) -> bool:
    origin, items = get_origin(hint), get_args(hint)
    if origin is Literal:
        return isinstance(value, str) and value in items
    if origin in (list, tuple):
        if not isinstance(value, list | tuple):
            return False
        if _has_length(hint) and len(value) != len(items):
            return False
        return all(_has_type(item, items[0]) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and _is_finite(value)
    # By the type itself, since bool is a subclass of int.
    if hint in (bool, int):
        return type(value) is hint
    return isinstance(value, origin or hint)


def _has_length(hint: Any) -> bool:
    """Return whether a hint is of a tuple of some length, such as `tuple[int, int]`, and not of any."""
    return get_origin(hint) is tuple and Ellipsis not in get_args(hint)


def _is_finite(value: int | float) -> bool:
    # isfinite raises for an integer too large for a float.
    return isinstance(value, int) or math.isfinite(value)


def _type_name(hint: Any) -> str:
    # A list and a tuple of the same are one thing to a reader.
    return " or ".join(dict.fromkeys(_one_type_name(arm) for arm in _arms(hint) if arm is not NoneType))


def _one_type_name(hint: Any) -> str:
    origin, items = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(items)}"
    if origin in (list, tuple):
        count = f"{len(items)} " if _has_length(hint) else ""
        return f"a list of {count}{_NAMES[items[0]][1]}"
    return _NAMES[hint][0] if hint in _NAMES else f"a {(origin or hint).__name__}"


def _normalize(value: Any, hint: Any) -> Any:
    """Convert between list and tuple, as the annotation names them first."""
    if isinstance(value, list | tuple):
        for arm in _arms(hint):
            if get_origin(arm) in (list, tuple):
                return get_origin(arm)(value)
    return value


def _parse_number(value: Any, hint: Any) -> Any:
    """Convert text for a number. YAML 1.1 reads `1e-8`, without a dot, as text."""
    if not isinstance(value, str) or float not in _arms(hint) or str in _arms(hint):
        return value
    try:
        return float(value)
    except ValueError:
        return value


# -------------------------------------------------------------------------------------------------------- documentation

REGENERATE = 'python -c "from geta_hf.config import write_field_tables; write_field_tables()"'
"""The command that writes the pages again, from the root of the repository."""

FIELD_PAGES = {
    "qasso": "configuration.md",
    "search": "configuration_search.md",
    "one-shot": "configuration_one_shot.md",
}
"""The name of a method -> the page in `docs` with the fields of its config class."""

_Kind = TypeVar("_Kind", bound="type[CompressionConfig]")


def document_attributes(kind: _Kind) -> _Kind:
    """Append the fields with their help to the docstring of a config class; a class decorator."""
    lines = [inspect.cleandoc(kind.__doc__ or ""), "", "Attributes:"]
    for one in settings_of(kind).values():
        text = f"{one.name}: {one.help} Default: {one.default!r}; {one.allowed}."
        lines += textwrap.wrap(text, 116, initial_indent=" " * 4, subsequent_indent=" " * 8, break_on_hyphens=False)
    kind.__doc__ = "\n".join(lines) + "\n"
    return kind


def write_field_tables(folder: str | os.PathLike[str] = "docs") -> None:
    """Write `FIELD_PAGES`: all fields of every method that users choose by its config class.

    Args:
        folder: where the pages are. Default: `docs`, from the root of the repository.
    """
    for method, page in FIELD_PAGES.items():
        write_whole(Path(folder) / page, field_table(CONFIG_CLASSES[method]))


def field_table(kind: type[CompressionConfig] | None = None) -> str:
    """Return a page with all fields of a config class (default: `GETAConfig`) as Markdown tables."""
    kind = kind or GETAConfig
    given = f"as given in Python (`{kind.__name__}(target_sparsity=0.3)`)"
    if kind is GETAConfig:
        given += (
            ", in the `geta:` section of a recipe's YAML file, or on its command line (`--geta.target_sparsity 0.3`)"
        )
    lines = [
        "# Configuration" if kind is GETAConfig else f"# Configuration: {kind.__name__}",
        "",
        f"<!-- Generated from the declarations in geta_hf. After a change there, run: {REGENERATE} -->",
        "",
        f"The fields of `{kind.__name__}`, {given}. A run saves them as `{CONFIG_NAME}`.",
    ]
    for section, settings in sections_of(kind).items():
        lines += ["", f"## {section}", ""]
        introduction = introduction_of(section, kind)
        if introduction:
            lines += [introduction, ""]
        lines += ["| field | default | value | meaning |", "|---|---|---|---|"]
        for one in settings:
            cells = (f"`{one.name}`", f"`{one.default!r}`", one.allowed, one.help)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------------------------- the classes

CONFIG_CLASSES: dict[str, type[CompressionConfig]] = {}
"""The name of a method -> its config class. A subclass that sets `method` enters by itself."""

_PRUNING = ("target_sparsity", "target_parameters")
_COMPARES_LOSSES = {"saliency": ("fisher", "mask_fisher"), "bit_rule": ("sensitivity",)}
"""Rule -> its values under which pruning and widths can compete for a size."""
_SIZES = ("target_bops", "target_bytes")
_PAIR = "a pair (b_l, b_u) of integers in 2..16, b_l <= b_u"


def _is_pair_of_widths(pair: Pair) -> bool:
    # As a list it may have any length, as far as its type says.
    return len(pair) == 2 and 2 <= pair[0] <= pair[1] <= 16


def _is_minimum(value: float) -> bool:
    return 0 < value < 1 or (value >= 1 and float(value).is_integer())


_DURATION = "steps, a share of training, or text such as '1.5 epochs'; not negative, and a share below 1"


def parse_duration(text: str) -> tuple[float, str] | None:
    """Return the number and the unit, `step` or `epoch`, of a length such as '1.5 epochs'; None for other text."""
    number, _, unit = text.strip().partition(" ")
    # Both "1 epoch" and "2 epochs". A bare number has an empty unit, which is refused.
    kind = unit.strip().removesuffix("s")
    try:
        count = float(number)
    except ValueError:
        return None
    if kind not in ("step", "epoch") or not math.isfinite(count):
        return None
    return count, kind


def is_duration(value: Duration) -> bool:
    """Return whether a value is the length of a stage: an integer, a share in [0, 1), or text with a unit."""
    if isinstance(value, str):
        parsed = parse_duration(value)
        return parsed is not None and parsed[0] >= 0
    # An int is steps and a float a share, so 1 and 1.0 are far apart: the latter, all of training, is refused.
    return value >= 0 if isinstance(value, int) else 0 <= value < 1


def _are_patterns(values: Texts) -> bool:
    try:
        for value in values:
            re.compile(value)
    except re.error:
        return False
    return True


def _is_depth(value: int | Texts) -> bool:
    return not isinstance(value, int) or value >= 0


class _Settled(str):
    """A grid that a config has settled, in contrast to one that its user gives."""

    __slots__ = ()


@document_attributes
@dataclass
class CompressionConfig:
    """The limits of a compression run that every method shares.

    The class of a config chooses the method, so a run takes a subclass such as `GETAConfig`. Code that needs the limits
    only, such as the plan or the export, works with this class.

    >>> limits = CompressionConfig(target_parameters=0.3, bits=(3, 8), bit_choices=[8, 4])
    >>> limits.widths
    [4, 8]
    >>> limits.wanted_mean_bits
    6.0

    A method declares its class as follows, with its own settings; the file of a run then names the method, and
    `read_config` returns the class.

        @dataclass
        class SearchConfig(CompressionConfig):
            method: ClassVar[str] = "search"
            temperature: float = setting(1.0, "Softmax temperature.", above(0), section="Rules")

    Raises:
        GETAError: a value of the wrong type or out of range, or settings that contradict each other.
    """

    method: ClassVar[str] = ""
    """The name of the method, as saved files carry it."""

    default_sparsity: ClassVar[float] = 0.5
    """What `target_sparsity` is where neither pruning nor a size has a target."""

    introductions: ClassVar[Mapping[str, str]] = {}
    """Sections of the documentation -> their introduction, where it is not that of `SECTIONS`."""

    target_sparsity: float | None = setting(
        None,
        "Share of the prunable groups (heads, channels) to remove, met exactly: K = round(share · groups).",
        between(0, 1),
        section="Targets",
    )
    bits: Pair = setting(
        (4, 8),
        "The bounds within which the width of every quantized weight must end.",
        Check(_is_pair_of_widths),
        section="Widths",
        expected=_PAIR,
    )
    target_parameters: float | None = setting(
        None,
        "Share of the parameters in prunable groups to remove; replaces `target_sparsity`.",
        between(0, 1),
        section="Targets",
    )
    target_bops: float | None = setting(
        None,
        "BOPs of the quantized layers, relative to the dense model at 32 · 32 bits.",
        inside(0, 1),
        section="Targets",
    )
    target_bytes: int | None = setting(None, "Bytes of the exported model.safetensors.", at_least(1), section="Targets")
    mean_bits: float | None = setting(
        None,
        "Maximum mean bit width of the remaining weights, inside `bits`. With a size target, both apply. None is the "
        "middle of `bits` if there is no size target.",
        section="Targets",
    )
    bit_choices: Integers | None = setting(
        None, "The only widths allowed, such as [4, 8], inside `bits`. None allows every integer.", section="Widths"
    )
    activation_bits: Pair | None = setting(
        None,
        "The bounds for the inputs of the layers, calibrated on `calibration_batches`. `target_bops` decides where in "
        "them each input ends, together with the weights' widths. Without it sensitivity decides, with the middle of "
        "the bounds as the mean; under `bit_rule` `ppsg` and `paper` the learned widths are rounded. None does not "
        "quantize activations.",
        Check(_is_pair_of_widths),
        section="Widths",
        expected=_PAIR,
    )
    embedding_bits: int | None = setting(
        None,
        "Width to which the vocabulary's embedding is rounded at export, with a step size for each row or, where "
        "`grid` is `block32`, for every 32 of its elements. None does not round it.",
        Check(lambda value: 2 <= value <= 8, "in 2..8"),
        section="Widths",
    )
    grid: GridName | None = setting(
        None,
        "What has a (d, q_m) of its own: each `layer`, each output `channel`, or, with `block32`, every 32 neighboring "
        "inputs of a channel, which costs half a bit for each weight. Blocks are formed over the inputs that remain; "
        "convolutions have channels in place of blocks. None is what `per_channel` says.",
        section="Quantizers",
    )
    per_channel: bool = setting(
        False, "The former spelling of `grid`: True is `channel`, False is `layer`.", section="Quantizers"
    )
    calibration_batches: int = setting(
        8,
        "Number of batches on which the clipping values of activations, and what is compensated, are measured.",
        at_least(1),
        section="Quantizers",
    )
    min_kept: float = setting(
        1,
        "Minimum number of groups that remain in every family, or, below 1, their share.",
        Check(_is_minimum),
        section="Pruning limits",
        expected="an integer count of at least 1, or a share above 0 and below 1",
    )
    multiple_of: int = setting(
        1,
        "The number of remaining channels of every family is a multiple of this.",
        at_least(1),
        section="Pruning limits",
    )
    uniform: bool = setting(
        False,
        "Remove equally many groups from all families of the same kind and size, and keep only counts that the model's "
        "config class accepts. With this or with `multiple_of`, the exact K may be out of reach; then up to one chunk "
        "fewer is removed.",
        section="Pruning limits",
    )
    serve: Literal["llama.cpp", "vllm"] | None = setting(
        None,
        "The program that the result has to run in without code of ours: `llama.cpp` (the format `gguf`) or `vllm`. "
        "Widths, multiples and families are limited to what it can hold: channels in multiples of 32 for llama.cpp's "
        "blocks; for vLLM equally many heads in all layers; for both, `uniform` where the architecture has one number "
        "for all layers. A model that it can't run is refused. None sets no limits.",
        section="Serving",
    )
    clipping: Literal["mse", "max"] = setting(
        "mse",
        "Start value of q_m: `mse` has the least squared error at b_u bits, `max` is max|W|.",
        section="Quantizers",
    )
    distill_logits: float = setting(
        0.0, "Weight of the teacher's logits in the loss.", at_least(0), section="Distillation"
    )
    distill_hidden: float = setting(
        0.0, "Weight of the teacher's hidden states in the loss.", at_least(0), section="Distillation"
    )
    distill_temperature: float = setting(
        2.0, "Temperature that softens both distributions.", above(0), section="Distillation"
    )
    include: Texts | None = setting(
        None,
        "Regular expressions over module names: the layers to quantize. None selects the attention and MLP layers of "
        "the repeated blocks.",
        Check(_are_patterns),
        section="Selection",
        expected="a list of regular expressions",
    )
    exclude: Texts = setting(
        [],
        "Regular expressions over module names: layers not to quantize.",
        Check(_are_patterns),
        section="Selection",
        expected="a list of regular expressions",
    )
    drop_layers: int | Texts = setting(
        0,
        "Entire layers to remove first: their number, or their paths (`model.layers.3`). A number chooses them one by "
        "one, each time the layer without which the loss on `calibration_batches` is lowest. The saved config names "
        "their paths.",
        Check(_is_depth),
        section="Selection",
        expected="a number of layers, or a list of their paths",
    )
    drop_experts: int | Texts = setting(
        0,
        "Entire experts of a mixture to remove first: how many of each layer, or their paths "
        "(`model.layers.3.mlp.experts.5`), equally many of each layer. A number removes those of the least "
        "`expert_score` on `calibration_batches`. The saved config names their paths.",
        Check(_is_depth),
        section="Selection",
        expected="a number of experts, or a list of their paths",
    )
    expert_score: Literal["routed_norm", "tokens", "magnitude"] = setting(
        "routed_norm",
        "What `drop_experts` keeps experts for: router weight times norm of the output, summed over tokens "
        "(`routed_norm`), their number of tokens, or the norm of their weights.",
        section="Selection",
    )
    prune: Texts = setting(
        [],
        "Families to make prunable in addition to heads and channels: kinds (`residual`), couplings (`norm`) or "
        "patterns of names (`*.layers.0.*`); see `geta_hf.qadg.apply_policy`.",
        section="Selection",
        expected="a list of kinds, couplings or patterns",
    )
    keep: Texts = setting(
        [],
        "Families not to prune, named in the same way; overrides `prune`.",
        section="Selection",
        expected="a list of kinds, couplings or patterns",
    )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Of the class itself: a subclass that only changes defaults is the same method.
        if "method" not in vars(cls):
            return
        # Two methods of one name would make the file of a run ambiguous.
        owner = CONFIG_CLASSES.setdefault(cls.method, cls)
        if owner is not cls:
            raise GETAError(f"method {cls.method!r} of {cls.__name__} already belongs to {owner.__name__}")

    def __post_init__(self) -> None:
        # Every value by itself first: the checks of several settings rely on the types.
        for name, one in settings_of(type(self)).items():
            value = getattr(self, name)
            self._check(one.accepts(value), name, one.allowed)
            setattr(self, name, _normalize(value, one.hint))
        # Set here and not as the field's default, which a target of another kind could not tell from a user's wish.
        if not self.has_target:
            self.target_sparsity = self.default_sparsity
        if self.bit_choices is not None:
            self.bit_choices = sorted(set(self.bit_choices))
        self._settle_grid()
        self.check_widths()
        self.check_targets()
        self._check_serve()

    def _check_serve(self) -> None:
        """Raise GETAError for widths that the program of `serve` has no place for."""
        if self.serve is None:
            return
        if self.activation_bits is not None:
            raise GETAError(
                f"serve = {self.serve!r} and activation_bits = {self.activation_bits}: {self.serve} does not read how "
                f"inputs are rounded; leave activation_bits out, or serve"
            )
        # A byte holds the codes of both programs; wider ones would be stored as floats.
        if self.widths[-1] > 8:
            limit = "bits" if self.bit_choices is None else "bit_choices"
            raise GETAError(
                f"serve = {self.serve!r} and {limit} = {getattr(self, limit)}: {self.serve} has no integers of more "
                f"than 8 bits; choose widths of at most 8"
            )

    def _settle_grid(self) -> None:
        """Set `grid` and its former spelling; where both are given, `grid` counts."""
        grid = self.grid
        # A copy with another `per_channel` hands on the grid that was settled before.
        changed = isinstance(grid, _Settled) and self.per_channel != (grid == "channel")
        if grid is None or changed:
            grid = "channel" if self.per_channel else "layer"
        self.grid = cast(GridName, _Settled(grid))
        self.per_channel = grid == "channel"

    def check_widths(self) -> None:
        """Raise GETAError for `bit_choices` or `mean_bits` outside `bits`. Methods extend this."""
        lower, upper = self.bits
        if self.bit_choices is not None:
            fits = bool(self.bit_choices) and lower <= self.bit_choices[0] and self.bit_choices[-1] <= upper
            self._check(fits, "bit_choices", f"widths in {lower}..{upper}, as `bits`")
        if self.mean_bits is not None:
            low, high = self.widths[0], self.widths[-1]
            limit = "bits" if self.bit_choices is None else "bit_choices"
            self._check(low <= self.mean_bits <= high, "mean_bits", f"in {low}..{high}, as `{limit}`")

    def check_targets(self) -> None:
        """Raise GETAError for two targets of one kind, or for pruning, size and `mean_bits` together."""
        pruning = [name for name in _PRUNING if getattr(self, name) is not None]
        sizes = [name for name in _SIZES if getattr(self, name) is not None]
        for names in (pruning, sizes):
            if len(names) > 1:
                raise GETAError(f"{' and '.join(names)} set the same target; give only one of them")
        # Pruning, size and mean width are tied by one equation, so any two decide the third.
        if pruning and sizes and self.mean_bits is not None:
            raise GETAError(
                f"{pruning[0]}, {sizes[0]} and mean_bits can't all be met; give two of them, the third is solved for"
            )

    @property
    def has_target(self) -> bool:
        """Whether a target for pruning or size is given. Methods with further targets extend this."""
        return any(getattr(self, name) is not None for name in (*_PRUNING, *_SIZES))

    def _check(self, holds: bool, name: str, wanted: str) -> None:
        if not holds:
            raise GETAError(f"{type(self).__name__}.{name} = {getattr(self, name)!r} must be {wanted}")

    @property
    def widths(self) -> list[int]:
        """The integer widths that a layer may end with, ascending."""
        if self.bit_choices is not None:
            return list(self.bit_choices)
        return list(range(self.bits[0], self.bits[1] + 1))

    @property
    def embedding_grid(self) -> EmbeddingGrid:
        """Return what has a step size in an embedding that `embedding_bits` rounds: a row, or 32 elements of one."""
        return "block32" if self.grid == "block32" else "channel"

    @property
    def wanted_mean_bits(self) -> float | None:
        """`mean_bits`, or the middle of the widths if there is no size target; None if the size alone decides."""
        if self.mean_bits is not None or self._sized:
            return self.mean_bits
        return (self.widths[0] + self.widths[-1]) / 2

    @property
    def _sized(self) -> bool:
        return any(getattr(self, name) is not None for name in _SIZES)

    @property
    def size_alone(self) -> bool:
        """Whether a size is given, and no target for pruning or `mean_bits` with it."""
        return self._sized and all(getattr(self, name) is None for name in (*_PRUNING, "mean_bits"))

    @property
    def splits_in_training(self) -> bool:
        """Whether training decides how a size is split between pruning and widths; False unless a method says so."""
        return False

    @property
    def input_widths(self) -> list[int]:
        """The integer widths that a layer's input may end with, ascending; none where inputs are not quantized."""
        if self.activation_bits is None:
            return []
        return list(range(self.activation_bits[0], self.activation_bits[1] + 1))

    @property
    def wanted_mean_input_bits(self) -> float | None:
        """The plain mean that widths of inputs end with at most: the middle of `activation_bits`.

        None where inputs are not quantized, and where `target_bops` decides their widths together with the weights'.
        """
        if self.activation_bits is None or self.target_bops is not None:
            return None
        return sum(self.activation_bits) / 2

    @property
    def final_upper_bits(self) -> float:
        """The upper bound of the widths at the end of training."""
        return self.bits[1]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types, with the name of the method; `read_config` returns an equal config."""
        values = dataclasses.asdict(self)
        # JSON has no tuples; `_normalize` makes them again when a config is read.
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        # `per_channel` says the others, so that files are as they were before there were blocks.
        plain["grid"] = str(self.grid)
        if self.grid != "block32":
            del plain["grid"]
        # Earlier versions read configs that ask for no program.
        if self.serve is None:
            del plain["serve"]
        # And those of models without experts.
        if not self.drop_experts:
            del plain["drop_experts"]
            del plain["expert_score"]
        return {"method": self.method, **plain}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build a config of this class from plain data.

        Raises:
            GETAError: a key that is not a field, another method, or a value that is not allowed.
        """
        settings = settings_of(cls)
        method = values.get("method", cls.method)
        if method != cls.method:
            raise GETAError(
                f"{cls.__name__} has method {cls.method!r}, not {method!r}; read the values with "
                f"geta_hf.config.read_config, which chooses the class"
            )
        given = {name: value for name, value in values.items() if name != "method"}
        # An ignored key would run with a default in place of what was asked for.
        unknown = sorted(set(given) - set(settings))
        if unknown:
            hint = did_you_mean(unknown[0], settings)
            raise GETAError(f"unknown {cls.__name__} keys {unknown}{hint}; known are {sorted(settings)}")
        return cls(**{name: _parse_number(value, settings[name].hint) for name, value in given.items()})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON or YAML, by the file's extension. An existing file is replaced in one step."""
        values = self.to_dict()
        if Path(path).suffix == ".json":
            text = json.dumps(values, indent=2) + "\n"
        else:
            text = yaml.safe_dump(values, sort_keys=False)
        write_whole(path, text)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read JSON or YAML, by the file's extension.

        Raises:
            GETAError: a file that is not a mapping of the fields of this class, or one of another method.
        """
        return cls.from_dict(read_mapping(path))


FOUR_LEVELS_HELP = (
    "Give what ends at 2 bits, a weight or some of its rows, the four levels -q, -q/3, q/3 and q (SEQ, arXiv "
    "2502.02631) in place of -q, 0 and q, where it loses less on them."
)
"""What the field `four_levels` means, in every method that has it."""


@document_attributes
@dataclass
class GETAConfig(CompressionConfig):
    """The settings of QASSO, GETA's own method (Algorithm 2, https://arxiv.org/abs/2502.16638).

    >>> from geta_hf import GETAConfig
    >>> config = GETAConfig(target_sparsity=0.5, bits=(4, 8))
    >>> config.wanted_mean_bits
    6.0
    >>> GETAConfig(target_bops=0.05, warmup="1 epoch").target_sparsity is None  # solved for before training
    True
    >>> GETAConfig.paper(target_sparsity=0.5).saliency
    'hesso'

    Raises:
        GETAError: a value of the wrong type or out of range, or settings that contradict each other.
    """

    method: ClassVar[str] = "qasso"

    initial_bits: int = setting(
        16,
        "Width before the projection stage, at least b_u.",
        Check(lambda value: 2 <= value <= 16, "from b_u to 16"),
        section="Stages",
    )
    bit_reduction: float | None = setting(
        None,
        "b_r, the bits by which each projection period lowers the upper bound. None spreads initial_bits - b_u over "
        "the periods; any other value must end inside `bits`.",
        at_least(0),
        section="Stages",
    )
    warmup: Duration = setting(
        0.1,
        "Length of the warm-up stage; 0 leaves it out.",
        Check(is_duration),
        section="Stages",
        expected=_DURATION,
    )
    projection: Duration = setting(
        0.1,
        "Length of the projection stage. With 0 widths stay at initial_bits until the joint stage ends.",
        Check(is_duration),
        section="Stages",
        expected=_DURATION,
    )
    joint: Duration = setting(
        0.4,
        "Length of the joint stage. With 0 all groups are removed at once, at the last step before cool-down.",
        Check(is_duration),
        section="Stages",
        expected=_DURATION,
    )
    projection_periods: int = setting(
        4,
        "B, the number of projection periods; fewer where the stage has fewer steps. 0 leaves the stage out.",
        at_least(0),
        section="Stages",
    )
    pruning_periods: int = setting(
        5,
        "P, the number of periods of the joint stage; fewer where the stage has fewer steps. 0 leaves the stage out.",
        at_least(0),
        section="Stages",
    )
    saliency: Literal["fisher", "taylor", "hesso", "mask_fisher"] = setting(
        "fisher",
        "Score by which groups are removed: `fisher` is the moving average of <g, x>², `taylor` its root, `hesso` the "
        "score of the paper, `mask_fisher` the moving average of <g, x>² over the slices alone that read a group's "
        "output. All but `hesso` are taken per parameter removed, unless the target counts groups (`target_sparsity`).",
        section="Rules",
    )
    split: Literal["even", "early", "late"] | None = setting(
        None,
        "How a size alone is split between pruning and widths. `even` decides before training, as if all groups were "
        "alike: widths become narrower than the middle of `bits` only once half of the groups are removed. `early` "
        "decides when the joint stage starts, by the expected losses of removing each group and of rounding each "
        "weight, which compete for the size; from then on the run is trained at these widths. `late` decides by them "
        "what is removed when each pruning period starts, and widths when the joint stage ends. With both, groups are "
        "scored as under `mask_fisher`. None is `early` for a size alone whose rules compare expected losses, and "
        "`even` elsewhere.",
        section="Rules",
    )
    exchange_rate: float = setting(
        2.0,
        "What the expected loss of removing a group is multiplied by before it competes with that of rounding, where "
        "`split` is `early` or `late`. A higher rate removes less and leaves fewer bits: training makes up for more of "
        "what rounding costs.",
        above(0),
        section="Rules",
    )
    forgetting: Literal["uniform", "paper"] = setting(
        "uniform",
        "Rate at which redundant groups shrink: `uniform` is γ = 1 / (remaining steps of the period), `paper` is "
        "Eq. 13.",
        section="Rules",
    )
    bit_rule: Literal["sensitivity", "ppsg", "paper"] = setting(
        "sensitivity",
        "How widths are chosen. `sensitivity` spends `mean_bits`, or the size target, where one more bit lowers the "
        "expected loss most, at the end of the joint stage. `ppsg` learns d under projection alone; in practice layers "
        "end at or near b_u. `paper` sets d by Eq. 14 in the joint stage, which takes most layers that lose groups to "
        "b_l. With these two, `mean_bits` has no default; if a target requires other widths than those learned, all "
        "are moved together.",
        section="Rules",
    )
    compensate: bool = setting(
        False,
        "Remove the groups of a pruning period at once, when it starts, and let the weights that read them make up for "
        "it by least squares on `calibration_batches`; `forgetting` then has no part.",
        section="Rules",
    )
    rounding: Literal["nearest", "compensated"] = setting(
        "nearest",
        "How weights are rounded to their final widths: `nearest`, or `compensated`, where the inputs that follow make "
        "up for the error of each (GPTQ), on `calibration_batches`. Training goes on from there.",
        section="Rules",
    )
    four_levels: bool = setting(True, FOUR_LEVELS_HELP, section="Quantizers")
    learn_exponent: bool = setting(False, "Train t of weights; otherwise t = 1.", section="Quantizers")
    learn_activation_exponent: bool = setting(
        False, "Train t of activations; otherwise t = 1, which inference kernels expect.", section="Quantizers"
    )
    quantizer_learning_rate: float = setting(
        1e-3,
        "Relative step size of (d, q_m, t), which follows the run's learning rate scheduler. At most 3e-3 is advised.",
        at_least(0),
        section="Quantizers",
    )
    saliency_decay: float = setting(
        0.95, "Decay of the moving average of the saliency.", between(0, 1), section="Rules"
    )
    eta: float = setting(0.999, "η of Eqs. 13 and 14.", inside(0, 1), section="Rules")
    xi: float = setting(0.999, "ξ of Eqs. 13 and 14.", inside(0, 1), section="Rules")
    epsilon: float = setting(1e-8, "Mean magnitude up to which a group counts as zero.", between(0, 1), section="Rules")

    def check_widths(self) -> None:
        """Raise GETAError for widths that the stages or the rule can't reach."""
        super().check_widths()
        upper = self.bits[1]
        self._check(upper <= self.initial_bits, "initial_bits", f"in {upper}..16")
        if self.activation_bits is not None:
            fits = self.activation_bits[1] <= self.initial_bits
            self._check(fits, "activation_bits", f"(b_l, b_u) with b_l <= b_u <= {self.initial_bits}")
        # Eq. 14 comes from one angle between a layer's gradient and its rounding errors, so it has no d for a part.
        if self.grid != "layer" and self.bit_rule == "paper":
            raise GETAError(
                f"Eq. 14 sets one d a layer; with grid = {self.grid!r} choose bit_rule='sensitivity' or 'ppsg'"
            )
        if self.compensate and self.bit_rule == "paper":
            raise GETAError(
                "bit_rule = 'paper' sets d while groups are forgotten, but compensate removes them at once; choose "
                "bit_rule='sensitivity' or 'ppsg'"
            )
        if self.rounding == "compensated" and self.learn_exponent:
            raise GETAError("rounding = 'compensated' is for t = 1; leave learn_exponent False, or rounding='nearest'")
        if self.bit_reduction is not None and self.projection_periods:
            self._check_reduction()

    def check_targets(self) -> None:
        """Raise GETAError for contradicting targets, or for a rule by which a size can't be split."""
        super().check_targets()
        if self.split in (None, "even"):
            return
        if not self.size_alone:
            given = [name for name in (*_PRUNING, "mean_bits") if getattr(self, name) is not None]
            raise GETAError(
                f"split = {self.split!r} splits a size between pruning and widths; give target_bytes or target_bops "
                f"alone, {f'without {given[0]}' if self._sized else 'not a target for pruning'}, or split='even'"
            )
        for name, choices in _COMPARES_LOSSES.items():
            if getattr(self, name) not in choices:
                raise GETAError(
                    f"split = {self.split!r} compares expected losses, which {name} = {getattr(self, name)!r} is not "
                    f"about; choose {name}={choices[-1]!r}, or split='even'"
                )

    @property
    def split_rule(self) -> Literal["even", "early", "late"]:
        """`split`, or what stands for None: `early` for a size alone whose rules compare expected losses, else `even`.

        >>> GETAConfig(target_bops=0.1).split_rule, GETAConfig.paper(target_bops=0.1).split_rule
        ('early', 'even')
        """
        if self.split is not None:
            return self.split
        compares = all(getattr(self, name) in choices for name, choices in _COMPARES_LOSSES.items())
        return "early" if self.size_alone and compares else "even"

    def _check_reduction(self) -> None:
        lower, upper = self.bits
        end = self.final_upper_bits
        sum_text = f"{self.initial_bits} - {self.projection_periods} · {self.bit_reduction} = {end}"
        if end < lower:
            raise GETAError(
                f"b_u - B·b_r = {sum_text} is below b_l = {lower}; lower bit_reduction or projection_periods"
            )
        if end > upper:
            raise GETAError(f"b_u - B·b_r = {sum_text} is above the {upper} bits of `bits`; raise bit_reduction")
        if self.widths[0] > end:
            raise GETAError(
                f"b_u - B·b_r = {sum_text} is below all of bit_choices = {self.widths}; lower bit_reduction"
            )

    @property
    def wanted_mean_bits(self) -> float | None:
        """`mean_bits`, or the middle of the widths if `bit_rule` is `sensitivity` and there is no size target."""
        if self.bit_rule != "sensitivity":
            return self.mean_bits
        return super().wanted_mean_bits

    @property
    def splits_in_training(self) -> bool:
        """Whether training decides how a size is split between pruning and widths."""
        return self.split_rule != "even"

    @property
    def compensates(self) -> bool:
        """Whether covariances of layers' inputs are measured in training."""
        return self.compensate or self.rounding == "compensated"

    @property
    def wanted_mean_input_bits(self) -> float | None:
        """As for every method if `bit_rule` is `sensitivity`; otherwise b_u, at or near which learned widths end."""
        if self.bit_rule != "sensitivity" and self.activation_bits is not None and self.target_bops is None:
            return float(self.activation_bits[1])
        return super().wanted_mean_input_bits

    @property
    def reduction(self) -> float:
        """b_r in bits for each period: `bit_reduction`, or (initial_bits - b_u) / B."""
        if self.bit_reduction is not None:
            return self.bit_reduction
        return (self.initial_bits - self.bits[1]) / max(self.projection_periods, 1)

    @property
    def final_upper_bits(self) -> float:
        """The upper bound after the projection stage: initial_bits - B·b_r, which is b_u unless b_r is given."""
        if self.bit_reduction is None or not self.projection_periods:
            return float(self.bits[1])
        return self.initial_bits - self.projection_periods * self.reduction

    @classmethod
    def paper(cls, **changes: Any) -> Self:
        """Return the rules of the paper: HESSO saliency, Eqs. 13 and 14, q_m = max|W|, learned t of weights and inputs.

        What still differs from the paper is listed in `docs/paper_index.md`.

        Args:
            changes: values of any fields, which override these rules too. Without `projection_periods`, B is 4, or
                b_u - b_l where that is less.

        Raises:
            GETAError: bounds that Algorithm 2 does not take: it needs b_u >= b_l + 1, 1 <= B <= b_u - b_l and b_r >= 1.

        >>> GETAConfig.paper(bits=(4, 6)).projection_periods
        2
        """
        rules: dict[str, Any] = {
            "saliency": "hesso",
            "forgetting": "paper",
            "bit_rule": "paper",
            "clipping": "max",
            "learn_exponent": True,
            "learn_activation_exponent": True,
            "four_levels": False,
        }
        config = cls(**{**rules, **changes})
        if "projection_periods" not in changes and "bit_reduction" not in changes:
            fewest = max(config.bits[1] - config.bits[0], 1)
            config.projection_periods = min(config.projection_periods, fewest)
        config._check_paper()
        return config

    def _check_paper(self) -> None:
        """Raise GETAError for bounds that line 1 of Algorithm 2 excludes."""
        lower, upper = self.bits
        source = "in the paper's rules (Algorithm 2, line 1)"
        if upper < lower + 1:
            raise GETAError(
                f"bits = {self.bits} must have b_u >= b_l + 1 {source}; widen bits, or use GETAConfig without paper()"
            )
        if not 1 <= self.projection_periods <= upper - lower:
            raise GETAError(
                f"projection_periods = {self.projection_periods} must be in 1..{upper - lower}, from 1 to b_u - b_l, "
                f"{source}; a projection stage is left out with projection = 0"
            )
        # The reduction that follows from other fields is a quotient, so that 1 may come out as 0.9999999.
        if self.reduction < 1 - 1e-9:
            raise GETAError(
                f"b_r = {self.reduction:g} must be at least 1 {source}: it is bit_reduction, or (initial_bits - b_u) / "
                f"projection_periods = ({self.initial_bits} - {upper}) / {self.projection_periods}; use fewer periods "
                f"or raise initial_bits"
            )


# -------------------------------------------------------------------------------------------------------------- reading


def read_config(source: str | os.PathLike[str] | Mapping[str, Any]) -> CompressionConfig:
    """Return the config of any method, from a JSON or YAML file or from plain data.

    Args:
        source: a path, or what `to_dict` returns. Its `method` chooses the class in `CONFIG_CLASSES`; data without one
            was written for QASSO.

    Raises:
        GETAError: an unreadable file, an unknown method, or values that its class refuses.

    >>> type(read_config({"bits": [4, 8]})).__name__
    'GETAConfig'
    """
    values = source if isinstance(source, Mapping) else read_mapping(source)
    method = values.get("method", GETAConfig.method)
    if not isinstance(method, str) or method not in CONFIG_CLASSES:
        known = sorted(CONFIG_CLASSES)
        hint = did_you_mean(str(method), known)
        raise GETAError(f"unknown method {method!r}{hint}; known are {known}. Import the module that declares it first")
    return CONFIG_CLASSES[method].from_dict(values)


def read_mapping(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the fields of a config as a JSON or YAML file has them. Raise GETAError for an unreadable file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        # JSON is not left to YAML, which reads `1e-8` as text.
        values = json.loads(text) if Path(path).suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise GETAError(f"{path} can't be read as a config: {error}") from error
    if not isinstance(values, dict):
        raise GETAError(f"{path} holds {type(values).__name__}, not the fields of a config")
    return values
