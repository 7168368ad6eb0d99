"""Compute what `quantization.functional` defines faster, and choose the way for each tensor in one place.

A kernel never changes a result: the pure functions of `quantization.maths` and `quantization.functional` are the
reference, and every kernel is made from them or tested against them.
"""

from geta_hf.quantization.kernels.choice import NAMES, choose, must_stay_plain, outlined, using
from geta_hf.quantization.kernels.kernel import Gradients, Kernel

__all__ = ["NAMES", "Gradients", "Kernel", "choose", "must_stay_plain", "outlined", "using"]
