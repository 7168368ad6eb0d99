"""Real runs of lm-eval on a tiny Llama: as transformers counts, side by side, and without a network."""

from __future__ import annotations

import json
import shutil
import socket
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import BertConfig, BertLMHeadModel, LlamaConfig, LlamaForCausalLM, T5Config

from geta_hf import Evaluation, GETAError, evaluate, export, perplexity
from geta_hf.cli import main
from geta_hf.evaluation import COMMONSENSE, command, harness, tasks
from tests.export.tiny_encoders import train_by_hand
from tests.spaces import build_space
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
    with pytest.raises(GETAError, match="into the model's 8 positions"):
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
    assert "questions" not in printed
    for name in ("dense", "small"):
        written = json.loads((tmp_path / f"scores_{name}.json").read_text())
        assert written["results"]["piqa"]["acc_norm,none"] in (0, 0.25, 0.5, 0.75, 1)
        assert written["model_name"] == str(home / name)
        assert written["texts"]["text.txt"]["tokens"] == 9 * 14
    card = json.loads((home / "small/geta_metrics.json").read_text())
    assert set(card) == {"dense", "compressed"}
    assert set(card["dense"]) == {"piqa acc", "piqa acc_norm", "blimp acc", "text.txt bits per byte"}
    assert "blimp acc" in (home / "small/README.md").read_text()


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of models, none with weights: `other` without a tokenizer, `short` of 64 positions, and so on."""
    folder = tmp_path_factory.mktemp("other")
    places = {"text": folder / "text.txt"} | {name: folder / name for name in ("other", "short", "narrow", "seq2seq")}
    tiny_llama().config.save_pretrained(places["other"])
    tiny_llama(positions=64).config.save_pretrained(places["short"])
    LlamaConfig(vocab_size=200).save_pretrained(places["narrow"])
    for task in ("SequenceClassification", "TokenClassification", "QuestionAnswering"):
        places[task] = folder / task
        LlamaConfig(architectures=[f"LlamaFor{task}"]).save_pretrained(places[task])
    for name in ("run/export", "started/checkpoint-4"):
        (folder / name).mkdir(parents=True)
    (folder / "run/export/geta_structure.json").write_text("{}")
    places |= {"run": folder / "run", "started": folder / "started"}
    T5Config(vocab_size=300).save_pretrained(places["seq2seq"])
    for name in ("short", "narrow", "seq2seq"):
        byte_tokenizer().save_pretrained(places[name])
    places["text"].write_text("Ink and rain. " * 9)
    (places["other"] / "empty.txt").write_text(" \n")
    return places


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
        (["--tasks", "piqa", "--data_dir", "{data}", "--dense", "{dense}"], "given twice"),
        (["--text", "nowhere.txt"], "nowhere.txt can't be read"),
        (["--text", "{other}/empty.txt"], "empty.txt contains no text"),
        (["--text", "{text}", "--output", "{data}"], "--output {data}: a folder"),
        (["--text", "{text}", "--block", "129"], "{dense}: block=129: a window has 1 to 128 tokens"),
        (["--text", "{text}", "--stride", "0"], "stride=0"),
        (["{short}", "--text", "{text}", "--block", "100"], "{short}: block=100"),
        (["{other}/nowhere", "--text", "{text}"], "{other}/nowhere: no such folder"),
        (["{other}", "--text", "{text}"], "{other}: no tokenizer"),
        (["{narrow}", "--text", "{text}"], "{narrow}: the tokenizer's token 256, bos_token 256 has no row"),
        (["{SequenceClassification}", "--text", "{text}"], "is a LlamaForSequenceClassification, but tasks and texts"),
        (["{TokenClassification}", "--text", "{text}"], "is a LlamaForTokenClassification, but tasks and texts"),
        (["{QuestionAnswering}", "--text", "{text}"], "is a LlamaForQuestionAnswering, but tasks and texts"),
        (["{run}", "--text", "{text}"], "{run} is the folder of a run; give its export, {run}/export"),
        (["{started}", "--text", "{text}"], "without an export; run `geta-hf export {started} OUT` first"),
        (["{seq2seq}", "--text", "{text}"], "{seq2seq}: no causal language model could be loaded (T5Config"),
    ],
)
def test_bad_input_is_told_before_a_model_is_loaded(
    home: Path,
    other: dict[str, Path],
    arguments: list[str],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    places = {"data": home / "data", "dense": home / "dense", **other}
    assert main(["eval", str(home / "dense"), *(argument.format(**places) for argument in arguments)]) == 2
    assert told.format(**places) in capsys.readouterr().err


def test_what_was_scored_is_printed_when_a_later_model_fails(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(folder: str, **options: Any) -> Any:
        if folder.endswith("small"):
            raise GETAError("its weights are damaged")
        return harness.load(folder, **options)

    monkeypatch.setattr(command, "load", load)
    options = ["--tasks", "piqa", "--data_dir", str(home / "data"), "--device", "cpu"]
    assert main(["eval", str(home / "dense"), str(home / "small"), *options]) == 2
    printed, told = capsys.readouterr()
    assert [cell.strip() for cell in printed.splitlines()[0].strip("|").split("|")][2:] == [str(home / "dense")]
    assert "acc_norm" in printed
    assert "damaged" in told


def test_one_model_at_a_time_is_in_memory(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[weakref.ref[Any]] = []

    def load(folder: str, **options: Any) -> Any:
        assert not any(model() for model in loaded)
        found = harness.load(folder, **options)
        loaded.append(weakref.ref(found[0]))
        return found

    monkeypatch.setattr(command, "load", load)
    (tmp_path / "text.txt").write_text("Ink and rain. ")
    options = ["--tasks", "piqa", "--data_dir", str(home / "data"), "--text", str(tmp_path / "text.txt")]
    assert main(["eval", str(home / "dense"), str(home / "small"), *options, "--device", "cpu"]) == 0
    assert len(loaded) == 2


def test_a_limit_is_told_in_the_table_and_in_the_card(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = shutil.copytree(home / "small", tmp_path / "small")
    for left in ("geta_metrics.json", "geta_results.json", "README.md"):  # of another test
        (small / left).unlink(missing_ok=True)
    options = ["--tasks", "piqa,blimp", "--data_dir", str(home / "data"), "--device", "cpu"]
    assert main(["eval", str(small), *options, "--limit", "2", "--card"]) == 0
    assert "The scores are over the first 2 questions of each task." in capsys.readouterr().out
    names = set(json.loads((small / "geta_metrics.json").read_text())["compressed"])
    part = "first 2 questions"
    assert names == {f"piqa acc, {part}", f"piqa acc_norm, {part}", f"blimp acc, {part} of each task"}
    (entry,) = yaml.safe_load((small / "README.md").read_text().split("---")[1])["model-index"]
    blocks = {block["dataset"]["name"]: block for block in entry["results"]}
    assert set(blocks) == {"piqa, local files", "blimp, local files"}
    assert {metric["name"] for block in blocks.values() for metric in block["metrics"]} == names
    piqa = blocks["piqa, local files"]
    assert piqa["dataset"]["split"] == "validation" and piqa["dataset"]["args"] == {"samples": 2, "total": 4}
    assert all(metric["args"]["stderr"] >= 0 for metric in piqa["metrics"])


def test_texts_of_one_name_are_kept_apart(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / name / "text.txt" for name in "ab"]
    for path in paths:
        path.parent.mkdir()
        path.write_text(f"Rain in {path}.")
    assert (
        main(["eval", str(home / "dense"), "--device", "cpu", *(f"--text={path}" for path in [*paths, paths[0]])]) == 0
    )
    printed = capsys.readouterr().out
    assert all(str(path) in printed for path in paths)


def test_nothing_is_printed_outside_a_repository(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    found = evaluate(home / "dense", "boolq", data_dir=home / "data", limit=1, device="cpu")
    assert found.results["git_hash"] is None
    assert "git" not in capfd.readouterr().err


def test_rows_that_the_hub_does_not_give_are_told(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "stock_tasks", lambda names: (None, names))

    def _run(*_: Any) -> None:
        raise ConnectionError("Couldn't reach 'aps/super_glue' on the Hub")

    monkeypatch.setattr(harness, "_run", _run)
    with pytest.raises(GETAError, match=r"without a network, give --data_dir.*Couldn't reach"):
        evaluate(home / "dense", "boolq", device="cpu")


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
    if not torch.cuda.is_available():
        with pytest.raises(GETAError, match=r"device='cuda' can't be used here .*--device cpu"):
            harness.load(tmp_path, device="cuda")
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(GETAError, match="no tokenizer"):
        harness.load(tmp_path)
    with pytest.raises(GETAError, match="neither bos_token nor eos_token"):
        harness.load(tmp_path, byte_tokenizer(pad_token="<s>"))


def test_a_tokenizer_or_a_model_that_does_not_fit_is_told(tmp_path: Path) -> None:
    model = tiny_llama()
    model.resize_token_embeddings(200)
    with pytest.raises(GETAError, match="200 rows"):
        harness.load(model, byte_tokenizer())
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    encoder = BertLMHeadModel(BertConfig(vocab_size=257, **sizes))
    encoder.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(GETAError, match=rf"{tmp_path.name} \(BertLMHeadModel\) sees later tokens"):
        harness.load(tmp_path, device="cpu")
    for one, told in [(encoder, "sees later tokens"), (model, "200 rows")]:
        with pytest.raises(GETAError, match=told):
            perplexity(one, byte_tokenizer(), "Ink")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of peft
def test_an_adapter_is_scored_on_its_base(home: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(
        LlamaForCausalLM.from_pretrained(home / "dense"), peft.LoraConfig(target_modules=["q_proj"])
    )
    adapted.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert main(["eval", str(tmp_path), "--tasks", "piqa", "--data_dir", str(home / "data"), "--device", "cpu"]) == 0
