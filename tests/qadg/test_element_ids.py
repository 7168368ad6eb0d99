"""The union-find with product terms, against an element-by-element model of what leaves."""

from __future__ import annotations

import numpy as np

from geta_hf.qadg.propagation.element_ids import ElementIds


def sets(terms: ElementIds, ids: np.ndarray) -> list[set[int]]:
    return [set(row.tolist()) - {0} for row in terms.atoms(ids)]


def test_fresh_atoms_are_their_own():
    terms = ElementIds()
    a, b = terms.fresh(3), terms.fresh(2)
    assert sets(terms, np.concatenate([a, b])) == [{1}, {2}, {3}, {4}, {5}]


def test_unify_joins_and_freezing_spreads():
    terms = ElementIds()
    a, b, c = terms.fresh(3), terms.fresh(3), terms.fresh(3)
    terms.unify(a, b)
    terms.unify(b[:2], c[1:])
    assert (terms.find(a[:2]) == terms.find(c[1:])).all()
    terms.pin(c[2:])
    assert sets(terms, np.concatenate([a, b, c])) == [{1}, set(), {3}, {1}, set(), {3}, {7}, {1}, set()]


def test_one_atom_unified_with_many_joins_them_all():
    terms = ElementIds()
    a, b = terms.fresh(5), terms.fresh(1)
    terms.unify(a, np.repeat(b, 5))
    assert len(set(terms.find(a).tolist())) == 1


def test_a_product_is_outer_times_inner():
    terms = ElementIds()
    outer, inner = terms.fresh(2), terms.fresh(3)
    product = terms.product(outer, inner)
    assert terms.atoms(product).tolist() == [[1, 3], [1, 4], [1, 5], [2, 3], [2, 4], [2, 5]]


def test_a_frozen_factor_drops_out():
    terms = ElementIds()
    outer, inner = terms.fresh(2), terms.fresh(2)
    product = terms.product(outer, inner)
    terms.pin(outer[:1])
    assert sets(terms, product) == [{3}, {4}, {2, 3}, {2, 4}]
    assert terms.product(np.zeros(2, np.int64), inner).tolist() == [3, 4, 3, 4]


def test_binding_atoms_to_a_product_then_meeting_another_product():
    terms = ElementIds()
    hidden, other = terms.fresh(6), terms.fresh(6)
    first = terms.product(terms.fresh(2), terms.fresh(3))
    second = terms.product(terms.fresh(2), terms.fresh(3))
    terms.unify(hidden, first)
    terms.unify(second, other)
    terms.unify(hidden, other)
    assert sets(terms, hidden) == sets(terms, other) == sets(terms, first) == sets(terms, second)
    assert len({atom for row in sets(terms, hidden) for atom in row}) == 5


def test_freezing_a_term_freezes_its_atoms():
    terms = ElementIds()
    outer, inner = terms.fresh(2), terms.fresh(2)
    product = terms.product(outer, inner)
    terms.pin(product[:1])
    assert sets(terms, product) == [set(), {4}, {2}, {2, 4}]


def test_mismatched_products_join_rather_than_loop():
    terms = ElementIds()
    a = terms.fresh(1)
    pair = terms.pair(a, terms.fresh(1))
    triple = terms.pair(pair, terms.fresh(1))
    terms.unify(pair, triple)
    terms.unify(a, triple)
    assert sets(terms, pair) == sets(terms, triple) == sets(terms, a)


def test_marks_follow_unions_and_bindings():
    terms = ElementIds()
    a, b = terms.fresh(2), terms.fresh(2)
    terms.mark("norm", a)
    terms.unify(a, b)
    atom = terms.fresh(1)
    terms.mark("head", atom)
    outer, inner = terms.fresh(1), terms.fresh(1)
    terms.unify(atom, terms.pair(outer, inner))
    assert terms.marked("norm")[terms.find(b)].all()
    assert terms.marked("head")[np.concatenate([outer, inner])].all()
    assert not terms.marked("other").any()


def test_random_unifications_agree_with_closure_by_brute_force():
    """Atoms only: classes must be those of plain union-find, frozen where any member is."""
    rng = np.random.default_rng(0)
    terms = ElementIds()
    ids = terms.fresh(60)
    parent = {i: i for i in [0, *ids.tolist()]}

    def root(x: int) -> int:
        while parent[x] != x:
            x = parent[x]
        return x

    for _ in range(6):
        left, right = rng.choice(ids, 8), rng.choice(ids, 8)
        terms.unify(left, right)
        for x, y in zip(left.tolist(), right.tolist(), strict=True):
            low, high = sorted((root(x), root(y)))
            parent[high] = low
    terms.pin(ids[:3])
    for x in ids[:3].tolist():
        parent[root(x)] = 0
    assert terms.find(ids).tolist() == [root(x) for x in ids.tolist()]
