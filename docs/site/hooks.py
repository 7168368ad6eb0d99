"""Fit files of the repository into the site: the changelog, the guide for contributors and notebooks become pages."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent.parent
PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
"""File at the root of the repository -> page of the site."""

# A link to a page, or to a file of the repository that is none. Not one with an address.
_LINK = re.compile(r"\]\(([^):#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside of `docs`, and one for each notebook."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=_LINK.sub(_from_root, text)))
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        name = Path(notebook.src_uri).name
        page = f"{notebook.src_uri.removesuffix('.ipynb')}.md"
        files.append(File.generated(config, page, content=notebook_page(notebook.content_string, name)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point links to such files at their pages."""
    for source, page in PAGES.items():
        markdown = markdown.replace(f"](../{source}", f"]({page}")
    return re.sub(r"\]\(([^):\s]+)\.ipynb\)(?!\{)", r"](\1.md)", markdown)


def _from_root(link: re.Match[str]) -> str:
    """Rewrite a link of a file at the root; of a file that is not in the site, the text of the link remains."""
    path, anchor = link[1], link[2] or ""
    if path in PAGES:
        return f"]({PAGES[path]}{anchor})"
    if path.startswith("docs/"):
        return f"]({path.removeprefix('docs/')}{anchor})"
    return "]"


def notebook_page(text: str, name: str) -> str:
    """Return the Markdown of a notebook: its cells, and below each what it printed, as it was saved."""
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        parts += filter(None, map(_output, cell["outputs"]))
    title, *rest = parts
    note = f"*Download [{name}]({name}){{download}}. It runs on a CPU, without a network.*"
    return "\n\n".join([title, note, *rest]) + "\n"


def _output(output: dict[str, Any]) -> str:
    """Return what a cell shows: a picture, or text."""
    data = output.get("data", {})
    if "image/svg+xml" in data:
        # Blank lines would end the block of HTML.
        picture = re.sub(r"\n\s*\n", "\n", "".join(data["image/svg+xml"]))
        return f'<div class="picture">\n{picture}\n</div>'
    shown = "".join(output.get("text", data.get("text/plain", [])))
    return f'```{{ .text .output title="Output" }}\n{shown.rstrip()}\n```' if shown.strip() else ""
