"""`evaluate`: lm-eval's harness on a folder, a name on the Hub, or a loaded model."""

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
from transformers.utils import find_adapter_config_file

from geta_hf.errors import GETAError
from geta_hf.evaluation.causal_lm import check_causal, check_vocabulary, embedding_rows
from geta_hf.evaluation.scores import Evaluation, read_scores
from geta_hf.evaluation.tasks import split_names, stock_folder, stock_tasks, write_tasks
from geta_hf.serialization.validate import read_json
from geta_hf.utils.loading import told

# Scores that are no means (a perplexity) get their standard error by drawing anew; lm-eval's 100,000 draws take longer
# than the model does.
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

    The random state of the process is left as it is.

    Args:
        model: a folder (exported or plain), a name on the Hub, or a loaded model, which is put in eval mode.
        tasks: `commonsense` (BoolQ, PIQA, HellaSwag, WinoGrande, ARC easy and challenge, OpenBookQA, and their mean),
            `blimp`, or any names of lm-eval's tasks and groups: a list, or with commas between them.
        tokenizer: by default the one beside the model.
        data_dir: take the rows from local files, as `write_tasks` says; no network is touched then.
        num_fewshot: examples in the prompt; by default as the task says, mostly 0.
        limit: score only so many questions of every task, the first ones.
        batch_size: rows of a batch; "auto" fits it to the length of the requests.
        device: where to run; by default an accelerator if there is one, else the CPU. A loaded model stays where it is.
        dtype: of the weights; "auto" as the folder says. A loaded model keeps its own.

    Returns:
        Scores, with those of every single question, and lm-eval's own results.

    Raises:
        GETAError: lm-eval is not installed, a task is unknown or has no file, all before the model is loaded; no such
            model, one that sees the tokens to come, or a tokenizer that is not the model's or has neither bos_token nor
            eos_token.
    """
    check_numbers(limit=limit, batch_size=batch_size, num_fewshot=num_fewshot)
    with open_tasks(tasks, data_dir, fewshot=bool(num_fewshot)) as (manager, known):
        loaded, words = load(model, tokenizer, device=device, dtype=dtype)
        options = {"num_fewshot": num_fewshot, "limit": limit, "task_manager": manager}
        with _quiet(data_dir is not None), _rows_told(data_dir):
            return _run(loaded.name_or_path or type(loaded).__name__, loaded, words, known, batch_size, options)


def check_numbers(*, limit: int | None, batch_size: int | str, num_fewshot: int | None) -> None:
    """Raise GETAError for numbers that can't be meant."""
    if limit is not None and limit < 1:
        raise GETAError(f"limit={limit}: the number of questions of each task is 1 or more; leave it out for all")
    if num_fewshot is not None and num_fewshot < 0:
        raise GETAError(f"num_fewshot={num_fewshot}: it is 0 or more")
    if batch_size != "auto" and not (str(batch_size).isdecimal() and int(batch_size) > 0):
        raise GETAError(f"batch_size={batch_size!r}: give 'auto' or 1 and more")


def load(
    model: str | os.PathLike[str] | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    device: str | None = None,
    dtype: str | torch.dtype = "auto",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal model in eval mode on its device, and its tokenizer. Raises GETAError with what can't be loaded."""
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise GETAError(f"dtype={dtype!r} is no type of torch; give 'auto', 'float32', 'bfloat16' or 'float16'")
    loaded: Any = model
    name = str(model.name_or_path) if isinstance(model, PreTrainedModel) else os.fspath(model)
    if not isinstance(model, PreTrainedModel):
        place = _device(device)
        with told(f"{name}: no causal language model could be loaded"):
            loaded = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
            loaded.to(place)
    tokenizer = _tokenizer(name) if tokenizer is None else tokenizer
    check_fit(loaded, tokenizer)
    return loaded.eval(), tokenizer


def check_fit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise GETAError unless model and tokenizer can tell how likely a text is."""
    prefix_token(tokenizer)
    check_vocabulary(embedding_rows(model), tokenizer)
    check_causal(model)


def check_folder(name: str) -> PreTrainedConfig:
    """The config of a model; GETAError for what shows without its weights that it can't be scored."""
    if not Path(name).is_dir():
        with told(f"{name}: no such folder, and no name on the Hub"):
            validate_repo_id(name)
    with told(f"{name}: no causal language model could be loaded"):
        adapter = find_adapter_config_file(name)
        config = AutoConfig.from_pretrained(read_json(Path(adapter))["base_model_name_or_path"] if adapter else name)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ValueError(f"{type(config).__name__} is of another kind")
    tokenizer = _tokenizer(name)
    rows = getattr(config.get_text_config(), "vocab_size", None)  # an embedding that is resized has it set
    try:
        prefix_token(tokenizer)
        if rows is not None:
            check_vocabulary(rows, tokenizer)
    except GETAError as error:
        raise GETAError(f"{name}: {error}") from error
    return config


def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    with told(f"{name}: no tokenizer could be loaded; save one beside the model"):
        return AutoTokenizer.from_pretrained(name)


def _device(name: str | None) -> str:
    """The device's name, once something was put on it."""
    name = name or default_device()
    try:
        torch.empty(1, device=name)
    except (AssertionError, RuntimeError) as error:  # the first is what torch raises where CUDA was not built in
        why = str(error).partition("\n")[0]
        raise GETAError(f"device={name!r} can't be used here ({why}); leave it out, or give --device cpu") from error
    return name


def prefix_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that stands before a text's first, so that it is predicted from something: bos, else eos."""
    found = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if found is None:
        raise GETAError("the tokenizer has neither bos_token nor eos_token: set one, it stands before every text")
    return found


def default_device() -> str:
    """The accelerator if there is one, else the CPU."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if found is None else found.type


@contextlib.contextmanager
def open_tasks(
    tasks: str | Sequence[str], data_dir: str | os.PathLike[str] | None, *, fewshot: bool
) -> Iterator[tuple[Any, list[str]]]:
    """lm-eval's index of tasks, and the names in it; over local files it holds nothing else.

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
def _rows_told(data_dir: str | os.PathLike[str] | None) -> Iterator[None]:
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (DatasetsError, OSError) as error:  # the Hub can't be reached: an OSError, too
        hub = "from the Hub; without a network give data_dir (--data_dir)"
        where = f"from {os.fspath(data_dir)}" if data_dir else hub
        raise GETAError(f"the rows of a task can't be read {where}: {error}") from error


@contextlib.contextmanager
def _quiet(local: bool) -> Iterator[None]:
    """What lm-eval prints, and its advice for its own command line, goes nowhere; and it starts no processes.

    `datasets` reports every data set that it loads, local ones too, unless it is told that there is no network.
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
        evaluator.get_git_commit_hash = lambda: get_commit_from_path(os.getcwd())  # git itself complains on stderr
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
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed"))
    results: Any = simple_evaluate(
        model=lm, tasks=tasks, batch_size=batch_size, bootstrap_iters=BOOTSTRAP_DRAWS, **seeds, **options
    )
    scores = read_scores(results)
    results.pop("samples")
    results["config"] |= {"model": "hf", "model_args": f"pretrained={name}", "device": str(model.device)}
    results |= {"model_source": "hf", "model_name": name, "model_name_sanitized": name.replace("/", "__")}
    return Evaluation(name, scores, results, lm.truncated, lm.requests, options["limit"])
