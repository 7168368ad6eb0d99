"""The one exception that every room raises for input it cannot honour."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class GETAError(ValueError):
    """Invalid input: the message names the module, the value and the remedy."""


class MemoryUnknown(GETAError):
    """The memory of a run can't be foreseen, which says nothing of whether it fits.

    Attributes:
        plan: the `Plan` of a dry run that came so far; None without one.
    """

    plan: object = None


@contextmanager
def told(message: str) -> Iterator[None]:
    """Turns what a library raises for a mistyped name, no network or a damaged folder into one sentence.

    Args:
        message: what failed, and the remedy where there is one; the library's reason follows in brackets.

    Raises:
        GETAError: instead of OSError, ValueError or RuntimeError; one that is raised inside goes through as it is.
    """
    try:
        yield
    except GETAError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise GETAError(f"{message} ({' '.join(str(error).split())[:300]})") from error
