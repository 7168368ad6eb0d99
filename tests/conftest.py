"""Small models and data that many tests share. No network, no files outside tmp_path."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from transformers import BertConfig, BertForQuestionAnswering

from geta_hf.qadg import verify
from geta_hf.training import trainer
from tests import spaces, triton_interpreter

if os.environ.get("TRITON_INTERPRET") == "1":
    triton_interpreter.accept_numpy()

# The models are tiny: more threads gain nothing, and lose much where other processes use the cores.
torch.set_num_threads(1)

# What the gates draw for every recording is meant for large models. This prime is enough for the weights here.
verify._NOISE = 262_139


@pytest.fixture(scope="module", autouse=True)
def without_old_objects() -> Iterator[None]:
    """Let garbage collections look only at what a file's own tests made.

    Every training run collects garbage, which otherwise visits all objects of the imported libraries.
    """
    gc.collect()
    gc.freeze()
    yield


# The files that take longest, in this order. Two processes that begin with them end at the same time.
LONG = (
    "qadg/test_architectures.py",
    "export/test_export.py",
    "export/formats/test_vanilla.py",
    "launch/test_launch.py",
    "training/test_trainer_options.py",
    "training/test_trainer.py",
    "compatibility/test_written_before.py",
    "export/test_reload.py",
    "export/formats/test_onnx.py",
    "surgery/test_verify.py",
    "surgery/test_drop_layers.py",
    "export/formats/test_compressed_tensors.py",
    "training/test_memory.py",
    "training/test_lora.py",
    "evaluation/test_harness.py",
    "eval/test_study_rules.py",
)


def pytest_configure(config: pytest.Config) -> None:
    """Let pytest-xdist take files in the order of the tests, where it would begin with those of the most tests."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of long files first."""
    place = {f"tests/{name}": number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.nodeid.partition("::")[0], len(LONG)))


def tiny_bert_config(**changes: object) -> BertConfig:
    """Two layers of 4 heads of 8, 48 MLP channels, no dropout."""
    values: dict = {
        "vocab_size": 60,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 40,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return BertConfig(**{**values, **changes})


@pytest.fixture
def bert() -> BertForQuestionAnswering:
    torch.manual_seed(0)
    return BertForQuestionAnswering(tiny_bert_config())


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 8:] = 0
    return {"input_ids": torch.randint(0, 60, (2, 12)), "attention_mask": mask}


@pytest.fixture(scope="module")
def shared_spaces() -> Iterator[None]:
    """Find the space of models that are alike once, for tests of what a trainer does with it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "prepare_space", spaces.prepare_space)
        yield
