"""Pruning in training, rounding after it: QASSO's groups, with bit widths chosen only once the last step is done."""

from geta_hf.methods.post_training.config import PostTrainingConfig
from geta_hf.methods.post_training.method import PostTrainingMethod

__all__ = ["PostTrainingConfig", "PostTrainingMethod"]
