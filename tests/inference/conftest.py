from __future__ import annotations

import pytest

from geta_hf.inference import prepare


@pytest.fixture(autouse=True)
def fast_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule as on a processor that multiplies integers."""
    monkeypatch.setattr(prepare, "_cpu_has_integers", lambda: True)
