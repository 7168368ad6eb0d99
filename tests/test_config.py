"""GETAConfig: what it refuses, what it derives, and that it survives JSON and YAML."""

from __future__ import annotations

import pytest

from geta_hf.config import GETAConfig
from geta_hf.errors import GETAError


@pytest.mark.parametrize("name", ["geta_config.json", "geta.yaml"])
@pytest.mark.parametrize(
    "config",
    [
        GETAConfig(),
        GETAConfig(0.3, (3, 6), warmup="1.5 epochs", include=["query"]),
        GETAConfig(prune=["residual"], keep=["*.0.*"]),
        GETAConfig(target_bytes=10**7, activation_bits=(4, 8), bit_choices=[8, 4], min_kept=0.25, distill_logits=0.5),
        GETAConfig.paper(eta=0.9),
    ],
)
def test_saved_and_read_back_equal(tmp_path, name: str, config: GETAConfig) -> None:
    config.save(tmp_path / name)
    assert GETAConfig.load(tmp_path / name) == config
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_paper_is_the_papers_rules_and_defaults_are_ours() -> None:
    paper, ours = GETAConfig.paper(target_sparsity=0.3), GETAConfig()
    assert (paper.saliency, paper.forgetting, paper.bit_rule, paper.clipping) == ("hesso", "paper", "paper", "max")
    assert paper.learn_exponent and paper.target_sparsity == 0.3
    assert (ours.target_sparsity, ours.wanted_mean_bits, paper.wanted_mean_bits) == (0.5, 6, None)
    assert (ours.saliency, ours.forgetting, ours.bit_rule, ours.clipping) == ("fisher", "uniform", "sensitivity", "mse")


def test_what_is_left_out_is_decided_here() -> None:
    assert GETAConfig(target_bops=0.1).target_sparsity is None is GETAConfig(target_bops=0.1).wanted_mean_bits
    assert GETAConfig(mean_bits=5).target_sparsity == 0.5 and GETAConfig(mean_bits=5).wanted_mean_bits == 5
    choices = GETAConfig(bits=(2, 8), bit_choices=[8, 4, 4])
    assert choices.widths == [4, 8] and choices.wanted_mean_bits == 6
    assert GETAConfig(bit_rule="ppsg").wanted_mean_bits is None and GETAConfig(bits=(4, 6)).widths == [4, 5, 6]


def test_tuples_and_numbers_written_as_text_are_taken() -> None:
    config = GETAConfig(bits=[4, 8], include=("query",), exclude=("key",))  # type: ignore[arg-type]
    assert GETAConfig.from_dict(config.to_dict()) == config and config.exclude == ["key"]
    assert GETAConfig.from_dict({"epsilon": "1e-9"}).epsilon == 1e-9  # as YAML 1.1 reads it


def test_the_reduction_ends_at_the_upper_bits() -> None:
    assert GETAConfig(bits=(4, 8)).reduction == 2 and GETAConfig(bits=(4, 8)).final_upper_bits == 8
    given = GETAConfig(bits=(4, 8), bit_reduction=2.5)
    assert given.reduction == 2.5 and given.final_upper_bits == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": (8, 4)}, r"bits = \(8, 4\) must be .*b_l <= b_u"),
        ({"bits": (1, 8)}, "2..16"),
        ({"bits": (4, 8, 9)}, "pair"),
        ({"bits": (4, 8), "initial_bits": 6}, "initial_bits = 6"),
        ({"bits": (4, 8), "bit_reduction": 4}, r"b_u - B·b_r = 16 - 4 · 4 = 0 is below b_l = 4"),
        ({"bits": (4, 8), "bit_reduction": 1}, "stays above the 8 bits"),
        ({"bit_choices": [8], "bit_reduction": 2.5}, r"= 6\.0 is below all of bit_choices = \[8\]"),
        ({"bit_choices": [2, 4]}, r"bit_choices = \[2, 4\] must be widths in 4..8"),
        ({"bit_choices": []}, "bit_choices"),
        ({"bit_choices": [4.0]}, "bit_choices = .* a list of whole numbers"),
        ({"mean_bits": 9}, r"mean_bits = 9 must be in 4..8"),
        ({"mean_bits": 4, "bit_choices": [5, 6]}, r"mean_bits = 4 must be in 5..6, as `bit_choices`"),
        ({"activation_bits": (8, 20)}, r"activation_bits = \(8, 20\) must be a pair .* in 2..16"),
        ({"activation_bits": (8, 4)}, "activation_bits"),
        ({"per_channel": True, "bit_rule": "paper"}, "Eq. 14 sets one d a layer"),
        ({"target_sparsity": 0.5, "target_parameters": 0.5}, "target_sparsity and target_parameters say the same"),
        ({"target_bops": 0.1, "target_bytes": 10**6}, "target_bops and target_bytes say the same thing twice"),
        ({"target_sparsity": 0.5, "target_bops": 0.1, "mean_bits": 5}, "can't all hold; leave one out"),
        ({"target_bops": 1.5}, r"target_bops = 1.5 must be in \(0, 1\)"),
        ({"target_bytes": 1.5e6}, "target_bytes = 1500000.0 must be a whole number"),
        ({"min_kept": 0}, "min_kept"),
        ({"min_kept": 2.5}, "min_kept = 2.5 must be a whole count, or a share below 1"),
        ({"multiple_of": 0}, "multiple_of"),
        ({"uniform": 1}, "uniform = 1 must be a bool"),
        ({"distill_logits": -1}, "distill_logits"),
        ({"distill_temperature": 0}, "distill_temperature = 0 must be above 0"),
        ({"target_sparsity": 1.0}, r"target_sparsity = 1.0 must be in \[0, 1\)"),
        ({"target_sparsity": -0.1}, "target_sparsity"),
        ({"saliency": "magic"}, "saliency = 'magic' must be one of fisher, taylor, hesso"),
        ({"pruning_periods": 0}, "pruning_periods"),
        ({"eta": 1.0}, "eta"),
        ({"eta": "abc"}, "eta = 'abc' must be a number"),
        ({"target_sparsity": "half"}, "target_sparsity = 'half' must be a number"),
        ({"bits": 8}, "bits = 8 must be a pair"),
        ({"bits": None}, "bits = None must be a pair"),
        ({"projection_periods": "4"}, "projection_periods = '4' must be a whole number"),
        ({"pruning_periods": 4.0}, "pruning_periods = 4.0 must be a whole number"),
        ({"epsilon": -1.0}, "epsilon"),
        ({"epsilon": float("nan")}, "epsilon"),
        ({"exclude": "pooler"}, "exclude = 'pooler' must be a list"),
        ({"include": [1]}, "include"),
        ({"prune": "residual"}, "prune = 'residual' must be a list of kinds"),
        ({"keep": [None]}, "keep"),
    ],
)
def test_what_cannot_be_met_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(GETAError, match=message):
        GETAConfig(**changes)


def test_unreadable_and_foreign_files_are_refused(tmp_path) -> None:
    with pytest.raises(GETAError, match="can't be read"):
        GETAConfig.load(tmp_path / "missing.json")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(GETAError, match="holds list"):
        GETAConfig.load(tmp_path / "list.yaml")
    (tmp_path / "torn.json").write_text('{"bits": [4,')
    with pytest.raises(GETAError, match="can't be read"):
        GETAConfig.load(tmp_path / "torn.json")
    with pytest.raises(GETAError, match=r"unknown GETAConfig keys \['sparsity'\]"):
        GETAConfig.from_dict({"sparsity": 0.5})
