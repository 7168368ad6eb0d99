"""What all recipes share: the data that scores are of."""

from __future__ import annotations

from geta_hf.recipes.run import Scoring, scored_data


def scoring(file: str | None, total: int) -> Scoring:
    place = scored_data("squad", file, "validation")
    return Scoring(lambda model: {}, lambda path: None, *place, total, metrics=("em", "f1"), count="questions")


def test_the_card_names_the_data_that_was_scored() -> None:
    scores = {"em": 50.0, "f1": 60.0, "questions": 40, "missing": 1, "em_stderr": 8.0, "f1_stderr": 7.0}
    one = scoring("/home/me/dev.json.gz", 100).card_result(scores)
    assert (one.data, one.split, one.size) == ("dev.json.gz", None, "sample of 40 of 100")
    assert one.metrics == {"em": 50.0, "f1": 60.0} and one.stderr == {"em": 8.0, "f1": 7.0}
    one = scoring(None, 40).card_result(scores)
    assert (one.data, one.split, one.size) == ("squad", "validation", "40")
