from __future__ import annotations

import json
from pathlib import Path

import pytest

from geta_hf.errors import GETAError
from geta_hf.export.formats import exported
from geta_hf.export.formats.experimental.executorch import write_executorch
from tests.export.formats.test_integers import compressed, gpt2
from tests.export.tiny_encoders import some_batch, tiny_model


def test_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exported, "find_spec", lambda name: None)
    with pytest.raises(GETAError, match=r"executorch format needs executorch: pip install 'geta_hf\[executorch\]'"):
        write_executorch(tiny_model(), tmp_path, some_batch())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # its packages warn of one another
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_outputs_are_the_model_s(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    small = compressed(tiny_model() if kind == "bert" else gpt2(), some_batch())
    write_executorch(small, tmp_path, some_batch())
    found = json.loads((tmp_path / "config.json").read_text())["exported_as"]
    assert found["format"] == "executorch" and found["difference"]["exact"] <= 1e-6
