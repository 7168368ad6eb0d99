from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from geta_hf.errors import GETAError
from geta_hf.serialization import atomic_folder
from geta_hf.serialization.atomic_folder import check_target, write_folder


def filler(text: str, fail: bool = False):
    def fill(folder: Path) -> None:
        (folder / "config.json").write_text(text)
        if fail:
            raise RuntimeError("half way")

    return fill


def test_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    write_folder(target, filler("new"))
    assert (target / "config.json").read_text() == "new"
    assert [path.name for path in target.parent.iterdir()] == ["b"]


def test_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="half way"):
        write_folder(tmp_path / "b", filler("new", fail=True))
    assert list(tmp_path.iterdir()) == []


def test_replaces_an_old_folder_only_by_a_whole_new_one(tmp_path: Path) -> None:
    target = tmp_path / "b"
    write_folder(target, filler("old"))
    with pytest.raises(RuntimeError, match="half way"):
        write_folder(target, filler("new", fail=True))
    assert (target / "config.json").read_text() == "old"
    write_folder(target, filler("new"))
    assert (target / "config.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_old_folder_returns_when_the_last_rename_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "b"
    write_folder(target, filler("old"))
    rename = Path.rename

    def failing(self: Path, to: Path) -> Path:
        if self.name.endswith(".new"):
            raise OSError("disk gone")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="disk gone"):
        write_folder(target, filler("new"))
    assert (target / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_targets_that_may_not_be_written(tmp_path: Path) -> None:
    check_target(tmp_path / "free", overwrite=False)
    write_folder(tmp_path / "model", filler("old"))
    with pytest.raises(GETAError, match="exists already"):
        check_target(tmp_path / "model", overwrite=False)
    check_target(tmp_path / "model", overwrite=True)
    (tmp_path / "photos").mkdir()
    with pytest.raises(GETAError, match=r"no config\.json"):
        check_target(tmp_path / "photos", overwrite=True)


@pytest.mark.parametrize("name", ["trainer_state.json", "runs/checkpoint-9/trainer_state.json", "checkpoint-9/weights"])
def test_what_a_training_needs_is_never_replaced(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path / "run", filler("old"))
    (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "run" / name).write_text("state")
    with pytest.raises(GETAError, match="training"):
        check_target(tmp_path / "run", overwrite=True)
    assert (tmp_path / "run" / name).read_text() == "state"


@pytest.fixture
def dead() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch, dead: int) -> Callable[[Path, int], None]:
    """Writes a target, and leaves things as a process that ended before its rename number `steps`."""

    def write(target: Path, steps: int) -> None:
        left, rename = iter(range(steps)), Path.rename

        def counted(self: Path, to: Path) -> Path:
            if next(left, None) is None:
                raise SystemExit
            return rename(self, to)

        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: dead)
            patch.setattr(shutil, "rmtree", lambda *_, **__: None)
            patch.setattr(Path, "rename", counted)
            with pytest.raises(SystemExit):
                write_folder(target, filler("new"))

    return write


def test_what_was_killed_between_the_renames_is_put_back(tmp_path: Path, killed: Callable[[Path, int], None]) -> None:
    """And what it left is cleared away, but for what belongs to other targets or to a process that lives."""
    target, other = tmp_path / "b", tmp_path / "b.c"
    for folder in (target, other):
        write_folder(folder, filler("old"))
    killed(other, 1)
    killed(target, 1)
    assert not target.exists()
    assert sorted(path.name[-4:] for path in tmp_path.iterdir()) == [".new", ".new", ".old", ".old"]

    def fill(folder: Path) -> None:
        check_target(target, overwrite=True)  # as another process would
        assert folder.is_dir()
        filler("newer")(folder)

    with pytest.raises(GETAError, match="exists already"):
        check_target(target, overwrite=False)
    assert (target / "config.json").read_text() == "old"
    write_folder(target, fill)
    assert (target / "config.json").read_text() == "newer"
    left = {path.name for path in tmp_path.iterdir()}
    assert len(left) == 3 and "b" in left and all(name.startswith(".b.c.") for name in left - {"b"})
    check_target(other, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"b", "b.c"}


def test_a_target_that_was_never_there_leaves_no_litter(tmp_path: Path, killed: Callable[[Path, int], None]) -> None:
    killed(tmp_path / "b", 0)
    assert [path.suffix for path in tmp_path.iterdir()] == [".new"]
    check_target(tmp_path / "b", overwrite=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="processes are not asked for there")
def test_what_another_machine_writes_is_left_alone(tmp_path: Path, dead: int) -> None:
    """Its processes can't be seen from here, whether or not there is one of that number."""
    for process in (1, dead):
        theirs = tmp_path / f".b.elsewhere.{process}.0123abcd.new"
        theirs.mkdir()
        check_target(tmp_path / "b", overwrite=False)
        assert theirs.is_dir()


def test_what_another_machine_moved_away_is_restored(tmp_path: Path) -> None:
    write_folder(tmp_path / "b", filler("old"))
    (tmp_path / "b").rename(tmp_path / ".b.elsewhere.1.0123abcd.old")
    with pytest.raises(GETAError, match="exists already"):
        check_target(tmp_path / "b", overwrite=False)
    assert (tmp_path / "b" / "config.json").read_text() == "old"


@pytest.mark.skipif(os.name == "nt", reason="processes are not asked for there")
@pytest.mark.parametrize(("error", "cleared"), [(PermissionError, False), (ProcessLookupError, True)])
def test_what_a_process_of_another_user_writes_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[OSError], cleared: bool
) -> None:
    def kill(process: int, signal: int) -> None:
        raise error

    monkeypatch.setattr(os, "kill", kill)
    theirs = tmp_path / f".b.{atomic_folder._HOST}.1.0123abcd.new"
    theirs.mkdir()
    check_target(tmp_path / "b", overwrite=False)
    assert theirs.is_dir() is not cleared
