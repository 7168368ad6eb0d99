"""The seam of the comparison: what a method offers, and what it returns. A method is one file in `methods/`."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedModel

from eval.compare import methods
from eval.compare.job import Job, Trials
from geta_hf.config import CompressionConfig
from geta_hf.errors import GETAError
from geta_hf.methods.base import CompressionResult


@dataclass
class Compressed:
    """What a method made.

    Attributes:
        model: to be scored. Where there is a `result`, with quantizers on its layers, and with zeros where groups are
            removed.
        share: of the prunable parameters that is removed.
        mean_bits: mean width of the remaining weights.
        bytes: of the folder; foreseen, and replaced by the file's own once it is exported.
        removed: bool, shape (groups,); None where the method does not remove groups of the space.
        result: removed groups and widths, for export; None where a result is no plain model, and is scored in memory.
        config: of the quantizers, for export.
        trials: what was tried on held-back data.
        tokens: that were read beside the calibration data.
        trained: whether the method used the steps itself, so that no recovery follows.
        note: what the table has to say of it.
    """

    model: PreTrainedModel
    share: float
    mean_bits: float
    bytes: int
    removed: Tensor | None = None
    result: CompressionResult | None = None
    config: CompressionConfig | None = None
    trials: Trials = ()
    tokens: int = 0
    trained: bool = False
    note: str = ""


class Method(Protocol):
    """One way to make a model smaller.

    Attributes:
        name: as the table shows it.
        needs: `nothing`, `forward` (passes over calibration data), `gradients` of it, or `training`.
        packages: modules that must be importable.
    """

    @property
    def name(self) -> str: ...

    @property
    def needs(self) -> str: ...

    @property
    def packages(self) -> Sequence[str]: ...

    def run(self, job: Job) -> Compressed:
        """Compress a fresh model within the job's budget. Raise GETAError where that is out of reach."""
        ...


def load_methods() -> dict[str, Method]:
    """Return every method by its name: what the files in `methods/` list as `METHODS`."""
    found: dict[str, Method] = {}
    for entry in pkgutil.iter_modules(methods.__path__):
        module = importlib.import_module(f"{methods.__name__}.{entry.name}")
        for method in module.METHODS:
            if method.name in found:
                raise GETAError(f"two methods are called {method.name!r}; the second is in methods/{entry.name}.py")
            found[method.name] = method
    return found


def missing_packages(method: Method) -> list[str]:
    """Return the packages of a method that are not installed."""
    return [name for name in method.packages if importlib.util.find_spec(name) is None]
