from __future__ import annotations

import gzip
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import BertTokenizer, LlamaForCausalLM

from eval import study_tasks
from eval.study_tasks import ImageOptions, Lengths, QuestionOptions, TextOptions
from geta_hf import GETAError
from geta_hf.recipes import demo_data
from tests.recipes.pictures import write_idx

DENSE = Lengths(2, 4, 1e-3)
TINY = TextOptions(texts=[], layers=1, hidden=32, block=16, eval_blocks=4)


@pytest.fixture
def text(tmp_path: Path) -> TextOptions:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 40)
    return replace(TINY, texts=[str(path)])


def test_blocks_are_the_texts_bytes_in_order(tmp_path: Path) -> None:
    for name, content in (("a.txt", "abcde"), ("b.txt", "fghij")):
        (tmp_path / name).write_text(content)
    blocks = study_tasks.read_blocks([str(tmp_path / "a.txt"), str(tmp_path / "b.txt")], None, 4)
    assert blocks.dtype == torch.int64
    assert ["".join(map(chr, row)) for row in blocks.tolist()] == ["abcd", "efgh"]
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b"abcdefgh"))
    assert study_tasks.read_blocks([str(tmp_path / "d.txt.gz")], None, 4).tolist() == [
        [97, 98, 99, 100],
        [101, 102, 103, 104],
    ]
    with pytest.raises(GETAError, match=r"c\.txt can't be read as a text"):
        study_tasks.read_blocks([str(tmp_path / "c.txt")], None, 4)


def test_a_tokenizer_may_cut_the_text(tmp_path: Path, tokenizer: BertTokenizer) -> None:
    (tmp_path / "a.txt").write_text("anna is a baker. " * 20)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    options = replace(TINY, texts=[str(tmp_path / "a.txt")], tokenizer=str(tmp_path / "tokenizer"), block=5)
    task = study_tasks.text_task(options, DENSE, "t")
    assert task.features[0]["input_ids"].tolist() == tokenizer("anna is a baker.", add_special_tokens=False).input_ids
    assert task.start().config.vocab_size == len(tokenizer)


def test_held_out_text_is_not_trained_on(text: TextOptions) -> None:
    task = study_tasks.text_task(text, DENSE, "t")
    blocks = study_tasks.read_blocks(text.texts, None, text.block)
    assert len(task.features) == len(blocks) - text.eval_blocks
    assert torch.equal(task.features[len(task.features) - 1]["labels"], blocks[-text.eval_blocks - 1])
    for count in (0, len(blocks)):
        with pytest.raises(GETAError, match="blocks of text are to be scored"):
            study_tasks.text_task(replace(text, eval_blocks=count), DENSE, "t")


def test_other_text_is_scored_all_along(text: TextOptions, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("".join(letter * 16 for letter in "abcdefgh"))
    options = replace(text, eval_texts=[str(tmp_path / "other.txt")])
    tokens, scored = study_tasks.split_blocks(options, None)
    assert torch.equal(tokens, study_tasks.read_blocks(text.texts, None, 16))
    assert "".join(chr(row[0]) for row in scored.tolist()) == "aceg"


def test_a_width_that_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(GETAError, match="multiple of 32"):
        study_tasks.llama_config(replace(TINY, hidden=48), 256)


def test_nats_of_a_model_that_knows_nothing_and_of_uneven_batches() -> None:
    model = LlamaForCausalLM(study_tasks.llama_config(TINY, 256))
    tokens = torch.randint(0, 256, (5, 16))
    whole = study_tasks.nats_per_token(model, tokens, batch_size=5)
    assert study_tasks.nats_per_token(model, tokens, batch_size=2) == pytest.approx(whole, abs=1e-5)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert study_tasks.nats_per_token(model.train(), tokens) == pytest.approx(math.log(256), abs=1e-5)
    assert model.training


def test_the_dense_model_is_trained_once_and_others_are_refused(text: TextOptions, tmp_path: Path) -> None:
    task = study_tasks.text_task(text, DENSE, "t")
    folder = study_tasks.dense_model(task, tmp_path)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert study_tasks.dense_model(task, tmp_path) == folder == tmp_path / "t" / "dense"
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert {path.name for path in folder.parent.iterdir()} == {"dense", "dense.json"}
    with pytest.raises(GETAError, match="other settings"):
        study_tasks.dense_model(replace(task, dense=replace(DENSE, steps=3)), tmp_path)


def test_an_interrupted_dense_training_goes_on(
    text: TextOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_tasks, "SAVE_EVERY", 2)
    task = study_tasks.text_task(text, Lengths(6, 4, 1e-2), "t")
    straight = task.load(study_tasks.dense_model(task, tmp_path / "straight"))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    seen: list[int] = []
    inner = task.collator

    def collate(rows: list) -> dict:
        seen.append(len(rows))
        return interrupt() or {} if len(seen) == 6 else inner(rows)

    with pytest.raises(KeyboardInterrupt):
        study_tasks.dense_model(replace(task, collator=collate), tmp_path / "broken")
    resumed = task.load(study_tasks.dense_model(task, tmp_path / "broken"))
    for name, value in straight.state_dict().items():
        assert torch.allclose(value, resumed.state_dict()[name], atol=1e-6), name


def test_question_task_trains_and_scores(tmp_path: Path) -> None:
    demo_data.write(tmp_path, train_questions=40, eval_questions=10)
    options = QuestionOptions(
        model=str(tmp_path / "model"),
        train_file=str(tmp_path / "train.json"),
        eval_file=str(tmp_path / "dev.json"),
        train_questions=24,
        eval_questions=6,
        bf16=True,
    )
    task = study_tasks.question_task(options, DENSE, "q")
    assert len(task.features) == task.settings["windows"] == 24
    model = task.load(study_tasks.dense_model(task, tmp_path / "work"))
    scores = task.score(model)
    assert tuple(scores) == task.metrics
    assert 0 <= scores["em"] <= scores["f1"] <= 100


def test_a_pretrained_model_is_the_dense_one_where_it_takes_no_steps(text: TextOptions, tmp_path: Path) -> None:
    """The tokenizer is read from its folder, and text of another kind is scored too."""
    model = LlamaForCausalLM(study_tasks.llama_config(TINY, 300))
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "other.txt").write_text("a quick b " * 40)
    options = replace(text, other_texts=[str(tmp_path / "other.txt")], eval_blocks=3)
    words = BertTokenizer(vocab={word: place for place, word in enumerate(["[UNK]", "the", "a", "b", "quick"])})
    words.save_pretrained(tmp_path / "model")
    task = study_tasks.text_task(replace(options, model=str(tmp_path / "model")), Lengths(0, 4, 1e-3), "t")
    folder = study_tasks.dense_model(task, tmp_path / "work")
    loaded = task.load(folder)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert not (folder.parent / "dense_checkpoints").exists()
    # Without a tokenizer of its own, the same text has other tokens.
    assert task.features[0]["input_ids"].max() < 5
    scores = task.score(loaded)
    assert scores.keys() == {"nats", "other_nats"} and task.scored["other_blocks"] == 3
    other = study_tasks.read_blocks(options.other_texts, task.tokenizer, 16)
    assert scores["other_nats"] == pytest.approx(
        study_tasks.nats_per_token(loaded, other[torch.arange(3) * len(other) // 3])
    )


def test_every_run_on_images_takes_the_momentum_of_the_command(tmp_path: Path) -> None:
    """It is no part of a saved model, so that it has to be set after each loading."""
    architecture = {"model_type": "cifar_resnet", "num_channels": 1, "depths": [1], "hidden_sizes": [8]}
    data = {"idx_dir": str(write_idx(tmp_path / "idx", 4))}
    options = ImageOptions({**architecture, "embedding_size": 8}, data, batch_norm_momentum=0.2)
    task = study_tasks.image_task(options, Lengths(0, 4, 1e-3), "images")
    loaded = task.load(study_tasks.dense_model(task, tmp_path))
    momenta = {module.momentum for module in loaded.modules() if isinstance(module, torch.nn.BatchNorm2d)}
    assert momenta == {0.2} and task.settings["batch_norm_momentum"] == 0.2
    plain = study_tasks.image_task(ImageOptions(options.model, data), Lengths(0, 4, 1e-3), "images")
    assert "batch_norm_momentum" not in plain.settings  # as in results of before
