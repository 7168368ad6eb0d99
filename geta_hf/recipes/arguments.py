"""Read a YAML file and the `--key value` after it as the arguments of one run: what all recipes share."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast, get_type_hints

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

from geta_hf import config
from geta_hf.config import CompressionConfig, GETAConfig, Setting, introduction_of, sections_of, settings_of
from geta_hf.errors import GETAError
from geta_hf.recipes import CONFIGS
from geta_hf.utils.suggestions import did_you_mean

MEASURE_SPEED = "time the dense and the exported model at the end, for a few seconds"


@dataclass
class ModelArguments:
    """Choose the model to start from."""

    model_name_or_path: str = field(metadata={"help": "name of a model on the Hub, or a local folder"})
    tokenizer_name_or_path: str | None = field(default=None, metadata={"help": "default: the model's own"})
    measure_speed: bool = field(default=True, metadata={"help": MEASURE_SPEED})


def read_values(
    argv: Sequence[str], parser: HfArgumentParser, recipe: str
) -> tuple[dict[str, Any], CompressionConfig | None]:
    """Read `[CONFIG.yaml] [--key value ...]`; see `split_overrides` for the forms of a value.

    Values of the command line are read as YAML, except those of fields that hold text, which are taken literally.

    Args:
        argv: the words of the command line.
        parser: of the recipe's arguments.
        recipe: the recipe's name; a config that names another one is refused.

    Returns:
        All values but the `geta` section, and that as a config; None where it is missing or null.

    Raises:
        GETAError: a missing file, a malformed argument, another recipe's config, or an invalid `geta` section.
    """
    path, rest = split_config(argv)
    values = read_config(path) if path is not None else {}
    apply_overrides(values, rest, text_fields(parser))
    named = values.pop("recipe", recipe)
    if named != recipe:
        raise GETAError(f"the config is for the recipe {named}, not {recipe}; run it by `geta-hf train`")
    geta = values.pop("geta", None)
    if not (geta is None or isinstance(geta, dict)):
        raise GETAError(f"geta: {geta!r} is neither a section with the fields of GETAConfig nor null")
    return values, None if geta is None else config.read_config(geta)


def make_parser(*kinds: type) -> HfArgumentParser:
    """Return a parser of a recipe's own dataclasses, followed by `TrainingArguments`."""
    usage = "geta-hf train CONFIG.yaml [--key value ...]"
    return HfArgumentParser(cast(Any, (*kinds, TrainingArguments)), usage=usage)


def print_help(parser: HfArgumentParser) -> None:
    """Print the recipe's arguments, and those of its `geta` section with help, values and default."""
    parser.print_help()
    print()
    print(describe_config())


def describe_config() -> str:
    """Return the options `--geta.FIELD` of every method as text; a setting that methods share is listed once."""
    lines = [
        "compression, the `geta` section (`--geta null` trains without it):",
        f"  --geta.method NAME  one of {', '.join(config.CONFIG_CLASSES)} (default: {GETAConfig.method})",
    ]
    listed: list[Setting] = []
    kinds: list[type[CompressionConfig]] = [CompressionConfig, *config.CONFIG_CLASSES.values()]
    for kind in kinds:
        owner = f"method {kind.method}" if kind.method else "every method"
        for section, settings in sections_of(kind).items():
            new = [setting for setting in settings if setting not in listed]
            if new:
                lines += ["", f"{section}, {owner}:", *_wrapped(introduction_of(section, kind), 2)]
            for setting in new:
                lines.append(f"  --geta.{setting.name} VALUE")
                lines += _wrapped(f"{setting.help} ({setting.allowed}; default: {json.dumps(setting.default)})", 8)
            listed += new
    return "\n".join(lines)


def _wrapped(text: str, indent: int) -> list[str]:
    spaces = " " * indent
    return textwrap.wrap(text, 100, initial_indent=spaces, subsequent_indent=spaces, break_on_hyphens=False)


def parse_sections(parser: HfArgumentParser, values: dict[str, Any]) -> tuple[Any, ...]:
    """Return the parser's dataclasses, filled from `values`.

    Raises:
        GETAError: a key that none of them knows, or a value that they refuse.
    """
    values = _without_negations(parser, values)
    check_keys(parser, _renamed(values))
    check_switches(parser, values)
    # YAML 1.1 reads the strategy `no` as false.
    values = {k: "no" if v is False and k.endswith("_strategy") else v for k, v in _renamed(values).items()}
    values.setdefault("use_cpu", not torch.accelerator.is_available())  # without it, bf16 refuses a CPU
    try:
        return parser.parse_dict(values)
    except (TypeError, ValueError) as error:
        raise GETAError(f"arguments of the recipe: {error}") from error


def check_keys(parser: HfArgumentParser, values: Collection[str]) -> None:
    """Raise GETAError for keys that no section of the run has, with the one that may be meant."""
    known = {field.name for kind in parser.dataclass_types for field in fields(kind) if field.init}
    unknown = [key for key in values if key not in known]
    if unknown:
        sections = [f"geta.{name}" for kind in config.CONFIG_CLASSES.values() for name in settings_of(kind)]
        hints = [f"{key}{did_you_mean(key, (*known, *sections))}" for key in unknown]
        raise GETAError(f"the run has no argument {', '.join(hints)}; --help lists all")


def check_switches(parser: HfArgumentParser, values: dict[str, Any]) -> None:
    """Raise GETAError for text where a switch takes true or false, which would count as true."""
    switches = {field.name for kind in parser.dataclass_types for field in fields(kind) if field.type is bool}
    for name in switches & values.keys():
        if not isinstance(values[name], bool | int):
            raise GETAError(f"{name} = {values[name]!r} must be true or false; a key=value after it needs --")


def check_choices(section: Any) -> None:
    """Raise GETAError where a field of a dataclass has a value that its `Literal` does not list."""
    for name, hint in get_type_hints(type(section)).items():
        one, value = Setting(name, hint, None), getattr(section, name)
        if one.choices and not one.accepts(value):
            raise GETAError(f"{name} = {value!r} must be {one.allowed}{', or null' if one.accepts(None) else ''}")


def _without_negations(parser: HfArgumentParser, values: dict[str, Any]) -> dict[str, Any]:
    """Read `no_KEY: true`, which argparse offers for switches that are on by default, as `KEY: false`."""
    switches = {f"no_{field.name}": field.name for kind in parser.dataclass_types for field in fields(kind)}
    taken = {key for key, value in values.items() if key in switches and value is True}
    return {switches[key] if key in taken else key: False if key in taken else value for key, value in values.items()}


def _renamed(values: dict[str, Any]) -> dict[str, Any]:
    """Take both names of gradient checkpointing, which later versions of transformers call activation checkpointing."""
    old, new = "gradient_checkpointing", "activation_checkpointing"
    if new not in TrainingArguments.__dataclass_fields__:
        old, new = new, old
    names = {f"{old}{end}": f"{new}{end}" for end in ("", "_kwargs")}
    return {names.get(key, key): value for key, value in values.items()}


def read_config(path: str) -> dict[str, Any]:
    """Return the YAML file as a dict, with `5e-5` read as the number that it is; see `find_config`."""
    try:
        values = yaml.safe_load(find_config(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise GETAError(f"{path}: not YAML: {error}") from error
    if not isinstance(values, dict):
        raise GETAError(f"{path}: expected `key: value` lines, found {type(values).__name__}")
    return _numbers(values)


def find_config(path: str) -> Path:
    """Return the config file at `path`, or the ready-made one of that name: `bert_squad`, `recipes/configs/phi2.yaml`.

    Raises:
        GETAError: neither exists; the message lists the ready-made ones.
    """
    file = Path(path)
    if file.is_file():
        return file
    shipped = {one.stem: one for one in sorted(CONFIGS.glob("*.yaml"))}
    if file.suffix in ("", ".yaml") and file.parent in (Path(), Path("recipes/configs")) and file.stem in shipped:
        return shipped[file.stem]
    hint = did_you_mean(file.stem, shipped)
    raise GETAError(f"{path}: no such config file{hint}; give a YAML file, or one of {', '.join(shipped)}")


def text_fields(parser: HfArgumentParser) -> set[str]:
    """Return the recipe's own fields that hold text and nothing else; Trainer's may take a section or true as well."""
    own = [field for kind in parser.dataclass_types if kind is not TrainingArguments for field in fields(kind)]
    settings = [Setting(field.name, field.type, None) for field in own]
    return {one.name for one in settings if one.choices or one.hint in (str, str | None)}


def split_config(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the config file that a command line begins with, or None, and the words that follow."""
    words = list(argv)
    if not words or words[0].startswith("--") or ("=" in words[0] and not Path(words[0]).is_file()):
        return None, words
    return words[0], words[1:]


def split_overrides(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield key and text of `--key value`, `--key=value`, `key=value` and `--flag`, which means true.

    Dashes within a key are read as underscores. A dotted key, such as `--geta.bits`, reaches into a section.

    Raises:
        GETAError: a word that is none of these.
    """
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        key, equals, text = word.partition("=")
        name = key.removeprefix("--")
        if not name or not (equals or key.startswith("--")):
            raise GETAError(
                f"{word!r}: expected --key value or key=value; only the first argument may be a config file"
            )
        if not equals:
            text = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        yield name.replace("-", "_"), text


def apply_overrides(values: dict[str, Any], argv: Sequence[str], texts: Collection[str] = ()) -> None:
    """Write what `split_overrides` finds into `values`, read as YAML.

    Args:
        values: of the config file; changed in place.
        argv: the words of the command line after the config file.
        texts: keys whose values are taken as they stand, but for `null` and for quotes around the whole.

    Raises:
        GETAError: a malformed argument, or a value that is no YAML.
    """
    for key, text in split_overrides(argv):
        *sections, name = key.split(".")
        target = values
        for section in sections:
            if not isinstance(target.get(section), dict):
                target[section] = {}
            target = target[section]
        target[name] = _value(f"--{key}", text, literal=not sections and name in texts)


def _value(key: str, text: str, literal: bool) -> Any:
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if literal and text != "null" and not quoted:
        return text
    try:
        return _numbers(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise GETAError(f"{key} {text}: not YAML; put patterns in single quotes ({error})") from error


def _numbers(value: Any) -> Any:
    """Turn text that is a number into one: YAML 1.1 reads `5e-5`, without a dot, as text."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return float(value)
    return value
