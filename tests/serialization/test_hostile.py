"""Damaged and hostile folders end in one sentence, or are read as they say: nothing hangs, and no code is run."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForQuestionAnswering, GPTJConfig, LlamaConfig

from geta_hf import GETAError, write_card, write_report
from geta_hf.cli import main
from geta_hf.convert import convert
from geta_hf.qadg.tracing.dummy_inputs import empty_model
from geta_hf.reporting.comparison import load_model
from geta_hf.reporting.hub import files_to_push
from geta_hf.utils.config_limits import check_counts
from geta_hf.utils.plain_yaml import load_plain_yaml
from tests.serialization.mutations import CARDS, Mutation, at_random, on_purpose
from tests.small_folders import exported

SECONDS = 2.0
"""Of the processor, for one command on one folder."""


def inspect(folder: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        from geta_hf.cli import _parser

        arguments = _parser().parse_args(["inspect", str(folder)])
        arguments.run(arguments)


OPENERS: dict[str, Callable[[Path], Any]] = {
    "report": lambda folder: write_report(folder, folder / "report.html"),
    "card": write_card,
    "push": files_to_push,
    "inspect": inspect,
    "load": load_model,
    "convert": lambda folder: convert(folder, folder.with_name("new")),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = exported(tmp_path_factory.mktemp("whole"))[1]
    metrics = {"dense": {"em": 1.0}, "compressed": {"em": 2.0}, "latency_ms": {"dense": 1.0, "compressed": 2.0}}
    write_card(folder, metrics=metrics)
    return folder


def check(whole: Path, home: Path, mutation: Mutation, names: tuple[str, ...]) -> list[str]:
    """Apply a mutation, and return which openers neither worked nor said in one sentence what is wrong."""
    title, change = mutation
    wrong = []
    for name in names:
        for old in ("copy", "new"):
            shutil.rmtree(home / old, ignore_errors=True)
        shutil.copytree(whole, home / "copy")
        change(home / "copy")
        start = time.process_time()
        try:
            OPENERS[name](home / "copy")
        except (GETAError, OSError) as error:
            if "\n" in str(error):
                wrong.append(f"{name}, {title}: several lines")
        except Exception as error:  # what the test is there to find
            wrong.append(f"{name}, {title}: {type(error).__name__} {str(error)[:200]}")
        if time.process_time() - start > SECONDS:
            wrong.append(f"{name}, {title}: {time.process_time() - start:.1f} s")
    return wrong


def test_whole_folders_are_read(whole: Path, tmp_path: Path) -> None:
    for name, opener in OPENERS.items():
        shutil.copytree(whole, tmp_path / name / "copy")
        opener(tmp_path / name / "copy")


@pytest.mark.parametrize("mutation", on_purpose(), ids=lambda mutation: mutation[0])
def test_what_is_done_on_purpose(whole: Path, tmp_path: Path, mutation: Mutation) -> None:
    names = ("inspect", "load") if mutation[0].startswith("config") else ("report", "push")
    assert not check(whole, tmp_path, mutation, names)


def test_what_happens_by_chance(whole: Path, tmp_path: Path) -> None:
    names = tuple(OPENERS)
    wrong = []
    for number, mutation in enumerate(at_random(whole, 30, seed=1)):
        wrong += check(whole, tmp_path, mutation, (names[number % 5],))
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 8))
def test_much_happens_by_chance(whole: Path, tmp_path: Path, seed: int) -> None:
    wrong = []
    for mutation in at_random(whole, 110, seed):
        wrong += check(whole, tmp_path, mutation, tuple(OPENERS))
    assert not wrong


REFUSED = ["layers without end", "wide", "a vocabulary without end", "positions without end", "an unknown activation"]


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("opener", OPENERS)
def test_a_config_of_another_size_is_refused_by_all(whole: Path, tmp_path: Path, name: str, opener: str) -> None:
    (change,) = (change for title, change in on_purpose() if title == f"config: {name}")
    if opener == "push" and name != "layers without end":
        pytest.skip("a push builds no model")
    shutil.copytree(whole, tmp_path / "copy")
    change(tmp_path / "copy")
    with pytest.raises(GETAError):
        OPENERS[opener](tmp_path / "copy")


@pytest.mark.parametrize("name", ["layers without end", "wide", "a vocabulary without end", "positions without end"])
def test_from_pretrained_refuses_it_too(whole: Path, tmp_path: Path, name: str) -> None:
    (change,) = (change for title, change in on_purpose() if title == f"config: {name}")
    shutil.copytree(whole, tmp_path / "copy")
    change(tmp_path / "copy")
    with pytest.raises(GETAError):
        AutoModelForQuestionAnswering.from_pretrained(tmp_path / "copy")


SIZES: list[dict[str, Any]] = [
    {"num_hidden_layers": 10**9},
    {"num_hidden_layers": 1001},
    {"vocab_size": 10**12},
    {"hidden_size": 10**9, "num_attention_heads": 1},
    {"head_dim": 10**9},
    {"intermediate_size": 2**40},
    {"num_labels": 10**9},
    {"hidden_act": "no such"},
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_config_without_weights_is_bounded_by_what_models_have(tmp_path: Path, sizes: dict[str, Any]) -> None:
    LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2).save_pretrained(
        tmp_path
    )
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | sizes))
    start = time.process_time()
    for source in (tmp_path, file):
        assert main(["inspect", str(source)]) == 2
    assert time.process_time() - start < 2 * SECONDS


def test_a_buffer_that_would_fill_the_memory_is_refused() -> None:
    """It is computed from two short vectors, so its size shows only in the product."""
    with pytest.raises(GETAError, match="makes a buffer of"):
        empty_model(GPTJConfig(n_embd=64, n_layer=1, n_head=1, n_positions=2**22, rotary_dim=64, vocab_size=10))


def test_counts() -> None:
    check_counts({"num_hidden_layers": 128, "depths": [3, 3], "layer_norm_eps": 1e-5, "max_depth": 4000}, 3)
    check_counts({"num_hidden_layers": 1000, "rope_theta": 10**9, "vocab_size": 10**6}, None)
    check_counts({"num_hidden_layers": 200}, 200)
    for config in (
        {"num_hidden_layers": 129},
        {"a": {"b": {"n_layers": 10**9}}},
        {"depths": [2, 10**9]},
        {"encoder_layers": 1e300},
        {"conv_layers": [[1, 10**9]]},
        {"num_blocks": float("inf")},
    ):
        with pytest.raises(GETAError, match="but the folder holds 3 tensors"):
            check_counts(config, 3)


@pytest.mark.parametrize("name", [*CARDS, "length"])
def test_yaml_of_strangers(name: str) -> None:
    text = CARDS.get(name, "a: b\n" * 10**5)
    start = time.process_time()
    try:
        load_plain_yaml(text, "README.md")
        read = True
    except GETAError as error:
        read = False
        assert "\n" not in str(error) and "README.md can't be read" in str(error)
    assert read == (name in ("a number", "a list of results", "half a character"))
    assert time.process_time() - start < SECONDS
