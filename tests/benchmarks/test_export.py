"""What benchmarks/export.py counts, and the record that it prints."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from benchmarks.export import (
    COUNTS,
    FIGURES,
    HEADER,
    compress_by_hand,
    counting,
    make_batch,
    make_model,
    row,
    run_once,
    summarize,
)
from geta_hf import build_space

linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from /proc")


@linux
def test_an_export_is_counted_and_its_record_has_all_keys() -> None:
    found = run_once("tiny", trainer=False)
    assert found["forwards"] >= found["recordings"] >= 1
    assert 2 >= found["copies"] >= 1 and found["copies"] >= found["weight_copies"]
    assert found["recordings"] <= 2
    assert found["built"] >= 1  # the model that is loaded from the folder
    record = json.loads(json.dumps({"model": "tiny", **summarize([found, {**found, "seconds": 99.0}])}))
    assert record.keys() == {"model", "parameters", "groups", *COUNTS, *FIGURES}
    assert record["seconds"] == [round(found["seconds"], 3), 99.0]
    assert all(value > 0 for figure in ("cpu_seconds", "peak_mib") for value in record[figure])
    assert len(row(record)) == len(HEADER)


@linux
def test_the_making_of_a_trainer_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    found = run_once("tiny", trainer=True)
    assert found["forwards"] >= found["recordings"] >= 1
    assert found["groups"] is None


def test_repeats_must_agree_in_their_counts() -> None:
    run = dict.fromkeys((*COUNTS, *FIGURES), 1)
    with pytest.raises(ValueError, match=r"two repeats differ: \{'copies': \(1, 2\)\}"):
        summarize([run, {**run, "copies": 2}])


def test_each_forward_recording_copy_and_construction_counts_once() -> None:
    model = make_model("tiny")
    batch = make_batch(model)
    with counting(type(model)) as counts:
        model(**batch)
        type(model).forward(model, **batch)
        copied = copy.deepcopy(model)  # its encoder is a PreTrainedModel too
        type(model)(model.config)
    assert counts == {"forwards": 2, "recordings": 0, "copies": 1, "weight_copies": 1, "built": 1}
    assert torch.equal(copied.classifier.weight, model.classifier.weight)
    assert copied.classifier.weight is not model.classifier.weight


def test_a_copy_that_shares_its_weights_is_no_weight_copy() -> None:
    model = make_model("tiny")
    shared = {id(parameter): parameter for parameter in model.parameters()}
    with counting(type(model)) as counts:
        copy.deepcopy(model, shared)
        copy.deepcopy(model.to("meta"))
    assert counts["copies"] == 2
    assert counts["weight_copies"] == 0


def test_only_dispatch_modes_of_geta_hf_are_recordings() -> None:
    model = make_model("tiny")
    with counting(type(model)) as counts:
        with TorchDispatchMode():
            pass
        assert counts["recordings"] == 0
        build_space(model, make_batch(model))
    assert counts["recordings"] >= 1


def test_nothing_stays_patched() -> None:
    model = make_model("tiny")
    kind = type(model)
    before = kind.forward, kind.__init__, TorchDispatchMode.__enter__
    with pytest.raises(RuntimeError), counting(kind):
        raise RuntimeError
    assert before == (kind.forward, kind.__init__, TorchDispatchMode.__enter__)
    assert not hasattr(PreTrainedModel, "__deepcopy__")


def test_layers_differ_in_what_is_zero_and_in_bits() -> None:
    model = make_model("tiny")
    space = compress_by_hand(model, make_batch(model))
    zero = []
    for family in space.prunable:
        first = family.members[0]
        size = model.get_parameter(first.tensor).shape[1] * first.index.shape[1]
        zero.append((family.kind, int((model.get_parameter(first.tensor) == 0).sum()) // size, family.size))
    assert zero == [("heads", 2, 4), ("channels", 22, 48), ("heads", 2, 4), ("channels", 29, 48)]
    bits = {round(float(module.bits()), 3) for module in model.modules() if hasattr(module, "q_m")}
    assert bits == {4.0, 5.0, 6.0, 7.0, 8.0}
