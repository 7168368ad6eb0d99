"""What is not finite is named, with a remedy that holds whether checkpoints were saved or not."""

from __future__ import annotations

import pytest
import torch

from geta_hf.errors import GETAError
from geta_hf.methods.qasso.checks import refuse_bad


def test_the_first_bad_value_is_named_and_no_checkpoint_is_promised() -> None:
    bad_step = torch.tensor([[-1, 7], [5, -1]])
    with pytest.raises(GETAError, match=r"of up was NaN or infinite at step 5.*or start again where none was saved"):
        refuse_bad(bad_step, ["up", "down"])
    refuse_bad(torch.full((2, 2), -1), ["up", "down"])
