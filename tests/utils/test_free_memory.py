"""Giving freed memory back to the system."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import pytest
import torch

from geta_hf.utils.free_memory import give_back


def held() -> int:
    """Return the bytes of memory that the system cannot take back from this process."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep no such heap")
def test_the_gaps_between_tensors_are_given_back() -> None:
    # 200 MB in tensors so small that they come from the heap, of which every sixteenth remains.
    tensors = [torch.ones(16_000) for _ in range(3200)]
    kept = tensors[::16]
    del tensors
    before = held()
    give_back()
    assert before - held() > 100_000_000
    assert all(bool((tensor == 1).all()) for tensor in kept)


def test_elsewhere_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr("ctypes.CDLL", lambda *_: pytest.fail("asked a C library"))
    give_back()
