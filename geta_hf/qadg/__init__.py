"""The quantization-aware dependency graph: which slices of which tensors may be removed (paper Sec. 4)."""

from geta_hf.qadg.build import build_space
from geta_hf.qadg.policy import apply_policy
from geta_hf.qadg.space import Family, Frozen, Member, PruningSpace, kept_indices, zero_groups
from geta_hf.qadg.verify import verify_space

__all__ = [
    "Family",
    "Frozen",
    "Member",
    "PruningSpace",
    "apply_policy",
    "build_space",
    "kept_indices",
    "verify_space",
    "zero_groups",
]
