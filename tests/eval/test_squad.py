"""The command that scores a folder on SQuAD."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval import squad
from geta_hf.errors import GETAError
from geta_hf.recipes import demo_data


def test_command_scores_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo_data.write(tmp_path, train_questions=5, eval_questions=12)
    lengths = ["--max_length", "128", "--doc_stride", "32"]
    common = [str(tmp_path / "model"), "--data", str(tmp_path / "dev.json"), *lengths]
    scores = squad.main([*common, "--limit", "7", "--output", str(tmp_path / "out.json")])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == scores
    assert scores["questions"] == len(json.loads((tmp_path / "out.json").read_text())) == 7
    with pytest.raises(GETAError, match=r"no config\.json"):
        squad.main([str(tmp_path), *common[1:]])
