from __future__ import annotations

from tests.evaluation.conftest import tokenizer as tokenizer
