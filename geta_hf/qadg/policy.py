"""Choose which families may be pruned: by default, and with switches by kind, coupling or name.

The dependency graph finds every family that could be removed without breaking the forward pass. That is more than one
wants: removing a slice of the residual stream is possible, but changes what every norm divides by. So the default takes
heads and channels alone, which are hidden between two layers, and excludes those with a coupling.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from geta_hf.errors import GETAError
from geta_hf.qadg.group_types import COUPLINGS, KINDS, Family

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


def choose_prunable(
    families: Sequence[Family], prune: Sequence[str] = (), keep: Sequence[str] = ()
) -> tuple[Family, ...]:
    """Return the families with `prunable` and `reason` set, as `geta_hf.qadg.apply_policy` describes.

    Raises:
        GETAError: an entry that is no kind, no coupling, and matches no family.
    """
    _check_entries(families, [*prune, *keep])
    # Kinds and couplings first, each family for itself; then one of those that cut the same indices.
    reasons = {family.name: _reason(family, prune, keep) for family in families}
    chosen: set[str] = set()
    # Named ones first, then those that cut most: heads rather than dims within heads.
    for family in sorted(families, key=lambda family: (not _named(family, prune), -_cut(family))):
        clash = chosen.intersection(family.excludes)
        if not reasons[family.name] and clash:
            reasons[family.name] = f"cuts the same indices as {', '.join(sorted(clash))}"
        if not reasons[family.name]:
            chosen.add(family.name)
    return tuple(replace(f, prunable=not reasons[f.name], reason=reasons[f.name]) for f in families)


def _check_entries(families: Sequence[Family], entries: Iterable[str]) -> None:
    """Raise an error for an entry that has no effect, which is most likely misspelled."""
    for entry in entries:
        if entry in KINDS or entry in COUPLINGS or any(fnmatchcase(f.name, entry) for f in families):
            continue
        names = ", ".join(family.name for family in families[:6])
        raise GETAError(
            f"the pruning policy names {entry!r}, which is no kind ({', '.join(KINDS)}), no coupling "
            f"({', '.join(COUPLINGS)}) and matches no family; families are called {names or 'nothing here'}, ..."
        )


def _named(family: Family, entries: Iterable[str]) -> bool:
    # Patterns match case on every system, as module paths do.
    return any(entry == family.kind or fnmatchcase(family.name, entry) for entry in entries)


def _cut(family: Family) -> int:
    return sum(member.index.numel() for member in family.members)


def _reason(family: Family, prune: Sequence[str], keep: Sequence[str]) -> str:
    """Return why a family is not pruned; empty when it may be."""
    if family.size < 2:
        return "has a single group, and a family never loses its last one"
    # `keep` wins over `prune`, and naming a family wins over its couplings.
    if _named(family, keep) or any(coupling in keep for coupling in family.couplings):
        return "the policy keeps it"
    if _named(family, prune):
        return ""
    if family.kind not in PRUNABLE_KINDS:
        return _WHY_KIND[family.kind]
    obstacles = [coupling for coupling in family.couplings if coupling not in prune]
    return _WHY_COUPLING[obstacles[0]] if obstacles else ""
