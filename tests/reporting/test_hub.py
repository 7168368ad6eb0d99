"""What arrives on the Hub is the folder, byte for byte, in one commit; what goes wrong is said and leaves it alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForQuestionAnswering

from geta_hf.errors import GETAError
from geta_hf.reporting.comparison import load_model
from geta_hf.reporting.hub import files_to_push, push_to_hub
from geta_hf.reporting.model_card import card_under, write_card
from tests.fake_hub import FakeHub, fake_hub
from tests.small_folders import exported

pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # of huggingface_hub's own upload
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = exported(tmp_path)[1]
    write_card(folder)
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setenv("HF_TOKEN", "hf_some")
    with fake_hub(monkeypatch) as hub:
        yield hub


def content(folder: Path, repo: str = "me/small") -> dict[str, bytes]:
    """Return what arrives: the files as they are, and the card under the repository's name."""
    found = {name: (folder / name).read_bytes() for name, _ in files_to_push(folder)}
    return found | {"README.md": card_under(folder, repo)}


def test_exactly_the_export_is_listed(folder: Path) -> None:
    whole = files_to_push(folder)
    assert [name for name, _ in whole] == sorted(path.name for path in folder.iterdir())
    assert dict(whole) == {path.name: path.stat().st_size for path in folder.iterdir()}
    (folder / "code").mkdir()
    (folder / "code" / "model.py").write_text("x = 1")
    for name in (".git/config", ".cache/x", "checkpoint-20/model.safetensors", "runs/events", "__pycache__/a.pyc"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("not ours")
    (folder / "geta_progress.json").write_text("{}")
    for name in (".env", "optimizer.pt", "training_args.bin", "trainer_state.json", "x.tmp", "config.json~", "a.lock"):
        (folder / name).write_text("not ours")
    assert files_to_push(folder) == sorted([*whole, ("code/model.py", 5)])


def test_every_byte_arrives_in_one_commit_and_loads(folder: Path, hub: FakeHub, tmp_path: Path) -> None:
    address = push_to_hub(folder, "me/small", private=True, commit_message="first")
    assert hub.files("me/small") == content(folder) and hub.commits == ["first"] and hub.private == {"me/small": True}
    assert address.startswith(f"{hub.url}/me/small/commit/") and hub.tokens <= {"hf_some", ""}
    assert hub.requests.index("POST /me/small.git/info/lfs/objects/batch") < hub.requests.index(
        "POST /api/models/me/small/commit/main"
    )
    loaded = AutoModelForQuestionAnswering.from_pretrained("me/small", cache_dir=tmp_path / "cache")
    batch = torch.arange(10)[None]
    assert torch.equal(loaded(batch).start_logits, load_model(folder)(batch).start_logits)
    snapshot = Path(huggingface_hub.snapshot_download("me/small", cache_dir=tmp_path / "cache"))
    assert {path.name: path.read_bytes() for path in snapshot.iterdir()} == content(folder)


def test_the_card_names_the_repository(folder: Path, hub: FakeHub) -> None:
    before = (folder / "README.md").read_text()
    assert '"small"' in before and "\n# small\n" in before
    push_to_hub(folder, "my-team/other_name")
    card = hub.files("my-team/other_name")["README.md"].decode()
    assert "# my-team/other\\_name\n" in card and '"small"' not in card and "\n# small" not in card
    assert card.count('"my-team/other_name"') == before.count('"small"') > 1
    assert (folder / "README.md").read_text() == before
    write_card(folder, metrics={"compressed": {"em": 79.0}})
    push_to_hub(folder, "my-team/other_name")
    card = hub.files("my-team/other_name")["README.md"].decode()
    assert ModelCard(card).data.model_name == "other_name"
    again = folder.with_name("written by 'somebody'")
    folder.rename(again)
    (again / "README.md").write_text("# small\n\nMy own words about small.")
    push_to_hub(again, "my-team/other_name")
    assert hub.files("my-team/other_name")["README.md"] == (again / "README.md").read_bytes()


def test_the_token_s_user_is_the_default_owner(folder: Path, hub: FakeHub) -> None:
    push_to_hub(folder, "small", token="hf_given")
    assert hub.files("me/small") == content(folder) and hub.commits == ["Upload small"] and "hf_given" in hub.tokens


def test_weights_of_before_are_replaced_with_all_their_shards(folder: Path, hub: FakeHub) -> None:
    push_to_hub(folder, "me/small")
    hub.files("me/small")["adapter_model.safetensors"] = b"not a weight of the model"
    load_model(folder).save_pretrained(folder / "sharded", max_shard_size="20KB")
    (folder / "model.safetensors").unlink()
    shards = sorted((folder / "sharded").glob("model*"))
    assert len(shards) > 2
    for shard in shards:
        shard.rename(folder / shard.name)
    (folder / "sharded" / "config.json").unlink()
    for left in (folder / "sharded").iterdir():
        left.unlink()
    push_to_hub(folder, "me/small")
    assert hub.files("me/small").pop("adapter_model.safetensors") == b"not a weight of the model"
    assert hub.files("me/small") == content(folder) and len(hub.commits) == 2


def test_a_branch_is_made_and_main_left_alone(folder: Path, hub: FakeHub) -> None:
    push_to_hub(folder, "me/small", commit_message="main")
    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\nother")
    push_to_hub(folder, "me/small", revision="four-bits")
    assert hub.files("me/small", "four-bits") == content(folder)
    assert hub.files("me/small")["README.md"] != content(folder)["README.md"]


def test_a_dry_run_sends_nothing(folder: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert push_to_hub(folder, "me/small", dry_run=True) == f"{hub.url}/me/small"
    assert not hub.requests
    with pytest.raises(GETAError, match="hf auth login"):
        push_to_hub(folder, "me/small")
    assert not hub.requests


@pytest.mark.parametrize("name", ["", "a/b/c", "me/a b", "me/../x", "-me/x", "me/x.git"])
def test_a_malformed_name_is_refused(folder: Path, hub: FakeHub, name: str) -> None:
    with pytest.raises(GETAError, match="is not a name of a repository"):
        push_to_hub(folder, name, dry_run=True)


@pytest.mark.parametrize("place", ["create", "preupload", "batch", "store", "commit"])
def test_an_interrupted_upload_changes_nothing(
    folder: Path, hub: FakeHub, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)  # between the attempts of huggingface_hub
    push_to_hub(folder, "me/small")
    before = dict(hub.files("me/small"))
    (folder / "model.safetensors").write_bytes(repacked(folder / "model.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["checksums"]  # as of a folder that was written before there were any
    (folder / "config.json").write_text(json.dumps(config))
    hub.broken = place
    with pytest.raises(GETAError, match=r"me/small was not pushed: .*disconnected.* its contents are unchanged"):
        push_to_hub(folder, "me/small")
    assert hub.files("me/small") == before
    hub.broken = None
    push_to_hub(folder, "me/small")
    assert hub.files("me/small") == content(folder) != before


def repacked(file: Path) -> bytes:
    """The same file with another last byte."""
    whole = file.read_bytes()
    return whole[:-1] + bytes([whole[-1] ^ 1])


def test_no_right_to_write_and_no_network_are_said(folder: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.forbidden = True
    with pytest.raises(GETAError, match=r"403 Forbidden.*token's rights"):
        push_to_hub(folder, "me/small")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(GETAError, match="HF_HUB_OFFLINE is set"):
        push_to_hub(folder, "me/small")


def test_what_is_no_whole_export_is_refused(folder: Path) -> None:
    with pytest.raises(GETAError, match="an exported folder"):
        files_to_push(folder.parent / "dense")
    whole = {path: path.read_bytes() for path in folder.iterdir()}

    def refused(match: str) -> None:
        with pytest.raises(GETAError, match=match):
            files_to_push(folder)
        for path in folder.iterdir():
            path.unlink()
        for path, data in whole.items():
            path.write_bytes(data)

    (folder / "config.json").unlink()
    refused(r"config\.json can't be read")
    (folder / "model.safetensors").write_bytes(whole[folder / "model.safetensors"][:-5])
    refused("damaged or cut short")
    (folder / "model.safetensors").unlink()
    refused(r"lacks model\.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    refused(r"lacks model-00001-of-00002\.safetensors")
    index.write_text('{"metadata": {}, "weight_map": {"a": 3}}')
    refused("weight_map is")
    (folder / "model-00001-of-00001.safetensors").write_bytes(b"")
    refused("has weights that are not the model's: model-00001")
    assert files_to_push(folder)
