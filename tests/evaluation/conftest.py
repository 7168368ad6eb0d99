from __future__ import annotations

import pytest
from transformers import BertTokenizer

from geta_hf.recipes import demo_data


@pytest.fixture(scope="session")
def tokenizer() -> BertTokenizer:
    return BertTokenizer(vocab=demo_data.vocabulary(), model_max_length=512)
