"""Rows that are held out for a method's choices: the split, the batches, and a run of Trainer that reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset

from geta_hf import SearchConfig
from geta_hf.errors import GETAError
from geta_hf.training.held_out import held_out_batches, split_rows
from tests.training.test_trainer import rows, trainer


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


@pytest.mark.usefixtures("shared_spaces")
def test_a_run_trains_choices_on_held_out_rows_alone_and_resumes(tmp_path: Path, monkeypatch: Any) -> None:
    config = SearchConfig(target_sparsity=0.5, bits=(3, 8), mean_bits=5, warmup=1, search=4, architecture_data=0.25)
    changes = {"max_steps": 6, "save_steps": 3, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    made = trainer(tmp_path / "run", config, **changes)
    held = {tuple(row["input_ids"].tolist()) for row in made._held_out}
    assert len(held) == 16 and len(made.train_dataset) == 48
    seen: list[tuple[bool, set[bool]]] = []
    step = made.training_step

    def watched(model: Any, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        inside = {tuple(row) in held for row in inputs["input_ids"].tolist()}
        seen.append((made.method.on_held_out_rows, inside))
        return step(model, inputs, *args, **kwargs)

    monkeypatch.setattr(made, "training_step", watched)
    made.train()
    assert [on for on, _ in seen] == [on for on in (False, False, True, False, True, False) for _ in range(2)]
    assert all(inside == {on} for on, inside in seen)
    again = trainer(tmp_path / "again", config, **changes)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    for name, value in made.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name
