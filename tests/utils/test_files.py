"""A file is replaced in one step, or stays as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from geta_hf.utils.files import write_whole


@pytest.mark.parametrize(("content", "expected"), [("Größe\n", "Größe\n".encode()), (b"\x00\xff", b"\x00\xff")])
def test_the_content_replaces_what_was_there(tmp_path: Path, content: str | bytes, expected: bytes) -> None:
    target = tmp_path / "file"
    target.write_text("before, and longer than what comes")
    write_whole(target, content)
    assert target.read_bytes() == expected
    assert list(tmp_path.iterdir()) == [target]


def test_it_may_be_read_by_whom_any_other_new_file_may(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_whole(str(tmp_path / "whole"), "")
    assert (tmp_path / "whole").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("step", ["write_bytes", "replace"])
def test_a_failure_leaves_the_old_content_and_nothing_else(
    tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Path, argument: object) -> None:
        if step == "write_bytes":
            self.touch()  # half of it is there
        raise OSError("disk full")

    target = tmp_path / "file"
    target.write_text("before")
    monkeypatch.setattr(Path, step, fail)
    with pytest.raises(OSError, match="disk full"):
        write_whole(target, "after")
    assert target.read_text() == "before"
    assert list(tmp_path.iterdir()) == [target]
