"""The graph at full size: BERT-base, every gate."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertForQuestionAnswering

from geta_hf.qadg import build_space, verify_space


@pytest.mark.slow
def test_bert_base_passes_every_gate() -> None:
    torch.manual_seed(0)
    model = BertForQuestionAnswering(BertConfig())
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[1, 10:] = 0
    batch = {"input_ids": torch.randint(0, 30000, (2, 16)), "attention_mask": mask}
    space = build_space(model, batch)
    sizes = {kind: [f.size for f in space.prunable if f.kind == kind] for kind in ("heads", "channels")}
    assert sizes == {"heads": [12] * 12, "channels": [3072] * 12}
    assert not space.unsupported
    verify_space(model, batch, space)
