from __future__ import annotations

import json
from pathlib import Path

import pytest

from geta_hf.errors import GETAError
from geta_hf.export.formats import exported
from geta_hf.export.formats.experimental.openvino import write_openvino
from tests.export.formats.test_integers import compressed, vit
from tests.export.tiny_encoders import some_batch, tiny_model


def test_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exported, "find_spec", lambda name: None)
    with pytest.raises(GETAError, match=r"openvino format needs openvino: pip install 'geta_hf\[openvino\]'"):
        write_openvino(tiny_model(), tmp_path, some_batch())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "channels", "rounded", "vit"])
def test_outputs_are_the_model_s(kind: str, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    model, batch = vit() if kind == "vit" else (tiny_model(), some_batch())
    small = compressed(model, batch, False if kind == "rounded" else None, per_channel=kind == "channels")
    write_openvino(small, tmp_path, batch)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["exported_as"]["difference"]["exact"] <= 1e-5 and "quantization_config" not in config
    program = openvino.Core().read_model(tmp_path / "openvino_model.xml")
    constants = [node for node in program.get_ordered_ops() if node.get_type_name() == "Constant"]
    codes = [node for node in constants if node.get_element_type() == openvino.Type.i8 and len(node.get_shape()) > 1]
    assert len(codes) == sum(bits <= 8 for bits in small.hf_quantizer.quantization_config.bits.values())
