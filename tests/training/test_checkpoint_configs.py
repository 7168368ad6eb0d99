"""Which settings may differ between a checkpoint and the run that resumes from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from geta_hf.config import CONFIG_NAME, GETAConfig
from geta_hf.errors import GETAError
from geta_hf.training.checkpoints import _check_config


def test_a_run_of_the_papers_rules_from_before_is_resumed(tmp_path: Path) -> None:
    """They did not learn t of inputs, which says nothing where inputs are not quantized."""
    GETAConfig.paper(learn_activation_exponent=False).save(tmp_path / CONFIG_NAME)
    _check_config(tmp_path, GETAConfig.paper())
    with pytest.raises(GETAError, match=r"eta: 0\.999 there, 0\.9 here"):
        _check_config(tmp_path, GETAConfig.paper(eta=0.9))


def test_quantized_inputs_need_the_same_exponent(tmp_path: Path) -> None:
    GETAConfig.paper(activation_bits=(4, 8), learn_activation_exponent=False).save(tmp_path / CONFIG_NAME)
    with pytest.raises(GETAError, match="learn_activation_exponent: False there, True here"):
        _check_config(tmp_path, GETAConfig.paper(activation_bits=(4, 8)))


def test_a_rate_that_was_1_before_it_could_be_chosen_must_remain(tmp_path: Path) -> None:
    _save_without_rate(GETAConfig(target_bops=0.1, split="early"), tmp_path)
    _check_config(tmp_path, GETAConfig(target_bops=0.1, exchange_rate=1.0))
    with pytest.raises(GETAError, match=r"exchange_rate: 1\.0 there, 2\.0 here"):
        _check_config(tmp_path, GETAConfig(target_bops=0.1))


def test_a_rate_says_nothing_where_pruning_and_widths_do_not_compete(tmp_path: Path) -> None:
    _save_without_rate(GETAConfig(target_sparsity=0.5), tmp_path)
    _check_config(tmp_path, GETAConfig(target_sparsity=0.5))


def _save_without_rate(config: GETAConfig, folder: Path) -> None:
    values = config.to_dict()
    del values["exchange_rate"]
    (folder / CONFIG_NAME).write_text(json.dumps(values))
