"""Upload exactly the files of an exported folder to the Hub, in one commit, or none of them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

from geta_hf.errors import GETAError
from geta_hf.reporting.comparison import read_structure
from geta_hf.reporting.folder_summary import CARD_NAME
from geta_hf.reporting.model_card import card_under
from geta_hf.serialization.atomic_folder import PROGRESS_NAME, WORLD_NAME
from geta_hf.serialization.checksums import verify_files
from geta_hf.serialization.sizes import tensor_sizes
from geta_hf.serialization.validate import INDEX, check_links, check_readable, read_json, weight_files

_NOT_OURS = {"trainer_state.json", WORLD_NAME, PROGRESS_NAME}
_UNFINISHED = (".tmp", ".lock", ".part", ".incomplete", ".bak", ".pyc", "~")
# Unpickling runs code, so no reader should be offered such a file.
_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_LOGS = re.compile(r"__pycache__|runs|checkpoint-\d+")
_READ_AS_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


def files_to_push(folder: str | os.PathLike[str]) -> list[tuple[str, int]]:
    """List the files of an exported folder that `push_to_hub` uploads.

    Hidden and temporary files, checkpoints and logs of a training, and pickled files are excluded.

    Args:
        folder: an exported folder.

    Returns:
        (name with forward slashes, bytes) of every file, sorted by name.

    Raises:
        GETAError: an incomplete export: no config.json or geta_structure.json, a missing or truncated shard, or
            weights that the index does not name; or a link that leads out of the folder.
    """
    path = Path(folder)
    check_links(path)
    read_structure(path)
    read_json(path / "config.json")
    # Structure and config first: a folder that is no export must not be listed, let alone sent.
    check_readable(path)
    names = sorted(_names(path, path))
    _check_weights(path, set(filter(_READ_AS_WEIGHTS.fullmatch, names)) - {INDEX})
    return [(name, (path / name).stat().st_size) for name in names]


def push_to_hub(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    dry_run: bool = False,
) -> str:
    """Upload an exported folder to a repository on the Hub, which is created if it does not exist.

    All files appear in one commit, so that a reader gets either the old model or the new one. Weights that the
    repository has under other names are deleted in the same commit; otherwise they might be read in place of the new.
    The uploaded model card names the repository where the one in the folder names the folder; nothing else differs.

    Args:
        folder: an exported folder.
        repo_id: `user/name`, or `name` for the user of the token.
        private: whether a new repository is private; by default as the user's or organization's settings say.
        token: of the Hub, with the right to write; by default the one of `hf auth login`, or of HF_TOKEN.
        revision: branch, created if it does not exist; by default `main`.
        commit_message: by default "Upload" with the folder's name.
        dry_run: check everything that can be checked locally and send nothing.

    Returns:
        The address of the commit, or of the repository in a dry run.

    Raises:
        GETAError: an incomplete export, a malformed name, no token, no right to write, or an interrupted upload. The
            repository is then unchanged, except that it may have been created empty.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from geta_hf import PruningSpace, attach_quantizers, export, push_to_hub
        >>> _ = torch.manual_seed(0)
        >>> sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes))
        >>> _ = attach_quantizers(model, initial_bits=8, target_bits=8)
        >>> batch = {"input_ids": torch.arange(8).view(1, 8)}
        >>> home = tempfile.TemporaryDirectory()
        >>> small = export(model, Path(home.name) / "small", space=PruningSpace(()), batch=batch).path
        >>> push_to_hub(small, "user/small", dry_run=True).endswith("user/small")
        True
        >>> home.cleanup()
    """
    if dry_run:
        _check_push(folder, repo_id)
        return f"{HfApi().endpoint}/{repo_id}"
    options = {"private": private, "token": token, "revision": revision, "commit_message": commit_message}
    return upload(folder, repo_id, **options).commit_url  # type: ignore[arg-type]


def _check_push(folder: str | os.PathLike[str], repo_id: str) -> list[str]:
    """Return the names of the files to push; raise GETAError for what can be seen without a network."""
    names = [name for name, _ in files_to_push(folder)]
    try:
        huggingface_hub.utils.validate_repo_id(repo_id)
    except HFValidationError as error:
        raise GETAError(f"{repo_id!r} is not a name of a repository ({error}); give user/name") from error
    return names


def upload(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> CommitInfo:
    """Upload an exported folder as `push_to_hub` does, with the same arguments and errors; return the commit."""
    path = Path(folder)
    names = _check_push(path, repo_id)
    api = HfApi(token=token)
    if token is None and huggingface_hub.get_token() is None:
        raise GETAError("no token for the Hub; run `hf auth login`, set HF_TOKEN, or pass token=")
    try:
        return _push(api, path, names, repo_id, private, revision, commit_message or f"Upload {path.resolve().name}")
    except OfflineModeIsEnabled as error:
        raise GETAError(f"{repo_id} was not pushed: HF_HUB_OFFLINE is set; unset it to reach the Hub") from error
    # A dropped connection, a full disk or a refusal raises an error of httpx, an OSError, or a thread's RuntimeError.
    except Exception as error:
        raise GETAError(
            f"{repo_id} was not pushed: {_reason(error)}; its contents are unchanged. Check the token's rights and "
            f"the network, then push again"
        ) from error


def _push(
    api: HfApi, folder: Path, names: list[str], repo_id: str, private: bool | None, revision: str | None, message: str
) -> CommitInfo:
    # The answer holds the full name: given `name` alone, the user's own is put before it.
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    remote = api.list_repo_files(repo_id, revision=revision)
    stale = [name for name in remote if _READ_AS_WEIGHTS.fullmatch(name) and name not in names]
    operations: list[Any] = [CommitOperationAdd(name, _content(folder, name, repo_id)) for name in names]
    operations += [CommitOperationDelete(name) for name in stale]
    # Not upload_folder: it splits a large folder into several commits.
    return api.create_commit(repo_id, operations, commit_message=message, revision=revision)


def _content(folder: Path, name: str, repo_id: str) -> Path | bytes:
    if name != CARD_NAME:
        return folder / name
    return card_under(folder, repo_id)


def _reason(error: BaseException) -> str:
    """Return the first lines of an error and of its causes, which say what went wrong rather than where."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    lines = [str(one).strip().partition("\n")[0].rstrip(".") or type(one).__name__ for one in chain]
    return ": ".join(dict.fromkeys(lines))


def _names(folder: Path, root: Path) -> Iterator[str]:
    for entry in folder.iterdir():
        # Among hidden files may be credentials, and drafts of exports that were killed.
        if entry.name.startswith("."):
            continue
        if entry.is_dir() and not entry.is_symlink():
            if not _LOGS.fullmatch(entry.name):
                yield from _names(entry, root)
        elif entry.is_file() and entry.name not in _NOT_OURS and not entry.name.endswith(_UNFINISHED + _PICKLED):
            yield entry.relative_to(root).as_posix()


def _check_weights(folder: Path, found: set[str]) -> None:
    """Raise GETAError unless the weights are exactly those that are loaded: one file, or the shards of the index."""
    named = weight_files(folder)
    # A stray shard is an error too: who loads by file names might read it in place of the model's.
    if missing := sorted(named - found):
        raise GETAError(f"{folder} lacks {', '.join(missing)}; export the folder again, nothing was pushed")
    if stray := sorted(found - named):
        raise GETAError(f"{folder} has weights that are not the model's: {', '.join(stray)}; delete them, then push")
    for name in sorted(named):
        tensor_sizes(folder / name)  # raises for a damaged file
    stored = read_json(folder / "config.json").get("quantization_config") or {}
    verify_files([str(folder / name) for name in sorted(named)], stored.get("checksums", {}))
