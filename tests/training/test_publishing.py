"""Whatever way of Trainer's leads to the Hub, the compressed model arrives there with its card, or nothing does."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForQuestionAnswering

from geta_hf import GETATrainer
from geta_hf.errors import GETAError
from geta_hf.training.publishing import PUSH_NAME
from tests.fake_hub import FakeHub, fake_hub
from tests.training.test_trainer import STEPS, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # of huggingface_hub's own upload
]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setenv("HF_TOKEN", "hf_some")
    monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)  # it keeps the address of another test
    with fake_hub(monkeypatch) as hub:
        yield hub


@pytest.fixture(scope="module")
def _trained(tmp_path_factory: pytest.TempPathFactory) -> GETATrainer:
    made = trainer(tmp_path_factory.mktemp("runs") / "small", save_strategy="no")
    made.train()
    return made


@pytest.fixture
def trained(_trained: GETATrainer) -> Iterator[GETATrainer]:
    """One finished run, whose arguments a test may change."""
    before = dict(vars(_trained.args))
    yield _trained
    vars(_trained.args).update(before)
    _trained.hub_model_id = None


def check_result(files: dict[str, bytes], repo: str, model: torch.nn.Module) -> ModelCard:
    """Check that a repository holds the compressed model and its card, and return the card."""
    assert {"geta_structure.json", "geta_config.json", "model.safetensors", "modeling_geta.py"} <= set(files)
    assert not {"training_args.bin", "geta_progress.json", "trainer_state.json"} & set(files)
    assert len(files["model.safetensors"]) < 0.6 * sum(tensor.nbytes for tensor in model.parameters())
    card = ModelCard(files["README.md"].decode())
    assert {"geta", "pruned", "quantized"} <= set(card.data.tags)
    assert f'from_pretrained("{repo}"' in card.content
    return card


def test_push_to_hub_uploads_the_export(
    trained: GETATrainer, hub: FakeHub, tmp_path: Path, batch: dict[str, torch.Tensor]
) -> None:
    vars(trained.args).update(hub_model_id="me/model", hub_private_repo=True)
    commit = trained.push_to_hub("a message", license="mit", tags="mine", dataset_tags="squad", language="en")
    card = check_result(hub.files("me/model"), "me/model", trained.model)
    assert (card.data.license, card.data.datasets, card.data.language) == ("mit", ["squad"], "en")
    assert "mine" in card.data.tags and hub.commits == ["a message"] and hub.private == {"me/model": True}
    assert commit.commit_url.startswith(f"{hub.url}/me/model/commit/")
    loaded = AutoModelForQuestionAnswering.from_pretrained("me/model", cache_dir=tmp_path)
    expected = trained.model.eval()(**batch).start_logits
    assert (loaded.eval()(**batch).start_logits - expected).abs().max() <= 1e-5
    assert not (Path(str(trained.args.output_dir)) / PUSH_NAME).exists()


@pytest.mark.slow
def test_the_upload_may_run_in_the_background(trained: GETATrainer, hub: FakeHub) -> None:
    trained.push_to_hub(blocking=False, revision="four-bits").result()
    check_result(hub.files("me/small", "four-bits"), "me/small", trained.model)
    assert not hub.files("me/small")


@pytest.mark.slow
def test_a_failed_upload_keeps_the_export(trained: GETATrainer, hub: FakeHub) -> None:
    hub.forbidden = True
    folder = Path(str(trained.args.output_dir)) / PUSH_NAME
    with pytest.raises(GETAError, match=rf"403 .* The export is kept: push it by `geta-hf push {folder} small`"):
        trained.push_to_hub()
    assert (folder / "model.safetensors").is_file()
    hub.forbidden = False
    trained.push_to_hub()
    check_result(hub.files("me/small"), "me/small", trained.model)


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints", "end"])
def test_nothing_is_pushed_from_a_checkpoint(
    trained: GETATrainer, hub: FakeHub, strategy: str, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(trained, "_told_of_pushes", False)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("geta_hf"), "propagate", True)
    vars(trained.args).update(push_to_hub=True, hub_strategy=strategy)
    for _ in range(2):
        trained._push_from_checkpoint(str(trained.args.output_dir))
    assert hub.requests == []
    assert caplog.text.count("nothing is pushed during training") == 1


def test_the_end_of_training_pushes(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(tmp_path / "name", save_strategy="no", push_to_hub=True)
    found: list[tuple[str, bool]] = []
    monkeypatch.setattr(
        made, "push_to_hub", lambda commit_message: found.append((commit_message, made.method.finished))
    )
    made.train()
    assert found == [("End of training", True)]


@pytest.mark.slow
def test_the_end_of_training_pushes_the_export(hub: FakeHub, tmp_path: Path) -> None:
    made = trainer(tmp_path / "name", save_steps=STEPS // 2, push_to_hub=True, hub_strategy="all_checkpoints")
    made.train()
    assert hub.commits == ["End of training"]
    check_result(hub.files("me/name"), "me/name", made.model)


@pytest.mark.slow
def test_a_saved_model_of_a_finished_run_pushes_the_export(trained: GETATrainer, hub: FakeHub) -> None:
    vars(trained.args).update(push_to_hub=True)
    trained.save_model()
    assert hub.commits == ["Model save"]
    check_result(hub.files("me/small"), "me/small", trained.model)


def test_a_run_that_has_not_finished_pushes_nothing(hub: FakeHub, tmp_path: Path) -> None:
    made = trainer(tmp_path / "name", push_to_hub=True, save_strategy="no")
    with pytest.raises(GETAError, match=r"no result to push or describe yet: the run is at step 0 .* train on"):
        made.push_to_hub()
    made.save_model()
    assert hub.files("me/name") == {} and hub.commits == []
    card = ModelCard.load(tmp_path / "name/README.md")
    assert "# Training checkpoint, not the result" in card.content and "had not finished" in card.content
    assert "training-checkpoint" in card.data.tags and "export_model" in card.content
    (tmp_path / "name/README.md").write_text("my own words")
    made.save_model()
    assert (tmp_path / "name/README.md").read_text() == "my own words"


def test_a_saved_model_says_that_it_is_a_checkpoint(trained: GETATrainer, tmp_path: Path) -> None:
    trained.save_model(str(tmp_path))
    text = (tmp_path / "README.md").read_text()
    assert f"at step {STEPS}; the run had finished" in text and "`geta-hf export RUN folder`" in text


def test_the_model_card_is_that_of_the_export(trained: GETATrainer) -> None:
    home = Path(str(trained.args.output_dir))
    trained.create_model_card(language="en", tasks=["question-answering"], dataset="some questions")
    card = ModelCard.load(home / "README.md")
    assert "compressed with GETA" in card.content and card.data.language == "en" and "\n# small\n" in card.content
    assert (home / "geta_structure.svg").is_file() and not (home / PUSH_NAME).exists()
    trained.save_model()
    assert "compressed with GETA" in (home / "README.md").read_text()  # kept, since it is no checkpoint's


@pytest.mark.slow
def test_a_card_next_to_a_checkpoint_tells_them_apart(trained: GETATrainer) -> None:
    home = Path(str(trained.args.output_dir))
    trained.save_model()
    trained.create_model_card()
    assert "The weights in this very folder are those of a training checkpoint" in (home / "README.md").read_text()
