"""Say what a family is from the structure alone: its kind, what it is coupled to, its name and its cost.

No name of a module or an architecture has a say. Kinds are read from the marks that the rules set on atoms:

- heads: the batch dim of a product of two activations ("head") that came from splitting another dim ("split");
- head dims: what such a product contracts ("attended");
- residual: a dim along which activations are added ("sum"), if it runs through more than one layer;
- channels: what links the outputs of a weight ("row") with the inputs of another ("column").

The first of these that applies is the kind, as the dims of a head also link the rows of one weight with the columns of
another.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from geta_hf.qadg.families.output_layers import output_weights
from geta_hf.qadg.families.partition import Draft, TensorDim
from geta_hf.qadg.propagation.element_ids import PINNED, Ids
from geta_hf.qadg.propagation.flow import Flow

Mask = NDArray[np.bool_]


def family_of_atoms(drafts: Sequence[Draft], count: int) -> Ids:
    """Return the position of the family of every id, -1 for none; shape (count,)."""
    family = np.full(count, -1, np.int32)
    for position, draft in enumerate(drafts):
        family[draft.atoms] = position
    return family


def find_kinds(flow: Flow, drafts: Sequence[Draft], excludes: dict[int, set[int]]) -> list[str]:
    """Return the kind of every draft, one of `groups.KINDS`."""
    ids = flow.ids
    # In the order of precedence.
    flags: dict[str, Mask] = {
        "heads": ids.marked("head") & ids.marked("split"),
        "head_dim": ids.marked("attended"),
        "residual": ids.marked("sum"),
        "channels": ids.marked("row") & ids.marked("column"),
    }
    kinds = []
    for draft in drafts:
        # `any`: marks are set by single operators, and some of them read only a part of a family's atoms.
        found = [kind for kind, flag in flags.items() if flag[draft.atoms].any()]
        if "residual" in found and not _spans(draft):
            # Activations are also added within a layer, where no residual stream runs.
            found.remove("residual")
        kinds.append(found[0] if found else "other")
    return [_query_heads(position, kinds, drafts, excludes) for position in range(len(drafts))]


def _spans(draft: Draft) -> bool:
    """Return whether a family runs through more than one layer.

    Its tensors then lie in different entries of a list of modules, such as `layers.0.` and `layers.1.`, or in no list
    at all.
    """
    paths = [tensor_dim.value.names[0].split(".")[:-1] for tensor_dim, _ in draft.members]
    common = _common(paths)
    inside_entry = any(part.isdigit() for part in common)
    following = {path[len(common)] for path in paths if len(path) > len(common)}
    entries = sum(part.isdigit() for part in following)
    return not inside_entry or entries > 1


def _query_heads(position: int, kinds: list[str], drafts: Sequence[Draft], excludes: dict[int, set[int]]) -> str:
    """Distinguish heads from query heads, which meet them in the same elements.

    With grouped queries, a view (kv heads, queries per kv head, head dim) gives two families that both look like heads.
    The one that cuts more is the key-value head with its queries. The other, query i of every key-value head at once,
    cuts no keys and values, hence less. Of two that cut the same, the first counts as heads.
    """
    if kinds[position] != "heads":
        return kinds[position]
    # Compared as pairs: what is cut, and of equal ones the smaller position.
    own = (drafts[position].cut, -position)
    for other in excludes.get(position, ()):
        if kinds[other] == "heads" and (drafts[other].cut, -other) > own:
            return "query_heads"
    return "heads"


def find_excludes(tensor_dims: Sequence[TensorDim], family: Ids) -> dict[int, set[int]]:
    """Return for every family those that it meets in an element's product, as they cut the same indices.

    Args:
        tensor_dims: all dims that families cut.
        family: the position of the family of every id, -1 for none; shape (ids,).
    """
    excludes: dict[int, set[int]] = {}
    for tensor_dim in tensor_dims:
        if tensor_dim.table.shape[1] == 1:
            # No element has more than one atom.
            continue
        met = np.where(tensor_dim.table == PINNED, -1, family[tensor_dim.table])
        for first in range(met.shape[1]):
            for second in range(first + 1, met.shape[1]):
                _note_pairs(met[:, first], met[:, second], excludes)
    return excludes


def _note_pairs(left: Ids, right: Ids, excludes: dict[int, set[int]]) -> None:
    """Add the pairs of different families that occur in any row, left[i] and right[i]."""
    both = (left >= 0) & (right >= 0) & (left != right)
    if not both.any():
        return
    # One number for each pair, since unique numbers are found much faster than unique rows.
    base = int(max(left.max(), right.max())) + 1
    codes = left[both].astype(np.int64) * base + right[both]
    for code in np.unique(codes).tolist():
        first, second = divmod(code, base)
        excludes.setdefault(first, set()).add(second)
        excludes.setdefault(second, set()).add(first)


def find_couplings(flow: Flow, drafts: Sequence[Draft]) -> list[tuple[str, ...]]:
    """Return what every draft is coupled to, of `groups.COUPLINGS`: a norm, a tied tensor, an output."""
    norm = flow.ids.marked("norm")
    facing_output = output_weights(flow.graph)
    found = []
    for draft in drafts:
        cut = [tensor_dim for tensor_dim, _ in draft.members]
        couplings = []
        if norm[draft.atoms].any():
            couplings.append("norm")
        # A tied tensor has a second reader, such as the head that shares its weight with the embedding.
        if any(len(tensor_dim.value.names) > 1 for tensor_dim in cut):
            couplings.append("tied")
        if any(tensor_dim.position in facing_output for tensor_dim in cut):
            couplings.append("output")
        found.append(tuple(couplings))
    return found


def find_names(drafts: Sequence[Draft], kinds: Sequence[str]) -> list[str]:
    """Return a unique name for every draft: the longest module path that all members share, and the kind.

    Further families of the same name get #2, #3 and so on, in their order.
    """
    names: list[str] = []
    for draft, kind in zip(drafts, kinds, strict=True):
        paths = [tensor_dim.value.names[0].split(".")[:-1] for tensor_dim, _ in draft.members]
        path = ".".join(_common(paths))
        name = f"{path}:{kind}" if path else kind
        # Two residual streams in one module, say: without a number they could not be told apart in `prune` or a report.
        taken = sum(other == name or other.startswith(f"{name}#") for other in names)
        names.append(f"{name}#{taken + 1}" if taken else name)
    return names


def _common(paths: Sequence[Sequence[str]]) -> list[str]:
    """Return the longest common beginning of several paths."""
    common = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return common


def parameters_per_group(draft: Draft) -> int:
    """Return how many elements of parameters are removed with one group."""
    total = 0
    for tensor_dim, index in draft.members:
        value = tensor_dim.value
        if value.role == "parameter":
            # One row of a (3072, 768) weight is 768 elements, of its bias 1.
            total += index.shape[1] * value.elements // value.shape[tensor_dim.dim]
    return total


def macs_per_group(flow: Flow, drafts: Sequence[Draft], family: Ids) -> list[int]:
    """Return the multiply-accumulates of the recorded batch that are removed with one group, for every draft.

    A contraction shrinks in proportion to each of its dims, so a family that owns a share of a dim's entries owns that
    share of its multiply-accumulates. It is an average over the groups, and what two families share counts for both.
    """
    total = np.zeros(len(drafts))
    for macs, dims in flow.contractions:
        for ids in dims:
            if ids is None:
                continue
            found = family[flow.ids.atoms(ids)]
            # A product of atoms of two families counts for either, since removing it from one side is enough.
            share = np.bincount(found[found >= 0].ravel(), minlength=len(drafts)) / len(ids)
            total += macs * share
    return [round(macs / len(draft.atoms)) for macs, draft in zip(total, drafts, strict=True)]
