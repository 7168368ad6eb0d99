"""The quantization-aware dependency graph: which slices of which tensors may be removed (paper Sec. 4)."""

from geta_hf.qadg.groups import Family, Member, UnsupportedOperator
from geta_hf.qadg.space import PruningSpace, apply_policy, build_space, kept_indices, zero_groups
from geta_hf.qadg.verify import verify_space

__all__ = [
    "Family",
    "Member",
    "PruningSpace",
    "UnsupportedOperator",
    "apply_policy",
    "build_space",
    "kept_indices",
    "verify_space",
    "zero_groups",
]
