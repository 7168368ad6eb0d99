"""Integers that remember where they come from: an attribute of a module, the size of a tensor, or arithmetic on these.

Put in place of a module's attributes while its forward runs, they reach the calls that take sizes with their whole
history, so that one run tells which attribute a size follows from.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor


@dataclass(frozen=True)
class Attribute:
    """An integer that a module holds: `name` may be dotted (`config.num_heads`) and indexed (`split[1]`)."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}".removeprefix(".")


@dataclass(frozen=True)
class Size:
    """The size of one dim of a recorded tensor; `value` is its position in the graph."""

    value: int
    dim: int

    def __str__(self) -> str:
        return f"size({self.dim})"


@dataclass(frozen=True)
class Operation:
    """Integer arithmetic: `function` is the name of a function of the module `operator`."""

    function: str
    operands: tuple[Expression, ...]

    def __str__(self) -> str:
        return f"{self.function}({', '.join(map(str, self.operands))})"


Expression: TypeAlias = "int | Attribute | Size | Operation"


def evaluate(expression: Expression, value_of: Callable[[Attribute | Size], int]) -> int:
    """Return the number that an expression stands for.

    Raises:
        ZeroDivisionError: as the arithmetic would.
    """
    if isinstance(expression, int):
        return int(expression)
    if isinstance(expression, Operation):
        return int(getattr(operator, expression.function)(*(evaluate(e, value_of) for e in expression.operands)))
    return value_of(expression)


def attributes(expression: Expression) -> Iterator[Attribute]:
    """Yield the attributes that an expression depends on."""
    if isinstance(expression, Attribute):
        yield expression
    elif isinstance(expression, Operation):
        for operand in expression.operands:
            yield from attributes(operand)


@dataclass(frozen=True)
class Guard:
    """A comparison that the forward made: with another outcome it might go another way."""

    comparison: str
    left: Expression
    right: Expression
    outcome: bool
    where: str


@dataclass(frozen=True)
class Use:
    """A place where the number itself entered the computation, as a scale does, and not only a size."""

    expression: Expression
    where: str


@dataclass
class Log:
    """What tagged integers met on their way, from `restart` to `close`.

    A function that caches its results may bring integers of an earlier run back; `run` tells them.
    """

    guards: list[Guard] = field(default_factory=list)
    uses: list[Use] = field(default_factory=list)
    run: int | None = 0

    def restart(self) -> None:
        """Drop what was logged so far: a capture that failed is started again, and its reads no longer count."""
        self.guards.clear()
        self.uses.clear()
        self.run = 1 + (self.run or 0)

    def close(self) -> None:
        """Make all tagged integers plain ones from now on: they may live on in caches of the model."""
        self.run = None

    def used(self, number: TaggedInt, others: tuple[Any, ...] = ()) -> None:
        """Log a use of the number itself, unless a tensor takes over, whose call is recorded on its own."""
        expression = self.expression_of(number)
        if not isinstance(expression, int) and not any(isinstance(other, Tensor) for other in others):
            self.uses.append(Use(expression, location()))

    def expression_of(self, number: int) -> Expression:
        """Return the history of a number; a plain one, or one of another run, is a constant."""
        # Attributes are tagged once, with run None, and hold in every run. Sizes name a value of one recorded graph, so
        # they carry the run that made them: in another graph the same place is another tensor.
        live = isinstance(number, TaggedInt) and number.log is self and number.run in (None, self.run)
        return number.expression if live and self.run is not None else int(number)  # type: ignore[attr-defined]


# Folders whose frames lie between the model's code and this log. A folder that is renamed must be renamed here too:
# otherwise, with no error, messages name this package's own lines.
_OWN_CODE = ("/torch/", "/geta_hf/surgery/", "/geta_hf/serialization/", "/geta_hf/qadg/")


def location() -> str:
    """Return file and line of the innermost frame that is neither torch's nor ours."""
    # A refusal should name a line of the model's code, such as modeling_opt.py:142, which the user can look up.
    frame = sys._getframe(1)
    while frame.f_back is not None and any(part in frame.f_code.co_filename for part in _OWN_CODE):
        frame = frame.f_back
    return f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}"


def _arithmetic(name: str) -> Any:
    function = name.strip("_")
    reflected = function.startswith("r")
    plain = function[1:] if reflected else function
    compute = getattr(int, name)

    def method(self: TaggedInt, *others: Any) -> Any:
        result = compute(self, *others)
        # `n * 0.5` and `n * tensor` give NotImplemented here, and Python then asks the other operand.
        if type(result) is not int:  # a float or a tensor: from here on the number is a value and no size
            self.log.used(self, others)
            return result
        operands = tuple(self.log.expression_of(number) for number in (self, *others))
        # Both are constants, as after `close`: there is no history to carry on.
        if all(isinstance(operand, int) for operand in operands):
            return result
        # `5 - n` reaches n as n.__rsub__(5): the operands are stored in the order in which they were written.
        history = Operation(plain, operands[::-1] if reflected else operands)
        return TaggedInt(result, history, self.log, self.log.run)

    return method


def _comparison(name: str) -> Any:
    compute = getattr(int, name)

    def method(self: TaggedInt, other: Any) -> Any:
        outcome = compute(self, other)
        if outcome is not NotImplemented:
            left, right = self.log.expression_of(self), self.log.expression_of(other)
            # Two constants compare the same after any cut, so only a number with a history can change the outcome.
            if not (isinstance(left, int) and isinstance(right, int)):
                self.log.guards.append(Guard(name.strip("_"), left, right, outcome, location()))
        return outcome

    return method


def _divide(self: TaggedInt, other: Any) -> Any:
    result = int.__truediv__(self, other)
    operands = (self.log.expression_of(self), self.log.expression_of(other)) if isinstance(other, TaggedInt) else ()
    if not operands or any(isinstance(operand, int) for operand in operands) or not result.is_integer():
        self.log.used(self, (other,))
        return result
    # `int(hidden_size / heads)` is a size: both numbers may shrink, as long as their quotient does not.
    where = location()
    self.log.uses += [Use(Operation("floordiv", operands), where), Use(Operation("mod", operands), where)]
    return result


def _use(name: str) -> Any:
    compute = getattr(int, name)

    def method(self: TaggedInt, *others: Any) -> Any:
        self.log.used(self, others)
        return compute(self, *others)

    return method


class TaggedInt(int):
    """An int with its history; arithmetic with ints keeps it, and comparisons and true divisions are logged.

    Args:
        value: the number.
        expression: its history.
        log: where comparisons and uses are noted.
        run: of the log, during which alone the history holds; None for any.
    """

    expression: Expression
    log: Log
    run: int | None

    def __new__(cls, value: int, expression: Expression, log: Log, run: int | None = None) -> TaggedInt:
        self = super().__new__(cls, value)
        self.expression = expression
        self.log = log
        self.run = run
        return self

    # A copy is the same number. Configurations are copied while models are built within a forward.
    def __deepcopy__(self, memo: dict[int, Any]) -> TaggedInt:
        return self

    def __copy__(self) -> TaggedInt:
        return self

    def __reduce__(self) -> Any:
        # A pickle outlives the recording, and its log with it.
        return int, (int(self),)

    __hash__ = int.__hash__  # a class that defines __eq__ loses it, and sizes are keys of dicts
    __add__, __radd__ = _arithmetic("__add__"), _arithmetic("__radd__")
    __sub__, __rsub__ = _arithmetic("__sub__"), _arithmetic("__rsub__")
    __mul__, __rmul__ = _arithmetic("__mul__"), _arithmetic("__rmul__")
    __floordiv__, __rfloordiv__ = _arithmetic("__floordiv__"), _arithmetic("__rfloordiv__")
    __mod__, __rmod__ = _arithmetic("__mod__"), _arithmetic("__rmod__")
    __neg__ = _arithmetic("__neg__")
    __eq__, __ne__ = _comparison("__eq__"), _comparison("__ne__")
    __lt__, __le__ = _comparison("__lt__"), _comparison("__le__")
    __gt__, __ge__ = _comparison("__gt__"), _comparison("__ge__")
    # From here on the results are no integers: `head_dim ** -0.5` and `math.sqrt(head_dim)` are scales that the model
    # was trained with, and a cut must not change them.
    __truediv__, __rtruediv__ = _divide, _use("__rtruediv__")
    __pow__, __rpow__ = _use("__pow__"), _use("__rpow__")
    __float__ = _use("__float__")
