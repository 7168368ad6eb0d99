"""Write one self-contained HTML page that draws the dependency graph after branch merging.

The page shows plain data (`page_data`); `graph_page.html` and its scripts draw it.
"""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from geta_hf.errors import GETAError
from geta_hf.qadg.group_types import Family, Member, UnsupportedOperator
from geta_hf.qadg.propagation.element_ids import PINNED, ElementIds, Ids
from geta_hf.qadg.propagation.flow import Dim, Flow
from geta_hf.qadg.space import PruningSpace
from geta_hf.qadg.tracing.graph import Graph, Node
from geta_hf.utils.files import write_whole

SHOWN_ROWS, SHOWN_INDICES = 2, 6
"""Number of groups of a member, and of indices of each, that the page lists."""

NUMBER = re.compile(r"(?<![^.#])\d+(?![^.:#])")
_SCRIPTS = ("graph_page_layout.js", "graph_page_panel.js", "graph_page.js")


def pattern(name: str) -> str:
    """Return a family's or module's name with every layer number as `*`: `model.layers.*.mlp:channels`."""
    return NUMBER.sub("*", name)


def span(names: Sequence[str]) -> str:
    """Return one name for several of the same `pattern`: `model.layers.{0..31}.mlp:channels`, or `{0,2,4}`."""
    if not names:
        return ""
    # One column for each place of a number in the pattern, filled in the order in which `sub` comes to them.
    columns = iter(zip(*(map(int, NUMBER.findall(name)) for name in names), strict=True))
    return NUMBER.sub(lambda _: _numbers(set(next(columns))), names[0])


def _numbers(found: set[int]) -> str:
    ordered = sorted(found)
    if len(ordered) == 1:
        return str(ordered[0])
    if ordered == list(range(ordered[0], ordered[-1] + 1)):
        return f"{{{ordered[0]}..{ordered[-1]}}}"
    return "{" + ",".join(map(str, ordered)) + "}"


def gather(names: Iterable[str]) -> list[str]:
    """Return the `span` of every `pattern` among `names`, in order of first occurrence."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(pattern(name), []).append(name)
    return [span(same) for same in alike.values()]


def gather_unsupported(space: PruningSpace) -> list[tuple[UnsupportedOperator, str]]:
    """Collect the unsupported operators; equal ones in several layers are one entry.

    Returns:
        The first of each kind, with the count of all, and the `span` of their modules.
    """
    alike: dict[tuple[str, str, str], list[UnsupportedOperator]] = {}
    for found in space.unsupported:
        alike.setdefault((found.operator, pattern(found.module), found.reason), []).append(found)
    return [
        (replace(same[0], count=sum(one.count for one in same)), span([one.module for one in same]))
        for same in alike.values()
    ]


def write_page(flow: Flow, space: PruningSpace, path: str | os.PathLike[str], title: str) -> None:
    """Draw the dependency graph as one self-contained HTML file, and replace `path` in one step.

    Args:
        flow: of `qadg.propagation.propagate.record_and_propagate`: after branch merging (paper Alg. 1, lines 3-14).
        space: the families of the same flow.
        path: the file to write; its folder must exist.
        title: the page's heading, any text.

    Raises:
        GETAError: the folder of `path` does not exist, or `path` is a folder.
    """
    target = Path(path)
    if not target.parent.is_dir() or target.is_dir():
        raise GETAError(f"cannot write a page to {target}: name a file in a folder that exists")
    parts = {
        "title": html.escape(title.encode(errors="replace").decode()),
        # Inside a script element, where HTML's own escapes do not count.
        "data": _embedded(page_data(flow, space, title)),
        "script": "\n".join(_packaged(name) for name in _SCRIPTS),
    }
    write_whole(target, re.sub(r"{{(\w+)}}", lambda hole: parts[hole[1]], _packaged("graph_page.html")))


def _packaged(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _embedded(data: dict[str, Any]) -> str:
    """Return JSON that cannot end the surrounding script element, whatever names it contains."""
    # A module's name comes from the model's code and may hold anything, `</script>` included.
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def page_data(flow: Flow, space: PruningSpace, title: str) -> dict[str, Any]:
    """Return what the page draws, as JSON-ready data.

    Args:
        flow: the propagated graph.
        space: its families.
        title: the page's heading.

    Returns:
        `vertices`: one for each node of the graph, in order: operator, module, the block it is drawn in, the named
        tensors it reads, its outputs as (value, shape, families of each dim), its families, and why it is unsupported.
        `edges`: (value, from vertex, to vertex). `families`: with members, each as tensor, dim, width (indices a
        group) and the first rows. `frozen`, `untouched`. Families are referred to by their position.
    """
    owners = _Owners(flow, space)
    reasons = {(frozen.operator, frozen.module): frozen.reason for frozen in space.unsupported}
    places = _blocks(flow.graph)
    nodes = zip(flow.graph.nodes, places, strict=True)
    return {
        "title": title,
        "vertices": [_vertex(flow, node, block, owners, reasons) for node, block in nodes],
        "edges": _edges(flow.graph),
        "families": _families(space),
        "frozen": [_frozen(first, modules) for first, modules in gather_unsupported(space)],
        "untouched": gather(space.untouched),
        "covered": space.coverage(),
        "prunable": space.coverage(prunable_only=True),
    }


class _Owners:
    """Find the families to which the ids of a dim belong."""

    def __init__(self, flow: Flow, space: PruningSpace) -> None:
        self._flow = flow
        self._known: dict[int, list[int]] = {}
        named = {value.names[0]: position for position, value in enumerate(flow.graph.values) if value.names}
        atoms = [_family_atoms(flow, family, named) for family in space.families]
        # An atom may be in several families (head and head dim), so the table has as many columns as the most of
        # them. It is one array, since a large model has millions of atoms.
        depth = np.zeros(flow.ids.count, np.int64)
        for own in atoms:
            depth[own] += 1
        self._table = np.full((flow.ids.count, max(1, int(depth.max(initial=0)))), -1)
        # Backwards, so that the families of an atom are in ascending order.
        for position, own in reversed(list(enumerate(atoms))):
            depth[own] -= 1
            self._table[own, depth[own]] = position

    def of(self, ids: Dim) -> list[int]:
        """Return the families of the elements of a dim, ascending; an ids array that dims share is read once."""
        if ids is None:
            return []
        # The arrays live as long as the flow, so no id is given twice.
        if id(ids) not in self._known:
            found = np.unique(self._table[self._flow.ids.atoms(ids)])
            self._known[id(ids)] = [int(position) for position in found if position >= 0]
        return self._known[id(ids)]

    def of_value(self, value: int) -> list[list[int]]:
        """Return the families of every dim of a value."""
        if not self._flow.known(value):  # `dims` would create ids for a value that no rule reached
            return [[] for _ in self._flow.graph.values[value].shape]
        return [self.of(ids) for ids in self._flow.dims(value)]


def _family_atoms(flow: Flow, family: Family, tensors: dict[str, int]) -> Ids:
    """Return the atoms that make a family's groups.

    An element may carry the atoms of other families too (a head's and a head-dim's), so an atom counts only when it is
    in every index of its group, for one member after the other until no group has a choice.
    """
    common: Ids | None = None
    for member in family.members:
        ids = flow.dims(tensors[member.tensor])[member.dim]
        assert ids is not None, f"{family.name} cuts {member.tensor} where it is frozen"
        own = _group_atoms(flow.ids, ids, member)
        if common is not None:
            own = np.where((own[:, :, None] == common[:, None, :]).any(axis=2), own, PINNED)
        common = own
        if ((common != PINNED).sum(axis=1) <= 1).all():
            break
    assert common is not None
    return np.unique(common[common != PINNED])


def _group_atoms(terms: ElementIds, ids: Ids, member: Member) -> Ids:
    """Return for every group the atoms that all of its indices carry, 0 elsewhere; shape (groups, k)."""
    index = member.index.numpy()
    table = terms.atoms(ids[index.ravel()]).reshape(*index.shape, -1)
    first = table[:, 0]
    everywhere = (table[:, :, None, :] == first[:, None, :, None]).any(axis=3).all(axis=1)
    return np.where(everywhere, first, PINNED)


def _vertex(flow: Flow, node: Node, block: str, owners: _Owners, reasons: dict[tuple[str, str], str]) -> dict[str, Any]:
    values = flow.graph.values
    read = list(dict.fromkeys(node.refs()))
    dims = {value: owners.of_value(value) for value in (*node.outputs, *read)}
    families = sorted({family for value in node.outputs for dim in dims[value] for family in dim})
    # What has neither weights nor families, such as masks and positions, pins nothing of interest.
    learned = any(values[value].from_parameter for value in (*read, *node.outputs))
    return {
        "op": node.op,
        "module": node.module,
        "block": block,
        "reads": [[v, list(values[v].shape), dims[v], *values[v].names] for v in read if values[v].names],
        "outputs": [[v, list(values[v].shape), dims[v]] for v in node.outputs],
        "families": families,
        "learned": learned or bool(families),
        "frozen": reasons.get((node.op, node.module), "") if learned else "",
        "body": [inner.op for inner in node.body],
        "returned": any(value in flow.graph.outputs for value in node.outputs),
    }


def _edges(graph: Graph) -> list[list[int]]:
    """Return (value, from, to); the producer of a value that is written in place is its last writer so far."""
    made: dict[int, int] = {}
    edges = []
    for position, node in enumerate(graph.nodes):
        edges += [[value, made[value], position] for value in dict.fromkeys(node.refs()) if value in made]
        made.update(dict.fromkeys(node.outputs, position))
    return edges


def _blocks(graph: Graph) -> list[str]:
    """Return the module in which each vertex is drawn: its own, or for a merged quantizer branch that of its layer."""
    made = graph.producers()
    readers = graph.consumers()
    blocks = []
    for node in graph.nodes:
        block = node.module
        if node.op == "attached":
            block = _weight_module(graph, made, node) or block
        # A quantizer of an input belongs to the layer that reads its output.
        elif node.op == "inserted":
            reader = readers.get(node.outputs[0], [])
            block = graph.nodes[reader[0]].module if reader else block
        blocks.append(block)
    return blocks


def _weight_module(graph: Graph, made: dict[int, int], node: Node) -> str:
    """Return the module whose parameter a weight quantizer reads, directly or through reshapes."""
    pending = [node.inputs["source"].value]
    while pending:
        value = pending.pop()
        if graph.values[value].role == "parameter":
            return graph.values[value].names[0].rpartition(".")[0]
        if value in made:
            pending += graph.nodes[made[value]].refs()
    return ""


def _families(space: PruningSpace) -> list[dict[str, Any]]:
    alike: dict[tuple[object, ...], list[str]] = {}
    for family in space.families:
        alike.setdefault(_likeness(family), []).append(family.name)
    legend = {key: span(names) for key, names in alike.items()}
    return [_family(family, legend[_likeness(family)]) for family in space.families]


def _likeness(family: Family) -> tuple[object, ...]:
    return pattern(family.name), family.size, family.prunable


def _family(family: Family, legend: str) -> dict[str, Any]:
    return {
        "name": family.name,
        "legend": legend,
        "kind": family.kind,
        "groups": family.size,
        "prunable": family.prunable,
        "reason": family.reason,
        "excludes": sorted(set(map(pattern, family.excludes))),
        "parameters": family.parameters,
        "macs": family.macs,
        "members": [_member(member) for member in family.members],
    }


def _member(member: Member) -> dict[str, Any]:
    rows = member.index[:SHOWN_ROWS, :SHOWN_INDICES].tolist()
    return {"tensor": member.tensor, "dim": member.dim, "width": member.index.shape[1], "rows": rows}


def _frozen(frozen: UnsupportedOperator, modules: str) -> dict[str, Any]:
    first = frozen.module
    count = frozen.count
    return {"op": frozen.operator, "module": first, "modules": modules, "reason": frozen.reason, "count": count}
