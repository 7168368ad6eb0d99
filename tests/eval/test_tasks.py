"""lm-eval's tasks over local files are lm-eval's in all but the rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from eval.tasks.__main__ import main
from geta_hf import GETAError
from geta_hf.evaluation import COMMONSENSE, write_tasks
from geta_hf.evaluation.tasks import split_names
from tests.tiny_tasks import ROWS, write_rows

pytest.importorskip("lm_eval")
SOURCES = {"dataset_path", "dataset_name", "dataset_kwargs", "training_split", "validation_split", "test_split"}


def loaded(path: Path) -> dict[str, Any]:
    """A task's YAML with all that it includes, as lm-eval reads it."""
    from lm_eval.tasks._yaml_loader import load_yaml

    return load_yaml(path, resolve_func=False)


def test_all_but_the_rows_is_lm_evals(tmp_path: Path) -> None:
    data, out = write_rows(tmp_path / "data"), tmp_path / "out"
    names = write_tasks(data, out)
    assert names == [*COMMONSENSE, "lambada_openai", "blimp"]
    assert {path.stem for path in out.iterdir()} == {*names, "blimp_transitive", "blimp_passive_1"}
    for path in out.iterdir():
        stock = Path(yaml.safe_load(path.read_text())["include"])
        assert stock.is_absolute()
        ours, theirs = loaded(path), loaded(stock)
        if path.stem == "blimp":
            assert ours.pop("task") == ["blimp_passive_1", "blimp_transitive"]
            assert theirs.pop("task").count("blimp_transitive") == 1
        else:
            assert ours["task"] == theirs["task"] == path.stem
            ours, theirs = ({key: one[key] for key in one if key not in SOURCES} for one in (ours, theirs))
        assert ours == theirs


@pytest.mark.parametrize(("task", "split"), [name.split("/") for name in ROWS if not name.startswith("blimp")])
def test_the_scored_split_is_lm_evals(task: str, split: str, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data", {f"{task}/{split}": ROWS[f"{task}/{split}"]})
    write_tasks(data, tmp_path, task)
    ours = yaml.safe_load((tmp_path / f"{task}.yaml").read_text())
    theirs = loaded(Path(ours["include"]))
    assert split == (theirs.get("test_split") or theirs["validation_split"])
    assert ours["dataset_kwargs"]["data_files"] == {split: str(data / task / f"{split}.jsonl.gz")}
    assert ours[f"{split}_split"] == split
    assert [ours[name] for name in ("training_split", "validation_split", "test_split")].count(None) == 2


def test_examples_for_the_prompt_come_from_train(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data", {"piqa/validation": ROWS["piqa/validation"]})
    with pytest.raises(GETAError, match=r"piqa/train.jsonl.gz is missing"):
        write_tasks(data, tmp_path / "out", "piqa", fewshot=True)
    write_rows(data, {"piqa/train": ROWS["piqa/validation"]})
    write_tasks(data, tmp_path / "out", "piqa", fewshot=True)
    written = yaml.safe_load((tmp_path / "out/piqa.yaml").read_text())
    assert written["training_split"] == "train"
    assert set(written["dataset_kwargs"]["data_files"]) == {"validation", "train"}


@pytest.mark.parametrize(
    ("tasks", "told"),
    [
        ("boolq", r"boolq/validation.jsonl.gz is missing"),
        ("blimp", r"blimp holds no <paradigm>.jsonl.gz"),
        ("blimp_transitive", r"transitive.jsonl.gz is missing"),
        ("blimp_unheard_of", r"blimp/unheard_of.jsonl.gz is missing"),
        ("pica", r"no task 'pica' from local files; did you mean piqa"),
        (" , ", "no task is named"),
        (None, "has no files for any of boolq"),
    ],
)
def test_what_is_not_there_is_named(tasks: str | None, told: str, tmp_path: Path) -> None:
    with pytest.raises(GETAError, match=told):
        write_tasks(tmp_path, tmp_path / "out", tasks)
    assert not (tmp_path / "out").exists()


def test_patterns_are_what_has_files(tmp_path: Path) -> None:
    data, out = write_rows(tmp_path / "data"), tmp_path / "out"
    assert write_tasks(data, out, "blimp_*") == ["blimp_passive_1", "blimp_transitive"]
    assert {path.stem for path in out.iterdir()} == {"blimp_passive_1", "blimp_transitive"}
    assert write_tasks(data, out, "arc_easy,arc_*") == ["arc_easy", "arc_challenge"]
    assert write_tasks(data, out, "blimp_transitive,blimp*") == ["blimp"]
    assert write_tasks(data, out, "*bo*q*") == ["boolq", "openbookqa"]
    with pytest.raises(GETAError, match=r"no file for .*'trivia_\*'; there are boolq, .*blimp_transitive"):
        write_tasks(data, out, "trivia_*")


def test_a_paradigm_that_lm_eval_does_not_have_is_refused(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data", {"blimp/unheard_of": ROWS["blimp/transitive"]})
    with pytest.raises(GETAError, match=r"lm-eval has no .*unheard_of.yaml"):
        write_tasks(data, tmp_path / "out", "blimp")


@pytest.mark.parametrize(
    ("line", "told"),
    [("", "not JSON"), ("{", "not JSON"), ("[]", "lacks goal, sol1"), ('{"goal": ""}', "lacks sol1, sol2")],
)
def test_rows_of_something_else_are_refused(line: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa/validation.jsonl").write_text(line)
    with pytest.raises(GETAError, match=rf"validation.jsonl: .*{told}"):
        write_tasks(tmp_path, tmp_path / "out", "piqa")


def test_a_file_that_is_not_packed_as_its_name_says(tmp_path: Path) -> None:
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa/validation.jsonl.gz").write_text(json.dumps(ROWS["piqa/validation"][0]))
    with pytest.raises(GETAError, match="not JSON"):
        write_tasks(tmp_path, tmp_path / "out", "piqa")


def test_names_are_split_and_the_suite_opened() -> None:
    assert split_names("commonsense") == list(COMMONSENSE)
    assert split_names(["piqa", "blimp , piqa"]) == ["piqa", "blimp"]
    assert split_names("winogrande,commonsense")[0] == "winogrande"
    assert len(split_names("winogrande,commonsense")) == 7


def test_the_command_writes_and_says_how_to_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_rows(tmp_path / "data")
    main([str(data), str(tmp_path / "out"), "--tasks", "piqa,blimp"])
    assert f"--include_path {tmp_path / 'out'} --tasks piqa,blimp" in capsys.readouterr().out
    assert len(list((tmp_path / "out").iterdir())) == 4
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "nowhere"), str(tmp_path / "out")])
    assert "no such folder" in capsys.readouterr().err
