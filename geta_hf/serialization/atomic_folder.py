"""Write a folder so that it appears complete or not at all.

An export takes minutes and may be killed. A reader, or the next export, must never find half a folder under the name
that was asked for, and an old folder must not be lost before the new one is in place. So a folder is filled under a
temporary name next to the target, on the same disk, and renamed into place: a rename is atomic, a copy is not.
"""

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

WORLD_NAME = "geta_world.json"
PROGRESS_NAME = "geta_progress.json"
"""Files in which a checkpoint records its launch and its progress; an export never has them."""

# Without dots, at which the names of temporary folders are split.
_HOST = re.sub(r"[^\w-]", "-", socket.gethostname()) or "host"


def check_target(target: Path, overwrite: bool) -> None:
    """Check that a target may be written, before any work is done.

    First, temporary folders of exports that were killed are deleted, and a folder that one of them was about to replace
    is restored.

    Args:
        target: absolute path.
        overwrite: whether an existing model folder may be replaced.

    Raises:
        GETAError: the target exists and `overwrite` is False; it is not a model folder, so deleting it cannot be what
            was meant; or training can resume from it.
    """
    _clear_up(target)
    if not target.exists():
        return
    if not overwrite:
        raise GETAError(
            f"{target} exists already; choose another folder, or replace it (--overwrite, in Python overwrite=True)"
        )
    # A mistyped path must not cost a home folder.
    if not (target / "config.json").is_file():
        raise GETAError(
            f"{target} is not a model folder (it has no config.json), so it is not replaced; choose another folder"
        )
    # A trainer's output folder is a model folder too, and its checkpoints may be hours of work.
    for state in (*target.glob("checkpoint-*"), *target.rglob("trainer_state.json")):
        raise GETAError(f"{target} holds {state.name} of a training, so it is not replaced; choose another folder")


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write and verify a temporary folder next to the target, then rename it into place.

    If `fill` raises, the target is not changed. An old target is kept until the new one is in place.

    Args:
        target: absolute path; missing parents are created.
        fill: called with the temporary folder.

    Raises:
        OSError: a folder cannot be created or renamed. Whatever `fill` raises is passed on.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    # Host and process tell a later export whether this one is still running; the random part allows several in one.
    mark = f"{_HOST}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
    fresh = target.with_name(f".{target.name}.{mark}.new")
    old = target.with_name(f".{target.name}.{mark}.old")
    fresh.mkdir()
    try:
        fill(fresh)
        # Most systems cannot rename onto a folder that has content, so the old one moves out of the way first.
        if target.exists():
            target.rename(old)
        fresh.rename(target)
    except BaseException:  # KeyboardInterrupt too
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    finally:
        for leftover in (fresh, old):
            shutil.rmtree(leftover, ignore_errors=True)


def _clear_up(target: Path) -> None:
    """Restore a target whose export was killed between the two renames; delete other folders of dead processes."""
    for folder, kind, dead in _leftovers(target):
        if kind == "old" and not target.exists():
            logger.warning(
                "%s was missing because an export was killed while it replaced it; the old folder is restored", target
            )
            folder.rename(target)
        elif dead:
            shutil.rmtree(folder, ignore_errors=True)


def _leftovers(target: Path) -> Iterator[tuple[Path, str, bool]]:
    """Yield the temporary folders next to a target: path, `new` or `old`, and whether their process is known dead."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.([\w-]+)\.(\d+)\.[0-9a-f]{{8}}\.(new|old)")
    if not target.parent.is_dir():
        return
    for folder in sorted(target.parent.iterdir()):
        if found := pattern.fullmatch(folder.name):
            # On a shared disk the folder may be of another machine, whose processes cannot be seen from here.
            dead = found[1] == _HOST and not _is_alive(int(found[2]))
            yield folder, found[3], dead


def _is_alive(process: int) -> bool:
    if os.name == "nt":
        return True  # on Windows, signal 0 would end the process
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it exists, but belongs to somebody else
        pass
    return True
