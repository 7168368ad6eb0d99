"""The public names of commit 09b780f: each exists, takes the same arguments and is documented; documents import them.

The tables are literal, so that a name can't be lost together with what lists it. New names and arguments need no entry.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import geta_hf
from geta_hf.cli import main

ROOT = Path(__file__).parent.parent
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "eval" / "tasks" / "README.md")

NAMES = (
    "QASSO",
    "Costs",
    "DryRun",
    "Evaluation",
    "GETAConfig",
    "GETAError",
    "GETATrainer",
    "MemoryPlan",
    "Plan",
    "PruningSpace",
    "Schedule",
    "apply_policy",
    "attach_input_quantizers",
    "attach_quantizers",
    "build_space",
    "convert",
    "detach_quantizers",
    "dry_run",
    "evaluate",
    "export",
    "measure_costs",
    "perplexity",
    "plan_memory",
    "prepare_for_inference",
    "push_to_hub",
    "verify_space",
    "verify_surgery",
    "write_card",
    "write_report",
)

ARGUMENTS = {
    "QASSO": "base names space quantizers schedule config",
    "GETATrainer": "model args geta_config teacher peft_config",
    "PruningSpace": "families shapes frozen untouched buffers matrix_parameters",
    "Schedule": "warmup projection joint total projection_periods pruning_periods",
    "apply_policy": "space prune keep",
    "attach_input_quantizers": "model batches initial_bits target_bits clipping learn_t include exclude",
    "attach_quantizers": "model include exclude initial_bits target_bits clipping learn_t per_channel grid",
    "build_space": "model batch prune keep verify",
    "convert": "source target format embedding_bits max_shard_size overwrite",
    "detach_quantizers": "model",
    "dry_run": "model batch args config peft_config steps",
    "evaluate": "model tasks tokenizer data_dir num_fewshot limit batch_size device dtype",
    "export": "model directory space batch config processing_class expected_zero_groups embedding_bits "
    "format max_shard_size finish overwrite",
    "measure_costs": "model tokens names",
    "perplexity": "model tokenizer text block stride",
    "plan_memory": "model batch args config space plan",
    "prepare_for_inference": "model compute batch",
    "push_to_hub": "folder repo_id private token revision commit_message dry_run",
    "verify_space": "model batch space seed removal",
    "verify_surgery": "model batch space seed",
    "write_card": "folder base_model task dataset metrics repo_id results front",
    "write_report": "folder out dense metrics",
}
"""Name -> its arguments, in their order. The fields of GETAConfig are in tests/compatibility."""

ATTRIBUTES = {
    "QASSO": "step_count phase finished step removed removed_groups target_groups bits mean_gamma state_dict "
    "load_state_dict",
    "Costs": "tokens parameters macs bops_linear bops_full mean_bits layers",
    "DryRun": "parameters space plan memory",
    "Evaluation": "model scores results truncated requests limit",
    "GETAConfig": "widths wanted_mean_bits reduction final_upper_bits paper to_dict from_dict save load",
    "GETATrainer": "train export_model compression_state create_optimizer",
    "MemoryPlan": "preparation backward step notes peak",
    "Plan": "rows target removed_groups exact groups kept_parameters mean_bits relative_bops bytes "
    "unquantized unquantized_share",
    "PruningSpace": "families shapes frozen untouched buffers matrix_parameters prunable trainable "
    "num_groups from_config save load check coverage",
    "Schedule": "warmup projection joint total projection_periods pruning_periods from_config at",
}
"""Class -> its fields, properties and methods that a program may use."""

OPTIONS = {
    "inspect": "MODEL --html --prune --keep",
    "export": "SOURCE OUT --format --embedding-bits --max-shard-size --overwrite",
    "eval": "DIR --dense --tasks --data_dir --text --block --stride --num_fewshot --limit --batch_size --device "
    "--dtype --output --card",
    "report": "DIR --dense --out",
    "push": "DIR REPO --dry-run --private",
}
"""Sub-command of `geta-hf` -> what its help names."""


@pytest.mark.parametrize("name", NAMES)
def test_public_names_exist_and_are_documented(name: str) -> None:
    assert name in geta_hf.__all__
    found = getattr(importlib.import_module("geta_hf"), name)
    text = inspect.cleandoc(found.__doc__ or "")
    assert len(text.split()) >= 4 and not text.startswith(f"{name}("), "no docstring of its own"


def test_every_listed_name_can_be_imported() -> None:
    names: dict[str, Any] = {}
    exec("from geta_hf import *", names)
    assert set(NAMES) <= set(geta_hf.__all__) <= set(names)
    assert isinstance(geta_hf.__version__, str)
    assert issubclass(geta_hf.GETAError, Exception)


def test_the_help_of_the_package_names_only_what_it_offers() -> None:
    named = set(re.findall(r"`([a-zA-Z_]\w*)`", geta_hf.__doc__)) - {"AutoModelForX"}
    assert len(named) > 15 and named <= set(geta_hf.__all__)


RENAMED = {("PruningSpace", "frozen"): "unsupported"}
"""Arguments under another name, which nobody but the package gives; the attribute keeps the former name too."""


@pytest.mark.parametrize("name", ARGUMENTS)
def test_public_names_take_the_same_arguments(name: str) -> None:
    parameters = inspect.signature(getattr(geta_hf, name)).parameters
    frozen = [RENAMED.get((name, argument), argument) for argument in ARGUMENTS[name].split()]
    assert [parameter for parameter in parameters if parameter in frozen] == frozen
    for parameter in parameters.keys() - set(frozen):
        unnamed = parameters[parameter].kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        optional = parameters[parameter].default is not inspect.Parameter.empty
        assert unnamed or optional or name == "QASSO", f"{parameter} is new and has no default"


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_public_classes_keep_their_attributes(name: str) -> None:
    found = getattr(geta_hf, name)
    known = {*dir(found), *getattr(found, "__dataclass_fields__", ())}
    assert set(ATTRIBUTES[name].split()) <= known


@pytest.mark.parametrize("command", OPTIONS)
def test_the_command_line_keeps_its_options(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    shown = set(re.findall(r"--[\w-]+|\b[A-Z]+\b", capsys.readouterr().out))
    assert set(OPTIONS[command].split()) <= shown


# --- what documents show ----------------------------------------------------------------------------------------------

_IMPORT = re.compile(r"^\s*(?:from ([\w.]+) import ([\w, ]+)|import ([\w.]+))", re.MULTILINE)
_DOTTED = re.compile(r"\bgeta_hf(?:\.\w+)+")
_ENDINGS = ("py", "js", "html", "json", "md", "yaml", "svg")


def imports(text: str) -> Iterator[tuple[str, str | None]]:
    """Yield (module, name) of every import statement in the Python blocks of a document; (module, None) of `import`."""
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        for module, names, alone in _IMPORT.findall(block):
            if alone:
                yield alone, None
            for name in filter(None, (part.strip().partition(" ")[0] for part in names.split(","))):
                yield module, name


def resolve(dotted: str) -> Any:
    """Return what a dotted path names: modules as far as they go, then attributes."""
    first, *rest = dotted.split(".")
    found = importlib.import_module(first)
    for place, part in enumerate(rest):
        # A function may have the name of its module, which is meant where the function has no such attribute.
        for owner in (found, sys.modules.get(".".join([first, *rest[:place]]))):
            if hasattr(owner, part):
                found = getattr(owner, part)
                break
        else:
            found = importlib.import_module(".".join([first, *rest[: place + 1]]))
    return found


def test_imports_are_found_in_a_document() -> None:
    text = (
        "```python\nimport geta_hf  # x\nfrom geta_hf import A, B as C  # y\n```\nimport no\n```bash\nimport no\n```\n"
    )
    assert list(imports(text)) == [("geta_hf", None), ("geta_hf", "A"), ("geta_hf", "B")]
    assert resolve("geta_hf.convert") is geta_hf.convert
    with pytest.raises(ImportError):
        resolve("geta_hf.no_such_name")


RUNNERS = ("trl", "xllamacpp")
"""What pages show beside geta_hf and is no dependency of any extra."""


def test_what_documents_import_exists() -> None:
    found = {pair for document in DOCUMENTS for pair in imports(document.read_text(encoding="utf-8"))}
    assert {("geta_hf", None), ("geta_hf", "GETATrainer"), ("geta_hf", "PruningSpace")} <= found
    for module, name in found:
        if module in RUNNERS and importlib.util.find_spec(module) is None:
            continue
        loaded = importlib.import_module(module)
        assert name is None or hasattr(loaded, name), f"from {module} import {name}"


def test_dotted_names_in_documents_exist() -> None:
    found = {name for document in DOCUMENTS for name in _DOTTED.findall(document.read_text(encoding="utf-8"))}
    found = {name for name in found if name.rpartition(".")[2] not in _ENDINGS}
    assert {"geta_hf.export", "geta_hf.prepare_for_inference"} <= found
    for name in found:
        resolve(name)
