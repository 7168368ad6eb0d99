from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

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
    write_folder(target, filler("new"), overwrite=True)
    assert (target / "config.json").read_text() == "new"
    assert [path.name for path in target.parent.iterdir()] == ["b"]


def test_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="half way"):
        write_folder(tmp_path / "b", filler("new", fail=True), overwrite=True)
    assert list(tmp_path.iterdir()) == []


def test_replaces_an_old_folder_only_by_a_whole_new_one(tmp_path: Path) -> None:
    target = tmp_path / "b"
    write_folder(target, filler("old"), overwrite=True)
    with pytest.raises(RuntimeError, match="half way"):
        write_folder(target, filler("new", fail=True), overwrite=True)
    assert (target / "config.json").read_text() == "old"
    write_folder(target, filler("new"), overwrite=True)
    assert (target / "config.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_old_folder_returns_when_the_last_rename_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "b"
    write_folder(target, filler("old"), overwrite=True)
    rename = Path.rename

    def failing(self: Path, to: Path) -> Path:
        if self.name.endswith(".new"):
            raise OSError("disk gone")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="disk gone"):
        write_folder(target, filler("new"), overwrite=True)
    assert (target / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_targets_that_may_not_be_written(tmp_path: Path) -> None:
    check_target(tmp_path / "free", overwrite=False)
    write_folder(tmp_path / "model", filler("old"), overwrite=True)
    with pytest.raises(GETAError, match="exists already"):
        check_target(tmp_path / "model", overwrite=False)
    check_target(tmp_path / "model", overwrite=True)
    (tmp_path / "photos").mkdir()
    check_target(tmp_path / "photos", overwrite=True)  # empty
    with pytest.raises(GETAError, match="exists already"):
        check_target(tmp_path / "photos", overwrite=False)
    (tmp_path / "photos" / "one.jpg").write_text("a")
    with pytest.raises(GETAError, match=r"no config\.json"):
        check_target(tmp_path / "photos", overwrite=True)


def test_a_place_where_no_folder_can_appear_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("a")
    for target in (tmp_path / "file" / "a", tmp_path / "file" / "a" / "b"):
        with pytest.raises(GETAError, match=f"since {re.escape(str(tmp_path / 'file'))} is no folder"):
            check_target(target, overwrite=False)
    monkeypatch.setattr(os, "access", lambda place, mode: Path(place) != tmp_path)
    with pytest.raises(GETAError, match=f"since {re.escape(str(tmp_path))} may not be changed"):
        check_target(tmp_path / "a" / "b", overwrite=False)


@pytest.mark.parametrize("name", ["trainer_state.json", "runs/checkpoint-9/trainer_state.json", "checkpoint-9/weights"])
def test_what_a_training_needs_is_never_replaced(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path / "run", filler("old"), overwrite=True)
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
                write_folder(target, filler("new"), overwrite=True)

    return write


def test_what_was_killed_between_the_renames_is_put_back(tmp_path: Path, killed: Callable[[Path, int], None]) -> None:
    """And what it left is cleared away, but for what belongs to other targets or to a process that lives."""
    target, other = tmp_path / "b", tmp_path / "b.c"
    for folder in (target, other):
        write_folder(folder, filler("old"), overwrite=True)
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
    write_folder(target, fill, overwrite=True)
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
    write_folder(tmp_path / "b", filler("old"), overwrite=True)
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


def appears(what: str) -> Callable[[Path], None]:
    """Makes something under a name: a folder with content, an empty one, a file, or a link that leads nowhere."""

    def make(target: Path) -> None:
        if what == "a file":
            target.write_text("thesis")
        elif what == "a link":
            target.symlink_to("nowhere")
        else:
            target.mkdir()
        if what == "a folder":
            (target / "thesis.txt").write_text("thesis")
        if what == "a model":
            (target / "config.json").write_text("theirs")

    return make


@pytest.mark.parametrize("what", ["a folder", "an empty folder", "a model", "a file", "a link"])
def test_what_appears_meanwhile_is_never_replaced(tmp_path: Path, what: str) -> None:
    target = tmp_path / "b"

    def fill(folder: Path) -> None:
        filler("new")(folder)
        appears(what)(target)

    with pytest.raises(GETAError, match="appeared while the export was running"):
        write_folder(target, fill, overwrite=False)
    assert os.path.lexists(target) and len(list(tmp_path.iterdir())) == 1
    if what == "a folder":
        assert (target / "thesis.txt").read_text() == "thesis"
    if what == "a model":
        assert (target / "config.json").read_text() == "theirs"
    if what == "a file":
        assert target.read_text() == "thesis"
    if what == "an empty folder":
        assert not list(target.iterdir())


def test_of_two_exports_at_once_one_wins(tmp_path: Path) -> None:
    """Both checked, both fill; the second to end finds the first one's folder."""
    target, ready, wins = tmp_path / "b", threading.Barrier(2), []

    def write(name: str) -> None:
        def fill(folder: Path) -> None:
            filler(name)(folder)
            ready.wait()

        try:
            write_folder(target, fill, overwrite=False)
            wins.append(name)
        except GETAError:
            pass

    threads = [threading.Thread(target=write, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wins) == 1 and (target / "config.json").read_text() == wins[0]
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


UNKNOWN = ["thesis.txt", "photos/cat.jpg", "photos/", "training_args.bin", "pytorch_model.bin", ".git/HEAD", "notes"]


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_folder_with_files_of_others_is_not_replaced(tmp_path: Path, name: str) -> None:
    target = tmp_path / "b"
    write_folder(target, filler("old"), overwrite=False)
    path = target / name
    if name.endswith("/"):
        path.mkdir()
    else:
        path.parent.mkdir(exist_ok=True)
        path.write_text("theirs")
    with pytest.raises(GETAError, match=f"holds {re.escape(name)}, which no export writes"):
        check_target(target, overwrite=True)
    with pytest.raises(GETAError, match=f"holds {re.escape(name)}, which no export writes"):
        write_folder(target, filler("new"), overwrite=True)
    assert path.exists() and (target / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_unknown_files_that_appear_meanwhile_are_kept(tmp_path: Path) -> None:
    target = tmp_path / "b"
    write_folder(target, filler("old"), overwrite=False)
    check_target(target, overwrite=True)

    def fill(folder: Path) -> None:
        filler("new")(folder)
        (target / "thesis.txt").write_text("thesis")

    with pytest.raises(GETAError, match=r"holds thesis\.txt"):
        write_folder(target, fill, overwrite=True)
    assert (target / "thesis.txt").is_file() and (target / "config.json").read_text() == "old"


def test_what_an_export_wrote_itself_is_replaced_whatever_its_name(tmp_path: Path) -> None:
    """A tokenizer of one's own may have files of any name."""

    def fill(folder: Path) -> None:
        filler("new")(folder)
        (folder / "runes.dat").write_text("own")

    for _ in range(2):
        write_folder(tmp_path / "b", fill, overwrite=True)
        check_target(tmp_path / "b", overwrite=True)
    (tmp_path / "b" / "other.dat").write_text("theirs")
    with pytest.raises(GETAError, match=r"holds other\.dat"):
        check_target(tmp_path / "b", overwrite=True)
    (tmp_path / "b" / "geta_files.json").write_text('{"runes.dat": 1')
    with pytest.raises(GETAError, match=r"holds other\.dat, runes\.dat"):
        check_target(tmp_path / "b", overwrite=True)


def test_an_old_folder_whose_name_was_taken_gets_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "b"
    write_folder(target, filler("old"), overwrite=False)
    rename = Path.rename

    def slow(self: Path, to: Path) -> Path:
        result = rename(self, to)
        if to.name.endswith(".old"):
            target.mkdir()
            filler("theirs")(target)
        return result

    monkeypatch.setattr(Path, "rename", slow)
    with pytest.raises(GETAError, match="appeared"):
        write_folder(target, filler("new"), overwrite=True)
    assert (target / "config.json").read_text() == "theirs"
    (other,) = [path for path in tmp_path.iterdir() if path != target]
    assert other.name.startswith("b.old-") and (other / "config.json").read_text() == "old"


@pytest.mark.parametrize("what", ["a folder", "a file", "a link"])
def test_what_appears_in_the_last_moment_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """After the last look, so that the rename itself has to fail."""
    target, rename = tmp_path / "b", Path.rename

    def late(self: Path, to: Path) -> Path:
        appears(what)(target)
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", late)
    with pytest.raises(GETAError, match="appeared while the export was running"):
        write_folder(target, filler("new"), overwrite=False)
    assert target.is_symlink() or target.is_file() or (target / "thesis.txt").read_text() == "thesis"
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def no_room(folder: Path) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "model.safetensors"))


def no_room_for_tensors(folder: Path) -> None:
    save_file({"x": torch.zeros(4)}, "/dev/full/model.safetensors")


def no_right(folder: Path) -> None:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))


@pytest.mark.parametrize("fail", [no_room, no_room_for_tensors, no_right])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path, fail: Callable[[Path], None]) -> None:
    def fill(folder: Path) -> None:
        filler("new")(folder)
        fail(folder)

    with pytest.raises(GETAError, match=r"was not written .*, and nothing of it remains; make room"):
        write_folder(tmp_path / "b", fill, overwrite=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="permissions are others there")
def test_weights_are_readable_for_those_who_may_read_the_rest(tmp_path: Path) -> None:
    """safetensors writes files for their owner alone."""

    def fill(folder: Path) -> None:
        filler("{}")(folder)
        save_file({"x": torch.zeros(4)}, folder / "model.safetensors")

    write_folder(tmp_path / "b", fill, overwrite=False)
    modes = {path.stat().st_mode for path in (tmp_path / "b").iterdir()}
    assert len(modes) == 1


def test_an_empty_folder_that_was_made_in_advance_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write_folder(tmp_path / "out", filler("new"), overwrite=True)
    assert (tmp_path / "out" / "config.json").read_text() == "new"
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    with pytest.raises(GETAError, match=r"no config\.json"):
        check_target(tmp_path / "link", overwrite=True)
