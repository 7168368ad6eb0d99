from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from geta_hf.errors import GETAError
from geta_hf.serialization.sizes import tensor_bytes, tensor_sizes

TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn)
WHOLE = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int64)


def test_sizes_are_those_of_the_tensors_of_any_type(tmp_path: Path) -> None:
    tensors = {str(kind): torch.zeros(3, 5).to(kind) for kind in (*TYPES, *WHOLE)} | {"none": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "a.safetensors")
    save_file({"other": torch.ones(7)}, tmp_path / "b.safetensors")
    expected = {name: tensor.nbytes for name, tensor in tensors.items()}
    assert tensor_sizes(tmp_path / "a.safetensors") == expected
    assert tensor_bytes(tmp_path) == sum(expected.values()) + 28


def test_a_path_may_lead_over_the_folder_above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": torch.ones(7)}, tmp_path / "a.safetensors")
    assert tensor_bytes(tmp_path / ".." / tmp_path.name) == 28
    monkeypatch.chdir(tmp_path)
    assert tensor_bytes(".") == tensor_bytes(Path("..") / tmp_path.name) == 28


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GETAError, match=r"holds no \.safetensors file"):
        tensor_bytes(tmp_path)
