"""An environment that has never seen geta_hf: the installed packages without the project."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

_BLIND = "import importlib.util\nassert importlib.util.find_spec('geta_hf') is None, 'geta_hf is in sight'\n"


def run_elsewhere(code: str, folder: Path) -> str:
    """Run Python code in a new environment that has all installed packages but geta_hf.

    Args:
        code: the program.
        folder: an existing folder to work in; the environment is made below it.

    Returns:
        What the program printed.

    Raises:
        AssertionError: it failed; with what it wrote.
    """
    done = subprocess.run(
        [make_environment(folder), "-W", "ignore", "-c", _BLIND + code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def make_environment(folder: Path) -> str:
    """A virtual environment below `folder`; its interpreter. One that exists is taken again."""
    home = folder / "elsewhere"
    interpreter = home / "bin" / "python"
    if not interpreter.exists():
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
        (found,) = home.glob("lib/python*/site-packages")
        # A folder named in a .pth file is searched, but its own .pth files, where an editable install lives, are not.
        (found / "installed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    return str(interpreter)
