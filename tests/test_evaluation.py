"""Real runs of lm-eval on a tiny Llama: as transformers counts, side by side, and without a network."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from geta_hf import Evaluation, GETAError, build_space, evaluate, export
from geta_hf.cli import main
from geta_hf.evaluation import COMMONSENSE, harness, tasks
from tests.export.tiny_encoders import train_by_hand
from tests.tiny_tasks import ROWS, byte_tokenizer, tiny_llama, write_rows

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what lm-eval imports

EVERYTHING = "commonsense,blimp,lambada_openai"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`data`, the rows; `dense`, a Llama; `small`, what an export left of it."""
    folder = tmp_path_factory.mktemp("evaluation")
    write_rows(folder / "data")
    model, batch = tiny_llama(), {"input_ids": torch.arange(8).view(2, 4)}
    model.save_pretrained(folder / "dense")
    byte_tokenizer().save_pretrained(folder / "dense")
    space = build_space(model, batch)
    train_by_hand(model, space)
    export(model, folder / "small", space=space, batch=batch, processing_class=byte_tokenizer())
    return folder


@pytest.fixture(scope="module")
def scored(home: Path) -> Evaluation:
    return evaluate(home / "dense", EVERYTHING, data_dir=home / "data", device="cpu")


@pytest.fixture
def model(home: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(home / "dense").eval()


@torch.no_grad()
def log_likelihood(model: LlamaForCausalLM, context: str, continuation: str) -> float:
    """Of a continuation, in one forward pass, from the definition."""
    tokenizer = byte_tokenizer()
    before = tokenizer(context).input_ids or [tokenizer.bos_token_id]
    after = tokenizer(continuation).input_ids
    logits = model(torch.tensor([[*before, *after]])).logits[0].log_softmax(-1)
    return sum(float(logits[len(before) - 1 + place, token]) for place, token in enumerate(after))


def test_scores_are_those_of_the_definition(scored: Evaluation, model: LlamaForCausalLM) -> None:
    right: dict[str, list[float]] = {"acc": [], "acc_norm": []}
    for row in ROWS["piqa/validation"]:
        ends = (row["sol1"], row["sol2"])
        sums = [log_likelihood(model, f"Question: {row['goal']}\nAnswer:", f" {end}") for end in ends]
        right["acc"].append(float(np.argmax(sums) == row["label"]))
        right["acc_norm"].append(
            float(np.argmax([a / len(b) for a, b in zip(sums, ends, strict=True)]) == row["label"])
        )
    for metric, expected in right.items():
        score = scored.scores["piqa"][metric]
        assert score.questions == tuple(expected)
        assert score.value == pytest.approx(np.mean(expected))
        assert score.stderr == pytest.approx(np.std(expected, ddof=1) / 2)
    pairs = [row for name in ("passive_1", "transitive") for row in ROWS[f"blimp/{name}"]]
    wins = [
        log_likelihood(model, "", pair["sentence_good"]) > log_likelihood(model, "", pair["sentence_bad"])
        for pair in pairs
    ]
    assert scored.scores["blimp"]["acc"].value == pytest.approx(np.mean(wins))
    ends = [row["text"].rpartition(" ") for row in ROWS["lambada_openai/test"]]
    nats = [-log_likelihood(model, before, f" {last}") for before, _, last in ends]
    assert scored.scores["lambada_openai"]["perplexity"].value == pytest.approx(np.exp(np.mean(nats)), rel=1e-5)


def test_the_mean_is_over_the_seven(scored: Evaluation) -> None:
    mean = scored.scores["commonsense"]["mean"]
    assert mean.value == pytest.approx(
        np.mean([scored.scores[name][metric].value for name, metric in COMMONSENSE.items()])
    )
    assert len(mean.members) == 7
    assert scored.results["results"]["boolq"]["acc,none"] == scored.scores["boolq"]["acc"].value
    assert "samples" not in scored.results


def test_batches_change_no_score(home: Path, model: LlamaForCausalLM, scored: Evaluation) -> None:
    options = {"tokenizer": byte_tokenizer(), "data_dir": home / "data", "batch_size": 1}
    singly = evaluate(model, "piqa,hellaswag,blimp,lambada_openai", **options)
    for task, metrics in singly.scores.items():
        for metric, score in metrics.items():
            assert score.value == pytest.approx(scored.scores[task][metric].value, rel=1e-5), task
            assert score.questions == scored.scores[task][metric].questions


def test_without_a_network_and_without_a_trace(
    home: Path, model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import datasets
    import huggingface_hub

    tried = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: tried.append(address))
    monkeypatch.setattr(socket.socket, "connect", lambda _, address: tried.append(address))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "nothing")
    before = torch.get_rng_state()
    evaluate(home / "dense", "boolq,blimp_transitive", data_dir=home / "data", limit=2, device="cpu")
    assert not tried
    assert not datasets.config.HF_HUB_OFFLINE
    assert not (home / "nothing").exists()
    assert torch.equal(torch.get_rng_state(), before)
    assert capsys.readouterr().out == ""


def test_long_requests_are_cut_and_counted(home: Path) -> None:
    options: dict[str, Any] = {"tokenizer": byte_tokenizer(), "data_dir": home / "data"}
    found = evaluate(tiny_llama(positions=40), "piqa", **options)
    lengths = [
        len(f"Question: {row['goal']}\nAnswer: {row[end]}")
        for row in ROWS["piqa/validation"]
        for end in ("sol1", "sol2")
    ]
    assert (found.truncated, found.requests) == (sum(length > 41 for length in lengths), 8)
    assert found.truncated
    with pytest.raises(GETAError, match="in the model's 8 positions"):
        evaluate(tiny_llama(positions=8), "piqa", **options)


def test_examples_in_the_prompt(home: Path, model: LlamaForCausalLM) -> None:
    options: dict[str, Any] = {"tokenizer": byte_tokenizer(), "data_dir": home / "few", "num_fewshot": 2}
    write_rows(home / "few", {f"piqa/{split}": ROWS["piqa/validation"] for split in ("train", "validation")})
    found = evaluate(model, "piqa", **options)
    assert found.results["n-shot"]["piqa"] == 2
    with pytest.raises(GETAError, match=r"boolq/validation.jsonl.gz is missing"):
        evaluate(model, "boolq", **options)


def test_the_command_puts_dense_and_compressed_side_by_side(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("Ink and rain. " * 9)
    dense, small, data = (str(home / name) for name in ("dense", "small", "data"))
    options = ["--tasks", "piqa,blimp", "--data_dir", data, "--text", str(tmp_path / "text.txt"), "--device", "cpu"]
    files = ["--output", str(tmp_path / "scores.json"), "--card"]
    assert main(["eval", small, "--dense", dense, *options, *files, "--block", "32"]) == 0
    printed = capsys.readouterr().out
    head = [cell.strip() for cell in printed.splitlines()[0].strip("|").split("|")]
    assert head == ["task", "metric", "dense", "small", "small - dense"]
    assert "blimp is the mean over 2 of its 67 paradigms" in printed
    assert "bits per byte" in printed
    for name in ("dense", "small"):
        written = json.loads((tmp_path / f"scores_{name}.json").read_text())
        assert written["results"]["piqa"]["acc_norm,none"] in (0, 0.25, 0.5, 0.75, 1)
        assert written["model_name"] == str(home / name)
        assert written["texts"]["text.txt"]["tokens"] == 9 * 14
    card = json.loads((home / "small/geta_metrics.json").read_text())
    assert set(card) == {"dense", "compressed"}
    assert set(card["dense"]) == {"piqa acc", "piqa acc_norm", "blimp acc", "text.txt bits per byte"}
    assert "BLIMP ACC" in (home / "small/README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "nothing to score"),
        (["--tasks", "pica", "--data_dir", "{data}"], "did you mean piqa"),
        (["--tasks", "boolq", "--data_dir", "nowhere"], "no such folder"),
        (["--tasks", "piqa", "--data_dir", "{data}", "--limit", "0"], "limit=0"),
        (["--tasks", "piqa", "--data_dir", "{data}", "--num_fewshot", "-1"], "num_fewshot=-1"),
        (["--tasks", "piqa", "--data_dir", "{data}", "--num_fewshot", "1"], "train.jsonl.gz is missing"),
        (["--tasks", "piqa", "--data_dir", "{data}", "--batch_size", "some"], "batch_size='some'"),
        (["--tasks", "piqa", "--data_dir", "{data}", "--output", "nowhere/x.json"], "no such folder"),
        (["--tasks", "piqa", "--data_dir", "{data}", "--card"], "is {dense} an exported folder"),
        (["--tasks", "piqa", "--data_dir", "{data}", "--dense", "{dense}"], "named twice"),
        (["--text", "nowhere.txt"], "nowhere.txt can't be read"),
    ],
)
def test_bad_input_is_told_before_a_model_is_loaded(
    home: Path, arguments: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("geta_hf.evaluation.command.load", lambda *_, **__: pytest.fail("a model was loaded"))
    places = {"data": home / "data", "dense": home / "dense"}
    assert main(["eval", str(home / "dense"), *(argument.format(**places) for argument in arguments)]) == 2
    assert told.format(**places) in capsys.readouterr().err


def test_an_unknown_name_is_told_with_close_ones(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    tasks.write_tasks(home / "data", home / "tasks")
    few = TaskManager(include_path=str(home / "tasks"), include_defaults=False)
    monkeypatch.setattr(tasks, "stock_manager", lambda: few)
    assert tasks.stock_tasks(["arc_*", "arc_easy"]) == (few, ["arc_challenge", "arc_easy"])
    with pytest.raises(GETAError, match=r"no task 'hellaswagg'; did you mean hellaswag"):
        evaluate(home / "nowhere", "hellaswagg")


@pytest.mark.slow  # lm-eval reads some ten thousand files
def test_the_installed_lm_eval_knows_the_suites() -> None:
    assert tasks.stock_tasks([*COMMONSENSE, "blimp", "lambada_openai"])[1][-2:] == ["blimp", "lambada_openai"]
    with pytest.raises(GETAError, match=r"no task 'bolq'; did you mean .*boolq"):
        tasks.stock_tasks(["bolq"])


def test_lm_eval_is_an_extra(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(GETAError, match=r"pip install 'geta_hf\[eval\]'"):
        evaluate(home / "dense", data_dir=home / "data")


def test_what_can_not_be_loaded_is_told(home: Path, tmp_path: Path) -> None:
    for options, told in [
        ({}, "no causal language model"),
        ({"dtype": "float99"}, "float99"),
        ({"device": "moon"}, "moon"),
    ]:
        with pytest.raises(GETAError, match=told):
            harness.load(tmp_path, **options)
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(GETAError, match="no tokenizer"):
        harness.load(tmp_path)
    with pytest.raises(GETAError, match="neither bos_token nor eos_token"):
        harness.load(tmp_path, byte_tokenizer(pad_token="<s>"))
