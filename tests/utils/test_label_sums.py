from __future__ import annotations

import pytest
import torch

from geta_hf.utils.label_sums import LabelSums
from tests.deterministic_forms import DeterministicForms

_LABELS = {
    "in order": [0, 0, 0, 2, 2, 2],
    "each once": [3, 1, 0],
    "each once, in order": [0, 1, 2],
    "mixed": [4, 0, 4, 4, 1, 0, 2],
    "one": [1, 1],
    "none": [],
}


@pytest.mark.parametrize("case", _LABELS)
def test_sums_are_those_of_index_add_and_no_label_is_added_twice(case: str) -> None:
    label = torch.tensor(_LABELS[case], dtype=torch.int64)
    values = torch.randn(3, len(label), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.ones(3, 6, dtype=torch.float64).index_add_(1, label, values)
    for rows in (slice(None), 0):
        total = torch.ones(3, 6, dtype=torch.float64)[rows]
        with DeterministicForms():
            LabelSums(label).add_to(total, values[rows])
        torch.testing.assert_close(total, expected[rows])
