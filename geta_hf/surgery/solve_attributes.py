"""Solve equations for the attributes to change: those that a cut forces, and no others.

Most equations name one attribute and settle it at once. The others, such as `heads * head_dim == 24`, have several
solutions: attributes that are settled already are put in, and of the rest one at a time is changed. The search is
deterministic, and a solution that is formally right but not what the model means does not pass the proof after surgery.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TypeAlias

from torch import Tensor

from geta_hf.surgery.size_equations import Demands, Equation, RefusalError, demands
from geta_hf.surgery.size_trace import InconsistentError, SizeTrace, SlicedTrace
from geta_hf.surgery.symbolic_int import Attribute, Expression, Guard, Operation, Size, attributes, evaluate

Values = dict[Attribute, int]
Claim: TypeAlias = Equation | Guard

_MOST_STEPS = 2000  # beyond which a part has no solution in practice; without a bound it could take for ever


def solve(traces: Sequence[SizeTrace], kept: Mapping[str, Mapping[int, Tensor]]) -> Values:
    """Find the attributes that modules must hold after a cut, so that the model's own forward runs on what remains.

    Args:
        traces: recorded forwards of the model, at least one; each may show attributes that the others do not.
        kept: tensor name -> dim -> int64 indices that remain.

    Returns:
        The attributes that change, with their new values.

    Raises:
        RefusalError: no values do, or the model uses a number that changes for more than a size.
    """
    asked = [demands(cut) for cut in _cuts(traces, kept)]
    original = {attribute: value for trace in traces for attribute, value in trace.original.items()}
    # Layers and recordings repeat each other's equations. In a dict they keep their order, so that the search, which
    # takes the first solution, finds the same one in every run.
    equations = list(dict.fromkeys(equation for one in asked for equation in one.equations))
    guards = list(dict.fromkeys(guard for one in asked for guard in one.guards))
    # A quotient that is used as a number stays the same only if its operands change together.
    quotients = [use for use in dict.fromkeys(use for one in asked for use in one.uses) if _is_quotient(use)]
    values = _direct(equations, original)
    # 12 layers of two unknowns are 12 small searches, and not one over 24 unknowns.
    for part, its_guards in _parts(equations, [*quotients, *guards]):
        values.update(_Search(part, its_guards, original).run(values))
    _check_uses(asked, original | values)
    return {attribute: value for attribute, value in values.items() if value != original[attribute]}


def _cuts(traces: Sequence[SizeTrace], kept: Mapping[str, Mapping[int, Tensor]]) -> Iterator[SlicedTrace]:
    yield SlicedTrace(traces[0], kept)
    for trace in traces[1:]:
        # An operator that only this forward uses may pin what is removed; this recording then has nothing to say.
        with suppress(InconsistentError):
            yield SlicedTrace(trace, kept)


def _direct(equations: Iterable[Equation], original: Values) -> Values:
    """Settle the attributes that an equation gives alone, whether they change or not."""
    values: Values = {}
    reasons: dict[Attribute, str] = {}
    for equation in equations:
        expression = equation.expression
        # No attribute has a part in it: a literal in the code, such as view(-1, 12, 64).
        if isinstance(expression, int) and expression != equation.wanted:
            raise RefusalError(f"{equation.where}: the code fixes {expression}, where {equation.wanted} is needed")
        if isinstance(expression, Attribute):
            value = values.setdefault(expression, equation.wanted)
            reason = reasons.setdefault(expression, equation.where)
            if value != equation.wanted:
                raise RefusalError(
                    f"{expression} must be {value} for {reason}, but {equation.wanted} for {equation.where}"
                )
    return values


def _is_quotient(use: Equation) -> bool:
    return isinstance(use.expression, Operation) and use.expression.function in ("floordiv", "mod")


def _names(claim: Claim) -> list[Attribute]:
    if isinstance(claim, Equation):
        return list(attributes(claim.expression))
    return [*attributes(claim.left), *attributes(claim.right)]


def _parts(equations: Iterable[Equation], wishes: Iterable[Claim]) -> Iterator[tuple[list[Equation], list[Claim]]]:
    """Yield equations and wishes that share attributes, part by part, so that each search stays small."""
    parent: dict[Attribute, Attribute] = {}

    def root(attribute: Attribute) -> Attribute:
        while parent.setdefault(attribute, attribute) != attribute:
            attribute = parent[attribute]
        return attribute

    # An equation of constants alone has no part; these come under None, where the search can only check them.
    rows = [(equation, _names(equation)) for equation in equations]
    conditions = [(wish, _names(wish)) for wish in wishes]
    for _, names in [*rows, *conditions]:
        for name in names[1:]:
            parent[root(name)] = root(names[0])
    parts: dict[Attribute | None, tuple[list[Equation], list[Claim]]] = {}
    for equation, names in rows:
        parts.setdefault(root(names[0]) if names else None, ([], []))[0].append(equation)
    for wish, names in conditions:
        parts.setdefault(root(names[0]) if names else None, ([], []))[1].append(wish)
    yield from parts.values()


class _Search:
    """Settle the equations of one part in turn, each by the smallest change: one attribute not settled yet.

    Then wishes that would not come true are mended in the same way: quotients that are used as numbers, and
    comparisons. Those that cannot be mended are ignored: a quotient is checked afterwards, and a forward that takes
    another branch, as with a single head, need not be wrong, and the proof will show it.
    """

    def __init__(self, equations: list[Equation], wishes: list[Claim], original: Values) -> None:
        self.equations = equations
        self.wishes = wishes
        self.original = original
        self.steps = 0
        self.reason = ""

    def run(self, settled: Values) -> Values:
        """Return the attributes settled before, and those of this part.

        Raises:
            RefusalError: there is an equation that no attribute can settle.
        """
        found = self._extend(settled)
        if found is None:
            raise RefusalError(self.reason)
        return found

    def _extend(self, settled: Values) -> Values | None:
        self.steps += 1
        for equation in self.equations:
            if not self._holds(equation, settled):
                # The first complaint is the cause; what fails after it, deeper in the search, often only follows from
                # it.
                self.reason = self.reason or self._complaint(equation, settled)
                return self._mend(equation, _names(equation), settled)
        for wish in self.wishes:
            if not self._holds(wish, settled):
                # A comparison such as `q_heads != kv_heads` decides a branch. Holding its outcome prefers the solution
                # under which the model runs the code that was recorded.
                mended = self._mend(wish, _names(wish), settled)
                return settled if mended is None else mended
        return settled

    def _mend(self, wrong: Claim, names: Iterable[Attribute], settled: Values) -> Values | None:
        for name in dict.fromkeys(names):
            if name in settled:
                continue
            # A cut makes no size larger, and 0 would leave a module without elements.
            for value in range(1, self.original[name] + 1):
                trial = {**settled, name: value}
                if self._holds(wrong, trial) and self.steps < _MOST_STEPS:
                    found = self._extend(trial)
                    if found is not None:
                        return found
        return None

    def _holds(self, claim: Claim, settled: Values) -> bool:
        if isinstance(claim, Equation):
            return self._value(claim.expression, settled) == claim.wanted
        left, right = self._value(claim.left, settled), self._value(claim.right, settled)
        # None comes from a division by 0, and fits no outcome.
        comparable = left is not None and right is not None
        return comparable and getattr(operator, claim.comparison)(left, right) == claim.outcome

    def _complaint(self, equation: Equation, settled: Values) -> str:
        found = self._value(equation.expression, settled)
        return (
            f"{equation.where}: {equation.expression} comes to {found}, where {equation.wanted} is needed, and no "
            f"attribute can be changed for it"
        )

    def _value(self, expression: Expression, settled: Values) -> int | None:
        def look_up(leaf: Attribute | Size) -> int:
            assert isinstance(leaf, Attribute)
            return settled[leaf] if leaf in settled else self.original[leaf]

        try:
            return evaluate(expression, look_up)
        except ZeroDivisionError:
            return None


def _check_uses(asked: Iterable[Demands], values: Values) -> None:
    for use in dict.fromkeys(use for one in asked for use in one.uses):
        found = evaluate(use.expression, lambda leaf: values[leaf])  # type: ignore[index]
        if found != use.wanted:
            raise RefusalError(
                f"{use.where} computes with the number {use.wanted}, which would become {found}: more than a size "
                f"changes"
            )
