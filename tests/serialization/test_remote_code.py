"""A folder in an environment that has never seen geta_hf."""

from __future__ import annotations

import ast
import importlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForQuestionAnswering,
    BertConfig,
    BertForQuestionAnswering,
    PreTrainedModel,
)

import geta_hf
from geta_hf import export
from geta_hf.quantization import attach_input_quantizers, quantized_layers, step_size
from geta_hf.quantization.quantizer import Quantizer
from geta_hf.serialization.remote_code import CARRIED, save_compressed
from geta_hf.surgery.trial_cut import try_cuts
from tests.architectures import build
from tests.elsewhere import run_elsewhere
from tests.export.test_channel_widths import trained as several_widths
from tests.export.tiny_encoders import some_batch, tiny_model, train_by_hand
from tests.spaces import build_space

# numpy is a requirement of transformers itself.
ALLOWED = {"torch", "transformers", "safetensors", "numpy"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export with everything: cut, packed, with a rounded embedding and rounded inputs."""
    home = tmp_path_factory.mktemp("remote")
    model = tiny_model()
    space = build_space(model, some_batch())
    train_by_hand(model, space)
    attach_input_quantizers(model, [some_batch()], initial_bits=8, target_bits=8)
    export(model, home / "out", space=space, batch=some_batch(), embedding_bits=4)
    save_file(some_batch(), home / "batch.safetensors")
    return home / "out"


RUN = """
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForQuestionAnswering
batch = load_file("batch.safetensors")
model = AutoModelForQuestionAnswering.from_pretrained("out", trust_remote_code=True)
with torch.no_grad():
    found = dict(model(**batch))
    base = AutoModel.from_pretrained("out", trust_remote_code=True)(**batch).last_hidden_state
save_file({**found, "base": base}, "found.safetensors")
try:
    model.save_pretrained("again")
except ValueError as error:
    assert "not serializable" in str(error)
try:
    model.dequantize()
except ValueError as error:
    assert "import geta_hf" in str(error)
print(type(model).__name__, model.get_input_embeddings().weight.dtype)
"""


def test_it_gives_the_same_outputs_and_refuses_to_be_saved(folder: Path) -> None:
    assert run_elsewhere(RUN, folder.parent).split() == ["BertForQuestionAnswering", "torch.int8"]
    model = AutoModelForQuestionAnswering.from_pretrained(folder)
    found = load_file(folder.parent / "found.safetensors")
    with torch.no_grad():
        expected = model(**some_batch())
        assert torch.equal(model.bert(**some_batch()).last_hidden_state, found["base"])
    assert torch.equal(expected.start_logits, found["start_logits"])
    assert torch.equal(expected.end_logits, found["end_logits"])
    assert not (folder.parent / "again").exists()


def test_it_reads_rows_and_columns_of_several_widths(tmp_path: Path) -> None:
    """Sorted channels, a table of heads' and of one layer's rows, and inputs that have no negative codes."""
    model, space = several_widths(inputs=True)
    layers = quantized_layers(model)
    own = layers["bert.encoder.layer.1.intermediate.dense"].weight_quantizer
    with torch.no_grad():
        own.d.copy_(step_size(torch.arange(64) % 5 + 2.0, own.q_m, own.t))
    layers["bert.encoder.layer.1.output.dense"].input_quantizer = Quantizer(2.0, 7, unsigned=True)
    export(model, tmp_path / "out", space=space, batch=some_batch())
    assert "geta_packed_layers.py" in {path.name for path in (tmp_path / "out").iterdir()}
    save_file(some_batch(), tmp_path / "batch.safetensors")
    run_elsewhere(RUN, tmp_path)
    found = load_file(tmp_path / "found.safetensors")
    reloaded = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "out")
    assert reloaded.config.quantization_config.unsigned_inputs
    with torch.no_grad():
        assert torch.equal(reloaded(**some_batch()).start_logits, found["start_logits"])


def test_without_the_flag_it_is_a_loud_error(folder: Path) -> None:
    code = """
from transformers import AutoModelForQuestionAnswering
try:
    AutoModelForQuestionAnswering.from_pretrained("out", trust_remote_code=False)
except Exception as error:
    print("refused", type(error).__name__)
"""
    assert run_elsewhere(code, folder.parent).startswith("refused")


def test_with_geta_hf_nothing_of_the_folder_runs(folder: Path, tmp_path: Path) -> None:
    for path in folder.glob("*.py"):
        assert "geta_hf" not in {name.partition(".")[0] for name in imported(path)}
        (tmp_path / path.name).write_text("raise SystemExit('this must not run')\n", encoding="utf-8")
    for path in folder.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    model = AutoModelForQuestionAnswering.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "again")
    assert "auto_map" not in json.loads((tmp_path / "again" / "config.json").read_text())


MANY = [
    "bart",
    "clip",
    "deberta-v2",
    "gpt2",
    "mixtral",
    "phi3",
    "qwen2_moe",
    "t5",
    "vit",
    "wav2vec2",
    "whisper",
    "zamba",
]
LOAD_ALL = """
import json, sys
from pathlib import Path
import torch, transformers
from safetensors.torch import load_file, save_file
for folder in sorted(path for path in Path(".").iterdir() if (path / "config.json").exists()):
    config = json.loads((folder / "config.json").read_text())
    (architecture,) = config["architectures"]
    autos = [auto for auto, name in config["auto_map"].items() if name.endswith("." + architecture)]
    batch = load_file(f"{folder}.batch")
    for auto in autos:
        model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True)
        with torch.no_grad():
            found = model(**batch)
    plain = {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
    save_file({name: value.contiguous() for name, value in plain.items()}, f"{folder}.found")
    print(folder, len(autos))
"""


@pytest.mark.slow
def test_many_architectures(tmp_path: Path) -> None:
    expected = {}
    for name in MANY:
        model, batch = build(name)
        space = try_cuts(model, build_space(model, batch), batch)
        train_by_hand(model, space)
        export(model, tmp_path / name, space=space, batch=batch)
        save_file({key: value.contiguous() for key, value in batch.items()}, tmp_path / f"{name}.batch")
        with torch.no_grad():
            expected[name] = type(model).from_pretrained(tmp_path / name)(**batch)
    lines = run_elsewhere(LOAD_ALL, tmp_path).splitlines()
    assert [line.split()[0] for line in lines] == sorted(MANY)
    assert all(int(line.split()[1]) >= 1 for line in lines)
    for name in MANY:
        for key, value in load_file(tmp_path / f"{name}.found").items():
            assert torch.equal(value, expected[name][key]), (name, key)


LOAD_RECIPES = """
import sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification
for name in ("cifar_resnet", "vgg7"):
    model = AutoModelForImageClassification.from_pretrained(name, trust_remote_code=len(sys.argv) == 1 or None)
    with torch.no_grad():
        logits = model.eval()(**load_file("batch.safetensors")).logits
    save_file({"logits": logits}, f"{name}.found")
    print(type(model).__name__)
"""


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, PreTrainedModel]]:
    """Exports of the models that only the image recipe has, and what they are."""
    home = tmp_path_factory.mktemp("recipes")
    batch = {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
    save_file(batch, home / "batch.safetensors")
    sizes = {
        "cifar_resnet": {"depths": [1, 1], "hidden_sizes": [8, 16], "embedding_size": 8},
        "vgg7": {"hidden_sizes": [4, 8], "classifier_size": 16, "image_size": 8},
    }
    models = {}
    for name, changes in sizes.items():
        torch.manual_seed(0)
        model = AutoModelForImageClassification.from_config(AutoConfig.for_model(name, **changes)).eval()
        space = build_space(model, batch)
        train_by_hand(model, space)
        export(model, home / name, space=space, batch=batch)
        models[name] = model
    return home, models


def check_outputs(home: Path, models: dict[str, PreTrainedModel]) -> None:
    batch = load_file(home / "batch.safetensors")
    for name, model in models.items():
        with torch.no_grad():
            expected = model(**batch).logits
        torch.testing.assert_close(load_file(home / f"{name}.found")["logits"], expected, rtol=1e-4, atol=1e-5)


def test_folders_of_the_recipes_models_carry_their_classes(recipes: tuple[Path, dict[str, PreTrainedModel]]) -> None:
    home, models = recipes
    names = run_elsewhere(LOAD_RECIPES, home).split()
    assert names == [type(model).__name__ for model in models.values()]
    check_outputs(home, models)


@pytest.mark.slow
def test_the_import_of_geta_hf_is_enough_for_them(recipes: tuple[Path, dict[str, PreTrainedModel]]) -> None:
    home, models = recipes
    environment = {**os.environ, "PYTHONPATH": str(Path(geta_hf.__file__).parent.parent)}
    command = [sys.executable, "-c", f"import geta_hf\n{LOAD_RECIPES}", "with geta_hf"]
    subprocess.run(command, cwd=home, env=environment, check=True, capture_output=True)
    check_outputs(home, models)


class Wider(BertForQuestionAnswering):
    """A user's own: the folder's code can't build it from transformers' class."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.qa_outputs = torch.nn.Linear(config.hidden_size, 2, bias=False)


class Renamed(BertForQuestionAnswering):
    """As FSDP makes one: another class that computes the same."""


def test_a_class_that_changes_what_transformers_computes_gets_no_code(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("geta_hf"), "propagate", True)
    config = tiny_model().config
    for kind in (Renamed, Wider):
        save_compressed(kind(config), tmp_path / kind.__name__)
    stored = {kind: json.loads((tmp_path / kind / "config.json").read_text()) for kind in ("Renamed", "Wider")}
    assert stored["Renamed"]["auto_map"]["AutoModelForQuestionAnswering"] == "modeling_geta.BertForQuestionAnswering"
    assert "auto_map" not in stored["Wider"] and not list((tmp_path / "Wider").glob("*.py"))
    assert "Wider is not a class of transformers" in caplog.text and "Renamed" not in caplog.text


def imported(path: Path, at_once: bool = False) -> set[str]:
    """What a file imports, or of that what it does as soon as it is imported itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in tree.body if at_once else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("name", CARRIED)
def test_what_is_carried_imports_nothing_that_an_environment_may_lack(name: str) -> None:
    path = Path(str(importlib.import_module(name).__file__))
    standard = {
        "__future__",
        "math",
        "os",
        "re",
        "json",
        "collections",
        "contextlib",
        "dataclasses",
        "functools",
        "itertools",
        "typing",
        "copy",
        "pathlib",
        "struct",
        "threading",
        "zlib",
    }
    whole, at_once = imported(path), imported(path, at_once=True)
    for module in whole - {"accelerate.utils"} | at_once:  # which is there where something was offloaded
        assert module in CARRIED or module.partition(".")[0] in ALLOWED | standard, module


def test_carried_modules_have_names_of_their_own() -> None:
    """They lie side by side in a folder, where one of two equal names would overwrite the other."""
    leaves = [name.rpartition(".")[2] for name in CARRIED]
    assert len(set(leaves)) == len(leaves)
    assert leaves[-1] == "loader"  # which modeling_geta.py imports
