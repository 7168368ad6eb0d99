"""Draw `docs/pictures/graph_bert.html` again: `.venv/bin/python docs/site/draw_graph.py`.

The page is kept in the repository, since `make docs` builds the site without PyTorch.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification

from geta_hf.qadg.propagation.propagate import record_and_propagate
from geta_hf.qadg.space import space_of
from geta_hf.qadg.tracing.dummy_inputs import make_dummy_inputs
from geta_hf.reporting.graph_page import write_page

PAGE = Path(__file__).parent.parent / "pictures" / "graph_bert.html"


def draw(page: Path = PAGE) -> None:
    """Write the page of a BERT with two layers, as `geta-hf inspect --html` does; no weights are made."""
    sizes = {"hidden_size": 384, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 1536}
    with torch.device("meta"):
        model = BertForSequenceClassification(BertConfig(**sizes)).eval()
    flow = record_and_propagate(model, make_dummy_inputs(model))
    write_page(flow, space_of(flow), page, "bert")


if __name__ == "__main__":
    draw()
