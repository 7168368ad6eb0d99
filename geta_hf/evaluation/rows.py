"""Read the rows of a table: a local file, a data set of the Hub, or a folder that `datasets` saved."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from geta_hf.errors import GETAError
from geta_hf.utils.quiet import without_dataset_bars

SampleBy = Literal["paragraph", "line", "document"]
"""What a document of a .txt file is."""

_KINDS = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def read_rows(
    file: str | None,
    name: str | None,
    config: str | None,
    split: str,
    *,
    streaming: bool = False,
    sample_by: SampleBy = "paragraph",
) -> Any:
    """Return the rows of a local file, otherwise of a split: a Dataset, or with `streaming` an IterableDataset.

    Args:
        file: .txt, .json, .jsonl, .csv or .parquet, all but the last also .gz.
        name: a data set of the Hub, or a folder saved by `datasets`; not used if there is a file.
        config: its configuration, if it has several.
        split: of the data set.
        streaming: read the rows while they are used. Default: False.
        sample_by: what a document of a .txt file is: paragraph (the default), line or document.

    Raises:
        GETAError: no data, an unknown kind of file, a missing split, or `datasets` is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise GETAError("reading data needs `pip install datasets`") from error
    if file is None and name is None:
        raise GETAError("no data: give dataset_name (such as `yahma/alpaca-cleaned`), or train_file")
    try:
        if file is not None:
            return _file(datasets, file, streaming, sample_by)
        return _split(datasets, str(name), config, split, streaming)
    except GETAError:
        raise
    except (OSError, ValueError, RuntimeError, StopIteration, datasets.exceptions.DatasetsError) as error:
        # An unknown split, no network, an empty or a broken file: the cause says which.
        reason = " ".join(str(error.__cause__ or error).split())[:500] or "it is empty"
        raise GETAError(f"{file or name} can't be read: {reason}") from error


def is_table(path: Path) -> bool:
    """Return whether a file holds rows with columns rather than plain text, by its ending.

    >>> is_table(Path("rows.jsonl.gz")), is_table(Path("story.txt"))
    (True, False)
    """
    return _KINDS.get(_plain_suffix(path), "text") != "text"


def _plain_suffix(path: Path) -> str:
    """Return the ending of a file, that of the file within for .gz."""
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


def _file(datasets: Any, file: str, streaming: bool, sample_by: SampleBy) -> Any:
    path = Path(file)
    if not path.is_file():
        raise GETAError(f"{path}: no such file")
    kind = _KINDS.get(_plain_suffix(path))
    if kind is None:
        raise GETAError(f"{path}: files are read as {', '.join(_KINDS)}, all but parquet also with .gz")
    options = {"sample_by": sample_by} if kind == "text" else {}
    with without_dataset_bars():  # a file of this machine is read in no time
        return datasets.load_dataset(kind, data_files=str(path), split="train", streaming=streaming, **options)


def _split(datasets: Any, name: str, config: str | None, split: str, streaming: bool) -> Any:
    folder = Path(name)
    if not (folder / "state.json").is_file() and not (folder / "dataset_dict.json").is_file():
        return datasets.load_dataset(name, config, split=split, streaming=streaming)
    saved = datasets.load_from_disk(str(folder))
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise GETAError(f"{folder} has no split {split!r}, only {', '.join(saved)}")
        saved = saved[split]
    return saved.to_iterable_dataset() if streaming else saved


def random_rows(rows: Any, limit: int | None, seed: int = 0) -> Any:
    """Return a random sample of a Dataset, at most `limit` rows in their order; all where it is None.

    Raises:
        GETAError: a limit below 1.
    """
    if limit is not None and limit < 1:
        raise GETAError(f"a sample of {limit} rows is empty; give 1 or more")
    if limit is None or limit >= len(rows):
        return rows
    return rows.select(sorted(random.Random(seed).sample(range(len(rows)), limit)))


def text_column(rows: Any, name: str) -> list[str]:
    """Return a column of texts.

    Raises:
        GETAError: no such column, or values that are not text.
    """
    if name not in rows.column_names:
        raise GETAError(f"the data has no column {name!r}, only {', '.join(map(repr, rows.column_names))}")
    values: Sequence[Any] = rows[name]
    for place, value in enumerate(values):
        if not isinstance(value, str):
            raise GETAError(f"column {name!r} holds {value!r} in row {place}, which is not text")
    return list(values)
