"""Rows that are held out for a method's choices: the split, the batches, and a run of Trainer that reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import AutoModelForQuestionAnswering, BertForQuestionAnswering

from geta_hf import GETATrainer, SearchConfig
from geta_hf.errors import GETAError
from geta_hf.training.held_out import held_out_batches, split_rows
from tests.conftest import tiny_bert_config
from tests.training.test_trainer import arguments, rows

pytestmark = pytest.mark.usefixtures("shared_spaces")


@pytest.mark.parametrize("seed", [0, 1])
def test_every_row_is_in_one_part(seed: int) -> None:
    train, held = split_rows(list(range(20)), 0.3, seed)
    assert (len(train), len(held)) == (14, 6) and sorted([*train, *held]) == list(range(20))
    again = split_rows(list(range(20)), 0.3, seed)
    assert list(again[1]) == list(held) and list(held) != list(range(14, 20))
    assert split_rows([1, 2], 0.0, seed) == ([1, 2], None)


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(rows(8))


@pytest.mark.parametrize(
    ("data", "share", "message"),
    [
        (Stream(), 0.2, r"architecture_data = 0.2 holds out rows by index, which a Stream lacks"),
        ([1, 2], 0.1, r"architecture_data = 0.1 holds out 0 of 2 rows; both parts need at least one"),
        ([1, 2], 0.9, r"architecture_data = 0.9 holds out 2 of 2 rows"),
    ],
)
def test_data_that_cannot_be_split_is_refused(data: Any, share: float, message: str) -> None:
    with pytest.raises(GETAError, match=message):
        split_rows(data, share, 0)


def test_batches_depend_on_their_number_alone() -> None:
    made = list(held_out_batches(list(range(9)), 4, list, 3, range(5)))
    assert list(held_out_batches(list(range(9)), 4, list, 3, range(2, 5))) == made[2:]
    assert all(len(set(batch)) == 4 for batch in made) and len({tuple(batch) for batch in made}) == 5
    assert [len(batch) for batch in held_out_batches([1, 2], 4, list, 3, range(1))] == [2]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[GETATrainer, list[tuple[bool, set[bool]]]]:
    """A run, and for each of its micro-batches whether held-out rows were wanted, and whether its rows were such."""
    made = small(tmp_path_factory.mktemp("run"))
    held = {tuple(row["input_ids"].tolist()) for row in made._held_out}
    assert len(held) == 16 and len(made.train_dataset) == 48
    seen: list[tuple[bool, set[bool]]] = []
    step = made.training_step

    def watched(model: Any, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        inside = {tuple(row) in held for row in inputs["input_ids"].tolist()}
        seen.append((made.method.on_held_out_rows, inside))
        return step(model, inputs, *args, **kwargs)

    made.training_step = watched
    made.train()
    return made, seen


def small(folder: Path) -> GETATrainer:
    """A search on a BERT of one layer, with two micro-batches a step."""
    torch.manual_seed(0)
    model = BertForQuestionAnswering(tiny_bert_config(num_hidden_layers=1, hidden_size=16))
    config = SearchConfig(target_sparsity=0.5, bits=(3, 8), mean_bits=5, warmup=1, search=4, architecture_data=0.25)
    args = arguments(
        folder, max_steps=6, save_steps=3, gradient_accumulation_steps=2, per_device_train_batch_size=4, seed=3
    )
    return GETATrainer(model, args, geta_config=config, train_dataset=rows())


def test_choices_are_trained_on_held_out_rows_and_weights_on_the_others(run: Any) -> None:
    _, seen = run
    assert [on for on, _ in seen] == [on for on in (False, False, True, False, True, False) for _ in range(2)]
    assert all(inside == {on} for on, inside in seen)


def test_a_run_resumed_in_the_search_ends_bit_for_bit_the_same(run: Any, tmp_path: Path) -> None:
    made, _ = run
    again = small(tmp_path)
    again.train(resume_from_checkpoint=f"{made.args.output_dir}/checkpoint-3")
    for name, value in made.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name


def test_a_search_becomes_a_folder_that_computes_the_same(run: Any, tmp_path: Path) -> None:
    made, _ = run
    result = made.method.result()
    report = made.export_model(tmp_path / "small")
    assert report.bits == dict(result.weight_bits) and min(report.bits.values()) >= 3
    assert sum(before - kept for kept, before in report.kept.values()) == result.removed_groups == 26
    batch = {name: torch.stack([row[name] for row in rows(4)]) for name in ("input_ids", "attention_mask")}
    reloaded = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "small").eval()
    with torch.no_grad():
        expected = made.model.eval()(**batch).start_logits
        torch.testing.assert_close(reloaded(**batch).start_logits, expected, atol=1e-5, rtol=1e-5)
