"""The quantization-aware dependency graph: which slices of which tensors may be removed (paper Sec. 4).

`build_space(model, batch)` goes through the folders in this order, and everything between them is plain data:

1. `tracing`: `record_forward` runs the model once and writes every operator call into a `Graph`; `merge_branches` turns
   each quantizer into one vertex (Alg. 1, lines 3-14). `make_dummy_inputs` makes the batch where there is none.
2. `propagation`: `propagate` walks the graph, and the rule of each operator ties element ids to each other (line 15).
   The result is a `Flow`: the ids along every dim of every value.
3. `families`: `find_families` sorts the ids into groups and families, with a kind, couplings and costs.
4. `space`: `PruningSpace` holds them; `apply_policy` decides which are prunable. `group_labels.find_group_labels`
   gives training a flat form of it, and `kept_indices` tells surgery what remains.
5. Gates: (1) an operator without a rule is pinned and reported during 2; `verify_space` replays the graph on sliced
   weights (`replay.Replay`) and checks that (2) all shapes fit and (3) outputs equal those of zeroed weights.
"""

from geta_hf.qadg.group_types import Family, Member, UnsupportedOperator
from geta_hf.qadg.space import PruningSpace, apply_policy, build_space, kept_indices, zero_groups
from geta_hf.qadg.verify import verify_space
from geta_hf.utils.former_modules import former_names

__getattr__ = former_names(__name__, {"Frozen": "geta_hf.qadg.group_types.UnsupportedOperator"})

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
