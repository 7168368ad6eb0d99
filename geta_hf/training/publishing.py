"""Let Trainer's own ways to the Hub lead to the compressed model: what they would upload is the training checkpoint."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
from transformers import Trainer
from transformers.utils import logging

from geta_hf.errors import GETAError
from geta_hf.export import ExportReport
from geta_hf.export.folder_files import STRUCTURE_NAME
from geta_hf.methods import Method
from geta_hf.reporting.folder_summary import CARD_NAME, read_front
from geta_hf.reporting.hub import upload
from geta_hf.reporting.model_card import PICTURE_NAME, write_card
from geta_hf.utils.files import write_whole

logger = logging.get_logger(__name__)

PUSH_NAME = "export_to_push"
"""Folder in `output_dir` that holds an export until it is uploaded."""

_CHECKPOINT_TAG = "training-checkpoint"

_CHECKPOINT_CARD = """---
library_name: transformers
tags:
- geta
- {tag}
---

# Training checkpoint, not the result

A GETATrainer saved this folder at step {step}; the run {state}. The weights are uncompressed: no group is cut away and
nothing is packed, and `from_pretrained` reads the weights without their quantizers.

{remedy}
"""


class PublishingTrainer(Trainer):
    """Trainer whose uploads and cards are those of the compressed model, once the run has finished.

    Attributes:
        method: the compression method, which knows whether the run has finished.
        export_model: writes the compressed model; see `GETATrainer`.
    """

    if TYPE_CHECKING:
        method: Method
        export_model: Callable[..., ExportReport | None]

    _told_of_pushes = False

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Export the compressed model and upload it with its model card, in one commit.

        The repository is `hub_model_id`, or the name of `output_dir`. All processes have to call it.

        Args:
            commit_message: of the commit.
            blocking: whether to wait for the upload. The export is always waited for.
            token: of the Hub; by default `hub_token`, then that of `hf auth login`.
            revision: branch; by default `hub_revision`, then `main`.
            private: whether a new repository is private; by default `hub_private_repo`.
            kwargs: as for `create_model_card`.

        Returns:
            The commit, or a Future of it where `blocking` is False; None on processes other than the first.

        Raises:
            GETAError: the run has not finished, the export is refused, or the upload failed. The export of a failed
                upload is kept, and the message says where.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        repo = self.hub_model_id or self.args.hub_model_id or Path(self._run_folder).absolute().name
        folder = self._export_with_card({**kwargs, "model_name": repo})
        if folder is None:
            return None
        options = {
            "private": self.args.hub_private_repo if private is None else private,
            "token": self.args.hub_token if token is None else token,
            "revision": self.args.hub_revision if revision is None else revision,
            "commit_message": commit_message,
        }

        def push() -> Any:
            return _upload(folder, repo, options)

        return push() if blocking else huggingface_hub.HfApi().run_as_future(push)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save a training checkpoint, which a README calls so; `export_model` writes the result.

        With `push_to_hub=True` the export is pushed as well, if the run has finished.

        Args:
            output_dir: where; by default the `output_dir` of the arguments.
        """
        super().save_model(output_dir, _internal_call=True)
        if self.args.push_to_hub and not _internal_call:
            self._push_if_finished("Model save")

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write the card of the compressed model as `output_dir/README.md`; before the end, that of a checkpoint.

        The card describes what an export would hold, so one is made for it. Where `output_dir` has weights of its own,
        which are those of a checkpoint, the card says that. All processes have to call it.

        Args:
            language: for the card's metadata, as `license` and `tags`.
            license: by default that of the base model's card where it is known.
            tags: in addition to the card's own.
            model_name: the title; by default the name of the repository, or of `output_dir`.
            finetuned_from: the base model; by default what the model was loaded from.
            tasks: the Hub's tag of a pipeline; the first of several.
            dataset_tags: names of data sets on the Hub, for the metadata.
            dataset: name of the data on which the metrics were measured.
            dataset_args: ignored; metrics with their data are given to `write_card`.

        Raises:
            GETAError: the export is refused.
        """
        home = Path(self._run_folder)
        if not self.method.finished:
            if self.is_world_process_zero():
                home.mkdir(parents=True, exist_ok=True)
                self._write_checkpoint_card(home)
            return
        name = model_name or self.hub_model_id or self.args.hub_model_id or home.absolute().name
        options = {"language": language, "license": license, "tags": tags, "finetuned_from": finetuned_from}
        options |= {"tasks": tasks, "dataset_tags": dataset_tags, "dataset": dataset, "model_name": name}
        folder = self._export_with_card(options)
        if folder is None:
            return
        text = (folder / CARD_NAME).read_text(encoding="utf-8")
        if any(home.glob("*.safetensors")):
            note = (
                "> This card describes the export of the run. The weights in this very folder are those of a training "
                "checkpoint, not the result; `trainer.export_model(folder)` writes the result.\n"
            )
            text = text.replace("\n# ", f"\n{note}\n# ", 1)
        write_whole(home / PICTURE_NAME, (folder / PICTURE_NAME).read_bytes())
        write_whole(home / CARD_NAME, text)
        shutil.rmtree(folder, ignore_errors=True)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self._write_checkpoint_card(Path(output_dir or self._run_folder))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push nothing: the weights of a checkpoint look like the result, and are not."""
        if not self._told_of_pushes and self.is_world_process_zero():
            self._told_of_pushes = True
            logger.warning(
                "nothing is pushed during training, whatever hub_strategy says: a checkpoint is not compressed yet. "
                "The export is pushed when the run has finished"
            )

    def _push_if_finished(self, commit_message: str) -> None:
        """Push the export; say in one line if that is not possible, so that what was trained is not lost with it."""
        if not self.method.finished:
            if self.is_world_process_zero():
                logger.warning(
                    "nothing was pushed: the run is at step %d and has not finished, so there is no compressed model "
                    "yet. Resume it, then call trainer.push_to_hub()",
                    self.method.step_count,
                )
            return
        try:
            self.push_to_hub(commit_message=commit_message)
        except GETAError as error:
            logger.error("the run has finished, but nothing was pushed: %s", error)

    def _export_with_card(self, options: Mapping[str, Any]) -> Path | None:
        """Export into a folder of its own, with the card that the options of `create_model_card` ask for."""
        if not self.method.finished:
            raise GETAError(
                f"there is no result to push or describe yet: the run is at step {self.method.step_count} and has not "
                f"finished; train on, then call it again"
            )
        folder = Path(self._run_folder) / PUSH_NAME
        card = _card_options(**options, model_tags=getattr(self.model, "model_tags", None))
        if self.export_model(folder, overwrite=True) is None:
            return None
        write_card(folder, **card)
        return folder

    @property
    def _run_folder(self) -> str:
        return str(self.args.output_dir)

    def _write_checkpoint_card(self, folder: Path) -> None:
        path = folder / CARD_NAME
        if path.is_file() and not _is_checkpoint_card(folder):
            return  # somebody's own words
        if self.method.finished:
            state, remedy = "had finished", "To get the result, "
        else:
            state, remedy = "had not finished", "To get the result, resume the run to its end; then "
        remedy += (
            "call `trainer.export_model(folder)`, or run `geta-hf export RUN folder` on the run's last checkpoint."
        )
        values = {"tag": _CHECKPOINT_TAG, "step": self.state.global_step, "state": state, "remedy": remedy}
        write_whole(path, _CHECKPOINT_CARD.format(**values))


def is_own_export(folder: Path, output_dir: Path) -> bool:
    """Return whether a folder is an export that an earlier run wrote within its own `output_dir`."""
    inside = output_dir.resolve() in folder.resolve().parents
    return inside and (folder / STRUCTURE_NAME).is_file()


def _is_checkpoint_card(folder: Path) -> bool:
    try:
        tags = read_front(folder).get("tags")
    except (GETAError, OSError):
        return False
    return isinstance(tags, list) and _CHECKPOINT_TAG in tags


def _upload(folder: Path, repo: str, options: Mapping[str, Any]) -> Any:
    try:
        commit = upload(folder, repo, **options)
    except GETAError as error:
        raise GETAError(f"{error}. The export is kept: push it by `geta-hf push {folder} {repo}`") from error
    shutil.rmtree(folder, ignore_errors=True)
    return commit


def _card_options(
    *,
    language: str | None = None,
    license: str | None = None,
    tags: str | list[str] | None = None,
    model_name: str | None = None,
    finetuned_from: str | None = None,
    tasks: str | list[str] | None = None,
    dataset_tags: str | list[str] | None = None,
    dataset: str | list[str] | None = None,
    dataset_args: object = None,
    model_tags: str | list[str] | None = None,
) -> dict[str, Any]:
    """Return what Trainer's arguments of a card are for `write_card`."""
    front = {"language": language, "license": license, "datasets": _as_list(dataset_tags)}
    front["tags"] = [*_as_list(tags), *_as_list(model_tags)]
    return {
        "base_model": finetuned_from,
        "task": next(iter(_as_list(tasks)), None),
        "dataset": ", ".join(_as_list(dataset)) or None,
        "repo_id": model_name,
        "front": {key: value for key, value in front.items() if value},
    }


def _as_list(value: str | os.PathLike[str] | list[str] | None) -> list[str]:
    if value is None:
        return []
    return [str(value)] if isinstance(value, str | os.PathLike) else list(value)
