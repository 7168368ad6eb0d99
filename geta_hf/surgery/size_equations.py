"""Write down what every call that takes sizes demands of the numbers it is given, once slices are removed.

One rule per torch function: it reads the recorded call and yields (number, what it must be). A number is a constant of
the code or an expression in the modules' attributes; `solve` finds the attributes to change from these equations.

The sizes that are wanted come from the propagated graph, never from the numbers themselves, so an equation is
independent of how the code computes its sizes. What no change of attributes can make right is refused here, with the
place in the model's code: a stride that would skip other elements, channels that no longer divide into groups, an
`arange` whose content is used and that loses more than its end (ALiBi slopes, sinusoids).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geta_hf.errors import GETAError
from geta_hf.qadg.tracing.graph import Ref
from geta_hf.surgery.size_trace import UNKNOWN, Call, SlicedTrace
from geta_hf.surgery.symbolic_int import Attribute, Expression, Guard, Operation, Size, TaggedInt, Use, evaluate

Demand = tuple[Any, int]
"""A number of the call, plain or tagged, and what it must be."""


class RefusalError(GETAError):
    """The model's code cannot follow a cut; the message says where and why."""


@dataclass(frozen=True)
class Equation:
    """`expression`, in attributes alone, must come to `wanted`."""

    expression: Expression
    wanted: int
    where: str


@dataclass
class Demands:
    """Everything that one cut asks of the attributes.

    Attributes:
        equations: sizes that must come out right.
        guards: comparisons that must come out as they did.
        uses: numbers in the arithmetic, with the value they had, which must not change.
    """

    equations: list[Equation]
    guards: list[Guard]
    uses: list[Equation]


def demands(sliced: SlicedTrace) -> Demands:
    """Collect what a cut asks of the attributes of the model, by the forward that was recorded.

    Raises:
        RefusalError: a call that no change of attributes can make right.
    """
    trace = sliced.trace
    # A tensor that no recorded operator made (UNKNOWN) has no ids, so nothing is known of its sizes after the cut.
    calls = [c for c in trace.calls if not any(item is UNKNOWN for item in (*c.args, *c.kwargs.values()))]

    # What a number was in the recording, which a number used as a scale must still be after the cut.
    def old(leaf: Attribute | Size) -> int:
        return trace.original[leaf] if isinstance(leaf, Attribute) else sliced.flow.shape(Ref(leaf.value))[leaf.dim]

    equations = [
        Equation(fold(number, sliced), wanted, f"{call.name} at {call.where} in {call.module or 'the model'}")
        for call in calls
        if call.name in RULES
        for number, wanted in RULES[call.name](call, sliced)
        if isinstance(number, int | Attribute)  # and not a tensor, whose content is the model's affair
    ]
    guards = [
        Guard(g.comparison, fold(g.left, sliced), fold(g.right, sliced), g.outcome, g.where)
        for g in dict.fromkeys(trace.log.guards)
    ]
    uses = chain(trace.log.uses, (use for call in calls for use in _uses(call)))
    fixed = [Equation(fold(u.expression, sliced), evaluate(u.expression, old), u.where) for u in dict.fromkeys(uses)]
    return Demands(list(dict.fromkeys(equations)), guards, fixed)


def fold(number: Any, sliced: SlicedTrace) -> Expression:
    """Replace every size in a number by what it is after the cut, so that only attributes remain."""
    expression = number.expression if isinstance(number, TaggedInt) else number
    if isinstance(expression, Size):
        return sliced.size(Ref(expression.value), expression.dim)
    if not isinstance(expression, Operation):
        return expression
    operands = tuple(fold(operand, sliced) for operand in expression.operands)
    folded = Operation(expression.function, operands)
    # A division by 0 is kept as it is: the search then finds that it has no value, and refuses with a reason.
    if all(isinstance(operand, int) for operand in operands) and not (
        expression.function in ("floordiv", "mod") and operands[1] == 0
    ):
        return evaluate(folded, lambda _: 0)
    return folded


# Where a tensor is multiplied by a number, or a number by a tensor, the number is more than a size: a scale of
# 1 / sqrt(head_dim) belongs to what was trained, and must not follow when head_dim shrinks.
_OPERATORS = ("mul", "div", "true_divide", "add", "sub", "rsub", "pow", "floor_divide", "remainder", "fmod", "truediv")
_ARITHMETIC = frozenset(
    [name for plain in _OPERATORS for name in (plain, f"__{plain}__", f"__r{plain}__")]
    + ["multiply", "divide", "subtract", "tensor", "full", "new_full", "full_like", "linspace"]
)


def _uses(call: Call) -> Iterator[Use]:
    """Yield the numbers of a call that enter its result as themselves."""
    if call.name == "scaled_dot_product_attention":
        # Without a scale torch takes 1 / sqrt(head_dim) from the query itself, which would change with head_dim.
        if call.kwargs.get("scale") is None and len(call.args) < 7:
            query = call.args[0] if call.args else call.kwargs["query"]
            yield Use(Size(query.value, -1), f"the default scale at {call.where}")
    elif call.name in _ARITHMETIC:
        # The size that a factory is given goes through its rule: full(size, value), tensor.new_full(size, value).
        skipped = {"full": 1, "new_full": 2}.get(call.name, 0)
        for item in chain(call.args[skipped:], call.kwargs.values()):
            if isinstance(item, TaggedInt):
                yield Use(item.expression, f"{call.name} at {call.where}")


def _given(call: Call, place: int, *names: str) -> Any:
    """Return an argument by position or by one of its names; None when it was not given."""
    if len(call.args) > place:
        return call.args[place]
    return next((call.kwargs[name] for name in names if name in call.kwargs), None)


def _numbers(call: Call, start: int) -> Sequence[Any]:
    """Return sizes given one by one, as one sequence, or by name; -1 for whatever is no number."""
    given = call.args[start:] or tuple(call.kwargs[n] for n in ("size", "shape", "sizes", "dims") if n in call.kwargs)
    flat = given[0] if given and isinstance(given[0], list | tuple) else given
    return [number if isinstance(number, int) else -1 for number in flat]


def _sizes(numbers: Iterable[Any], sizes: Iterable[int]) -> Iterator[Demand]:
    """Demand that every number is the size next to it; -1 follows by itself."""
    for number, size in zip(numbers, sizes, strict=True):
        if int(number) != -1:
            yield number, size


def _view(call: Call, sliced: SlicedTrace) -> Iterator[Demand]:
    numbers, sizes = _numbers(call, 1), sliced.sizes(call.outputs[0])
    if len(numbers) == len(sizes):  # not so where a view changes the type of the elements
        yield from _sizes(numbers, sizes)


def _factory(start: int) -> Callable[[Call, SlicedTrace], Iterator[Demand]]:
    def rule(call: Call, sliced: SlicedTrace) -> Iterator[Demand]:
        numbers = _numbers(call, start)
        if len(numbers) == len(sliced.flow.shape(call.outputs[0])):
            yield from _made(numbers, call, sliced)

    return rule


def _made(numbers: Iterable[Any], call: Call, sliced: SlicedTrace) -> Iterator[Demand]:
    """Demand the sizes of a new tensor, except those that nothing in this forward depends on."""
    for dim, number in enumerate(numbers):
        if isinstance(number, int) and int(number) != -1 and not sliced.free(call.outputs[0], dim):
            yield number, sliced.size(call.outputs[0], dim)


def _full(call: Call, sliced: SlicedTrace) -> Iterator[Demand]:
    size = _given(call, 0 if call.name == "full" else 1, "size")
    yield from _made(size, call, sliced) if isinstance(size, list | tuple) else ()


def _repeat(call: Call, sliced: SlicedTrace) -> Iterator[Demand]:
    numbers = _numbers(call, 1)
    before = sliced.sizes(call.args[0])
    after = sliced.sizes(call.outputs[0])
    # More numbers than dims put new dims in front, as if the tensor had had dims of size 1 there.
    before = [1] * (len(after) - len(before)) + before
    for dim, number in enumerate(numbers, start=len(after) - len(numbers)):
        if int(number) != -1 and not sliced.free(call.outputs[0], dim):
            yield number, _quotient(call, after[dim], before[dim])


def _repeat_interleave(call: Call, sliced: SlicedTrace) -> Iterator[Demand]:
    repeats, dim = _given(call, 1, "repeats"), _given(call, 2, "dim")
    if isinstance(repeats, int) and dim is not None:
        yield repeats, _quotient(call, sliced.size(call.outputs[0], dim), sliced.size(call.args[0], dim))


def _quotient(call: Call, whole: int, part: int) -> int:
    if part == 0 or whole % part:
        raise RefusalError(f"{call.name} at {call.where}: {part} elements cannot be repeated to {whole}")
    return whole // part


def _split(call: Call, sliced: SlicedTrace) -> Iterator[Demand]:
    numbers, dim = _given(call, 1, "split_size_or_sections", "split_size", "split_sizes"), _given(call, 2, "dim") or 0
    sizes = [sliced.size(output, dim) for output in call.outputs]
    if isinstance(numbers, int):
        # The last part may be shorter, so it says nothing about the number unless it is the only one.
        numbers = [numbers] * max(1, len(sizes) - 1)
        sizes = sizes[: len(numbers)]
    yield from zip(numbers, sizes, strict=True)


def _chunk(call: Call, sliced: SlicedTrace) -> Iterator[Demand]:
    dim = _given(call, 2, "dim") or 0
    sizes = [sliced.size(output, dim) for output in call.outputs]
    # The number of parts is a literal that no cut changes, so equal parts must lose equally many elements.
    if len(set(sizes)) > 1 and sizes != [sliced.flow.shape(output)[dim] for output in call.outputs]:
        raise RefusalError(f"chunk at {call.where} gives equal parts, but {sizes} elements of them remain")
    yield from ()


def _unflatten(call: Call, sliced: SlicedTrace) -> Iterator[Demand]:
    numbers = _given(call, 2, "sizes")
    start = int(_given(call, 1, "dim")) % len(sliced.flow.shape(call.args[0]))
    yield from _sizes(numbers, sliced.sizes(call.outputs[0])[start : start + len(numbers)])


def _narrow(call: Call, sliced: SlicedTrace) -> Iterator[Demand]:
    dim = _given(call, 1, "dim")
    start = _given(call, 2, "start")
    length = _given(call, 3, "length")
    mask = sliced.mask(call.args[0], dim)
    if isinstance(start, int):
        yield start, int(start) if mask is None else int(mask[: int(start)].sum())
    yield length, sliced.size(call.outputs[0], dim)


def _arange(call: Call, sliced: SlicedTrace) -> Iterator[Demand]:
    mask = sliced.mask(call.outputs[0], 0)
    if mask is None:
        if len(call.args) == 1 and isinstance(call.args[0], TaggedInt):
            yield call.args[0], int(call.args[0])
        return
    remaining = int(mask.sum())
    # arange(n - 2) is what remains of arange(n) only if the last two were removed: [0, 1, 3] is no arange.
    if len(call.args) != 1 or not mask[:remaining].all():
        raise RefusalError(f"arange at {call.where}: its content cannot lose other elements than the last ones")
    yield call.args[0], remaining


def _item(call: Call, sliced: SlicedTrace) -> Iterator[Demand]:
    """Move bounds and places along a dim that is cut with what remains before them."""
    source = call.args[0]
    index = call.args[1] if isinstance(call.args[1], tuple) else (call.args[1],)
    # Indexed by a tensor, a list or a bool, a tensor has no bounds that could come from an attribute.
    if any(isinstance(item, Ref | list | bool) for item in index):
        return
    dim = 0
    rank = len(sliced.flow.shape(source))
    # In x[..., :d] the ellipsis takes every dim that no other item does; a None takes none.
    used = sum(item is not None and item is not Ellipsis for item in index)
    for item in index:
        if item is Ellipsis:
            dim += rank - used
        elif item is not None:
            mask = sliced.mask(source, dim)
            yield from _unmoved(item) if mask is None else _moved(call, item, mask)
            dim += 1


def _bounds(item: Any) -> list[Any]:
    bounds = [item.start, item.stop] if isinstance(item, slice) else [item]
    return [bound for bound in bounds if isinstance(bound, int)]


def _unmoved(item: Any) -> Iterator[Demand]:
    for number in _bounds(item):
        if isinstance(number, TaggedInt):
            yield number, int(number)


def _moved(call: Call, item: Any, mask: NDArray[np.bool_]) -> Iterator[Demand]:
    if isinstance(item, slice) and item.step not in (None, 1):
        yield from _strided(call, item, mask)
    elif isinstance(item, slice):
        for number in _bounds(item):
            place = int(number)
            wanted = _remaining_before(number, mask)
            if wanted is None:
                continue
            if place < 0 and wanted == 0:  # which would count from the start
                raise RefusalError(f"the bound {place} at {call.where} counts from the end, where nothing remains")
            yield number, wanted
    elif isinstance(item, int):
        place = int(item)
        if not mask[place]:
            raise RefusalError(f"index {place} at {call.where} reads an element that is removed")
        yield item, int(mask[:place].sum()) if place >= 0 else -int(mask[place:].sum())


def _remaining_before(number: int, mask: NDArray[np.bool_]) -> int | None:
    """Return where a bound is after the cut; None for one that may remain as it is, beyond either end.

    With the mask [1, 1, 0, 1], the bound 3 becomes 2: as many elements remain before it. A bound beyond the end, such
    as sys.maxsize, holds as it is, unless an attribute has to go on being as far beyond.
    """
    place = int(number)
    if place >= 0 and (place < len(mask) or isinstance(number, TaggedInt)):
        return int(mask[:place].sum()) + max(0, place - len(mask))
    return -int(mask[place:].sum()) if 0 > place > -len(mask) else None


def _strided(call: Call, item: slice, mask: NDArray[np.bool_]) -> Iterator[Demand]:
    """Demand numbers with which a slice takes, of what remains, just the elements that it took before.

    Start, stop and step depend on each other: interleaved pairs, [1::2], keep their start when the first pair is
    removed, although one element less remains before it.
    """
    taken = np.zeros(len(mask), np.bool_)
    taken[item] = True
    places = np.flatnonzero(taken[mask]).tolist()
    remaining = range(int(mask.sum()))
    numbers = (item.start, item.stop, item.step)
    for choice in product(*(_candidates(number, mask, places, role) for role, number in enumerate(numbers))):
        if choice[2] != 0 and list(remaining[slice(*choice)]) == places:
            # Numbers that an attribute is behind must come to this; the others are the same as before.
            yield from ((old, new) for old, new in zip(numbers, choice, strict=True) if isinstance(old, TaggedInt))
            return
    raise RefusalError(f"the stride of {int(item.step)} at {call.where} would skip other elements than before")


def _candidates(number: Any, mask: NDArray[np.bool_], places: Sequence[int], role: int) -> list[Any]:
    """Return what the start (role 0), stop (1) or step (2) of a slice can be after a cut, likely ones first.

    A number that the code itself contains cannot change.
    """
    if not isinstance(number, TaggedInt):
        return [None if number is None else int(number)]
    found = [int(number)]
    if role == 2:
        step = [places[1] - places[0]] if len(places) > 1 else []
        return list(dict.fromkeys([*step, *found]))
    # Of -2 * n no attribute makes a number that counts from the start, so what counts from the end goes on doing so.
    origin = int(mask.sum()) if int(number) < 0 else 0
    moved = _remaining_before(number, mask)
    found = [*([] if moved is None else [moved]), *found]
    if role == 0:
        # Without any element to take, a start beyond the end is right.
        found.insert(0 if places else len(found), (places[0] if places else int(mask.sum())) - origin)
    elif places:
        found.append(places[-1] + 1 - origin)
    return list(dict.fromkeys(found))


def _convolution(call: Call, sliced: SlicedTrace) -> Iterator[Demand]:
    groups, weight = _given(call, 6, "groups"), sliced.sizes(_given(call, 1, "weight"))
    if groups is None or int(groups) == 1:
        return
    source, output = _given(call, 0, "input"), call.outputs[0]
    transposed = call.name.startswith("conv_transpose")
    # `groups` is what the channels and the weight leave no choice about; a remainder means that some group would lose
    # more channels than another, which one weight tensor cannot hold.
    # The weight's second dim holds the channels of one group: inputs, or outputs where transposed.
    channels = [sliced.size(ref, len(sliced.flow.shape(ref)) + 1 - len(weight)) for ref in (source, output)]
    divided, other = channels[::-1] if transposed else channels
    wanted, rest = divmod(divided, weight[1])
    if rest or other % wanted:
        raise RefusalError(
            f"{call.module}: a weight of shape {tuple(weight)} divides {channels[0]} channels into no whole groups"
        )
    yield _own(call, sliced, "groups", groups), wanted


def _group_norm(call: Call, sliced: SlicedTrace) -> Iterator[Demand]:
    source, groups = _given(call, 0, "input"), _given(call, 1, "num_groups")
    mask = sliced.mask(source, 1)
    if mask is None:
        return
    # 8 channels in 4 groups: [2, 2, 0, 2] becomes 3 groups of 2, but no number of groups gives [2, 1, 2, 2].
    remaining = mask.reshape(int(groups), -1).sum(axis=1)
    if len(set(remaining[remaining > 0].tolist())) > 1:
        raise RefusalError(f"{call.module}: groups of {remaining.tolist()} channels cannot be normalised together")
    yield _own(call, sliced, "num_groups", groups), int((remaining > 0).sum())


def _own(call: Call, sliced: SlicedTrace, name: str, number: Any) -> Any:
    """Return the attribute that an untagged layer of torch.nn passes on as a number; else the number itself."""
    attribute = Attribute(call.module, name)
    plain = not isinstance(number, TaggedInt) and sliced.trace.original.get(attribute) == number
    return attribute if plain else number


def _layer_norm(call: Call, sliced: SlicedTrace) -> Iterator[Demand]:
    numbers = _given(call, 1, "normalized_shape")
    sizes = sliced.sizes(call.outputs[0])[-len(numbers) :]
    # Plain numbers are those of torch.nn's own layers, which follow their weights.
    yield from ((number, size) for number, size in zip(numbers, sizes, strict=True) if isinstance(number, TaggedInt))


def _attention(call: Call, sliced: SlicedTrace) -> Iterator[Demand]:
    for ref in call.args:
        if isinstance(ref, Ref) and tuple(sliced.sizes(ref)) != sliced.flow.shape(ref):
            raise RefusalError(
                f"{call.module}: nn.MultiheadAttention has no heads of another size than its inputs give"
            )
    yield from ()


Rule = Callable[[Call, SlicedTrace], Iterator[Demand]]

_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")

RULES: dict[str, Rule] = {
    **dict.fromkeys(("view", "reshape"), _view),
    **dict.fromkeys(("expand", "broadcast_to"), _factory(1)),
    **dict.fromkeys(("zeros", "ones", "empty", "rand", "randn"), _factory(0)),
    **dict.fromkeys(("new_zeros", "new_ones", "new_empty"), _factory(1)),
    **dict.fromkeys(("full", "new_full"), _full),
    **dict.fromkeys(("repeat", "tile"), _repeat),
    **dict.fromkeys(("split", "split_with_sizes"), _split),
    **dict.fromkeys(_CONVOLUTIONS, _convolution),
    **dict.fromkeys(("layer_norm", "rms_norm"), _layer_norm),
    "repeat_interleave": _repeat_interleave,
    "chunk": _chunk,
    "multi_head_attention_forward": _attention,
    "unflatten": _unflatten,
    "narrow": _narrow,
    "arange": _arange,
    "__getitem__": _item,
    "group_norm": _group_norm,
}
"""Torch functions whose arguments are sizes or places, with the rule of each. One without a rule says nothing."""

WANTED = frozenset([*RULES, *_ARITHMETIC, "scaled_dot_product_attention"])
"""The torch functions whose calls a trace has to record."""
