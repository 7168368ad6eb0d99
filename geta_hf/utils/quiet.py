"""Keep bars of what takes moments, such as "Loading weights", out of the output."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging


@contextmanager
def without_bars() -> Iterator[None]:
    """Turn off transformers' bars for weights within the context. Also a decorator of functions.

    The bar of training and those of this package are not affected.
    """
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def quiet() -> Iterator[None]:
    """Turn off bars, and warnings of libraries about their own future, which a user of a command can't act on."""
    with without_bars(), warnings.catch_warnings():
        for kind in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
            warnings.filterwarnings("ignore", category=kind, append=True)
        yield
