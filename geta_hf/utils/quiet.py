"""Keep bars of what takes moments, such as "Loading weights", and warnings that say nothing here out of the output."""

from __future__ import annotations

import logging as standard_logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging

_SIZES = standard_logging.getLogger("transformers.integrations.heterogeneity.configuration_utils")
"""Warns where a config with sizes of each layer is read, which transformers itself does as it loads one."""


def _is_needed(record: standard_logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Reading global config value for per-layer attribute")


@contextmanager
def without_bars() -> Iterator[None]:
    """Turn off transformers' bars for weights within the context. Also a decorator of functions.

    The bar of training and those of this package are not affected. The warning that a config has sizes for each layer
    is left out too: what this package loads has its sizes from the weights.
    """
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    outermost = _is_needed not in _SIZES.filters
    _SIZES.addFilter(_is_needed)
    try:
        yield
    finally:
        if outermost:
            _SIZES.removeFilter(_is_needed)
        if shown:
            logging.enable_progress_bar()


@contextmanager
def without_dataset_bars() -> Iterator[None]:
    """Turn off the bars of `datasets`, which has to be installed, within the context."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


@contextmanager
def quiet() -> Iterator[None]:
    """Turn off bars, and warnings of libraries about their own future, which a user of a command can't act on."""
    with without_bars(), warnings.catch_warnings():
        for kind in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
            warnings.filterwarnings("ignore", category=kind, append=True)
        yield
