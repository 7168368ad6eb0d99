"""Write a folder so that it appears complete or not at all.

An export takes minutes and may be killed. A reader, or the next export, must never find half a folder under the name
that was asked for, and an old folder must not be lost before the new one is in place. So a folder is filled under a
temporary name next to the target, on the same disk, and renamed into place: a rename is atomic, a copy is not.

Minutes pass between the check of a target and the rename, so both look: what appeared in between is never replaced.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import stat
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError
from transformers.utils import logging

from geta_hf.errors import GETAError

logger = logging.get_logger(__name__)

WORLD_NAME = "geta_world.json"
PROGRESS_NAME = "geta_progress.json"
"""Files in which a checkpoint records its launch and its progress; an export never has them."""

_KNOWN = re.compile(
    r"config\.json|(generation|preprocessor|processor|video_preprocessor|audio_tokenizer)_config\.json|README\.md"
    r"|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|modeling_geta\.py"
    r"|geta_(?!world|progress)\w+\.json|geta_structure\.svg|geta_\w+\.py"
    # what programs of other formats consist of
    r"|model\.(onnx|onnx\.data|pt2|pte|xml|bin)|export\.json"
    # what transformers' tokenizers and processors write
    r"|(tokenizer|tokenizer_config|special_tokens_map|added_tokens|tekken)\.json|chat_template\.(json|jinja)"
    r"|additional_chat_templates/[^/]+\.jinja|(vocab|entity_vocab|target_vocab|vocab-src|vocab-tgt)\.json"
    r"|(emoji|normalizer|byte_maps|word_shape|word_pronunciation)\.json|(vocab|merges|dict)\.txt|bpe\.codes"
    r"|(tokenizer|spiece|spm|spm_char|sentencepiece|sentencepiece\.bpe)\.model|prophetnet\.tokenizer"
    r"|(source|target)\.spm"
)
"""The files that an export of any format writes, as paths within its folder."""

FILES_NAME = "geta_files.json"
"""Lists the files of a folder that are written by it but not named above, such as those of a tokenizer of one's own."""

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
            was meant; training can resume from it; it holds files that no export writes, which would be lost; or the
            folder around it is none, or may not be written.
    """
    _clear_up(target)
    if os.path.lexists(target):
        if not overwrite:
            raise GETAError(
                f"{target} exists already; choose another folder, or replace it (--overwrite, in Python overwrite=True)"
            )
        _check_replaceable(target, target)
    _check_place(target)


def check_apart(source: Path, target: Path) -> None:
    """Check that a target may be replaced without losing what is read.

    Args:
        source: the folder of a model that is to be written in another form.
        target: absolute path.

    Raises:
        GETAError: the target is the source, or holds it.
    """
    if source.resolve().is_relative_to(target):
        raise GETAError(f"{target} holds {source}, which would be lost, so it is not replaced; choose another folder")


def _check_place(target: Path) -> None:
    """Raise GETAError where no folder can appear beside the target, before minutes of work show it."""
    place = target.parent
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise GETAError(f"{target} can't be written, since {place} is no folder; choose another folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise GETAError(f"{target} can't be written, since {place} may not be changed; choose another folder")


def _check_replaceable(folder: Path, name: Path) -> None:
    """Raise GETAError unless a folder, called `name` in errors, is a model folder that holds only known files."""
    # Made in advance, by a user or a script; nothing can be lost.
    if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
        return
    # A mistyped path must not cost a home folder.
    if not (folder / "config.json").is_file():
        raise GETAError(
            f"{name} is not a model folder (it has no config.json), so it is not replaced; choose another folder"
        )
    # A trainer's output folder is a model folder too, and its checkpoints may be hours of work.
    for state in (*folder.glob("checkpoint-*"), *folder.rglob("trainer_state.json")):
        raise GETAError(f"{name} holds {state.name} of a training, so it is not replaced; choose another folder")
    unknown = _unknown(folder)
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise GETAError(
            f"{name} holds {', '.join(unknown[:3])}{more}, which no export writes and which would be lost, so it is "
            f"not replaced; move what you need away, or choose another folder"
        )


def _unknown(folder: Path) -> list[str]:
    """Return the paths in a folder that its export did not write, as far as names can tell."""
    try:
        listed = json.loads((folder / FILES_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        listed = []
    own = set(filter(lambda name: isinstance(name, str), listed if isinstance(listed, list) else ()))
    return [path for path in _paths(folder) if not _KNOWN.fullmatch(path) and path not in own]


def _paths(folder: Path) -> list[str]:
    """Return what a folder holds, as relative paths with forward slashes: its files, and folders that are empty."""
    found = []
    for place, folders, files in os.walk(folder):
        home = Path(place).relative_to(folder)
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        found += [(home / name).as_posix() for name in (*files, *links)]
        if not folders and not files and Path(place) != folder:
            found.append(f"{home.as_posix()}/")
    return sorted(found)


def write_folder(target: Path, fill: Callable[[Path], None], *, overwrite: bool) -> None:
    """Let `fill` write and verify a temporary folder next to the target, then rename it into place.

    If `fill` raises, the target is not changed. An old target is kept until the new one is in place.

    Args:
        target: absolute path; missing parents are created.
        fill: called with the temporary folder.
        overwrite: replace a model folder that holds known files only, as `check_target` allows it. If False, whatever
            appears under the name while `fill` runs is kept, and the new folder is discarded.

    Raises:
        GETAError: the target exists and may not be replaced, or the new folder cannot be written, as on a full disk.
            Whatever else `fill` raises is passed on.
    """
    # Host and process tell a later export whether this one is still running; the random part allows several in one.
    mark = f"{_HOST}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
    fresh = target.with_name(f".{target.name}.{mark}.new")
    old = target.with_name(f".{target.name}.{mark}.old")
    try:
        with _one_line_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            fresh.mkdir()
            fill(fresh)
            if others := _unknown(fresh):
                (fresh / FILES_NAME).write_text(json.dumps(others, indent=2) + "\n", encoding="utf-8")
            _share_mode(fresh)
        # A folder that has content cannot be renamed onto, so the old one moves out of the way first.
        if overwrite and os.path.lexists(target):
            target.rename(old)
            _check_replaceable(old, target)  # files may have appeared since `check_target` looked
        _rename_new(fresh, target)
    except BaseException:  # KeyboardInterrupt too
        _put_back(old, target)
        raise
    else:
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _put_back(old: Path, target: Path) -> None:
    """Give an old folder its name back, or a visible one if something else has taken it."""
    if not os.path.lexists(old):
        return
    if not os.path.lexists(target):
        old.rename(target)
        return
    kept = target.with_name(f"{target.name}.old-{uuid.uuid4().hex[:8]}")
    old.rename(kept)
    logger.warning("%s appeared while the export was running; what was there before is now %s", target, kept)


def _rename_new(fresh: Path, target: Path) -> None:
    """Rename a folder to a name that nothing has.

    Raises:
        GETAError: something has the name.
    """
    try:
        if os.path.lexists(target):
            raise FileExistsError(target)
        # What appears in this very moment is kept too: a rename fails on all but an empty folder, on Windows on all.
        fresh.rename(target)
    except OSError as error:
        if not os.path.lexists(target):
            raise
        raise GETAError(
            f"{target} appeared while the export was running, so it is not replaced and the export is discarded; "
            f"choose another folder, or replace it (--overwrite, in Python overwrite=True)"
        ) from error


@contextlib.contextmanager
def _one_line_errors(target: Path) -> Iterator[None]:
    """Turn the errors of a full disk or a missing permission into one sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # the latter is no OSError, even where the disk is full
        raise GETAError(
            f"{target} was not written ({error}), and nothing of it remains; make room for it, or choose another folder"
        ) from error


def _share_mode(folder: Path) -> None:
    """Give files of weights the permissions that the folder's other files have.

    safetensors writes a file that its owner alone may read, whatever the umask says.
    """
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir() if path.is_file()}
    usual = next((mode for path, mode in modes.items() if path.suffix == ".json"), None)
    for path in modes:
        if usual is not None and path.suffix == ".safetensors":
            path.chmod(usual)


def _clear_up(target: Path) -> None:
    """Restore a target whose export was killed between the two renames; delete other folders of dead processes."""
    for folder, kind, dead in _leftovers(target):
        if kind == "old" and not os.path.lexists(target):
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
