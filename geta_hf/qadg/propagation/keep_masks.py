"""Say which elements remain along every dim when atoms are removed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from geta_hf.qadg.propagation.flow import Dim, Flow


class KeepMasks:
    """The elements that remain along the dims of a flow's values.

    Args:
        flow: the propagated graph.
        removed: for every id, whether it is an atom that is removed; bool, shape (ids,). None removes nothing.
    """

    def __init__(self, flow: Flow, removed: NDArray[np.bool_] | None) -> None:
        self._flow = flow
        self._removed = removed
        # By address, since many values share their ids: a residual stream has the same array everywhere. The arrays
        # are kept next to their masks, or else a new one could get the address of one that was freed.
        self._masks: dict[int, tuple[Dim, NDArray[np.bool_] | None]] = {}

    def mask(self, value: int, dim: int) -> NDArray[np.bool_] | None:
        """Return which elements of a value remain along a dim, bool, shape (size,); None when all do."""
        if self._removed is None or not self._flow.known(value):
            return None
        ids = self._flow.dims(value)[dim]
        if ids is None:
            return None
        if id(ids) not in self._masks:
            # Any removed atom takes the element with it: that is what a product means.
            remains = np.logical_not(self._removed[self._flow.ids.atoms(ids)].any(axis=1))
            self._masks[id(ids)] = (ids, None if remains.all() else remains)
        return self._masks[id(ids)][1]
