"""Run the notebooks of the docs from top to bottom, and save what they show.

    python docs/site/run_notebooks.py [NOTEBOOK ...]

A cell that fails ends the run. What is saved is without times, ids of runs and progress bars, so that running again
changes a file only where its results differ.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"
SECONDS = 900
"""The most that a cell may take. On two free cores a notebook takes a minute or two; machines may be busy."""


_TIMES = re.compile(r" in \d+ s(?=;)|, \"train_seconds\": [\d.]+|, (?:[\d.]+x \w+|about as fast) \([^)]*ms\)")


def execute(path: Path) -> nbformat.NotebookNode:
    """Return a notebook with the outputs of a new run, which happens in a folder of its own and without a network."""
    notebook = nbformat.read(path, as_version=4)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as home:
        client = NotebookClient(
            notebook, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": home}}
        )
        client.execute()
        for cell in notebook.cells:
            cell.metadata = {}
            if cell.cell_type == "code":
                cell.outputs = list(_lasting(cell.outputs, home))
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return notebook


def _lasting(outputs: list[nbformat.NotebookNode], home: str) -> Iterator[nbformat.NotebookNode]:
    """Yield what the next run will show too: no warnings, progress, times, or names of temporary folders."""
    for output in outputs:
        if output.get("name") == "stderr":
            continue
        if "text" in output:
            lines = output.text.replace(f"{home}/", "").splitlines()
            output.text = "".join(f"{_TIMES.sub('', line)}\n" for line in lines if line and not line.startswith("{'"))
            if not output.text:
                continue
        yield output


def main(paths: list[Path]) -> None:
    """Run notebooks and write them back."""
    for path in paths or sorted(FOLDER.glob("*.ipynb")):
        nbformat.write(execute(path), path)
        print(path)


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]])
