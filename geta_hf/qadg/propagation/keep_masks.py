"""What stays of every dim when atoms leave."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from geta_hf.qadg.propagation.flow import Dim, Flow


class KeepMasks:
    """Which elements stay along the dims of a flow's values.

    Args:
        flow: the propagated graph.
        removed: for every id, whether it is an atom that leaves; shape (ids,). None removes nothing.
    """

    def __init__(self, flow: Flow, removed: NDArray[np.bool_] | None) -> None:
        self._flow, self._removed = flow, removed
        # Many values share their ids, which are kept here so that no others get the same address.
        self._masks: dict[int, tuple[Dim, NDArray[np.bool_] | None]] = {}

    def mask(self, value: int, dim: int) -> NDArray[np.bool_] | None:
        """Which elements of a value stay along a dim, shape (size,); None when all do."""
        if self._removed is None or not self._flow.known(value):
            return None
        ids = self._flow.dims(value)[dim]
        if ids is None:
            return None
        if id(ids) not in self._masks:
            stays = np.logical_not(self._removed[self._flow.ids.atoms(ids)].any(axis=1))
            self._masks[id(ids)] = (ids, None if stays.all() else stays)
        return self._masks[id(ids)][1]
