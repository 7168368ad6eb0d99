"""Generate a data set in SQuAD's format, its vocabulary and a small BERT for `make demo`.

Every paragraph tells facts about one person, in any order and in varying words; a question asks, in varying words too,
for one of them. People of the evaluation set never occur in training. The same seed gives the same files.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from transformers import BertConfig, BertForQuestionAnswering, BertTokenizer, set_seed

EVAL_SHARE = 5  # every fifth person is kept for evaluation
FACTS = 5  # of the person of a paragraph


@dataclass(frozen=True)
class Relation:
    """Hold one kind of fact: its sentences and questions with {name} and {value}, and the values to choose from."""

    statements: tuple[str, ...]
    questions: tuple[str, ...]
    values: tuple[str, ...]


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.replace("_", " ") for word in text.split())


FIRST = _words("Anna Boris Clara David Elena Felix Greta Hugo Irene Jonas Karla Leon Maria Nils Olga Pavel")
LAST = _words("Adler Brandt Costa Dorn Ekberg Falk Grant Holm Ivanov Jansen Keller Lopez Moreau Novak Olsen Parker")
PEOPLE = [f"{first} {last}" for first, last in product(FIRST, LAST)]

CITIES = _words("Lisbon Oslo Vienna Prague Dublin Athens Warsaw Geneva New_York Cape_Town San_Diego Port_Louis")
YEARS = tuple(str(year) for year in range(1971, 2021, 3))
JOBS = _words("baker pilot nurse painter judge farmer tailor music_teacher tax_lawyer bus_driver")
INSTRUMENTS = _words("piano violin cello flute harp trumpet guitar oboe bass_drum pipe_organ")
PETS = tuple(" ".join(pet) for pet in product(("black", "white", "grey", "brown"), ("cat", "dog", "goat", "parrot")))
DISHES = _words("soup pasta risotto goulash curry paella onion_tart fish_pie lentil_stew plum_cake")
SPORTS = _words("tennis football rowing fencing judo chess water_polo ice_hockey table_tennis")
LANGUAGES = _words("Danish Finnish Greek Polish Dutch Turkish Basque Welsh Old_Norse Swiss_German")

RELATIONS = (
    Relation(
        ("{name} was born in {value}.", "The birthplace of {name} is {value}."),
        ("Where was {name} born?", "What is the birthplace of {name}?"),
        CITIES,
    ),
    Relation(
        ("{name} retired in {value}.", "The career of {name} ended in {value}."),
        ("When did {name} retire?", "In which year did the career of {name} end?"),
        YEARS,
    ),
    Relation(
        ("{name} works as a {value}.", "By training {name} is a {value}."),
        ("What does {name} work as?", "What is {name} by training?"),
        JOBS,
    ),
    Relation(
        ("{name} plays the {value}.", "At parties {name} brings out the {value}."),
        ("Which instrument does {name} play?", "What does {name} bring out at parties?"),
        INSTRUMENTS,
    ),
    Relation(
        ("{name} keeps a {value}.", "At home {name} looks after a {value}."),
        ("Which animal does {name} keep?", "What does {name} look after at home?"),
        PETS,
    ),
    Relation(
        ("{name} loves to cook {value}.", "The best dish of {name} is {value}."),
        ("What does {name} love to cook?", "What is the best dish of {name}?"),
        DISHES,
    ),
    Relation(
        ("{name} won a medal in {value}.", "The favourite sport of {name} is {value}."),
        ("In which sport did {name} win a medal?", "What is the favourite sport of {name}?"),
        SPORTS,
    ),
    Relation(
        ("{name} speaks {value}.", "With friends {name} talks in {value}."),
        ("Which language does {name} speak?", "How does {name} talk with friends?"),
        LANGUAGES,
    ),
)


def generate(questions: int, people: list[str], seed: int | str, title: str) -> dict[str, Any]:
    """Generate a data set of `questions` questions about `people`, in SQuAD's nested format.

    Returns:
        `{"version", "data": [{"title", "paragraphs"}]}`. If an article precedes an answer, the answer with its
        article is a second reference.
    """
    rng = random.Random(seed)
    paragraphs: list[dict[str, Any]] = []
    while sum(len(paragraph["qas"]) for paragraph in paragraphs) < questions:
        paragraphs.append(_paragraph(rng, people, f"{title}-{len(paragraphs)}"))
    surplus = sum(len(paragraph["qas"]) for paragraph in paragraphs) - questions
    del paragraphs[-1]["qas"][len(paragraphs[-1]["qas"]) - surplus :]
    return {"version": "1.1", "data": [{"title": title, "paragraphs": paragraphs}]}


def _paragraph(rng: random.Random, people: list[str], id: str) -> dict[str, Any]:
    name, context, qas = rng.choice(people), "", []
    for number, relation in enumerate(rng.sample(RELATIONS, FACTS)):
        value = rng.choice(relation.values)
        before, after = rng.choice(relation.statements).format(name=name, value="\0").split("\0")
        start = len(context) + len(before)
        context += f"{before}{value}{after} "
        answers = [{"text": value, "answer_start": start}]
        if article := re.search(r"(a|the) $", before):
            answers.append({"text": article[0] + value, "answer_start": start - len(article[0])})
        question = rng.choice(relation.questions).format(name=name)
        qas.append({"id": f"{id}-{number}", "question": question, "answers": answers})
    return {"context": context.rstrip(), "qas": qas}


def vocabulary() -> dict[str, int]:
    """Return every word of the templates, and all single characters, so that any text can be written."""
    texts = [*PEOPLE, *(text for r in RELATIONS for text in (*r.statements, *r.questions, *r.values))]
    words = sorted({word for text in texts for word in re.findall(r"[a-z0-9]+", text.lower())})
    characters = "abcdefghijklmnopqrstuvwxyz0123456789"
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*special, *".?,", *characters, *(f"##{char}" for char in characters), *words]
    return {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}


def small_bert(vocab_size: int, layers: int = 4) -> BertConfig:
    """Configure layers of 8 heads and 256 MLP channels: 4 have 1056 groups, and learn in seconds."""
    return BertConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        num_hidden_layers=layers,
        num_attention_heads=8,
        intermediate_size=256,
        max_position_embeddings=256,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.1,  # BERT's 0.02 is for wider models; here it would cost half of the steps
    )


def write(folder: Path, train_questions: int = 3000, eval_questions: int = 300, seed: int = 0, layers: int = 4) -> None:
    """Write `train.json`, `dev.json` and `model/` (untrained, with its tokenizer) into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    known = [name for number, name in enumerate(PEOPLE) if number % EVAL_SHARE]
    unseen = PEOPLE[::EVAL_SHARE]
    for title, count, people in (("train", train_questions, known), ("dev", eval_questions, unseen)):
        data = generate(count, people, f"{seed}-{title}", title)
        (folder / f"{title}.json").write_text(json.dumps(data, indent=1), encoding="utf-8")
    tokenizer = BertTokenizer(vocab=vocabulary(), model_max_length=256)
    tokenizer.save_pretrained(folder / "model")
    set_seed(seed)
    BertForQuestionAnswering(small_bert(len(tokenizer), layers)).save_pretrained(folder / "model")


if __name__ == "__main__":
    write(Path("runs/demo"))
