"""The union-find with products, against an element-by-element model of what is removed."""

from __future__ import annotations

import numpy as np
import pytest

from geta_hf.qadg.propagation.element_ids import ElementIds, Ids


@pytest.fixture(autouse=True)
def endless_loops_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where `unify` makes no progress, or an id contains itself and so expands for ever, rather than hang."""
    different = ElementIds._different
    find = ElementIds.find
    rounds = 0

    def counted(element_ids: ElementIds, left: Ids, right: Ids) -> tuple[Ids, Ids]:
        nonlocal rounds
        rounds += 1
        assert rounds < 200, "unify makes no progress"
        return different(element_ids, left, right)

    def bounded(element_ids: ElementIds, ids: Ids) -> Ids:
        assert ids.ndim < 2 or ids.shape[1] < 50, "an id expands for ever"
        return find(element_ids, ids)

    monkeypatch.setattr(ElementIds, "_different", counted)
    monkeypatch.setattr(ElementIds, "find", bounded)


def sets(element_ids: ElementIds, ids: np.ndarray) -> list[set[int]]:
    return [set(row.tolist()) - {0} for row in element_ids.atoms(ids)]


def test_fresh_atoms_are_their_own():
    element_ids = ElementIds()
    a, b = element_ids.fresh(3), element_ids.fresh(2)
    assert sets(element_ids, np.concatenate([a, b])) == [{1}, {2}, {3}, {4}, {5}]


def test_unify_joins_and_pinning_spreads():
    element_ids = ElementIds()
    a, b, c = element_ids.fresh(3), element_ids.fresh(3), element_ids.fresh(3)
    element_ids.unify(a, b)
    element_ids.unify(b[:2], c[1:])
    assert (element_ids.find(a[:2]) == element_ids.find(c[1:])).all()
    element_ids.pin(c[2:])
    assert sets(element_ids, np.concatenate([a, b, c])) == [{1}, set(), {3}, {1}, set(), {3}, {7}, {1}, set()]


def test_one_atom_unified_with_many_joins_them_all():
    element_ids = ElementIds()
    a, b = element_ids.fresh(5), element_ids.fresh(1)
    element_ids.unify(a, np.repeat(b, 5))
    assert len(set(element_ids.find(a).tolist())) == 1


def test_a_product_is_outer_times_inner():
    element_ids = ElementIds()
    outer, inner = element_ids.fresh(2), element_ids.fresh(3)
    product = element_ids.product(outer, inner)
    assert element_ids.atoms(product).tolist() == [[1, 3], [1, 4], [1, 5], [2, 3], [2, 4], [2, 5]]


def test_a_pinned_factor_drops_out():
    element_ids = ElementIds()
    outer, inner = element_ids.fresh(2), element_ids.fresh(2)
    product = element_ids.product(outer, inner)
    element_ids.pin(outer[:1])
    assert sets(element_ids, product) == [{3}, {4}, {2, 3}, {2, 4}]
    assert element_ids.product(np.zeros(2, np.int64), inner).tolist() == [3, 4, 3, 4]


def test_binding_atoms_to_a_product_then_meeting_another_product():
    element_ids = ElementIds()
    hidden, other = element_ids.fresh(6), element_ids.fresh(6)
    first = element_ids.product(element_ids.fresh(2), element_ids.fresh(3))
    second = element_ids.product(element_ids.fresh(2), element_ids.fresh(3))
    element_ids.unify(hidden, first)
    element_ids.unify(second, other)
    element_ids.unify(hidden, other)
    assert (
        sets(element_ids, hidden) == sets(element_ids, other) == sets(element_ids, first) == sets(element_ids, second)
    )
    assert len({atom for row in sets(element_ids, hidden) for atom in row}) == 5


def test_the_product_of_an_id_with_itself_is_that_id():
    element_ids = ElementIds()
    a = element_ids.fresh(2)
    assert element_ids.pair(a, a).tolist() == a.tolist()


def test_what_meets_a_pinned_id_is_pinned_on_either_side():
    element_ids = ElementIds()
    pinned, left, right = element_ids.fresh(1), element_ids.fresh(1), element_ids.fresh(1)
    element_ids.pin(pinned)
    element_ids.unify(pinned, right)
    element_ids.unify(left, pinned)
    assert not element_ids.find(np.concatenate([left, right])).any()


def test_two_atoms_that_meet_three_are_joined_with_them_and_pinned_nowhere():
    """(a, b) = (c, d, e) and (a, f) = (c, g, h): no atom of either side can be bound to the other side alone."""
    element_ids = ElementIds()
    a, b, c, d, e, f, g, h = (element_ids.fresh(1) for _ in range(8))
    pairs = np.concatenate([element_ids.pair(a, b), element_ids.pair(a, f)])
    longer = [element_ids.pair(c, element_ids.pair(d, e)), element_ids.pair(c, element_ids.pair(g, h))]
    element_ids.unify(pairs, np.concatenate(longer))
    assert set(element_ids.find(np.concatenate([a, b, c, d, e, f, g, h])).tolist()) == {int(a[0])}


def test_pinning_a_product_pins_its_atoms():
    element_ids = ElementIds()
    outer, inner = element_ids.fresh(2), element_ids.fresh(2)
    product = element_ids.product(outer, inner)
    element_ids.pin(product[:1])
    assert sets(element_ids, product) == [set(), {4}, {2}, {2, 4}]


def test_mismatched_products_join_rather_than_loop():
    element_ids = ElementIds()
    a = element_ids.fresh(1)
    pair = element_ids.pair(a, element_ids.fresh(1))
    triple = element_ids.pair(pair, element_ids.fresh(1))
    element_ids.unify(pair, triple)
    element_ids.unify(a, triple)
    assert sets(element_ids, pair) == sets(element_ids, triple) == sets(element_ids, a)


def test_marks_follow_unions_and_bindings():
    element_ids = ElementIds()
    a, b = element_ids.fresh(2), element_ids.fresh(2)
    element_ids.mark("norm", a)
    element_ids.unify(a, b)
    atom = element_ids.fresh(1)
    element_ids.mark("head", atom)
    outer, inner = element_ids.fresh(1), element_ids.fresh(1)
    element_ids.unify(atom, element_ids.pair(outer, inner))
    assert element_ids.marked("norm")[element_ids.find(b)].all()
    assert element_ids.marked("head")[np.concatenate([outer, inner])].all()
    assert not element_ids.marked("other").any()


def test_random_unifications_agree_with_closure_by_brute_force():
    """Atoms only: classes must be those of plain union-find, pinned where any member is."""
    rng = np.random.default_rng(0)
    element_ids = ElementIds()
    ids = element_ids.fresh(60)
    parent = {i: i for i in [0, *ids.tolist()]}

    def root(x: int) -> int:
        while parent[x] != x:
            x = parent[x]
        return x

    for _ in range(6):
        left, right = rng.choice(ids, 8), rng.choice(ids, 8)
        element_ids.unify(left, right)
        for x, y in zip(left.tolist(), right.tolist(), strict=True):
            low, high = sorted((root(x), root(y)))
            parent[high] = low
    element_ids.pin(ids[:3])
    for x in ids[:3].tolist():
        parent[root(x)] = 0
    assert element_ids.find(ids).tolist() == [root(x) for x in ids.tolist()]


def test_an_atom_that_is_two_products_at_once_is_the_factor_that_they_share():
    element_ids = ElementIds()
    shared, others, atom = element_ids.fresh(1), element_ids.fresh(2), element_ids.fresh(1)
    products = element_ids.pair(np.repeat(shared, 2), others)
    element_ids.unify(np.repeat(atom, 2), products)
    assert sets(element_ids, atom) == sets(element_ids, shared) == [{1}]
    assert sets(element_ids, others) == [set(), set()]
    assert sets(element_ids, products) == [{1}, {1}]


def test_contradictions_are_resolved_for_each_atom_by_itself():
    """Three atoms in one call: of three products, of two, and of a single one that is listed twice."""
    element_ids = ElementIds()
    first, of_first = element_ids.fresh(1), element_ids.fresh(3)
    second, of_second = element_ids.fresh(1), element_ids.fresh(2)
    third, of_third = element_ids.fresh(1), element_ids.fresh(1)
    atoms = element_ids.fresh(3)
    outer = np.concatenate([np.repeat(first, 3), np.repeat(second, 2), np.repeat(third, 2)])
    inner = np.concatenate([of_first, of_second, np.repeat(of_third, 2)])
    element_ids.unify(np.repeat(atoms, [3, 2, 2]), element_ids.pair(outer, inner))
    assert sets(element_ids, atoms) == [{int(first[0])}, {int(second[0])}, {int(third[0]), int(of_third[0])}]
    assert not element_ids.find(np.concatenate([of_first, of_second])).any()


def test_an_atom_of_products_that_share_nothing_joins_them_and_pins_none():
    element_ids = ElementIds()
    outer, inner, atom = element_ids.fresh(2), element_ids.fresh(2), element_ids.fresh(1)
    products = element_ids.pair(outer, inner)
    element_ids.unify(np.repeat(atom, 2), products)
    assert sets(element_ids, atom) == [{int(outer[0]), int(inner[0])}]
    assert sets(element_ids, products) == sets(element_ids, np.repeat(atom, 2))
    assert element_ids.find(outer).all() and element_ids.find(inner).all()


def test_only_what_all_products_share_is_kept_of_an_atom():
    """(1, 2, 3), (1, 2, 4) and (1, 5, 6): 2 is shared by most, but not by all."""
    element_ids = ElementIds()
    factors = element_ids.fresh(6)
    rows = np.array([[1, 2, 3], [1, 2, 4], [1, 5, 6]], np.int32)
    products = element_ids.pair(rows[:, 0], element_ids.pair(rows[:, 1], rows[:, 2]))
    atom = element_ids.fresh(1)
    element_ids.unify(np.repeat(atom, 3), products)
    assert sets(element_ids, atom) == sets(element_ids, factors[:1]) == [{1}]
    assert not element_ids.find(factors[1:]).any()


def test_atoms_without_a_shared_factor_do_not_hide_a_contradiction_of_others():
    """x = three products that share nothing, y = (a, b) and (a, c), z = a product of three."""
    element_ids = ElementIds()
    outer, inner = element_ids.fresh(3), element_ids.fresh(3)
    a, b, c = element_ids.fresh(1), element_ids.fresh(1), element_ids.fresh(1)
    longer = element_ids.pair(element_ids.fresh(1), element_ids.pair(element_ids.fresh(1), element_ids.fresh(1)))
    x, y, z = element_ids.fresh(1), element_ids.fresh(1), element_ids.fresh(1)
    products = np.concatenate([element_ids.pair(outer, inner), element_ids.pair(a, b), element_ids.pair(a, c), longer])
    element_ids.unify(np.concatenate([np.repeat(x, 3), np.repeat(y, 2), z]), products)
    assert sets(element_ids, x) == [{int(outer[0]), int(inner[0])}]
    assert sets(element_ids, y) == [{int(a[0])}]
    assert sets(element_ids, b) == sets(element_ids, c) == [set()]
    assert len(sets(element_ids, z)[0]) == 3


def test_atoms_are_bound_each_to_the_product_in_its_own_row():
    """In descending order, and with products of different lengths: two, three and four factors."""
    element_ids = ElementIds()
    factors = element_ids.fresh(9)
    four = element_ids.pair(element_ids.pair(factors[:1], factors[1:2]), element_ids.pair(factors[2:3], factors[3:4]))
    three = element_ids.pair(factors[4:5], element_ids.pair(factors[5:6], factors[6:7]))
    two = element_ids.pair(factors[7:8], factors[8:9])
    atoms = element_ids.fresh(3)[::-1]
    element_ids.unify(atoms, np.concatenate([four, three, two]))
    assert sets(element_ids, atoms) == [
        set(factors[:4].tolist()),
        set(factors[4:7].tolist()),
        set(factors[7:].tolist()),
    ]


def bound_within(element_ids: ElementIds, atom: int, path: tuple[int, ...] = ()) -> set[int]:
    """The atoms that an id is made of, by walking the bindings; fails where they close a circle."""
    assert atom not in path, f"{atom} is bound to itself through {path}"
    outer, inner = int(element_ids._outer[atom]), int(element_ids._inner[atom])
    if outer == -1:
        return {atom}
    return bound_within(element_ids, outer, (*path, atom)) | bound_within(element_ids, inner, (*path, atom))


def test_bindings_never_close_a_circle():
    """x = (y, 1) and y = (x, 2): the first is bound, and the other waits for the next round."""
    element_ids = ElementIds()
    x, y = element_ids.fresh(1), element_ids.fresh(1)
    others = element_ids.fresh(2)
    atoms, products = np.concatenate([x, y]), np.stack([np.concatenate([y, x]), others], axis=1)
    element_ids._bind(atoms, products)
    assert bound_within(element_ids, int(x[0])) == {int(y[0]), int(others[0])}
    assert bound_within(element_ids, int(y[0])) == {int(y[0])}
    element_ids.unify(y, element_ids.pair(x, others[1:]))
    assert sets(element_ids, x) == sets(element_ids, y)


def test_an_atom_that_is_a_factor_of_another_row_waits_while_the_others_are_bound():
    element_ids = ElementIds()
    x, y, z = element_ids.fresh(1), element_ids.fresh(1), element_ids.fresh(1)
    others = element_ids.fresh(4)
    products = np.array([[y[0], others[0]], [others[1], others[2]], [others[1], others[3]]])
    element_ids._bind(np.concatenate([x, y, z]), products)
    assert bound_within(element_ids, int(x[0])) == {int(y[0]), int(others[0])}
    assert bound_within(element_ids, int(y[0])) == {int(y[0])}
    assert bound_within(element_ids, int(z[0])) == {int(others[1]), int(others[3])}
