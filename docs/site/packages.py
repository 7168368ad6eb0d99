"""Print the packages of the extra `docs` in pyproject.toml, one a line, for pip. Runs on any Python."""

from __future__ import annotations

import re
from pathlib import Path

PYPROJECT = Path(__file__).parent.parent.parent / "pyproject.toml"


def main() -> None:
    """Print the list. Python 3.10 has no reader of TOML, and the extra is on lines of its own."""
    listed = re.search(r"^docs = \[(.*?)^\]", PYPROJECT.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    if listed is None:
        raise SystemExit(f"{PYPROJECT} has no extra `docs`")
    print("\n".join(re.findall(r'"([^"]+)"', listed[1])))


if __name__ == "__main__":
    main()
