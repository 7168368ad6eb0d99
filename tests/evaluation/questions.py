"""What the tests of this folder ask."""

from __future__ import annotations

from geta_hf.evaluation.squad_features import Question

FILLER = "the job of a baker is in oslo. "  # 9 tokens


def ask(
    context: str, *answers: str, start: int | None = None, question: str = "where was anna born?", id: str = "q"
) -> Question:
    """A question about a paragraph; its answers start where they first occur, or at `start`."""
    starts = tuple(context.find(answer) if start is None else start for answer in answers)
    return Question(id, question, context, answers, starts)
