"""Score a folder, a name on the Hub, or a loaded model with lm-eval's harness."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import validate_repo_id
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto import modeling_auto
from transformers.utils import find_adapter_config_file

from geta_hf.errors import GETAError
from geta_hf.evaluation.causal_lm import check_causal, check_vocabulary, embedding_rows
from geta_hf.evaluation.scores import Evaluation, read_scores
from geta_hf.evaluation.tasks import split_names, stock_folder, stock_tasks, write_tasks
from geta_hf.reporting.comparison import export_inside
from geta_hf.serialization.validate import read_json
from geta_hf.utils.loading import one_line_errors

_OTHER_HEADS = (
    modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING_NAMES,
)

# Scores that are not means (a perplexity) get their standard error by bootstrap; lm-eval's 100,000 draws take longer
# than the model.
BOOTSTRAP_DRAWS = 200


def evaluate(
    model: str | os.PathLike[str] | PreTrainedModel,
    tasks: str | Sequence[str] = "commonsense",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int | str = "auto",
    device: str | None = None,
    dtype: str | torch.dtype = "auto",
) -> Evaluation:
    """Score a causal language model on tasks of lm-eval, with lm-eval's own harness.

    The random state of the process does not change.

    Args:
        model: a folder (exported or plain), a name on the Hub, or a loaded model, which is set to eval mode.
        tasks: `commonsense` (BoolQ, PIQA, HellaSwag, WinoGrande, ARC easy and challenge, OpenBookQA, and their mean),
            `blimp`, or any names of lm-eval's tasks and groups: a list, or separated by commas.
        tokenizer: by default the one saved with the model.
        data_dir: folder with the rows as local files, laid out as for `write_tasks`; no network is used then.
        num_fewshot: examples in the prompt; by default as the task defines, mostly 0.
        limit: number of questions of each task to score, from the first on; by default all.
        batch_size: rows of a batch; "auto" fits it to the length of the requests.
        device: where to run; by default an accelerator if there is one, otherwise the CPU. A loaded model is not moved.
        dtype: of the weights; "auto" for that of the folder. A loaded model keeps its own.

    Returns:
        Scores, with those of each question, and lm-eval's own results.

    Raises:
        GETAError: before the model is loaded: lm-eval is not installed, or a task is unknown or has no file. Then: no
            such model, one that sees later tokens, or a tokenizer that is not the model's or has neither bos_token nor
            eos_token.

    Example:
        >>> from geta_hf import evaluate
        >>> found = evaluate("runs/phi2/export", "piqa,arc_easy", limit=100)  # doctest: +SKIP
        >>> found.scores["piqa"]["acc_norm"].value  # doctest: +SKIP
        0.71
    """
    check_numbers(limit=limit, batch_size=batch_size, num_fewshot=num_fewshot)
    # The tasks come before the model, since a mistyped name must not cost the time of loading.
    with open_tasks(tasks, data_dir, fewshot=bool(num_fewshot)) as (manager, known):
        loaded, words = load(model, tokenizer, device=device, dtype=dtype)
        options = {"num_fewshot": num_fewshot, "limit": limit, "task_manager": manager}
        with _quiet(data_dir is not None), _one_line_row_errors(data_dir):
            return _run(loaded.name_or_path or type(loaded).__name__, loaded, words, known, batch_size, options)


def check_numbers(*, limit: int | None, batch_size: int | str, num_fewshot: int | None) -> None:
    """Raise GETAError for numbers out of range."""
    if limit is not None and limit < 1:
        raise GETAError(f"limit={limit}: the number of questions of each task is 1 or more; omit it for all")
    if num_fewshot is not None and num_fewshot < 0:
        raise GETAError(f"num_fewshot={num_fewshot}: must be 0 or more")
    if batch_size != "auto" and not (str(batch_size).isdecimal() and int(batch_size) > 0):
        raise GETAError(f"batch_size={batch_size!r}: give 'auto', or 1 or more")


def load(
    model: str | os.PathLike[str] | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    device: str | None = None,
    dtype: str | torch.dtype = "auto",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal model, in eval mode on its device, and its tokenizer. Raise GETAError if either can't be loaded."""
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise GETAError(f"dtype={dtype!r} is not a dtype of torch; give 'auto', 'float32', 'bfloat16' or 'float16'")
    loaded: Any = model
    name = str(model.name_or_path) if isinstance(model, PreTrainedModel) else os.fspath(model)
    if not isinstance(model, PreTrainedModel):
        # Before loading, since torch accepts any name until a tensor is made on the device.
        place = _device(device)
        with one_line_errors(f"{name}: no causal language model could be loaded"):
            loaded = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
            loaded.to(place)
    tokenizer = _tokenizer(name) if tokenizer is None else tokenizer
    check_fit(loaded, tokenizer)
    return loaded.eval(), tokenizer


def check_fit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise GETAError unless model and tokenizer can compute the likelihood of a text."""
    prefix_token(tokenizer)
    check_vocabulary(embedding_rows(model), tokenizer)
    check_causal(model)


def check_folder(name: str) -> PreTrainedConfig:
    """Return the config of a model. Raise GETAError if it is clear without its weights that it can't be scored."""
    # transformers takes a missing folder for a name on the Hub, and its error would speak of a repository.
    if not Path(name).is_dir():
        with one_line_errors(f"{name}: no such folder, and no name on the Hub"):
            validate_repo_id(name)
    else:
        _check_no_run(Path(name))
    with one_line_errors(f"{name}: no causal language model could be loaded"):
        # A LoRA folder has no config of its own; transformers loads its base model and then the adapter.
        adapter = find_adapter_config_file(name)
        config = AutoConfig.from_pretrained(read_json(Path(adapter))["base_model_name_or_path"] if adapter else name)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ValueError(f"{type(config).__name__} is not of a causal language model")
    _check_head(name, config)
    tokenizer = _tokenizer(name)
    rows = getattr(config.get_text_config(), "vocab_size", None)  # resizing the embedding updates it
    try:
        prefix_token(tokenizer)
        if rows is not None:
            check_vocabulary(rows, tokenizer)
    except GETAError as error:
        raise GETAError(f"{name}: {error}") from error
    return config


def _check_no_run(folder: Path) -> None:
    """Raise GETAError for the folder of a run, which has models inside but is none."""
    if any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        return
    if (inside := export_inside(folder)) is not None:
        raise GETAError(f"{folder} is the folder of a run; give its export, {inside}")
    if any(folder.glob("checkpoint-*")):
        raise GETAError(f"{folder} is the folder of a run without an export; run `geta-hf export {folder} OUT` first")


def _check_head(name: str, config: PreTrainedConfig) -> None:
    """Raise GETAError for a model with the head of another task, whose language model's head would be made up."""
    for architecture in config.architectures or ():
        if any(architecture in mapping.values() for mapping in _OTHER_HEADS):
            raise GETAError(
                f"{name} is a {architecture}, but tasks and texts are scored by causal language models; score it on "
                f"its own task, with Trainer.evaluate, or with eval/squad.py if it answers questions"
            )


def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    with one_line_errors(f"{name}: no tokenizer could be loaded; save one with the model"):
        return AutoTokenizer.from_pretrained(name)


def _device(name: str | None) -> str:
    """Return the device's name, after a tensor was made on it."""
    name = name or default_device()
    try:
        torch.empty(1, device=name)
    except (AssertionError, RuntimeError) as error:  # AssertionError: torch was built without CUDA
        why = str(error).partition("\n")[0]
        raise GETAError(f"device={name!r} can't be used here ({why}); omit it, or give --device cpu") from error
    return name


def prefix_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token from which a text's first token is predicted: bos, otherwise eos."""
    found = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if found is None:
        raise GETAError("the tokenizer has neither bos_token nor eos_token: set one, to put before every text")
    return found


def default_device() -> str:
    """Return the name of the accelerator if there is one, otherwise "cpu"."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if found is None else found.type


@contextlib.contextmanager
def open_tasks(
    tasks: str | Sequence[str], data_dir: str | os.PathLike[str] | None, *, fewshot: bool
) -> Iterator[tuple[Any, list[str]]]:
    """Yield lm-eval's index of tasks and the names to run; over local files the index has no other tasks.

    Raises:
        GETAError: lm-eval is not installed, a task is unknown or has no file.
    """
    stock_folder()
    names = split_names(tasks)
    if data_dir is None:
        yield stock_tasks(names)
        return
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory(prefix="geta_tasks_") as folder:
        known = write_tasks(data_dir, Path(folder) / "tasks", names, fewshot=fewshot, cache_dir=Path(folder) / "tables")
        yield TaskManager(include_path=str(Path(folder) / "tasks"), include_defaults=False), known


@contextlib.contextmanager
def _one_line_row_errors(data_dir: str | os.PathLike[str] | None) -> Iterator[None]:
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (DatasetsError, OSError) as error:  # an unreachable Hub raises an OSError
        where = f"from {os.fspath(data_dir)}" if data_dir else "from the Hub; without a network, give --data_dir"
        raise GETAError(f"the rows of a task can't be read {where}: {error}") from error


@contextlib.contextmanager
def _quiet(local: bool) -> Iterator[None]:
    """Suppress what lm-eval prints, such as advice for its own command line, and keep it from starting processes.

    `datasets` reports every data set that it loads to the Hub, local ones too, unless it is set to offline.
    """
    import datasets
    from lm_eval import evaluator
    from lm_eval.loggers.utils import get_commit_from_path

    logger = logging.getLogger("lm_eval")
    with contextlib.ExitStack() as undo:
        undo.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.ERROR)
        undo.callback(setattr, datasets.config, "HF_HUB_OFFLINE", datasets.config.HF_HUB_OFFLINE)
        datasets.config.HF_HUB_OFFLINE = local or datasets.config.HF_HUB_OFFLINE
        if not datasets.are_progress_bars_disabled():
            undo.callback(datasets.enable_progress_bars)
            datasets.disable_progress_bars()
        if "DISABLE_MULTIPROC" not in os.environ:
            undo.callback(os.environ.pop, "DISABLE_MULTIPROC")
            os.environ["DISABLE_MULTIPROC"] = "1"
        undo.callback(setattr, evaluator, "get_git_commit_hash", evaluator.get_git_commit_hash)
        evaluator.get_git_commit_hash = lambda: get_commit_from_path(os.getcwd())  # git itself prints errors to stderr
        undo.enter_context(contextlib.redirect_stdout(io.StringIO()))
        yield


def _run(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[str],
    batch_size: int | str,
    options: dict[str, Any],
) -> Evaluation:
    from lm_eval import simple_evaluate

    from geta_hf.evaluation.batches import BatchedLM

    lm = BatchedLM(model, tokenizer, batch_size)
    # None keeps lm-eval from setting the process's seeds.
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed"))
    results: Any = simple_evaluate(
        model=lm, tasks=tasks, batch_size=batch_size, bootstrap_iters=BOOTSTRAP_DRAWS, **seeds, **options
    )
    scores = read_scores(results)
    # They hold every question and answer, and the scores of each are in `scores` by now.
    results.pop("samples")
    # As lm-eval's command line writes it. It was given an object here, which the file could not name.
    results["config"] |= {"model": "hf", "model_args": f"pretrained={name}", "device": str(model.device)}
    results |= {"model_source": "hf", "model_name": name, "model_name_sanitized": name.replace("/", "__")}
    return Evaluation(name, scores, results, lm.truncated, lm.requests, options["limit"])
