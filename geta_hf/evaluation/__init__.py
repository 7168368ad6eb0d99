"""Measure how good a model is: lm-eval's tasks, SQuAD's EM and F1, and the perplexity of a text."""

from geta_hf.evaluation.harness import evaluate
from geta_hf.evaluation.scores import Evaluation, Score
from geta_hf.evaluation.table import side_by_side
from geta_hf.evaluation.tasks import COMMONSENSE, write_tasks
from geta_hf.evaluation.texts import TextScore, perplexity, read_text

__all__ = [
    "COMMONSENSE",
    "Evaluation",
    "Score",
    "TextScore",
    "evaluate",
    "perplexity",
    "read_text",
    "side_by_side",
    "write_tasks",
]
