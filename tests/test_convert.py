"""From a checkpoint or an exported folder to a folder of any format."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForQuestionAnswering

from geta_hf import GETAConfig
from geta_hf.cli import main
from geta_hf.convert import convert
from geta_hf.errors import GETAError
from geta_hf.export.export import copy_beside
from geta_hf.reporting.comparison import read_structure
from geta_hf.reporting.folder_summary import read_summary
from geta_hf.reporting.html_report import write_report
from geta_hf.reporting.hub import files_to_push
from geta_hf.training.checkpoints import PROGRESS_NAME
from tests.elsewhere import run_code
from tests.training.test_trainer import SMALL, trainer

pytestmark = pytest.mark.usefixtures("shared_spaces")

IDS = {"input_ids": torch.arange(3, 19).view(2, 8)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a checkpoint from its middle, and what its trainer exported."""
    folder = tmp_path_factory.mktemp("run")
    config = GETAConfig(**SMALL, activation_bits=(4, 8), embedding_bits=8)
    made = trainer(folder / "run", config, save_strategy="steps", save_steps=10)
    made.model.config.name_or_path = "someone/tiny-bert"
    made.train()
    made.save_model(str(folder / "run" / f"checkpoint-{made.state.global_step}"))
    made.export_model(folder / "exported")
    return folder


def test_a_checkpoint_becomes_what_its_trainer_exported(run: Path, tmp_path: Path) -> None:
    report = convert(run / "run", tmp_path / "out")
    assert report is not None
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", run / "exported"))
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for name in ("geta_structure.json", "geta_config.json", "config.json"):
        assert json.loads((tmp_path / "out" / name).read_text()) == json.loads((run / "exported" / name).read_text())


def test_a_checkpoint_from_before_the_end_is_refused(run: Path, tmp_path: Path) -> None:
    first = min(run.glob("run/checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    with pytest.raises(GETAError, match=r"is from step 10, before its run had finished"):
        convert(first, tmp_path / "out")
    (first / PROGRESS_NAME).unlink()
    with pytest.raises(GETAError, match=PROGRESS_NAME):
        convert(first, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_exported_folder_is_written_anew(run: Path, tmp_path: Path) -> None:
    assert convert(run / "exported", tmp_path / "out") is None
    first, again = run / "exported", tmp_path / "out"
    assert {path.name for path in first.iterdir()} == {path.name for path in again.iterdir()}
    assert (first / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    models = [AutoModelForQuestionAnswering.from_pretrained(folder) for folder in (first, again)]
    with torch.no_grad():
        outputs = [model(**IDS).start_logits for model in models]
    assert torch.equal(*outputs)


def test_the_command_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["export", str(run / "run"), str(out), "--embedding-bits", "4"]) == 0
    assert "geta format" in capsys.readouterr().out
    bits = json.loads((out / "geta_structure.json").read_text())["bits"]
    assert bits["bert.embeddings.word_embeddings"] == 4
    assert main(["export", str(run / "run"), str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["export", str(run / "exported"), str(tmp_path / "other"), "--embedding-bits", "4"]) == 2
    assert "is an export already" in capsys.readouterr().err
    assert main(["export", str(run), str(tmp_path / "other")]) == 2
    assert "neither a checkpoint" in capsys.readouterr().err
    assert main(["export", str(run / "exported"), str(tmp_path / "other"), "--format", "vanilla"]) == 2
    assert not (tmp_path / "other").exists()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("run/checkpoint-24", "run"),
        ("run", "run/checkpoint-24"),
        ("run", "run/checkpoint-10"),
        ("run", "run"),
        ("run/checkpoint-24", "run/checkpoint-24"),
        ("bare", "bare"),
        ("home/small", "home"),
    ],
)
def test_what_an_export_is_made_of_is_never_replaced(run: Path, tmp_path: Path, source: str, target: str) -> None:
    shutil.copytree(run / "run", tmp_path / "run")
    shutil.copy(run / "run" / "checkpoint-24" / "config.json", tmp_path / "run")
    shutil.copytree(run / "run" / "checkpoint-24", tmp_path / "bare")
    (tmp_path / "bare" / "trainer_state.json").unlink(missing_ok=True)
    shutil.copytree(run / "exported", tmp_path / "home" / "small")
    shutil.copy(run / "exported" / "config.json", tmp_path / "home")
    before = contents(tmp_path)
    with pytest.raises(GETAError, match="not replaced"):
        convert(tmp_path / source, tmp_path / target, overwrite=True)
    assert contents(tmp_path) == before


def test_an_exported_folder_may_be_written_over_itself(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "exported", tmp_path / "out")
    before = contents(tmp_path)
    convert(tmp_path / "out", tmp_path / "out", overwrite=True)
    assert contents(tmp_path) == before


def test_a_damaged_checkpoint_is_named_with_the_ones_before(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "run", tmp_path / "run")
    os.truncate(tmp_path / "run" / "checkpoint-24" / "model.safetensors", 3000)
    with pytest.raises(GETAError, match=r"checkpoint-24.model\.safetensors is damaged or cut short") as error:
        convert(tmp_path / "run" / "checkpoint-24", tmp_path / "out")
    assert str(error.value).endswith(f"; or export {tmp_path}/run/checkpoint-20")
    shutil.rmtree(tmp_path / "run" / "checkpoint-20")
    with pytest.raises(GETAError, match="damaged") as error:
        convert(tmp_path / "run", tmp_path / "out")
    assert str(error.value).endswith(f"; or train on from {tmp_path}/run/checkpoint-10")
    shutil.rmtree(tmp_path / "run" / "checkpoint-10")
    with pytest.raises(GETAError, match="damaged") as error:
        convert(tmp_path / "run", tmp_path / "out")
    assert " or train on" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_the_card_names_what_the_run_began_with(run: Path, tmp_path: Path) -> None:
    convert(run / "run", tmp_path / "out")
    assert read_summary(tmp_path / "out").base_model == read_summary(run / "exported").base_model == "someone/tiny-bert"
    shutil.copytree(run / "run" / "checkpoint-24", tmp_path / "copy")
    path = tmp_path / "copy" / PROGRESS_NAME
    noted = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in noted.items() if name != "base_model"}))
    convert(tmp_path / "copy", tmp_path / "old")
    assert read_summary(tmp_path / "old").base_model is None


@pytest.mark.parametrize("source", ["run", "exported"])
def test_a_folder_appears_with_its_card(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    rename, seen = Path.rename, []

    def noted(self: Path, target: Path) -> Path:
        seen.append({path.name for path in self.iterdir()})
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", noted)
    convert(run / source, tmp_path / "out")
    assert len(seen) == 1
    assert seen[0] == {path.name for path in (tmp_path / "out").iterdir()} >= {"README.md", "geta_structure.svg"}
    text = (tmp_path / "out" / "README.md").read_text()
    assert (".new" in text, f"# {'out' if source == 'run' else 'exported'}\n" in text) == (False, True)


def test_what_save_pretrained_leaves_out_is_made_anew(run: Path, tmp_path: Path) -> None:
    model = AutoModelForQuestionAnswering.from_pretrained(run / "exported").eval()
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(GETAError, match=r"has no geta_structure\.json.*geta-hf export .*saved OUT"):
        read_structure(tmp_path / "saved")
    convert(tmp_path / "saved", tmp_path / "out")
    assert read_structure(tmp_path / "out").kept == read_structure(run / "exported").kept
    names = {path.name for path in (run / "exported").iterdir()} - {"geta_config.json"}
    assert (
        {path.name for path in (tmp_path / "out").iterdir()}
        == names
        == {name for name, _ in files_to_push(tmp_path / "out")}
    )
    for name in ("geta_structure.json", "modeling_geta.py", "config.json", "model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (run / "exported" / name).read_bytes()
    assert write_report(tmp_path / "out", tmp_path / "report.html").is_file()


@pytest.mark.parametrize("source", ["run", "exported"])
def test_shards_in_one_step(run: Path, tmp_path: Path, source: str) -> None:
    convert(run / source, tmp_path / "out", max_shard_size="4KB")
    shards = sorted(tmp_path.glob("out/*.safetensors"))
    assert len(shards) > 2
    found: dict[str, torch.Tensor] = {}
    for shard in shards:
        found |= load_file(shard)
    whole = load_file(run / "exported" / "model.safetensors")
    assert set(found) == set(whole) and all(torch.equal(found[name], whole[name]) for name in whole)
    assert {name for name, _ in files_to_push(tmp_path / "out")} >= {shard.name for shard in shards}
    assert main(["export", str(run / source), str(tmp_path / "cli"), "--max-shard-size", "4KB"]) == 0
    assert [path.name for path in sorted(tmp_path.glob("cli/*.safetensors"))] == [path.name for path in shards]


@pytest.mark.parametrize(("size", "format"), [("20 apples", "geta"), (0, "geta"), ("20KB", "vanilla")])
def test_shards_that_cannot_be_are_refused_first(run: Path, tmp_path: Path, size: str | int, format: str) -> None:
    for source in (run / "run", run / "exported"):
        with pytest.raises(GETAError, match="max_shard_size"):
            convert(source, tmp_path / "out", max_shard_size=size, format=format)


def test_other_formats_get_no_picture_that_nothing_shows(run: Path, tmp_path: Path) -> None:
    copy_beside(run / "exported", tmp_path, structure=False)
    assert {path.name for path in tmp_path.iterdir()} == {"geta_config.json"}


ROOT = Path(__file__).parents[1]
KILLED = """
import os, sys
from geta_hf.convert import convert
from pathlib import Path
steps = int(sys.argv[3])
original = Path.rename
def rename(self, target):
    global steps
    if steps == 0:
        os._exit(9)
    steps -= 1
    return original(self, target)
Path.rename = rename
convert(sys.argv[1], sys.argv[2], overwrite=True)
"""


@pytest.mark.parametrize("steps", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_killed_while_it_replaces_a_folder_nothing_is_lost(run: Path, tmp_path: Path, steps: int) -> None:
    """Between the two renames the old folder stands under another name beside it."""
    convert(run / "exported", tmp_path / "out")
    whole = (tmp_path / "out" / "model.safetensors").read_bytes()
    arguments = (str(run / "exported"), str(tmp_path / "out"), str(steps))
    assert run_code(KILLED, ROOT, *arguments).returncode == 9
    assert not (tmp_path / "out").exists() or (tmp_path / "out" / "model.safetensors").read_bytes() == whole
    left = [path for path in tmp_path.glob("**/model.safetensors") if path.read_bytes() == whole]
    assert left
    convert(run / "exported", tmp_path / "out", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
