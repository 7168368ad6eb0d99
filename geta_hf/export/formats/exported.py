"""Trace a model, write it by one of transformers' exporters, and prove what was written by running it."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from geta_hf.errors import GETAError
from geta_hf.export.formats.integers import Style, plain_copy, store_integers
from geta_hf.serialization.encode import activation_bits
from geta_hf.surgery.compare_outputs import comparison_mode
from geta_hf.surgery.record import other_shape
from geta_hf.utils.model_io import float_tensors, to_device
from geta_hf.utils.process_state import full_precision

if TYPE_CHECKING:
    from transformers.exporters import DynamoConfig, ExportedModel

EXACT = 1e-4
"""The largest difference allowed where nothing but the weights is rounded, as a share of the largest output."""

ROUNDED = 0.1
"""The same where activations are rounded too: the last bit of a sum may decide which way."""


@dataclass(frozen=True)
class Sample:
    """A batch and what the model makes of it: output name -> tensor."""

    batch: dict[str, Tensor]
    outputs: dict[str, Tensor]


@dataclass(frozen=True)
class Traceable:
    """A model ready for an exporter.

    Attributes:
        model: a copy that computes its weights from integers.
        samples: the given batch, and where the model can run it one of another number of rows and tokens.
        tolerance: largest difference allowed of its outputs, as a share of the largest.
    """

    model: PreTrainedModel
    samples: list[Sample]
    tolerance: float


def require(extra: str, *packages: str) -> None:
    """Raise GETAError when a package that a format needs is not installed."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise GETAError(f"the {extra} format needs {', '.join(missing)}: pip install 'geta_hf[{extra}]'")


def traceable(model: PreTrainedModel, batch: Mapping[str, Tensor], style: Style) -> Traceable:
    """Return a copy of a compressed model for an exporter, with samples to trace and prove it on.

    Args:
        model: compressed, or plain; left unchanged.
        batch: keyword arguments of its forward.
        style: as in `store_integers`.

    Raises:
        GETAError: the model cannot run the batch.
    """
    copied = plain_copy(model)
    given = to_device(batch, "cpu")
    try:
        # The references are computed before the layers change, so that the proof covers `store_integers` as well.
        samples = [Sample(given, _outputs(copied, given))]
    except Exception as error:
        raise GETAError(f"{type(model).__name__} cannot run the batch with {sorted(given)}: {error}") from error
    # A graph that has kept a batch size or a length as a constant passes on the batch that it was traced with.
    other = other_shape(copied, given)
    with contextlib.suppress(Exception):  # each model has its own way to refuse a shape
        samples.append(Sample(other, _outputs(copied, other)))
    store_integers(copied, style)
    return Traceable(copied, samples, ROUNDED if activation_bits(model) else EXACT)


def _outputs(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    with comparison_mode(model):
        return float_tensors(type(model).forward(model, **batch))


def export_program(case: Traceable, kind: str, config: DynamoConfig) -> ExportedModel:
    """Run transformers' exporter of `kind` on the last sample: one with several rows can run with any number.

    Raises:
        GETAError: the exporter cannot.
    """
    from transformers.exporters import AutoHfExporter

    sample: dict[str, Any] = dict(case.samples[-1 if config.dynamic else 0].batch)
    try:
        with quietly():
            return AutoHfExporter.from_config(config).export(case.model, sample, config)
    except Exception as error:
        reason = " ".join(str(error).split())[:500]
        raise GETAError(
            f"transformers' {kind} exporter cannot write this {type(case.model).__name__}: {type(error).__name__}: "
            f"{reason}; export in the geta format"
        ) from error


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Silence the exporters' progress reports, and what torch warns of its own code."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated", category=FutureWarning)
        yield


def save(exported: ExportedModel, folder: Path) -> None:
    """Write an export, its configuration and transformers' own manifest."""
    with quietly():
        exported.save_pretrained(folder)


def describe(case: Traceable, folder: Path, kind: str, facts: Mapping[str, Any]) -> None:
    """Say in config.json what the folder is, how it is loaded, and what was found of it (`exported_as`)."""
    load = "transformers.exporters.ExportedModel.from_pretrained(folder)"
    case.model.config.exported_as = {"format": kind, "load": load, **facts}
    case.model.config.save_pretrained(folder)


def load(folder: Path, **options: Any) -> ExportedModel:
    """Load an export as its user would, on CPU; `options` are those of transformers' runner."""
    from transformers.exporters import ExportedModel

    with quietly():
        return ExportedModel.from_pretrained(folder, device="cpu", **options)


def difference(loaded: ExportedModel, sample: Sample, allowed: float, what: str) -> float:
    """Return the largest difference of any output from the model's, as a share of the largest value of that output.

    Args:
        loaded: the export.
        sample: what to run.
        allowed: largest difference that is not an error.
        what: how to call the export in an error.

    Raises:
        GETAError: it cannot run the batch, an output is missing, or it differs by more.
    """
    batch: dict[str, Any] = sample.batch
    shapes = {name: tuple(getattr(item, "shape", ())) for name, item in batch.items()}
    try:
        with quietly(), full_precision():
            found = float_tensors(loaded(**batch))
    except Exception as error:
        raise GETAError(f"the {what} cannot run a batch of {shapes}: {error}; export in the geta format") from error
    return max(_share(name, tensor, found.get(name), allowed, what) for name, tensor in sample.outputs.items())


def _share(name: str, expected: Tensor, found: Tensor | None, allowed: float, what: str) -> float:
    if found is None or found.shape != expected.shape:
        shape = None if found is None else tuple(found.shape)
        # Compared first: torch.where would broadcast a wrong shape without an error.
        raise GETAError(f"the {what}'s {name} has shape {shape}, the model's {tuple(expected.shape)}")
    gap = torch.where(expected == found, 0.0, (expected - found).abs())  # infinities that agree
    share = float(gap.max()) / max(float(expected[expected.isfinite()].abs().max()), 1e-6)
    if not share <= allowed:  # also true of NaN
        raise GETAError(
            f"the {what}'s {name} differs from the model's by {share:.2g} of its largest value; allowed is "
            f"{allowed:g}; export in the geta format"
        )
    return share
