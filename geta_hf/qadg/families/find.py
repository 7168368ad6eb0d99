"""All families of a propagated graph, as plain data."""

from __future__ import annotations

import numpy as np
import torch

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
from geta_hf.qadg.groups import Family, Member
from geta_hf.qadg.propagation.flow import Flow


def find_families(flow: Flow) -> tuple[Family, ...]:
    """Every family, in the order of the parameters that they cut first; none is prunable before a policy says so."""
    tensor_dims = find_tensor_dims(flow)
    drafts = find_drafts(tensor_dims, flow.ids.count)
    family = family_of_atoms(drafts, flow.ids.count)
    excludes = find_excludes(tensor_dims, family)
    kinds = find_kinds(flow, drafts, excludes)
    names, couplings = find_names(drafts, kinds), find_couplings(flow, drafts)
    macs = macs_per_group(flow, drafts, family)
    return tuple(
        Family(
            name=names[position],
            kind=kinds[position],
            members=_members(draft),
            prunable=False,
            excludes=tuple(names[other] for other in sorted(excludes.get(position, ()))),
            couplings=couplings[position],
            parameters=parameters_per_group(draft),
            macs=macs[position],
        )
        for position, draft in enumerate(drafts)
    )


def _members(draft: Draft) -> tuple[Member, ...]:
    """Members with their groups in the order of the first member's indices."""
    order = np.argsort(draft.members[0][1][:, 0], kind="stable")
    return tuple(Member(s.value.names[0], s.dim, torch.from_numpy(index[order]).long()) for s, index in draft.members)
