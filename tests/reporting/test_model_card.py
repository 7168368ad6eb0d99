"""The card says what the folder holds, in a form that the Hub reads, and its examples run."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData

from geta_hf.config import CONFIG_NAME
from geta_hf.errors import GETAError
from geta_hf.export.untouched import Untouched, write_untouched
from geta_hf.reporting.comparison import load_model, read_structure
from geta_hf.reporting.folder_summary import METRICS_NAME, read_summary
from geta_hf.reporting.model_card import PICTURE_NAME, card_under, model_card, table_of, ways_to_load, write_card
from geta_hf.reporting.results import RESULTS_NAME, TaskResult, read_results
from geta_hf.reporting.structure_svg import layer_grid
from tests.elsewhere import run_elsewhere
from tests.small_folders import exported, written

METRICS = {"dense": {"em": 80.5, "f1": 88.25}, "compressed": {"em": 79.0, "f1": 87.125}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return exported(tmp_path)[1]


def front(path: Path) -> ModelCardData:
    return ModelCard.load(path).data


def test_the_hub_reads_its_head(folder: Path) -> None:
    data = front(write_card(folder, base_model="google-bert/bert-base-uncased", dataset="squad", metrics=METRICS))
    assert (data.base_model, data.base_model_relation) == ("google-bert/bert-base-uncased", "quantized")
    assert (data.pipeline_tag, data.library_name) == ("question-answering", "transformers")
    assert data.tags == ["geta", "pruned", "quantized"]
    found = {result.metric_type: result.metric_value for result in data.eval_results}
    assert found == METRICS["compressed"]
    assert {(result.dataset_name, result.task_type) for result in data.eval_results} == {
        ("squad", "question-answering")
    }


def test_layers_that_left_whole_are_said_and_not_counted_among_the_dense(folder: Path) -> None:
    assert "removed entirely" not in model_card(folder)
    config = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps({**config, "drop_layers": ["encoder.layer.1", "encoder.layer.2"]}))
    text = model_card(folder)
    assert "2 layers were removed entirely, " in text
    assert "of the dense model exclude the 2 layers that were removed entirely." in text
    assert re.search(r"\| layers removed +\| +\| encoder\.layer\.1, encoder\.layer\.2 ", text)


def test_what_comes_later_joins_what_was_known(folder: Path) -> None:
    write_card(
        folder, base_model="google-bert/bert-base-uncased", dataset="squad", metrics={"compressed": {"em": 79.0}}
    )
    data = front(write_card(folder, metrics={"dense": {"em": 80.5}, "compressed": {"f1": 87.0}}))
    assert data.base_model == "google-bert/bert-base-uncased" and data.eval_results[0].dataset_name == "squad"
    stored = json.loads((folder / METRICS_NAME).read_text())
    assert stored == {"dense": {"em": 80.5}, "compressed": {"em": 79.0, "f1": 87.0}}
    text = (folder / "README.md").read_text()
    assert re.search(r"\| EM +\| 80\.50 +\| 79\.00 ", text) and re.search(r"\| F1 +\| +\| 87\.00 ", text)
    write_card(folder)
    assert (folder / "README.md").read_text() == text


def test_what_a_person_added_to_the_head_stays(folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: apache-2.0\ntags: [mine, geta]\n---\nold words")
    data = front(write_card(folder))
    assert data.license == "apache-2.0" and data.tags == ["mine", "geta", "pruned", "quantized"]
    assert "old words" not in (folder / "README.md").read_text()


def test_a_local_base_model_is_shown_and_not_claimed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    for local in (str(folder.parent / "dense"), "dense"):
        path = write_card(folder, base_model=local)
        assert front(path).base_model is None and str(folder.parent) not in path.read_text()
        assert "A BertForQuestionAnswering from dense, compressed" in path.read_text()
    write_card(folder)
    assert "from dense, compressed" in path.read_text()
    assert front(write_card(folder, base_model="me/dense")).base_model == "me/dense"


def test_without_metrics_none_are_claimed(folder: Path) -> None:
    path = write_card(folder)
    assert not front(path).eval_results and not (folder / METRICS_NAME).exists() and "| EM" not in path.read_text()


def test_its_table_and_picture_show_every_layer(folder: Path) -> None:
    text, structure = write_card(folder).read_text(), read_structure(folder)
    rows = [line for line in text.splitlines() if re.match(r"\| [01] +\|", line)]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    for layer, line in enumerate(cells):
        heads, channels = (structure.of_kind(kind)[layer][0] for kind in ("heads", "channels"))
        bits = [width for name, width in structure.bits.items() if f"layer.{layer}." in name]
        inputs = [width for name, width in structure.activation_bits.items() if f"layer.{layer}." in name]
        assert line == [str(value) for value in (layer, heads, channels, *bits, *inputs)]
    assert f"]({PICTURE_NAME})" in text
    ElementTree.parse(folder / PICTURE_NAME)
    assert json.loads(re.search(r"```json\n(.*?)```", text, re.DOTALL)[1])["bits"] == [2, 16]


def test_its_python_loads_the_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.search(r"```python\n(.*?)```", model_card(folder), re.DOTALL)[1]
    monkeypatch.chdir(folder.parent)
    found: dict = {}
    exec(code, found)
    batch = torch.arange(10)[None]
    assert torch.equal(found["model"](batch).start_logits, load_model(folder)(batch).start_logits)


@pytest.mark.slow
def test_its_other_python_loads_the_model_where_geta_hf_is_not(folder: Path) -> None:
    with_it, without = re.findall(r"```python\n(.*?)```", model_card(folder), re.DOTALL)[:2]
    assert "import geta_hf" in with_it and "geta_hf" not in without
    check = "import torch\nprint(model(torch.arange(10)[None]).start_logits.tolist())"
    found = torch.tensor(json.loads(run_elsewhere(without + check, folder.parent).splitlines()[-1]))
    assert torch.allclose(found, load_model(folder)(torch.arange(10)[None]).start_logits, atol=1e-5)


def test_ways_to_load_follow_the_folder(tmp_path: Path) -> None:
    config = {"model_type": "x", "architectures": ["X"]}
    code = {"auto_map": {"AutoConfig": "a.C", "AutoModelForCausalLM": "a.X"}}
    plain = ways_to_load(read_summary(written(tmp_path / "a", {}, {"a": 4}, config=config)), "me/a")
    assert [way.language for way in plain] == ["python", "python"] and "trust_remote_code" not in plain[0].code
    assert "load_for_inference" in plain[1].code
    own = ways_to_load(read_summary(written(tmp_path / "b", {}, {"a": 4}, config={**config, **code})), "me/b")
    assert [way.language for way in own] == ["python", "python", "bash"]
    assert "trust_remote_code=True" in own[1].code and "import geta_hf" not in own[1].code
    assert own[2].code.startswith("lm_eval --model hf --model_args pretrained=me/b,trust_remote_code=True ")
    task = {"model_type": "x", "architectures": ["BertForSequenceClassification"]}
    piped = ways_to_load(read_summary(written(tmp_path / "c", {}, {"a": 4}, config=task)), 'a"b')
    assert 'pipeline("text-classification", model="a\\"b")' in piped[1].code


def test_names_cannot_break_the_table(tmp_path: Path) -> None:
    name = "a|b`c\n# d<script>"
    text = model_card(written(tmp_path / "m", {f"{name}.0:heads": (1, 2)}, {f"{name}.{i}": 4 for i in range(3)}))
    lines = [line for line in text.splitlines() if line.startswith("|") and "layer" in line]
    assert len(lines) == 1 and len(re.findall(r"(?<!\\)\|", lines[0])) == 4
    assert "<script" not in text and "\n# d" not in text


def test_the_longer_side_of_the_table_is_downwards(tmp_path: Path) -> None:
    bits = {f"h.{i}.m{j}": 2 + j % 8 for i in range(3) for j in range(20)}
    head, lines = table_of(layer_grid(read_structure(written(tmp_path / "m", {}, bits))))
    assert head == ("", "0", "1", "2") and len(lines) == 20 and lines[3] == ("m3, bits", "5", "5", "5")


def test_what_is_refused_leaves_the_folder_as_it_was(folder: Path) -> None:
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    with pytest.raises(GETAError, match="not a finite number"):
        write_card(folder, metrics={"compressed": {"em": float("nan")}})
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == before
    with pytest.raises(GETAError, match="an exported folder"):
        write_card(folder.parent / "dense")


HOSTILE = "a|b`c*[x](y)\n# d<script>alert(1)</script>&\ud800"


def test_nothing_of_a_name_reaches_the_card_unescaped(tmp_path: Path) -> None:
    structure = {f"{HOSTILE}.0:{HOSTILE}": (1, 2)}
    folder = written(tmp_path / "m", structure, {f"{HOSTILE}.{i}": 4 for i in range(2)})
    write_untouched(folder, Untouched({HOSTILE: HOSTILE}, {HOSTILE: HOSTILE}, [HOSTILE]))
    (folder / CONFIG_NAME).write_text(json.dumps({"method": "qasso", "drop_layers": [HOSTILE]}))
    plain = HOSTILE.replace("\ud800", "")
    assert "script>" in write_card(folder, repo_id=HOSTILE).read_text()
    results = {"compressed": [TaskResult(plain, {plain: 1.0}, {plain: 0.5}, split=plain, samples=3)]}
    options = {"base_model": f"/x/{plain}", "task": "text-generation", "dataset": plain}
    card = write_card(folder, results=results, metrics={"dense": {plain: 2.0}}, **options)
    body = card.read_text().split("---", 2)[2]
    outside = re.sub(r"```.*?```", "", body, flags=re.DOTALL)
    assert "<script" not in outside and "\n# d" not in outside and "&lt;script&gt;" in outside.lower()
    for line in outside.splitlines():
        assert "a|b" not in line.lower() and "b`c" not in line.lower() and "[x](" not in line
    assert front(card).eval_results[0].dataset_name == plain


def test_every_data_set_has_a_block_with_split_size_and_error(folder: Path) -> None:
    results = {
        "dense": [TaskResult("piqa", {"piqa acc": 70.0}, split="validation", samples=100, total=1838)],
        "compressed": [
            TaskResult("piqa", {"piqa acc": 68.5}, {"piqa acc": 4.6}, "validation", 100, 1838),
            TaskResult("dev-v1.1.json", {"em": 79.0, "f1": 87.0}, {"em": 0.4}, samples=10570),
        ],
    }
    card = write_card(folder, results=results, dataset="other", metrics={"compressed": {"perplexity": 9.0}})
    found = {(one.dataset_name, one.metric_name): one for one in front(card).eval_results}
    assert set(found) == {
        ("other", "perplexity"),
        ("piqa", "piqa acc"),
        ("dev-v1.1.json", "em"),
        ("dev-v1.1.json", "f1"),
    }
    piqa = found["piqa", "piqa acc"]
    assert (piqa.dataset_split, piqa.dataset_args) == ("validation", {"samples": 100, "total": 1838})
    assert piqa.metric_args == {"stderr": 4.6} and piqa.metric_value == 68.5
    text = card.read_text()
    row = r"\| piqa +\| validation +\| sample of 100 of 1,838 +\| piqa acc +\| 70\.00 +\| 68\.50 ± 4\.60 +\|"
    assert re.search(row, text) and re.search(r"\| 10,570 +\| em +\| +\| 79\.00 ± 0\.40 ", text)
    write_card(folder)
    assert card.read_text() == text  # all of it comes back from the files
    write_card(folder, metrics={"compressed": {"em": 80.0}})
    (_, squad) = read_results(folder)["compressed"]
    assert squad.metrics == {"em": 80.0, "f1": 87.0} and squad.stderr == {}


def test_damaged_results_are_refused(tmp_path: Path) -> None:
    for content in (
        '{"compressed": 3}',
        '{"other": []}',
        '{"dense": [{"data": 3}]}',
        '{"dense": [{"data": "a", "x": 1}]}',
    ):
        (tmp_path / RESULTS_NAME).write_text(content)
        with pytest.raises(GETAError, match=RESULTS_NAME):
            read_results(tmp_path)
    with pytest.raises(GETAError, match="not a finite number"):
        TaskResult("a", {"acc": 10**400})
    with pytest.raises(GETAError, match="number of samples"):
        TaskResult("a", {"acc": 1.0}, samples=0)


def test_the_license_is_that_of_the_base_model(tmp_path: Path) -> None:
    folder = written(tmp_path / "m", {}, {"a": 4})
    (tmp_path / "dense").mkdir()
    card = write_card(folder)
    assert (
        front(card).license == "unknown"
        and "License: unknown; it is inherited from the base model." in card.read_text()
    )
    (tmp_path / "dense/README.md").write_text("---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\n---\n")
    data = front(write_card(folder, base_model=str(tmp_path / "dense")))
    assert (data.license, data.license_name, data.license_link) == ("other", "llama3", "LICENSE")
    assert "License: llama3." in card.read_text()
    write_card(folder)  # which does not know the base model's folder any more
    assert front(card).license == "other"
    assert front(write_card(folder, front={"license": "mit"})).license == "mit"
    (tmp_path / "dense/README.md").write_text("---\nlicense: {a: 1}\n---\n")
    assert (
        front(write_card(folder, front={"license": "unknown"}, base_model=str(tmp_path / "dense"))).license == "unknown"
    )
    assert "https://arxiv.org/abs/2502.16638" in card.read_text()


def test_the_shell_command_quotes_the_name(tmp_path: Path) -> None:
    config = {"model_type": "x", "architectures": ["LlamaForCausalLM"]}
    summary = read_summary(written(tmp_path / "a", {}, {"a": 4}, config=config))

    def arguments(name: str) -> str:
        words = shlex.split(ways_to_load(summary, name)[1].code)
        return words[words.index("--model_args") + 1]

    assert arguments("me/a") == "pretrained=me/a"
    assert arguments("my model; rm -rf ~ $(x) `y`") == "pretrained=my model; rm -rf ~ $(x) `y`"
    assert json.loads(arguments("a,b='c'")) == {"pretrained": "a,b='c'"}
    load = ways_to_load(summary, "mod\N{GRINNING FACE}'\"")[0].code
    assert ast.literal_eval(load.partition("from_pretrained(")[2].rstrip(")")) == "mod\N{GRINNING FACE}'\""


def test_what_stays_as_it_was_is_named(folder: Path) -> None:
    text = model_card(folder)
    assert re.search(
        r"- not pruned, runs through the entire|- not pruned, runs through the whole residual stream", text
    )
    assert re.search(r"- not quantized: .*qa\\_outputs", text)


def test_a_card_in_another_encoding_is_passed_on(folder: Path) -> None:
    (folder / "README.md").write_bytes(b"# small\n\xff")
    assert card_under(folder, "me/other") == b"# small\n\xff"
