"""Every command that documents and docstrings name can be run: each figure of docs/results.md stays reachable.

Fast tests look for scripts, modules and configs. A slow one asks each script for `--help`, which must name the options
that documents give it.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "docs/results.md", "docs/folder_format.md", "docs/paper_index.md", "eval/tasks/README.md")
FOLDERS = ("recipes", "eval", "benchmarks")

FROZEN = {
    "README.md": "recipes/bert_squad.py eval/squad.py recipes/phi2_commonsense.py benchmarks/on_gpu.sh "
    "recipes/configs/bert_squad.yaml recipes/configs/minilm_squad.yaml recipes/configs/phi2.yaml "
    "recipes/configs/llama.yaml recipes/configs/qwen.yaml recipes/accelerate/fsdp2.yaml recipes/accelerate/ddp.yaml",
    "docs/results.md": "eval/study_rules.py recipes/bert_squad.py recipes/configs/minilm_squad.yaml "
    "benchmarks/inference.py benchmarks/onnx_speed.py benchmarks.embeddings eval/phi_study.sh benchmarks/generation.py "
    "benchmarks/memory_plan.py recipes/phi2_commonsense.py recipes/configs/phi2.yaml benchmarks/lora.py "
    "benchmarks/llm_scale.py benchmarks/train_step.py benchmarks/qadg.py",
    "docstrings": "eval/study_rules.py eval/squad.py eval.tasks eval.train_phi benchmarks/generation.py "
    "benchmarks.embeddings benchmarks/onnx_speed.py benchmarks/inference.py benchmarks/qadg.py benchmarks.zoo "
    "benchmarks/llm_scale.py benchmarks/memory_plan.py benchmarks/lora.py benchmarks/train_step.py recipes/demo.py",
    "scripts": "recipes/phi2_commonsense.py recipes/configs/phi2.yaml eval.train_phi benchmarks/generation.py "
    "benchmarks/train_step.py benchmarks/inference.py benchmarks/memory_plan.py benchmarks/llm_scale.py "
    "recipes/demo.py benchmarks.zoo geta_hf",
}
"""Where a command stood at commit 09b780f -> the scripts, modules and configs that it named. They go on working."""

MAKE = ("demo", "test", "test-slow", "zoo", "quality", "style", "clean")
_CODE = re.compile(r"```(?:bash|sh|console)\n(.*?)```|`([^`\n]+)`", re.DOTALL)
_FILE = re.compile(r"(?<![\w./-])(?:\./)?((?:recipes|eval|benchmarks)/[\w./-]+\.(?:py|sh|yaml))\b")
_MODULE = re.compile(r"(?:python3?|\bpython\"?|PYTHON\"?)\s+-m\s+([A-Za-z_][\w.]*)")
_OPTION = re.compile(r"(?<![\w-])--([A-Za-z][\w-]*)")


def blocks(name: str) -> Iterator[str]:
    """Yield the code of a document, a block or a span at a time, with continued lines joined."""
    for fenced, inline in _CODE.findall((ROOT / name).read_text(encoding="utf-8")):
        yield re.sub(r"\\\n\s*", " ", fenced or inline)


def docstrings() -> Iterator[str]:
    """Yield the docstring of every module that can be run."""
    for folder in (*FOLDERS, "geta_hf/recipes"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def scripts() -> Iterator[str]:
    """Yield the shell scripts and the Makefile."""
    for path in (*sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.sh")), ROOT / "Makefile"):
        yield re.sub(r"\\\n\s*", " ", path.read_text(encoding="utf-8"))


def texts() -> dict[str, list[str]]:
    """Return the code of every place that names commands."""
    found = {name: list(blocks(name)) for name in DOCUMENTS}
    return found | {"docstrings": list(docstrings()), "scripts": list(scripts())}


def named(parts: list[str]) -> set[str]:
    """Return the scripts and configs (with a slash) and the modules (with dots) of this project that commands name."""
    found = {name for part in parts for name in (*_FILE.findall(part), *_MODULE.findall(part))}
    return {name for name in found if re.split(r"[/.]", name)[0] in (*FOLDERS, "geta_hf")}


def exists(name: str) -> bool:
    """Return whether a file is there, or a module that `python -m` can run."""
    if "/" in name:
        return (ROOT / name).is_file()
    spec = importlib.util.find_spec(name)
    package = spec is not None and spec.submodule_search_locations is not None
    return spec is not None and (not package or importlib.util.find_spec(f"{name}.__main__") is not None)


@pytest.fixture
def from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))


def test_commands_are_found_in_text() -> None:
    text = "`python a/b.py`, `bash eval/x.sh A` `benchmarks/one.py`\n```bash\naccelerate launch \\\n  recipes/r.py\n```"
    pieces = [re.sub(r"\\\n\s*", " ", fenced or inline) for fenced, inline in _CODE.findall(text)]
    assert named(pieces) == {"eval/x.sh", "benchmarks/one.py", "recipes/r.py"}
    lines = ["python -m benchmarks.zoo", '"$PYTHON" -m geta_hf eval', "$(BIN)/python -m pytest -n 2"]
    assert named(lines) == {"benchmarks.zoo", "geta_hf"}


@pytest.mark.parametrize("place", FROZEN)
def test_commands_of_before_still_exist(place: str, from_the_root: None) -> None:
    missing = [name for name in FROZEN[place].split() if not exists(name)]
    assert not missing


def test_every_command_that_is_named_exists(from_the_root: None) -> None:
    found = texts()
    assert all(named(found[name]) for name in ("README.md", "docs/results.md", "docstrings", "scripts"))
    missing = {(place, name) for place, parts in found.items() for name in named(parts) if not exists(name)}
    assert not missing


def test_every_target_of_make_exists() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", text, re.MULTILINE))
    parts = [part for name in DOCUMENTS for part in blocks(name)]
    asked = {target for part in parts for target in re.findall(r"^make ([a-z-]+)", part, re.MULTILINE)}
    assert {"demo", "test", "zoo"} <= asked <= targets
    assert set(MAKE) <= targets


@pytest.mark.parametrize("name", ["eval/phi_study.sh", "benchmarks/on_gpu.sh"])
def test_shell_scripts_parse(name: str) -> None:
    subprocess.run(["bash", "-n", str(ROOT / name)], check=True)


def calls() -> dict[str, set[str]]:
    """Return script or module -> the options that commands in documents give it."""
    found: dict[str, set[str]] = {}
    for parts in texts().values():
        for line in (line for part in parts for line in part.splitlines()):
            for target in named([line]):
                found.setdefault(target, set()).update(_OPTION.findall(line.partition(target)[2]))
    return found


def commands() -> list[str]:
    """Return the scripts and modules of this project that take options."""
    return sorted(name for name in calls() if not name.endswith((".yaml", ".sh")) and name != "geta_hf")


def shown_help(name: str, *words: str) -> str:
    """Return what a script or module writes for `--help`, and after that what its sub-commands write."""
    start = [name] if "/" in name else ["-m", name]
    command = [sys.executable, "-W", "ignore", *start, *words, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    commands = re.search(r"\{([\w,]+)\} \.\.\.", done.stdout)
    below = [shown_help(name, word) for word in commands[1].split(",")] if commands else []
    return "\n".join([done.stdout, *below])


def check_options(name: str, shown: str) -> None:
    """Check that a help text names every option that a document gives the command."""
    assert "usage: " in shown
    options = {option for option in calls().get(name, ()) if not option.startswith(("geta", "lora"))}
    known = set(_OPTION.findall(shown))
    assert {option.replace("-", "_") for option in options} <= {option.replace("-", "_") for option in known}


@pytest.mark.parametrize(
    "name", ["eval/squad.py", "recipes/question_answering.py", "recipes/language_modeling.py", "recipes/bert_squad.py"]
)
def test_help_works(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In this process, which has the libraries loaded; the slow test starts each command as a user does."""
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with contextlib.suppress(SystemExit):
        runpy.run_path(str(ROOT / name), run_name="__main__")
    check_options(name, capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in commands() if name != "recipes/demo.py"])
def test_help_of_every_command_works(name: str) -> None:
    check_options(name, shown_help(name))
