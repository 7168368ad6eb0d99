"""Make Triton's interpreter run under every numpy, so that kernels are tested where there is no GPU."""

from __future__ import annotations

from typing import Any

from packaging.version import Version


def accept_numpy() -> None:
    """Let scalars be bounds of `range` in interpreted kernels, which Triton 3.6 fails to do under numpy 2.4 and later.

    Its interpreter holds a scalar as an array of one element and calls `int` on it, which numpy no longer takes for an
    array of one dimension. Triton 3.7 does what this function does. Call it before the first kernel runs.
    """
    import triton

    if Version(triton.__version__) >= Version("3.7"):
        return
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch
