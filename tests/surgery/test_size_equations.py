"""What a call demands of its numbers once slices are removed, against what torch itself does with them."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from geta_hf.qadg.tracing.graph import Ref
from geta_hf.surgery.size_equations import RULES, RefusalError, _moved, _uses, fold
from geta_hf.surgery.size_trace import Call
from geta_hf.surgery.symbolic_int import Attribute, Log, Operation, Size, TaggedInt

LENGTH = 6


def call(name: str, *args: Any, outputs: int = 1, **kwargs: Any) -> Call:
    """A recorded call whose outputs come after its inputs."""
    first = sum(isinstance(item, Ref) for item in (*args, *kwargs.values()))
    return Call(name, args, kwargs, tuple(Ref(first + place) for place in range(outputs)), "layer", "model.py:1")


class Sliced:
    """Stands for a sliced trace: shapes before and after, by value."""

    def __init__(self, *shapes: tuple[tuple[int, ...], tuple[int, ...]], masks: dict[Any, list[int]] | None = None):
        self.before = [before for before, _ in shapes]
        self.after = [after for _, after in shapes]
        self.masks = masks or {}
        self.flow = SimpleNamespace(shape=lambda ref: self.before[ref.value])
        self.trace = SimpleNamespace(original={})

    def sizes(self, ref: Ref) -> list[int]:
        return list(self.after[ref.value])

    def size(self, ref: Ref, dim: int) -> int:
        return self.after[ref.value][dim]

    def mask(self, ref: Ref, dim: int) -> np.ndarray | None:
        mask = self.masks.get((ref.value, dim), self.masks.get(ref.value))
        return None if mask is None else np.array(mask, bool)

    def free(self, ref: Ref, dim: int) -> bool:
        return False


def demanded(recorded: Call, sliced: Sliced) -> list[tuple[int, int]]:
    return [(int(number), wanted) for number, wanted in RULES[recorded.name](recorded, sliced)]  # type: ignore[arg-type]


# --- indexing -----------------------------------------------------------------------------------------------------


def moved(item: Any, mask: np.ndarray) -> Any:
    """The index or slice with its numbers replaced by what is demanded of them."""
    wanted = {int(number): place for number, place in _moved(call("__getitem__"), item, mask)}
    if not isinstance(item, slice):
        return wanted[item]
    bounds = [None if bound is None else wanted.get(bound, bound) for bound in (item.start, item.stop)]
    return slice(*bounds, item.step)


@pytest.mark.parametrize("mask", list(itertools.product([False, True], repeat=LENGTH))[1:])
def test_slices_select_what_remains_of_what_they_selected(mask: tuple[bool, ...]) -> None:
    """Every slice of every mask: the same elements less the removed ones, or a refusal where no slice does that."""
    remains = np.array(mask)
    elements = np.arange(LENGTH)
    for start, stop, step in itertools.product((None, 0, 1, 2, -2), (None, 3, 5, -1), (None, 1, 2, 3)):
        item = slice(start, stop, step)
        expected = [element for element in elements[item] if remains[element]]
        try:
            found = elements[remains][moved(item, remains)].tolist()
        except RefusalError:
            # A bound that counts from the end cannot say "nothing": -0 is 0.
            nothing = any(bound is not None and bound < 0 and not remains[bound:].any() for bound in (start, stop))
            assert step in (2, 3) or nothing
            continue
        assert found == expected, item


def test_a_stride_is_followed_where_what_it_skips_leaves_evenly() -> None:
    pairs = np.array([True, True, False, False, True, True])
    assert moved(slice(None, None, 2), pairs) == slice(None, None, 2)
    assert moved(slice(1, None, 2), pairs) == slice(1, None, 2)


@pytest.mark.parametrize(
    ("item", "mask"),
    [
        (slice(None, None, 2), [1, 0, 1, 1, 1, 1]),  # one of a pair leaves
        (slice(1, None, 2), [1, 0, 1, 1, 1, 1]),
        (slice(None, 4, 2), [1, 1, 0, 0, 1, 1]),  # bounds of a strided slice do not move
    ],
)
def test_a_stride_that_would_skip_others_is_refused(item: slice, mask: list[int]) -> None:
    remains = np.array(mask, bool)
    with pytest.raises(RefusalError, match=rf"the stride of {item.step} at model.py:1 would skip other elements"):
        moved(item, remains)


@pytest.mark.parametrize("mask", list(itertools.product([False, True], repeat=LENGTH))[1:])
def test_a_stride_of_plain_numbers_is_refused_just_where_it_takes_others(mask: tuple[bool, ...]) -> None:
    remains = np.array(mask)
    elements = np.arange(LENGTH)
    for item in (slice(start, stop, step) for start in (None, 0, 1, -5) for stop in (None, 4, -1) for step in (2, 3)):
        expected = [element for element in elements[item] if remains[element]]
        if elements[remains][item].tolist() == expected:
            assert list(_moved(call("__getitem__"), item, remains)) == []
        else:
            with pytest.raises(RefusalError, match="would skip other elements"):
                list(_moved(call("__getitem__"), item, remains))


@pytest.mark.parametrize("mask", list(itertools.product([False, True], repeat=LENGTH))[1:])
def test_attributes_behind_a_stride_follow_wherever_any_numbers_would_do(mask: tuple[bool, ...]) -> None:
    """Against all starts, stops and steps there are; those of `x[head::heads]` all come from attributes."""
    remains = np.array(mask)
    elements, log = np.arange(LENGTH), Log()
    for start, stop, step in itertools.product((0, 1, 2), (LENGTH, 4), (2, 3)):
        numbers = [TaggedInt(n, Attribute("layer", w), log) for n, w in zip((start, stop, step), "abc", strict=True)]
        expected = [element for element in elements[start:stop:step] if remains[element]]
        try:
            found = [wanted for _, wanted in _moved(call("__getitem__"), slice(*numbers), remains)]
        except RefusalError:
            some = itertools.product(range(LENGTH), range(LENGTH + 1), range(1, LENGTH))
            assert not any(elements[remains][slice(*choice)].tolist() == expected for choice in some)
            continue
        assert elements[remains][slice(*found)].tolist() == expected


def test_an_interleaved_pair_at_either_end_is_followed() -> None:
    for mask in ([0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 0, 0]):
        for start in (None, 0, 1):
            assert list(_moved(call("__getitem__"), slice(start, None, 2), np.array(mask, bool))) == []


def test_the_number_of_heads_as_a_stride_follows_the_heads() -> None:
    """Of x[1::heads], two heads of three: element 1 of every three, of which the first is removed."""
    log = Log()
    heads = TaggedInt(3, Attribute("layer", "heads"), log)
    mask = np.array([0, 1, 1, 0, 1, 1], bool)
    wanted = list(_moved(call("__getitem__"), slice(TaggedInt(1, Attribute("layer", "head"), log), None, heads), mask))
    assert [new for _, new in wanted] == [0, 2]
    mask = np.array([1, 1, 0, 1, 1, 0], bool)
    assert [new for _, new in _moved(call("__getitem__"), slice(1, None, heads), mask)] == [2]


def test_an_index_moves_with_what_remains_before_it() -> None:
    remains = np.array([True, False, True, True, False, True])
    assert [moved(place, remains) for place in (0, 2, 3, 5, -1, -3)] == [0, 1, 2, 3, -1, -2]
    for place in (1, 4, -2):
        with pytest.raises(RefusalError, match=f"index {place} at model.py:1 reads an element that is removed"):
            moved(place, remains)


def test_a_tagged_bound_beyond_the_end_stays_as_far_beyond() -> None:
    """A slice to 8 of 6 elements takes all: the attribute behind the 8 must not become smaller than what remains."""
    number = TaggedInt(8, Attribute("layer", "width"), Log())
    remains = np.array([True, False, True, True, False, True])
    assert [(int(n), wanted) for n, wanted in _moved(call("__getitem__"), slice(None, number), remains)] == [(8, 6)]
    assert list(_moved(call("__getitem__"), slice(None, 8), remains)) == []


def test_a_tagged_place_along_a_dim_that_is_not_cut_does_not_move() -> None:
    number = TaggedInt(2, Attribute("layer", "place"), Log())
    sliced = Sliced(((6, 4), (6, 4)), ((2, 4), (2, 4)))
    assert demanded(call("__getitem__", Ref(0), slice(None, number)), sliced) == [(2, 2)]
    assert demanded(call("__getitem__", Ref(0), slice(None, 2)), sliced) == []


def test_places_count_along_their_own_dim() -> None:
    def wanted(*index: Any) -> list[tuple[int, int]]:
        sliced = Sliced(
            ((6, 7), (5, 6)), ((1,), (1,)), masks={(0, 0): [1, 0, 1, 1, 1, 1], (0, 1): [0, 0, 1, 1, 1, 1, 1]}
        )
        return demanded(call("__getitem__", Ref(0), index), sliced)

    assert wanted(4) == [(4, 3)]
    assert wanted(None, 4) == [(4, 3)]
    assert wanted(4, None, 4) == [(4, 3), (4, 2)]
    assert wanted(..., 4) == [(4, 2)]
    assert wanted([0, 4], 4) == wanted(True, 4) == wanted(Ref(0), 4) == []  # chosen by content


# --- convolutions and norms of groups -----------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
def test_groups_of_a_convolution_are_refused_just_where_torch_refuses_them(transposed: bool) -> None:
    name = "conv_transpose1d" if transposed else "conv1d"
    run = getattr(torch.nn.functional, name)
    refused = 0
    for inputs, outputs, group in itertools.product((4, 6, 8, 9), (4, 6, 8, 9), (1, 2, 3)):
        # The first dim of a weight holds all outputs (all inputs where transposed), the second those of one group.
        weight = (inputs, group, 3) if transposed else (outputs, group, 3)
        recorded = call(name, Ref(0), Ref(1), groups=2)
        sliced = Sliced(((1, 12, 7), (1, inputs, 7)), ((12, 6, 3), weight), ((1, 12, 7), (1, outputs, 7)))
        try:
            ((_, groups),) = demanded(recorded, sliced)
        except RefusalError as error:
            assert "channels into no whole groups" in str(error)
            refused += 1
            counts = range(1, 10)
        else:
            counts = range(groups, groups + 1)
        fits = [
            count for count in counts if runs(run, torch.zeros(1, inputs, 7), torch.zeros(weight), count, (1, outputs))
        ]
        assert bool(fits) == (len(counts) == 1), (inputs, outputs, group)
    assert refused > 10


def runs(function: Any, x: torch.Tensor, weight: torch.Tensor, groups: int, shape: tuple[int, int]) -> bool:
    """Whether a convolution accepts the tensors and gives so many channels."""
    try:
        return tuple(function(x, weight, groups=groups).shape[:2]) == shape
    except RuntimeError:
        return False


def test_a_convolution_without_groups_demands_nothing() -> None:
    sliced = Sliced(((1, 12, 7), (1, 5, 7)), ((12, 12, 3), (7, 5, 3)), ((1, 12, 7), (1, 7, 7)))
    assert demanded(call("conv1d", Ref(0), Ref(1)), sliced) == []
    assert demanded(call("conv1d", Ref(0), Ref(1), groups=1), sliced) == []


def test_norms_of_groups_lose_whole_groups_or_equally_much_of_each() -> None:
    def norm(*mask: int) -> list[tuple[int, int]]:
        sliced = Sliced(((1, 6, 2), (1, sum(mask), 2)), ((1, 6, 2), (1, sum(mask), 2)), masks={0: list(mask)})
        return demanded(call("group_norm", Ref(0), 3), sliced)

    assert norm(1, 1, 0, 0, 1, 1) == [(3, 2)]
    assert norm(1, 0, 0, 1, 1, 0) == [(3, 3)]
    with pytest.raises(RefusalError, match=r"groups of \[2, 1, 2\] channels cannot be normalised together"):
        norm(1, 1, 1, 0, 1, 1)


# --- repeats, parts, ranges ---------------------------------------------------------------------------------------


def test_what_is_repeated_must_divide() -> None:
    def repeat(before: int, after: int) -> list[tuple[int, int]]:
        recorded = call("repeat_interleave", Ref(0), 3, dim=1)
        return demanded(recorded, Sliced(((2, 4), (2, before)), ((2, 12), (2, after))))

    assert repeat(2, 6) == [(3, 3)]
    assert repeat(2, 4) == [(3, 2)]
    for before, after in ((2, 5), (4, 6), (0, 6)):
        with pytest.raises(RefusalError, match=f"{before} elements cannot be repeated to {after}"):
            repeat(before, after)


def test_repeat_counts_new_dims_too() -> None:
    recorded = call("repeat", Ref(0), 2, 1, 3)
    assert demanded(recorded, Sliced(((4, 5), (4, 3)), ((2, 4, 15), (2, 4, 6)))) == [(2, 2), (1, 1), (3, 2)]


def test_chunks_stay_equal_or_are_refused() -> None:
    def chunk(*sizes: int) -> list[tuple[int, int]]:
        shapes = [((2, 8), (2, sum(sizes)))] + [((2, 4), (2, size)) for size in sizes]
        return demanded(call("chunk", Ref(0), 2, dim=1, outputs=2), Sliced(*shapes))

    assert chunk(3, 3) == []
    with pytest.raises(RefusalError, match=r"chunk at model.py:1 gives equal parts, but \[3, 2\] elements of them"):
        chunk(3, 2)


def test_the_last_part_of_a_split_may_be_smaller() -> None:
    shapes = [((7,), (5,)), ((4,), (3,)), ((3,), (2,))]
    assert demanded(call("split", Ref(0), 4, outputs=2), Sliced(*shapes)) == [(4, 3)]
    assert demanded(call("split", Ref(0), [4, 3], outputs=2), Sliced(*shapes)) == [(4, 3), (3, 2)]


def test_a_range_loses_its_last_elements_alone() -> None:
    number = TaggedInt(6, Attribute("layer", "width"), Log())

    def arange(*args: int, mask: list[int]) -> list[tuple[int, int]]:
        return demanded(call("arange", *args), Sliced(((6,), (sum(mask),)), masks={0: mask}))

    assert arange(number, mask=[1, 1, 1, 1, 0, 0]) == [(6, 4)]
    for args, mask in (((number,), [0, 1, 1, 1, 1, 1]), ((0, number), [1, 1, 1, 1, 0, 0])):
        with pytest.raises(RefusalError, match=r"arange at model\.py:1: its content cannot lose other elements"):
            arange(*args, mask=mask)
    unchanged = Sliced(((6,), (6,)))
    assert demanded(call("arange", number), unchanged) == [(6, 6)]  # it must not follow another size
    assert demanded(call("arange", 6), unchanged) == []


def test_a_narrowed_part_starts_where_it_did() -> None:
    sliced = Sliced(((6,), (4,)), ((3,), (2,)), masks={0: [1, 0, 1, 0, 1, 1]})
    assert demanded(call("narrow", Ref(0), 0, 2, 3), sliced) == [(2, 1), (3, 2)]


def test_attention_of_torch_takes_no_other_sizes() -> None:
    full = Sliced(((2, 4), (2, 4)), ((2, 4), (2, 4)))
    assert demanded(call("multi_head_attention_forward", Ref(0)), full) == []
    with pytest.raises(RefusalError, match="no heads of another size"):
        demanded(call("multi_head_attention_forward", Ref(0)), Sliced(((2, 4), (2, 3)), ((2, 4), (2, 4))))


# --- numbers ------------------------------------------------------------------------------------------------------


def test_sizes_in_a_history_are_those_after_the_cut() -> None:
    log, width = Log(), Attribute("layer", "width")
    sliced: Any = Sliced(((2, 12), (2, 8)))
    size = Size(0, 1)
    assert fold(TaggedInt(12, size, log), sliced) == 8
    assert fold(TaggedInt(24, Operation("mul", (2, size)), log), sliced) == 16
    mixed = Operation("floordiv", (size, width))
    assert fold(TaggedInt(4, mixed, log), sliced) == Operation("floordiv", (8, width))
    by_zero = Operation("floordiv", (size, 0))
    assert fold(TaggedInt(4, by_zero, log), sliced) == Operation("floordiv", (8, 0))
    assert fold(7, sliced) == 7


def test_layers_of_torch_name_their_own_groups() -> None:
    sliced = Sliced(((1, 12, 7), (1, 8, 7)), ((12, 1, 3), (8, 1, 3)), ((1, 12, 7), (1, 8, 7)))
    own = Attribute("layer", "groups")
    sliced.trace.original[own] = 12
    recorded = call("conv1d", Ref(0), Ref(1), groups=12)
    assert list(RULES["conv1d"](recorded, sliced)) == [(own, 8)]  # type: ignore[arg-type]
    sliced.trace.original[own] = 6  # another number than the layer's: a constant of the code
    assert list(RULES["conv1d"](recorded, sliced)) == [(12, 8)]  # type: ignore[arg-type]


def test_a_new_tensor_that_nothing_reads_may_have_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    sliced = Sliced(((6,), (4,)))
    assert demanded(call("zeros", 6), sliced) == [(6, 4)]
    monkeypatch.setattr(sliced, "free", lambda ref, dim: True)
    assert demanded(call("zeros", 6), sliced) == []


def test_only_a_default_scale_follows_the_size_of_a_head() -> None:
    def uses(*args: Any, **kwargs: Any) -> int:
        return len(list(_uses(call("scaled_dot_product_attention", Ref(0), Ref(0), Ref(0), *args, **kwargs))))

    assert uses() == 1
    assert uses(scale=0.5) == 0
    assert uses(None, 0.0, False, 0.5) == 0  # the scale by position
    assert uses(None, 0.0, False) == 1
