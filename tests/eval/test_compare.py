"""The comparison: budgets, what goes at a share, pairs within a budget, recovery, rows that are skipped, and tables."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from eval.compare import job as jobs
from eval.compare import run as compare
from eval.compare import shared, table
from eval.compare.curve import draw_curves, points_over
from eval.compare.job import Budget, Job, batches_of, bytes_after, bytes_for, read_budget
from eval.compare.method import load_methods, missing_packages
from eval.compare.scores import CHOICES, Choice
from eval.compare.table import render
from eval.results_file import append_result, read_results
from geta_hf import GETAError
from geta_hf.costs.ledger import LayerEntry, Ledger
from geta_hf.methods import OneShotConfig, OneShotMethod
from geta_hf.methods.one_shot import Calibration
from geta_hf.methods.one_shot.choice import Candidate
from geta_hf.qadg.group_types import Family, Member
from geta_hf.quantization import quantized_layers
from geta_hf.training.plan import make_ledger
from geta_hf.training.preparation import empty_copy
from tests.spaces import build_space
from tests.tiny_tasks import byte_tokenizer, tiny_llama

SHAPES = {f"layers.{n}.a.weight": (6, 4) for n in range(4)} | {"head.weight": (3, 4)}
FAMILIES = [
    Family(
        f"layers.{n}:channels",
        "channels",
        (Member(f"layers.{n}.a.weight", 0, torch.arange(6)[:, None]),),
        True,
        parameters=4,
    )
    for n in range(4)
]
LEDGER = Ledger.of(
    FAMILIES, SHAPES, [LayerEntry(name, channel_dim=0) for name in SHAPES if "layers" in name], dict.fromkeys(SHAPES, 4)
)
SCORES = torch.tensor([5.0, 1, 3, 4, 2, 0] * 3 + [0.5, 0.1, 0.3, 0.4, 0.2, 0.05], dtype=torch.float64)
ALIKE = Choice(CHOICES["taylor"].score, alike=True)
TOGETHER = Choice(CHOICES["flap"].score, alike=False)


@pytest.fixture(scope="module")
def job() -> Job:
    torch.manual_seed(0)
    weights = tiny_llama().state_dict()

    def load() -> PreTrainedModel:
        model = tiny_llama()
        model.load_state_dict(weights)
        return model.eval()

    model = load()
    blocks = torch.randint(0, 257, (12, 12), generator=torch.Generator().manual_seed(1))
    space = build_space(model, {"input_ids": blocks[:2]})
    empty = empty_copy(model)
    OneShotMethod(OneShotConfig(target_bytes=1)).attach(empty, None)
    ledger = make_ledger(empty, space)
    used = batches_of(blocks[:6])
    data = Calibration(used, used, batches_of(blocks[6:8]))
    return Job(load, space, ledger, Budget("B=5", bytes_for(ledger, 5.0)), data, blocks[8:], steps=2, rows=2)


def test_budgets_are_what_they_are_called() -> None:
    weights = 4 * 24
    assert bytes_for(LEDGER, 3.0) == LEDGER.stored_bytes(LEDGER.nothing, 0) - 4 * 6 * 4 + 3 * weights // 8
    removed = torch.zeros(24, dtype=torch.bool)
    removed[::2] = True
    assert bytes_after(LEDGER, 0.5, 8) == pytest.approx(LEDGER.stored_bytes(removed, 8), abs=8)
    assert read_budget("50%@8", LEDGER).bits == 8
    assert read_budget("B=3", LEDGER) == Budget("B=3", bytes_for(LEDGER, 3.0))
    for text in ("3.2", "30%", "B=x", "B=nan", "a%@8", "130%@8", "30%@0"):
        with pytest.raises(GETAError, match=r"must be like B=3\.2"):
            read_budget(text, LEDGER)


def test_families_lose_alike_or_compete() -> None:
    alike = shared.remove_lowest(FAMILIES, SCORES, 0.5, ALIKE).view(4, 6)
    assert alike.tolist() == [[False, True, False, False, True, True]] * 3 + [[False, True, False, False, True, True]]
    together = shared.remove_lowest(FAMILIES, SCORES, 0.5, TOGETHER).view(4, 6)
    # The last family has the lowest scores, and keeps its best group all the same.
    assert together[3].tolist() == [False, True, True, True, True, True] and int(together.sum()) == 10


def test_ends_and_kinds_are_spared() -> None:
    assert shared.spared_blocks(FAMILIES, (8, 16)) == {0, 2, 3}
    assert shared.spared_blocks(FAMILIES, (4, 2)) == set()
    spared = shared.remove_lowest(FAMILIES, SCORES, 1.0, replace(ALIKE, spared=(8, 8)))
    assert spared.view(4, 6).sum(1).tolist() == [0, 5, 5, 0]
    assert not shared.remove_lowest(FAMILIES, SCORES, 1.0, replace(ALIKE, kinds=("heads",))).any()


def test_pairs_meet_the_budget_with_the_least_removed(job: Job) -> None:
    scores = torch.rand(job.ledger.groups, generator=torch.Generator().manual_seed(0))
    found = shared.find_pairs(job, scores, ALIKE)
    assert len(found) > 1 and [one.weight_bits[0] for one in found] == sorted({one.weight_bits[0] for one in found})
    for one in found:
        assert job.ledger.stored_bytes(one.removed, one.weight_bits[0]) <= job.budget.bytes
        assert 0 <= one.share <= shared.MOST_REMOVED
    unpruned = [one for one in found if not one.removed.any()]
    assert len(unpruned) <= 1
    with pytest.raises(GETAError, match=r"B=0 can't be reached with at most 50%"):
        shared.find_pairs(replace(job, budget=Budget("B=0", 10)), scores, ALIKE)


@dataclass
class Watched:
    """A fake method without its package."""

    name: str = "watched"
    needs: str = "forward"
    packages: tuple[str, ...] = ("a_package_that_is_not_there",)
    recovers: bool = True

    def run(self, job: Job) -> Any:
        raise AssertionError


def test_methods_have_names_of_their_own_and_say_what_they_need() -> None:
    found = load_methods()
    assert {"ours", "same, unpruned", "FLAP + GPTQ"} <= set(found)
    assert all(method.needs in ("nothing", "forward", "gradients", "training") for method in found.values())
    assert missing_packages(Watched()) == ["a_package_that_is_not_there"]


def test_rows_with_and_without_steps(tmp_path: Path) -> None:
    known = {
        name: Watched(name, needs, recovers=recovers)
        for name, needs, recovers in (("a", "training", True), ("b", "forward", False), ("c", "forward", True))
    }
    cells = list(compare.cells_of(options(tmp_path, tmp_path, "--steps", "0", "5"), known))
    assert [(key[0], key[2]) for key in cells] == [("dense", 0), ("a", 5), ("b", 0), ("c", 0), ("c", 5)]


def test_recovery_keeps_groups_and_grids_and_learns(job: Job) -> None:
    removed = shared.remove_lowest(job.space.trainable, torch.arange(job.ledger.groups).float(), 0.3, ALIKE)
    pair = Candidate(0.0, removed, [3] * len(job.ledger.layers))
    compressed = shared.round_with(job, [pair], by_block=False)
    model = compressed.model
    steps = {name: layer.weight_quantizer.d.clone() for name, layer in quantized_layers(model).items()}
    before = {name: layer.weight.clone() for name, layer in quantized_layers(model).items()}
    shared.recover(replace(job, steps=3, learning_rate=1e-2), compressed)
    assert compressed.tokens == 3 * 2 * 12
    for name, layer in quantized_layers(model).items():
        assert torch.equal(layer.weight_quantizer.d, steps[name])
        assert not torch.equal(layer.weight, before[name])
    labels = [cut for cut in job.ledger.labels if cut.tensor in dict(model.named_parameters())]
    for cut in labels:
        rows = model.get_parameter(cut.tensor).movedim(cut.dim, 0)
        assert not rows[torch.cat([removed, torch.tensor([False])])[cut.label]].any()
    plain = compare.plain_copy(model)
    ids = job.training[:2]
    torch.testing.assert_close(plain(input_ids=ids).logits, model(input_ids=ids).logits)
    assert not quantized_layers(plain) and quantized_layers(model)


def test_training_in_bf16_multiplies_in_bf16_and_keeps_weights_in_fp32(job: Job) -> None:
    dtypes: dict[bool, set[torch.dtype]] = {}
    weights = {}
    for bf16 in (False, True):
        model = job.load()
        seen = dtypes.setdefault(bf16, set())
        model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda _, __, out, seen=seen: seen.add(out.dtype))
        own = replace(job, steps=2, bf16=bf16)
        shared.train(own, model, list(model.parameters()))
        weights[bf16] = model.get_parameter("model.layers.0.mlp.gate_proj.weight")
    assert dtypes == {False: {torch.float32}, True: {torch.bfloat16}}
    assert weights[True].dtype == torch.float32 and not torch.equal(weights[True], weights[False])
    torch.testing.assert_close(weights[True], weights[False], rtol=0, atol=4 * job.learning_rate)


def test_tasks_are_answered_in_bf16_only_where_asked(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []

    def watched(model: PreTrainedModel, *_: Any, **__: Any) -> Any:
        hook = model.lm_head.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
        with torch.autocast("cpu", enabled=False):  # as lm-eval does
            seen.append(model(input_ids=job.training[:1]).logits.dtype)
        hook.remove()
        return argparse.Namespace(scores={})

    monkeypatch.setattr(compare, "evaluate", watched)
    for arguments in ((), ("--bf16",)):
        asked = options(tmp_path, tmp_path, "--tasks", "piqa", *arguments)
        compare.score(compare.Study(asked, None, job.training, job.training, {}, {"known": torch.ones(1)}), job.load())
        assert ("bf16" in compare.settings_of(asked)) == bool(arguments)
    assert seen == [torch.float32, torch.float32, torch.bfloat16, torch.float32]


def test_low_rank_training_changes_only_what_remains(job: Job) -> None:
    removed = shared.remove_lowest(job.space.trainable, torch.arange(job.ledger.groups).float(), 0.3, ALIKE)
    model = job.load()
    shared.slices_of(job, model, removed)()
    before = {entry.weight: model.get_parameter(entry.weight).clone() for entry in job.ledger.layers}
    names = list(model.state_dict())
    shared.train_low_rank(job, model, removed)
    assert list(model.state_dict()) == names
    for name, old in before.items():
        new = model.get_parameter(name)
        assert not torch.equal(new, old)
        # A sum of 8 products of vectors.
        assert torch.linalg.matrix_rank(new.detach() - old.detach()) <= 8
    zero = shared.slices_of(job, model, removed)
    after = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    zero()
    assert all(torch.equal(tensor, after[name]) for name, tensor in model.state_dict().items())


def test_every_method_trains_on_the_same_batches(job: Job) -> None:
    first = [job.batch(step)["input_ids"] for step in range(2)]
    again = [replace(job, memory={}).batch(step)["input_ids"] for step in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(torch.cat(first).sort(0).values, job.training.sort(0).values)
    assert job.training_tokens() == 2 * 2 * 12 and job.calibration_tokens() == 8 * 12


def test_losses_of_blocks_are_those_of_the_model(job: Job) -> None:
    model = job.load()
    rows = job.training[:3]
    with torch.no_grad():
        expected = [float(model(input_ids=row[None], labels=row[None]).loss) for row in rows]
    assert jobs.loss_of_each(model, rows, rows=2).tolist() == pytest.approx(expected, rel=1e-5)


LINES = [
    {
        "method": "dense",
        "budget": "",
        "steps": 0,
        "draw": 0,
        "grid": "",
        "bytes": 9e6,
        "a": {"dense": 2.0, "above": [0.0, 0.0]},
        "answers": {"piqa": "1111", "boolq": "1111"},
    },
    *(
        {
            "method": name,
            "budget": "B=3",
            "steps": 0,
            "draw": 0,
            "grid": "channel",
            "target_bytes": 5_000_000,
            "bytes": 4.9e6,
            "share": 0.25,
            "mean_bits": 4.0,
            "tokens": 4000,
            "needs": "forward",
            "seconds": 10.0,
            "a": {"dense": 2.0, "above": above},
            "answers": {"piqa": answers, "boolq": "1111"},
        }
        for name, above, answers in (("ours", [0.1, 0.3], "1101"), ("other", [0.3, 0.7], "0101"))
    ),
    {"method": "gone", "budget": "B=3", "steps": 0, "draw": 0, "grid": "channel", "skipped": "spam not installed"},
    {"method": "far", "budget": "B=3", "steps": 0, "draw": 0, "grid": "channel", "reason": "out of reach"},
]


def test_tables_pair_errors_and_name_what_is_missing() -> None:
    text = render(LINES)
    row, by_task = (line for line in text.splitlines() if line.startswith("| other"))
    # Behind ours by 0.2 and 0.4; a half of PIQA's four answers is lost, none of BoolQ's.
    assert "0.500 ± 0.200" in row and "0.300 ± 0.100" in row
    assert "| 75.00 " in row and "-25.00 ± 14.43" in row
    assert "| 4.90 " in row and "25.0%" in row and "forward" in row
    assert "Skipped: gone (spam not installed)." in text
    (far,) = [line for line in text.splitlines() if line.startswith("| far")]
    assert "out of reach" in far
    assert [cell.strip() for cell in by_task.split("|")[2:-1]] == ["0", "50.0", "100.0", "75.0"]
    silent = [{name: value for name, value in line.items() if name != "answers"} for line in LINES]
    assert "Accuracy by task" not in render(silent)


def test_methods_of_one_width_are_compared_with_ours_of_one_width() -> None:
    ours = next(line for line in LINES if line["method"] == "ours")
    text = render([*LINES, {**ours, "method": "ours, one width", "a": {"above": [0.2, 0.6]}}])
    assert "a, behind ours, one width" in text
    rows = {line.split("|")[1].strip(): line.split("|") for line in reversed(text.splitlines()) if "|" in line}
    assert [rows[name][4].strip() for name in ("other", "ours", "ours, one width")] == [
        "0.100 ± 0.000",
        "-0.200 ± 0.100",
        "",
    ]


def test_losses_are_shown_over_bytes_and_over_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = [{**line, "steps": 40, "tokens": 44_000, "a": {"above": [0.1, 0.1]}} for line in LINES if "share" in line]
    lines = [*LINES, *trained]
    (row,) = [line for line in render(lines).splitlines() if line.startswith("| B=3 ") and " other" in line]
    assert [cell.strip() for cell in row.split("|")[4:6]] == ["0.500", "0.100"]
    assert "| 4 k tokens | 44 k tokens |" in render(lines) and "over tokens" not in render(LINES)
    own = [line for line in lines if line["method"] == "other"]
    assert points_over(own, "a", "tokens") == [(4000, pytest.approx(0.5)), (44_000, pytest.approx(0.1))]
    pytest.importorskip("matplotlib")
    for line in lines:
        append_result(tmp_path, line)
    picture = tmp_path / "curve.svg"
    monkeypatch.setattr("sys.argv", ["table", "--work", str(tmp_path), "--curve", str(picture)])
    table.main()
    assert b"<path" in picture.read_bytes()
    with pytest.raises(GETAError, match="no method has a score on a"):
        draw_curves(LINES[:1], picture, "a")


def options(work: Path, text: Path, *more: str) -> argparse.Namespace:
    given = ["--model", str(work.parent / "model"), "--text", str(text), "--scored", f"a={text}", "--work", str(work)]
    sizes = ["--blocks", "8", "--length", "16", "--scored_blocks", "2", "--budgets", "B=5", "--no_export"]
    return compare.parser().parse_args([*given, *sizes, *more])


def test_cells_are_kept_and_missing_packages_are_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    text = tmp_path / "a.txt"
    text.write_text("Once upon a time. " * 40, encoding="utf-8")
    known = {**load_methods(), "watched": Watched()}
    monkeypatch.setattr(compare, "load_methods", lambda: known)
    # Without trial cuts, which take most of the time.
    monkeypatch.setattr(compare, "prepare_space", lambda model, batch: (build_space(model, batch), None))
    asked = options(tmp_path / "work", text, "--methods", "same, unpruned", "watched")
    compare.run(asked)
    lines = read_results(tmp_path / "work")
    assert [line["method"] for line in lines] == ["dense", "same, unpruned", "watched"]
    assert lines[1]["bytes"] <= lines[1]["target_bytes"] and len(lines[1]["a"]["above"]) == 2
    assert "a_package_that_is_not_there" in lines[2]["skipped"]
    ran: list[str] = []
    monkeypatch.setattr(compare, "measure", lambda study, key, method: ran.append(key[0]) or lines[2])
    compare.run(asked)
    assert ran == ["watched"]
    with pytest.raises(GETAError, match="other settings"):
        compare.run(options(tmp_path / "work", text, "--limit", "3"))
    with pytest.raises(GETAError, match=r"no methods \['nobody'\]"):
        compare.run(options(tmp_path / "work", text, "--methods", "nobody"))
    with pytest.raises(GETAError, match="fewer than a block"):
        compare.run(options(tmp_path / "other", text, "--length", "5000"))
    with pytest.raises(GETAError, match="blocks, but 1600 are needed"):
        compare.run(options(tmp_path / "other", text, "--blocks", "800"))
    with pytest.raises(GETAError, match="must be NAME=FILE"):
        compare.run(options(tmp_path / "other", text, "--scored", str(text)))
