"""What the recipes share: a YAML file and `--key value` after it, as the arguments of one run."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Collection, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, cast, get_args

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

from geta_hf import config
from geta_hf.config import SECTIONS, CompressionConfig, GETAConfig, Setting, sections_of
from geta_hf.errors import GETAError
from geta_hf.recipes import CONFIGS


def read_values(argv: Sequence[str], parser: HfArgumentParser) -> tuple[dict[str, Any], CompressionConfig | None]:
    """Read `[config.yaml] [--key value ...]`; a dotted key reaches into a section, a key alone means true.

    Values of the command line are read as YAML, except those of fields that hold text, which are taken literally.

    Returns:
        All values but the `geta` section, and that as a config; None where it is missing or null.

    Raises:
        GETAError: a missing file, a malformed argument, or an invalid `geta` section.
    """
    argv = list(argv)
    values = read_config(argv.pop(0)) if argv and not argv[0].startswith("--") else {}
    apply_overrides(values, argv, text_fields(parser))
    geta = values.pop("geta", None)
    if not (geta is None or isinstance(geta, dict)):
        raise GETAError(f"geta: {geta!r} is neither a section with the fields of GETAConfig nor null")
    return values, None if geta is None else config.read_config(geta)


def make_parser(*kinds: type) -> HfArgumentParser:
    """Return a parser of a recipe's own dataclasses, followed by `TrainingArguments`."""
    return HfArgumentParser(cast(Any, (*kinds, TrainingArguments)))


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
                lines += ["", f"{section}, {owner}:", *_wrapped(SECTIONS.get(section, ""), 2)]
            for setting in new:
                lines.append(f"  --geta.{setting.name} VALUE")
                lines += _wrapped(f"{setting.help} ({setting.allowed}; default: {json.dumps(setting.default)})", 8)
            listed += new
    return "\n".join(lines)


def _wrapped(text: str, indent: int) -> list[str]:
    spaces = " " * indent
    return textwrap.wrap(text, 100, initial_indent=spaces, subsequent_indent=spaces, break_on_hyphens=False)


def parse_sections(parser: HfArgumentParser, values: dict[str, Any]) -> tuple[Any, ...]:
    """The parser's dataclasses, filled from `values`.

    Raises:
        GETAError: a key that none of them knows, or a value that they refuse.
    """
    # YAML 1.1 reads the strategy `no` as false.
    values = {k: "no" if v is False and k.endswith("_strategy") else v for k, v in _renamed(values).items()}
    values.setdefault("use_cpu", not torch.accelerator.is_available())  # without it, bf16 refuses a CPU
    try:
        return parser.parse_dict(values)
    except (TypeError, ValueError) as error:
        raise GETAError(f"arguments of the recipe: {error}") from error


def _renamed(values: dict[str, Any]) -> dict[str, Any]:
    """Later versions of transformers call gradient checkpointing activation checkpointing; both names are taken."""
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
    raise GETAError(f"{path}: no such config file; give a YAML file, or one of {', '.join(shipped)}")


def text_fields(parser: HfArgumentParser) -> set[str]:
    """The recipe's own fields that hold text and nothing else; some of Trainer's take a section or true as well."""
    own = [field for kind in parser.dataclass_types if kind is not TrainingArguments for field in fields(kind)]
    return {field.name for field in own if field.type is str or set(get_args(field.type)) == {str, type(None)}}


def apply_overrides(values: dict[str, Any], argv: Sequence[str], texts: Collection[str] = ()) -> None:
    """Writes `--key value`, `--key=value`, `--section.key value` and `--flag` into `values`, read as YAML.

    Args:
        texts: keys whose values are taken as they stand, but for `null` and for quotes around the whole.
    """
    rest = list(argv)
    while rest:
        key, equals, text = rest.pop(0).partition("=")
        if not key.startswith("--") or len(key) == 2:
            raise GETAError(f"{key!r}: expected --key value; only the first argument may be a config file")
        if not equals:
            text = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        *sections, name = key[2:].split(".")
        target = values
        for section in sections:
            if not isinstance(target.get(section), dict):
                target[section] = {}
            target = target[section]
        target[name] = _value(key, text, literal=not sections and name in texts)


def _value(key: str, text: str, literal: bool) -> Any:
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if literal and text != "null" and not quoted:
        return text
    try:
        return _numbers(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise GETAError(f"{key} {text}: not YAML; put patterns in single quotes ({error})") from error


def _numbers(value: Any) -> Any:
    """YAML 1.1 reads `5e-5`, without a dot, as text."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return float(value)
    return value
