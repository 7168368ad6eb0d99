"""A file that appears whole or not at all."""

from __future__ import annotations

import os
import uuid
from pathlib import Path


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file beside its place and rename it, so that no reader ever meets half of it.

    What stood there before is replaced in one step, or left as it was when the writing fails.

    Args:
        path: the file; its folder must exist.
        content: text, written as UTF-8, or bytes.

    Raises:
        OSError: the folder does not exist, `path` is a folder, or the disk is full.
    """
    target = Path(path)
    draft = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        draft.write_bytes(content.encode() if isinstance(content, str) else content)
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)
