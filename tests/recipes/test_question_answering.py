from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForQuestionAnswering, TrainingArguments

from geta_hf import GETAConfig, GETAError
from geta_hf.recipes import demo_data
from geta_hf.recipes import question_answering as bert_squad
from geta_hf.recipes.arguments import apply_overrides

FOLDER = Path(bert_squad.__file__).parent / "configs"
CONFIGS = [FOLDER / f"{name}.yaml" for name in ("bert_squad", "demo", "minilm_squad")]


@pytest.fixture
def config(tmp_path: Path) -> str:
    values = {"model_name_or_path": "m", "output_dir": str(tmp_path / "out"), "geta": {"bits": [4, 8]}}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values) + "learning_rate: 5e-5\n")
    return str(path)


def test_yaml_and_overrides(config: str) -> None:
    arguments = bert_squad.parse_arguments(
        [
            config,
            "--max_length=200",
            "--seed",
            "7",
            "--use_cpu",
            "--geta.target_sparsity",
            "0.3",
            "--weight_decay",
            "-1e-2",
        ]
    )
    assert arguments.model.model_name_or_path == "m"
    assert arguments.data.max_length == 200
    assert arguments.training.learning_rate == 5e-5
    assert (arguments.training.seed, arguments.training.use_cpu, arguments.training.weight_decay) == (7, True, -0.01)
    assert arguments.geta == GETAConfig(bits=(4, 8), target_sparsity=0.3)


def test_geta_null_is_dense_and_a_dotted_key_opens_the_section(config: str) -> None:
    assert bert_squad.parse_arguments([config, "--geta", "null"]).geta is None
    assert bert_squad.parse_arguments([config, "--geta", "null", "--geta.bits", "[2, 4]"]).geta == GETAConfig(
        bits=(2, 4)
    )
    assert bert_squad.parse_arguments(["--model_name_or_path", "m", "--output_dir", "o"]).geta is None


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--learning_rat", "1"], r"no argument learning_rat \(did you mean learning_rate\?\); --help lists all"),
        (["target_sparsty=0.5"], r"no argument target_sparsty \(did you mean geta.target_sparsity\?\)"),
        (["--bits", "[4, 8]"], r"no argument bits \(did you mean geta.bits\?\)"),
        (["--geta.sparsety", "0.5"], r"\['sparsety'\]; known are"),
        (["--geta.mean_bit", "5"], r"\['mean_bit'\] \(did you mean mean_bits\?\)"),
        (["--recipe", "language_modeling"], "is for the recipe language_modeling, not question_answering"),
        (["--", "1"], "expected --key value or key=value"),
        (["--use_cpu", "seed=3"], "use_cpu = 'seed=3' must be true or false; a key=value after it needs --"),
        (["=1"], "expected --key value or key=value"),
        (["--geta.bits", "[8, 4]"], "b_l <= b_u"),
        (["--geta", "yes"], "neither a section"),
        (["stray"], "expected --key value or key=value"),
        (["--eval_strategy", "sometimes"], "sometimes"),
    ],
)
def test_wrong_arguments_say_what_is_wrong(config: str, argv: list[str], message: str) -> None:
    with pytest.raises(GETAError, match=message):
        bert_squad.parse_arguments([config, *argv])


def test_missing_or_malformed_config_file(tmp_path: Path) -> None:
    with pytest.raises(GETAError, match="no such config file"):
        bert_squad.parse_arguments([str(tmp_path / "none.yaml")])
    for text, message in (("a: [", "not YAML"), ("just text", "key: value")):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(GETAError, match=message):
            bert_squad.parse_arguments([str(tmp_path / "bad.yaml")])


def test_no_data_says_what_to_give(config: str) -> None:
    data = bert_squad.parse_arguments([config]).data
    with pytest.raises(GETAError, match="dataset_name"):
        bert_squad.load_split(data, None, "train", None)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_understood(path: Path, tmp_path: Path) -> None:
    arguments = bert_squad.parse_arguments([str(path), "--output_dir", str(tmp_path)])
    assert isinstance(arguments.training, TrainingArguments)
    assert arguments.training.report_to in ("none", [])
    if arguments.geta is not None:
        assert arguments.geta.bits == (4, 8)


def arguments_for(folder: Path, *overrides: str) -> list[str]:
    demo_data.write(folder, train_questions=48, eval_questions=10)
    paths = ["--model_name_or_path", str(folder / "model"), "--output_dir", str(folder / "out")]
    files = ["--train_file", str(folder / "train.json"), "--eval_file", str(folder / "dev.json")]
    quick = ["--max_steps", "3", "--per_device_train_batch_size", "4", "--disable_tqdm", "--use_cpu"]
    return [str(FOLDER / "demo.yaml"), *paths, *files, *quick, *overrides]


def test_dense_run_from_end_to_end(tmp_path: Path) -> None:
    argv = arguments_for(
        tmp_path, "--bf16", "--train_sampling_strategy", "group_by_length", "--max_eval_questions", "8"
    )
    results = bert_squad.main(argv)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == json.loads(json.dumps(results))
    assert (results["steps"], results["train_questions"], results["train_windows"], results["questions"]) == (
        3,
        48,
        48,
        8,
    )
    assert {key: results["before_export"][key] for key in ("em", "f1")} == {"em": results["em"], "f1": results["f1"]}
    assert results["config"]["geta"] is None
    AutoModelForQuestionAnswering.from_pretrained(tmp_path / "out" / "export")


def test_compressed_run_removes_half_of_the_groups(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = arguments_for(tmp_path, "--max_steps", "40", "--geta.target_sparsity", "0.5", "--geta.bits", "[4, 8]")
    results = bert_squad.main(argv)
    assert results["em"] == results["before_export"]["em"]
    (speed,) = results["speed"]
    assert speed["work"] == "128 tokens" and speed["dense"] > 0 and speed["compressed"] > 0
    assert f" ({speed['work']} in " in capsys.readouterr().out.splitlines()[-4]
    assert results["config"]["geta"] == GETAConfig(target_sparsity=0.5, bits=(4, 8)).to_dict()
    reloaded = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "out" / "export")
    dense = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "model")
    channels = [layer.intermediate.dense.out_features for layer in reloaded.bert.encoder.layer]
    assert sum(channels) < sum(layer.intermediate.dense.out_features for layer in dense.bert.encoder.layer)


def test_a_value_that_is_no_yaml_is_named() -> None:
    with pytest.raises(GETAError, match=r'--geta\.include \["layers\\\.", "head"\]: not YAML'):
        apply_overrides({}, ["--geta.include", '["layers\\.", "head"]'])
