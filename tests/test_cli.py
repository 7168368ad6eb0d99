"""`geta-hf inspect` prints the space of a model without weights, and fails with one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertConfig, PvtV2Config, RwkvConfig

from geta_hf import cli
from geta_hf.cli import family_table, main
from geta_hf.qadg.group_types import Family, Member
from tests.architectures import ARCHITECTURES
from tests.conftest import tiny_bert_config
from tests.qadg.models import Block


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config: BertConfig = tiny_bert_config(num_hidden_layers=3, architectures=["BertForQuestionAnswering"])
    config.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def family(name: str, prunable: bool = True, groups: int = 4, **fields: object) -> Family:
    member = Member("w", 0, torch.arange(groups)[:, None])
    return Family(name, "channels", (member,), prunable, **fields)  # type: ignore[arg-type]


def rows(text: str) -> dict[str, list[str]]:
    """The lines of the table by their first word."""
    return {line.split()[0]: line.split() for line in text.splitlines() if line and not line.startswith(" ")}


def test_inspect_prints_families_and_coverage(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(folder)]) == 0
    out = capsys.readouterr().out
    table = rows(out)
    assert out.startswith("BertForQuestionAnswering: ")
    heads, channels = table["bert.encoder.layer.{0..2}.attention:heads"], table["bert.encoder.layer.{0..2}:channels"]
    assert heads[1:5] == ["3", "heads", "4", "1,048"]  # 4 x 32 x 8 weights and 3 x 8 biases
    assert channels[1:5] == ["3", "channels", "48", "65"]
    assert heads[-1] == channels[-1] == "yes"
    assert table["residual"][1:4] == ["1", "residual", "32"]
    assert "no: " in " ".join(table["residual"])
    assert "13 families cover 100.0% of the matrix parameters; 6 prunable ones with 156 groups cover" in out
    assert "unsupported" not in out
    assert out.splitlines()[-2].startswith("next: geta-hf train CONFIG.yaml")
    assert "wrote" not in out


def test_inspect_says_once_why_a_family_is_not_pruned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1}
    RwkvConfig(**sizes, architectures=["RwkvForCausalLM"]).save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert (shown.out + shown.err + caplog.text).count("the model does not follow when channels are cut away") == 1


def test_inspect_reads_a_config_file_and_writes_a_page(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = folder / "page.html"
    assert main(["inspect", str(folder / "config.json"), "--html", str(page)]) == 0
    assert f"wrote {page}" in capsys.readouterr().out
    assert "bert.encoder.layer.{0..2}:channels" in page.read_text()


def test_heads_that_the_trainer_will_refuse_are_not_listed_as_prunable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    architecture = ARCHITECTURES["pvt_v2"]
    PvtV2Config(**architecture.settings, architectures=[architecture.model]).save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    table = rows(capsys.readouterr().out)
    heads = [line for name, line in table.items() if name.endswith(":heads")]
    assert heads and all("the code fixes" in " ".join(line) for line in heads)
    assert {line[-1] for name, line in table.items() if name.endswith("mlp:channels")} == {"yes"}


def test_prune_and_keep_switch_families(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(folder), "--keep", "heads", "--prune", "residual", "--prune", "norm"]) == 0
    table = rows(capsys.readouterr().out)
    assert table["bert.encoder.layer.{0..2}.attention:heads"][-1] != "yes"
    assert table["residual"][-1] == "yes"


@pytest.mark.parametrize("arguments", [["nowhere"], ["{folder}", "--keep", "nonsense"], ["{folder}", "--html", "no/p"]])
def test_bad_input_is_one_message_and_exit_code_2(
    folder: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", *(argument.format(folder=folder) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("geta-hf: ")
    assert "Traceback" not in error


def test_usage_errors_are_argparse_s(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["eval", "m", "d"], ["inspect", "m"]])
def test_an_unknown_option_shows_the_usage_of_its_command(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--no-such-option", "3"])
    assert stopped.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"usage: geta-hf {command[0]} ")
    assert "unrecognized arguments: --no-such-option" in shown


def test_frozen_and_untouched_are_reported_by_layer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = [Block(lambda x: torch.fft.fft(x).real) for _ in range(3)]
    for block in blocks:
        block.spare = nn.Linear(6, 6, bias=False)
    monkeypatch.setattr(cli, "empty_model", lambda _: nn.Sequential(*blocks).eval())
    monkeypatch.setattr(cli, "make_dummy_inputs", lambda _: {"input": torch.randn(2, 6)})
    assert main(["inspect", "anything"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert any(line.startswith("_fft_r2c {0..2} 3x ") for line in lines)
    assert lines[lines.index("untouched: no operator reads these parameters") + 1] == "{0..2}.spare.weight"


def test_a_model_without_families_is_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "empty_model", lambda _: nn.Softmax(dim=-1))
    monkeypatch.setattr(cli, "make_dummy_inputs", lambda _: {"input": torch.randn(2, 6)})
    assert main(["inspect", "anything"]) == 0
    out = capsys.readouterr().out
    assert "no families" in out
    assert "0 families cover 0.0%" in out


def test_only_like_families_share_a_line() -> None:
    other = {"parameters": 2_500_000, "macs": 12_345}
    table = family_table(
        [
            family("a.0:channels", excludes=("a.0:x", "b:x")),
            family("a.1:channels", excludes=("a.1:x", "b:x")),
            family("a.2:channels", groups=5),
            family("b:residual", prunable=False, reason="runs in layer 3", **other),
            family("a.4:channels", **other),
        ]
    )
    assert [line.split() for line in table.splitlines()[1:]] == [
        ["a.{0..1}:channels", "2", "channels", "4", "0", "0", "yes"],
        ["excludes", "a.{0..1}:x,", "b:x"],
        ["a.2:channels", "1", "channels", "5", "0", "0", "yes"],
        ["a.4:channels", "1", "channels", "4", "2.5", "M", "12.3", "k", "yes"],
        ["b:residual", "1", "channels", "4", "2.5", "M", "12.3", "k", "no:", "runs", "in", "layer", "3"],
    ]
