"""Keep a copy of weights that will be changed, in memory or on disk, to give them back."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn


class FirstWeights:
    """A copy of some parameters.

    Args:
        parameters: each once.
        on_disk: in a temporary folder, which takes no memory, and is deleted with this object. Default False.

    Attributes:
        parameters: those that are copied.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], on_disk: bool = False) -> None:
        self.parameters = list(parameters)
        self._folder = Path(tempfile.mkdtemp(prefix="geta_weights_")) if on_disk else None
        if self._folder is not None:
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._copies = []
        for place, parameter in enumerate(self.parameters):
            if self._folder is None:
                self._copies.append(parameter.detach().clone())
            else:  # a file each, since a file of several is made in memory first
                save_file({"x": parameter.detach().cpu().contiguous()}, self._file(place))

    def _file(self, place: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{place}.safetensors"

    @torch.no_grad()
    def restore(self) -> None:
        """Copy the first values into the parameters."""
        for place, parameter in enumerate(self.parameters):
            parameter.copy_(self._copies[place] if self._folder is None else load_file(self._file(place))["x"])
