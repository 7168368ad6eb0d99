"""Which families QASSO may prune: a default, and switches by kind, coupling or name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from geta_hf.errors import GETAError
from geta_hf.qadg.space import COUPLINGS, KINDS, Family, PruningSpace

PRUNABLE_KINDS = frozenset({"heads", "channels"})

_WHY_KIND = {
    "query_heads": "cuts inside groups of heads that share keys and values; remove those groups instead",
    "head_dim": "cuts inside the attention heads; remove whole heads instead",
    "residual": "runs through the whole residual stream, where removing a slice changes what its norms divide by",
    "other": "does not link the outputs of one linear layer with the inputs of another",
}
_WHY_COUPLING = {
    "norm": "a normalisation or a mean runs over this dim, so removing a slice changes what is left",
    "tied": "cuts a tensor that is tied across the model",
    "output": "feeds a layer that makes an output of the model",
}


def apply_policy(space: PruningSpace, prune: Sequence[str] = (), keep: Sequence[str] = ()) -> PruningSpace:
    """Decide anew which families are prunable.

    By default heads and channels are, except where they are coupled to a norm, to a tied tensor or to an output.
    Of prunable families that cut the same indices only one stays so: one named in `prune` before the others, then
    the one that cuts most. A family of one group is never prunable.

    Args:
        space: the families.
        prune: switches on. A kind (`head_dim`) or a pattern of names (`model.layers.*.mlp:*`) makes families prunable
            whatever their couplings; a coupling (`norm`) is no obstacle any more.
        keep: switches off, stronger than `prune`: kinds, couplings, or patterns of names.

    Returns:
        The space with `prunable` and `reason` of every family set.

    Raises:
        GETAError: an entry that is no kind, no coupling, and matches no family.
    """
    _check_entries(space, [*prune, *keep])
    reasons = {family.name: _reason(family, prune, keep) for family in space.families}
    chosen: set[str] = set()
    for family in sorted(space.families, key=lambda family: (not _named(family, prune), -_cut(family))):
        clash = chosen.intersection(family.excludes)
        if not reasons[family.name] and clash:
            reasons[family.name] = f"cuts the same indices as {', '.join(sorted(clash))}"
        if not reasons[family.name]:
            chosen.add(family.name)
    families = (replace(f, prunable=not reasons[f.name], reason=reasons[f.name]) for f in space.families)
    return replace(space, families=tuple(families))


def _check_entries(space: PruningSpace, entries: Iterable[str]) -> None:
    for entry in entries:
        if entry in KINDS or entry in COUPLINGS or any(fnmatchcase(f.name, entry) for f in space.families):
            continue
        names = ", ".join(family.name for family in space.families[:6])
        raise GETAError(
            f"the pruning policy names {entry!r}, which is no kind ({', '.join(KINDS)}), no coupling "
            f"({', '.join(COUPLINGS)}) and matches no family; families are called {names or 'nothing here'}, ..."
        )


def _named(family: Family, entries: Iterable[str]) -> bool:
    return any(entry == family.kind or fnmatchcase(family.name, entry) for entry in entries)


def _cut(family: Family) -> int:
    return sum(member.index.numel() for member in family.members)


def _reason(family: Family, prune: Sequence[str], keep: Sequence[str]) -> str:
    """Why a family stays whole; empty when it may be pruned."""
    if family.size < 2:
        return "has a single group, and a family never loses its last one"
    if _named(family, keep) or any(coupling in keep for coupling in family.couplings):
        return "the policy keeps it"
    if _named(family, prune):
        return ""
    if family.kind not in PRUNABLE_KINDS:
        return _WHY_KIND[family.kind]
    obstacles = [coupling for coupling in family.couplings if coupling not in prune]
    return _WHY_COUPLING[obstacles[0]] if obstacles else ""
