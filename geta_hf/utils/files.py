"""Write a file so that it appears complete or not at all."""

from __future__ import annotations

import os
import uuid
from pathlib import Path


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file under a temporary name and rename it, so that no reader ever finds half of it.

    An existing file is replaced in one step, and not changed if writing fails.

    Args:
        path: the file; its folder must exist.
        content: text, which is written as UTF-8, or bytes.

    Raises:
        OSError: the folder does not exist, `path` is a folder, or the disk is full.
    """
    target = Path(path)
    # In the same folder, so on the same disk: only there is a rename atomic.
    draft = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        draft.write_bytes(content.encode() if isinstance(content, str) else content)
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)
