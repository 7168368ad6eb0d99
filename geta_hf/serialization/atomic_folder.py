"""A folder that appears whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from transformers.utils import logging

from geta_hf.errors import GETAError

logger = logging.get_logger(__name__)

_HOST = re.sub(r"[^\w-]", "-", socket.gethostname()) or "host"


def check_target(target: Path, overwrite: bool) -> None:
    """Refuse a target that may not be written, before any work is done.

    What an export left that was killed is cleared away, and the folder that it was about to replace is put back.

    Args:
        target: absolute path.
        overwrite: whether a model's folder may be replaced.

    Raises:
        GETAError: it exists and `overwrite` is off, it is not a model's folder, which nobody asked to delete, or a
            training can go on from it.
    """
    _clear_up(target)
    if not target.exists():
        return
    if not overwrite:
        raise GETAError(
            f"{target} exists already; choose another folder, or replace it (--overwrite, in Python overwrite=True)"
        )
    if not (target / "config.json").is_file():
        raise GETAError(f"{target} is not a model's folder (it has no config.json), so it is not replaced")
    for state in (*target.glob("checkpoint-*"), *target.rglob("trainer_state.json")):
        raise GETAError(f"{target} holds {state.name} of a training, so it is not replaced; choose another folder")


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write and verify a temporary folder beside the target, then rename it into place.

    If `fill` raises, the target is as it was. An old target is kept until the new one is in place.

    Args:
        target: absolute path; parents are made.
        fill: called with the temporary folder.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    mark = f"{_HOST}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
    fresh, old = (target.with_name(f".{target.name}.{mark}.{kind}") for kind in ("new", "old"))
    fresh.mkdir()
    try:
        fill(fresh)
        if target.exists():
            target.rename(old)
        fresh.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    finally:
        for leftover in (fresh, old):
            shutil.rmtree(leftover, ignore_errors=True)


def _clear_up(target: Path) -> None:
    """Put an old target back that was killed between the two renames; delete what dead processes left of others."""
    for folder, kind, dead in _leftovers(target):
        if kind == "old" and not target.exists():
            logger.warning("%s was missing, since an export was killed as it replaced it; the old one is back", target)
            folder.rename(target)
        elif dead:
            shutil.rmtree(folder, ignore_errors=True)


def _leftovers(target: Path) -> Iterator[tuple[Path, str, bool]]:
    """What `write_folder` made beside this target and has not taken away: `new` or `old`, and whether it never will."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.([\w-]+)\.(\d+)\.[0-9a-f]{{8}}\.(new|old)")
    for folder in sorted(target.parent.iterdir()) if target.parent.is_dir() else ():
        if found := pattern.fullmatch(folder.name):
            yield folder, found[3], found[1] == _HOST and not _is_alive(int(found[2]))


def _is_alive(process: int) -> bool:
    if os.name == "nt":
        return True  # where signal 0 would end it
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
