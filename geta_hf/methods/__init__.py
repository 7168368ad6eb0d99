"""Ways to compress a model: each one is a `Method`, and only this room knows how it decides.

A method reads limits, a pruning space and gradients, and ends with a `CompressionResult`: plain data that surgery and
export read. It knows nothing of Trainer. The type of the config chooses it, by `METHODS`.
"""

from geta_hf.config import GETAConfig
from geta_hf.methods.base import METHODS, CompressionResult, Method, Run, StepMemory, make_method
from geta_hf.methods.one_shot import OneShotConfig, OneShotMethod
from geta_hf.methods.post_training import PostTrainingConfig, PostTrainingMethod
from geta_hf.methods.qasso.method import QASSOMethod
from geta_hf.methods.search import SearchConfig, SearchMethod

METHODS[GETAConfig] = QASSOMethod
METHODS[PostTrainingConfig] = PostTrainingMethod
METHODS[OneShotConfig] = OneShotMethod
METHODS[SearchConfig] = SearchMethod

__all__ = [
    "METHODS",
    "CompressionResult",
    "Method",
    "OneShotConfig",
    "OneShotMethod",
    "PostTrainingConfig",
    "PostTrainingMethod",
    "QASSOMethod",
    "Run",
    "SearchConfig",
    "SearchMethod",
    "StepMemory",
    "make_method",
]
