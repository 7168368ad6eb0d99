"""What a library could not load, told in one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from geta_hf.errors import GETAError


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
