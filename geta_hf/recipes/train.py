"""Run the recipe that a config names: the sub-command `geta-hf train`."""

from __future__ import annotations

import importlib
import textwrap
from collections.abc import Sequence
from typing import Any

from geta_hf.errors import GETAError
from geta_hf.recipes import CONFIGS, RECIPES
from geta_hf.recipes.arguments import describe_config, read_config, split_config, split_overrides
from geta_hf.recipes.run import HELP, wants_help
from geta_hf.utils.suggestions import did_you_mean

_USAGE = """usage: geta-hf train CONFIG.yaml [--key value ...]
       accelerate launch -m geta_hf train CONFIG.yaml [--key value ...]

Fine-tune a model by a recipe and, with a `geta:` section, compress it at the same time. What follows the
config replaces its values: `--seed 1`, `--seed=1` or `seed=1`, and `--geta.bits "[3, 8]"` for a field of
a section.
`geta-hf train CONFIG.yaml --help` lists all arguments of its recipe."""


def train(argv: Sequence[str]) -> dict[str, Any]:
    """Run a recipe: that of the config's key `recipe`, or of `--recipe NAME`.

    Args:
        argv: `[CONFIG.yaml] [--key value ...]`, as `geta_hf.recipes.arguments.read_values` documents.

    Returns:
        The results of the run; an empty dict after help, and on all processes but the first.

    Raises:
        GETAError: no such config or recipe, and as the recipe does.
    """
    path, rest = split_config([word for word in argv if word not in HELP])
    overrides = dict(split_overrides(rest))
    if path is None and "recipe" not in overrides and wants_help(argv):
        print(overview())
        return {}
    values = {} if path is None else read_config(path)
    name = overrides.get("recipe", values.get("recipe"))
    if name is None:
        raise GETAError(f"{path or 'the command line'} names no recipe; add `recipe:`, one of {', '.join(RECIPES)}")
    if name not in RECIPES:
        hint = did_you_mean(str(name), RECIPES)
        raise GETAError(f"there is no recipe {name!r}{hint}; choose one of {', '.join(RECIPES)}")
    results: dict[str, Any] = importlib.import_module(f"geta_hf.recipes.{name}").main(argv)
    return results


def overview() -> str:
    """Return the help of `geta-hf train`: usage, recipes, ready-made configs, and the fields of `geta:`."""
    recipes = [f"  {name:<22}{task}" for name, task in RECIPES.items()]
    configs = textwrap.fill(", ".join(sorted(one.stem for one in CONFIGS.glob("*.yaml"))), 100, initial_indent="  ")
    lists = ["recipes (`recipe:` in a config):", *recipes, "", "ready-made configs, which their names find:", configs]
    return "\n".join([_USAGE, "", *lists, "", describe_config()])
