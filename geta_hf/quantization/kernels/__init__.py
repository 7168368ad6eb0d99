"""Faster ways to compute what `quantization.functional` defines, and the one place where a way is chosen."""

from geta_hf.quantization.kernels.choice import NAMES, choose, must_stay_plain, outlined, using
from geta_hf.quantization.kernels.kernel import Gradients, Kernel

__all__ = ["NAMES", "Gradients", "Kernel", "choose", "must_stay_plain", "outlined", "using"]
