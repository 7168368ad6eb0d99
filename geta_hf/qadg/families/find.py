"""Turn a propagated graph into families as plain data: from atoms to (tensor, dim, indices)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from geta_hf.qadg.families.classify import (
    family_of_atoms,
    find_couplings,
    find_excludes,
    find_kinds,
    find_names,
    macs_per_group,
    parameters_per_group,
)
from geta_hf.qadg.families.partition import Draft, find_drafts, find_tensor_dims
from geta_hf.qadg.group_types import Family, Member
from geta_hf.qadg.propagation.flow import Flow


def find_families(flow: Flow) -> tuple[Family, ...]:
    """Find every family of a propagated graph.

    Args:
        flow: the ids of all values of a recorded forward pass.

    Returns:
        The families, in the order of the parameters that they cut first. None is prunable before a policy says so.
    """
    tensor_dims = find_tensor_dims(flow)
    drafts = find_drafts(tensor_dims, flow.ids.count)
    family = family_of_atoms(drafts, flow.ids.count)
    excludes = find_excludes(tensor_dims, family)
    kinds = find_kinds(flow, drafts, excludes)
    names = find_names(drafts, kinds)
    couplings = find_couplings(flow, drafts)
    macs = macs_per_group(flow, drafts, family)
    read = flow.ids.made_with("column")
    families = []
    for position, draft in enumerate(drafts):
        found = Family(
            name=names[position],
            kind=kinds[position],
            members=_members(draft, read),
            # The graph says what can be removed; whether it should be is the policy's to say
            # (`policy.choose_prunable`).
            prunable=False,
            excludes=tuple(names[other] for other in sorted(excludes.get(position, ()))),
            couplings=couplings[position],
            parameters=parameters_per_group(draft),
            macs=macs[position],
        )
        families.append(found)
    return tuple(families)


def _members(draft: Draft, read: NDArray[np.bool_]) -> tuple[Member, ...]:
    """Return the members with their groups in the order of the first member's indices.

    Atoms are numbered as they were made, and unification keeps the smaller number, so their order says little. A user
    expects group 0 to be the first head.

    Args:
        draft: the family.
        read: of every id, whether it was marked as an input feature of a weight itself, before ids were unified.
    """
    first_index = draft.members[0][1][:, 0]
    order = np.argsort(first_index, kind="stable")
    members = []
    for tensor_dim, index in draft.members:
        # int64, which torch's indexing insists on; the ids are int32 to save memory.
        rows = torch.from_numpy(index[order]).long()
        consumer = bool(read[tensor_dim.ids[index]].any())
        members.append(Member(tensor_dim.value.names[0], tensor_dim.dim, rows, consumer))
    return tuple(members)
