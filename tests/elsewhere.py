"""New processes in an environment that has never seen geta_hf: the installed packages without the project."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

_BLIND = "import importlib.util\nassert importlib.util.find_spec('geta_hf') is None, 'geta_hf is in sight'\n"

_PARENT = """
import json, os, runpy, sys
import torch
from transformers import AutoModel, PreTrainedModel
for line in sys.stdin:
    order = json.loads(line)
    if not os.fork():
        break
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
else:
    sys.exit()
for number, name, mode in ((0, os.devnull, "r"), (1, order["out"], "w"), (2, order["err"], "w")):
    with open(name, mode) as file:
        os.dup2(file.fileno(), number)
sys.stdin = open(0, closefd=False)
os.chdir(order["cwd"])
os.environ.update(order["environment"])
sys.argv = order["argv"]
sys.path[0] = order["path"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Loads what takes seconds, once; then forks for every line it reads, and writes the exit status of the fork."""


class _Environment:
    """A virtual environment that has all installed packages but geta_hf, and in it the parent of all programs."""

    def __init__(self) -> None:
        self.home = Path(tempfile.mkdtemp())
        self.hub = self.home / "hub"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", self.home / "venv"], check=True)
        (found,) = self.home.glob("venv/lib/python*/site-packages")
        # A folder named in a .pth file is searched, but its own .pth files, where an editable install lives, are not.
        (found / "installed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
        environment = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "HF_HOME": str(self.hub)}
        command = [self.home / "venv" / "bin" / "python", "-W", "ignore", "-c", _PARENT]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.parent = subprocess.Popen(command, env=environment, cwd=self.home, text=True, **pipes)
        atexit.register(self.close)

    def close(self) -> None:
        """End the parent and remove the environment."""
        self.parent.communicate()
        shutil.rmtree(self.home)

    def run(
        self, argv: Sequence[str], cwd: Path, path: str, environment: dict[str, str]
    ) -> subprocess.CompletedProcess[str]:
        """Run a program in a fork. What it left in the cache of the hub is removed."""
        written = {name: self.home / f"{name}.txt" for name in ("out", "err")}
        files = {name: str(file) for name, file in written.items()}
        order = {"argv": list(argv), "cwd": str(cwd), "path": path, "environment": environment, **files}
        self.parent.stdin.write(json.dumps(order) + "\n")
        self.parent.stdin.flush()
        status = int(self.parent.stdout.readline())
        shutil.rmtree(self.hub, ignore_errors=True)
        return subprocess.CompletedProcess(argv, status, *(file.read_text("utf-8") for file in written.values()))


_environment = cache(_Environment)


def run_script(script: Path, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `VARIABLES python SCRIPT OPTIONS` for a script of the project from another folder."""
    environment = _environment()
    return environment.run([str(script), *options], environment.home, str(script.parent), variables)


def run_code(code: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run Python code as `python -c CODE OPTIONS` in a folder whose modules it can import; geta_hf is not installed."""
    environment = _environment()
    program = environment.home / "program.py"
    program.write_text(code, encoding="utf-8")
    return environment.run([str(program), *options], folder, "", {})


def run_elsewhere(code: str, folder: Path) -> str:
    """Run Python code in a new process that has all installed packages but geta_hf.

    Args:
        code: the program.
        folder: an existing folder to work in.

    Returns:
        What the program printed.

    Raises:
        AssertionError: it failed; with what it wrote.
    """
    done = run_code(_BLIND + code, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
