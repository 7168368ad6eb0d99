from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from geta_hf.utils import gpu


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    gpu.has_triton.cache_clear()
    yield
    gpu.has_triton.cache_clear()


@pytest.mark.parametrize(
    ("name", "capability", "triton", "products", "tensor_cores"),
    [
        ("P100", (6, 0), False, False, False),
        ("V100", (7, 0), True, False, False),
        ("T4", (7, 5), True, True, False),
        ("A100", (8, 0), True, True, True),
        ("H100", (9, 0), True, True, True),
    ],
)
def test_capability_decides(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    capability: tuple[int, int],
    triton: bool,
    products: bool,
    tensor_cores: bool,
) -> None:
    monkeypatch.setattr(gpu, "capability", lambda device: capability)
    monkeypatch.setattr(gpu, "has_triton", lambda: True)
    device = torch.device("cuda", 0)
    found = (gpu.runs_triton(device), gpu.multiplies_bytes(device), gpu.has_triton_tensor_cores(device))
    assert found == (triton, products, tensor_cores), name


@pytest.mark.parametrize(("installed", "compiler"), [(True, True), (True, False), (False, True)])
def test_triton_needs_a_compiler(monkeypatch: pytest.MonkeyPatch, installed: bool, compiler: bool) -> None:
    monkeypatch.setattr(gpu, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: "/usr/bin/cc" if compiler else None)
    monkeypatch.setattr(gpu.sys, "platform", "linux")
    assert gpu.has_triton() == (installed and compiler)
