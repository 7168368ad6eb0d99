"""Install the built wheel into clean environments of every supported Python, and use it there: `make test-pythons`.

Interpreters that this machine lacks are skipped, and named. With pyenv they have to be chosen first, since its commands
fail otherwise: `PYENV_VERSION=3.10.13:3.11.7:3.12.1:3.13.0 make test-pythons`, by the versions that it has.
`make test-versions` runs the ends of transformers' range.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import nox

nox.options.error_on_missing_interpreters = False
TESTS = ("tests/test_readme.py", "tests/test_config.py", "tests/test_cli.py", "tests/export/test_reload.py")


@nox.session(python=["3.10", "3.11", "3.12", "3.13"])
def wheel(session: nox.Session) -> None:
    """Run a choice of the tests against the wheel alone, away from the checkout."""
    (built,) = Path("dist").glob("*.whl")
    # The versions of `make test`; what is not built for one Python alone comes from pip's cache after the first.
    session.install("--constraint", "constraints.txt", f"{built}[peft]", "pytest", "pillow")
    away = Path(session.create_tmp()).resolve()
    # Without the package beside them, so that the tests import what was installed.
    for name in ("tests", "docs", "benchmarks"):
        shutil.copytree(name, away / name, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (*Path().glob("*.md"), Path("pyproject.toml"), Path("mkdocs.yml")):
        shutil.copy(path, away)
    session.chdir(away)
    session.run("python", "-c", "import geta_hf, pathlib; print(pathlib.Path(geta_hf.__file__).parent)")
    session.run("geta-hf", "--help", silent=True)
    session.run("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default", *TESTS)
