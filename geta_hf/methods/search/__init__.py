"""A differentiable search of widths in which 0 bits means removed, with hardware costs (arXiv 2407.01054)."""

from geta_hf.methods.search.config import SearchConfig
from geta_hf.methods.search.method import SearchMethod

__all__ = ["SearchConfig", "SearchMethod"]
