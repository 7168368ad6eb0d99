"""Turn loading errors of other libraries into one-line GETAErrors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from geta_hf.errors import GETAError


@contextmanager
def one_line_errors(message: str) -> Iterator[None]:
    """Turn what a library raises for a mistyped name, a missing network or a damaged folder into one sentence.

    Args:
        message: what failed, and the remedy where there is one; the library's reason follows in brackets.

    Raises:
        GETAError: in place of an OSError, ValueError or RuntimeError. A GETAError raised inside is passed on unchanged.
    """
    try:
        yield
    # It has a sentence of its own already. GETAError is a ValueError, so it has to come first.
    except GETAError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise GETAError(f"{message} ({' '.join(str(error).split())[:300]})") from error
