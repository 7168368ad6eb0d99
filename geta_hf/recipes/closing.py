"""Say at the end of a run what it brought, from what was measured in it, and what to do next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from geta_hf.recipes.speed import Speed
from geta_hf.reporting.comparison import spelled

_WEIGHTS = ("*.safetensors",)
_CLEAR = 1.0
"""Seconds that scoring must take at least for two durations to be compared."""


def closing(
    folder: Path,
    compressed: bool,
    dense_bytes: int | None,
    start: Mapping[str, Any] | None,
    scores: Mapping[str, Any],
    metrics: Sequence[str],
    seconds: Mapping[str, float],
    speeds: Sequence[Speed] = (),
) -> str:
    """Return the last lines of a run: sizes, speed, scores, the folder and the next command.

    Args:
        folder: the exported model.
        compressed: False for a run without `geta`.
        dense_bytes: of the model that the run started from; None if not known.
        start: scores of that model; None where it was not scored.
        scores: of the exported model.
        metrics: the names of the scores to show.
        seconds: how long scoring took, of the model at the `start` and of the `exported` one.
        speeds: of both models; where there are none, the durations of scoring are compared.
    """
    size = sum(path.stat().st_size for pattern in _WEIGHTS for path in folder.glob(pattern))
    sizes = f"{size / 1e6:,.1f} MB"
    if dense_bytes is not None and compressed:
        sizes = f"{dense_bytes / 1e6:,.1f} → {sizes}"
    parts = [sizes, *map(str, speeds)]
    before, after = seconds.get("start", 0.0), seconds.get("exported", 0.0)
    if compressed and not speeds and min(before, after) >= _CLEAR:
        parts.append(f"scored in {before:.1f} → {after:.1f} s ({before / after:.1f}x as fast)")
    for name in metrics:
        known = f"{start[name]:.2f} → " if start is not None and name in start else ""
        parts.append(f"{spelled(name)} {known}{scores[name]:.2f}")
    following = f"geta-hf report {folder}"
    if not compressed:
        following = f"geta-hf train CONFIG.yaml --model_name_or_path {folder}, with a `geta` section"
    return f"{', '.join(parts)}\nfolder: {folder}\nnext:   {following}"
