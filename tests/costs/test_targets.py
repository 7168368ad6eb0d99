"""Targets: counted by hand on the toy, solved before training, met at the end, refused with what is reachable."""

from __future__ import annotations

import re

import pytest
import torch

from geta_hf.costs.ledger import LayerEntry, Ledger
from geta_hf.costs.selection import Limits
from geta_hf.costs.targets import most_removed, solve_target
from geta_hf.errors import GETAError
from geta_hf.qadg.group_types import Family
from geta_hf.quantization import quantize, quantized_layers
from tests.methods.qasso.toy import STEPS, Toy, make, small_config, toy_space, train_step

WEIGHTS = [96, 96, 48, 48]
# A head of `heads` is 3 rows of 8, 3 biases and 3 columns of 8; a channel a third of that.
HEAD, CHANNEL = 51, 17


def ledger(**changes: object) -> Ledger:
    shapes = {name: tuple(p.shape) for name, p in Toy().named_parameters()}
    layers = [LayerEntry(f"layers.{i}.weight", uses=1.0) for i in range(4)]
    values: dict = {"item_bytes": dict.fromkeys(shapes, 4)}
    return Ledger.of(toy_space().families, shapes, layers, **{**values, **changes})


def mask(*numbers: int) -> torch.Tensor:
    gone = torch.zeros(10, dtype=torch.bool)
    gone[list(numbers)] = True
    return gone


def test_amounts_counted_by_hand() -> None:
    book = ledger()
    assert book.prunable_parameters(book.nothing) == 4 * HEAD + 6 * CHANNEL
    assert book.prunable_parameters(mask(0, 5)) == 3 * HEAD + 5 * CHANNEL
    assert book.weights(mask(0, 5)).tolist() == [72, 72, 40, 40]
    bits = torch.tensor([4.0, 8, 8, 2])
    expected = (72 * 4 + 72 * 8 + 40 * 8 + 40 * 2) * 8 / (288 * 32 * 32)
    assert book.relative_bops(mask(0, 5), bits, 8) == pytest.approx(expected)


def test_uses_weigh_bops_but_not_bytes() -> None:
    shapes = {name: tuple(p.shape) for name, p in Toy().named_parameters()}
    layers = [LayerEntry(f"layers.{i}.weight", uses=use) for i, use in enumerate([1.0, 0.5, 1.0, 1.0])]
    book = Ledger.of(toy_space().families, shapes, layers)
    assert book.relative_bops(book.nothing, torch.tensor([4.0, 32, 32, 32])) == pytest.approx(
        (96 * 4 + 192 / 2 * 16 + 96 * 32 - 96 / 2 * 0 + 0) / ((96 + 48 + 96) * 32)
    )


def test_a_tensor_cut_along_both_dims_counts_what_is_left_of_it() -> None:
    shapes = {"w": (4, 6)}
    rows = Family("rows", "heads", (_member("w", 0, [[0], [1], [2], [3]]),), prunable=True)
    columns = Family("columns", "channels", (_member("w", 1, [[0, 1], [2, 3], [4, 5]]),), prunable=True)
    book = Ledger.of((rows, columns), shapes, [LayerEntry("w")])
    gone = torch.tensor([True, False, False, False, True, False, False])
    assert book.weights(gone).tolist() == [3 * 4] and book.prunable_parameters(gone) == 12


def _member(tensor: str, dim: int, index: list[list[int]]):
    from geta_hf.qadg.group_types import Member

    return Member(tensor, dim, torch.tensor(index))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_sparsity": 0.9}, r"K = 9 of 10 groups.*at most 8 can go.*lower target_sparsity to 0\.8"),
        ({"target_sparsity": 0.6, "min_kept": 0.5}, "at most 5 can go"),
        ({"target_parameters": 0.9}, r"hold 68: lower it to 0\.777"),
        ({"target_bops": 0.01}, r"target_bops = 0\.01 can't be reached.*4 bits it is 0\.02\d+"),
        (
            {"target_bops": 0.05, "mean_bits": 8},
            r"at their least, at 8 bits it is 0\.05\d*; raise it, or lower bits, mean_bits or",
        ),
        ({"target_bytes": 100}, "target_bytes = 100 can't be reached"),
        (
            {"target_sparsity": 0.5, "target_bops": 0.03},
            "with all that is to be pruned removed, at 4 bits it is 0.06.*; raise it, or lower bits, or prune more",
        ),
    ],
)
def test_what_cannot_be_reached_is_said_with_what_can(changes: dict, message: str) -> None:
    config = small_config(**{"target_sparsity": None, **changes})
    with pytest.raises(GETAError, match=message):
        solve_target(config, toy_space().families, ledger())


@pytest.mark.parametrize("min_kept", [1, 2, 3, 0.25, 0.4])
def test_the_reachable_figure_that_a_message_names_is_reachable(min_kept: float) -> None:
    families, book = toy_space().families, ledger()

    def solve(**changes: float):
        return solve_target(small_config(target_sparsity=None, min_kept=min_kept, **changes), families, book)

    whole = book.prunable_parameters(book.nothing)
    rest = book.prunable_parameters(most_removed(families, Limits(min_kept)))
    assert solve(target_parameters=1 - rest / whole).amount == pytest.approx(rest)
    for unreachable, pattern in (
        ({"target_bops": 1e-3}, r"bits it is ([\d.]+)"),
        ({"target_bytes": 9}, r"it is ([\d,]+)"),
    ):
        with pytest.raises(GETAError) as caught:
            solve(**unreachable)
        figure = re.search(pattern, str(caught.value))[1].rstrip(".").replace(",", "")
        solve(**{name: type(value)(figure) for name, value in unreachable.items()})


@pytest.mark.parametrize(
    ("changes", "figure"),
    [
        ({"target_bytes": 10**6}, "8 bits it is"),
        ({"target_bops": 0.24, "mean_bits": 5}, r"5 bits it is 0\.1563"),
        ({"target_bops": 0.24, "target_sparsity": 0.4}, r"8 bits it is 0\.1"),
    ],
)
def test_a_size_that_limits_nothing_is_said(caplog, changes: dict, figure: str) -> None:
    solve_target(small_config(**{"target_sparsity": None, **changes}), toy_space().families, ledger())
    assert re.search(rf"limits nothing.*{figure}", caplog.text)
    caplog.clear()
    solve_target(small_config(target_sparsity=None, target_bops=0.2), toy_space().families, ledger())
    assert not caplog.text


def test_a_size_alone_is_pruned_for_the_middle_width_and_narrower_ones_only_where_half_is_not_enough() -> None:
    families, book = toy_space().families, ledger()

    def solved(bops: float):
        return solve_target(small_config(target_sparsity=None, target_bops=bops), families, book)

    assert solved(0.15).bits == 6 and solved(0.1).bits == 6
    assert 4 < solved(0.08).bits < 6 and solved(0.05).bits == 4
    assert solved(0.24).bits == 6 and solved(0.24).remaining(book, book.nothing) <= 0.24  # widths fill what is left


TARGETS = {
    "groups": {"target_sparsity": 0.4},
    "groups and mean bits": {"target_sparsity": 0.4, "mean_bits": 5.2},
    "parameters": {"target_parameters": 0.4},
    "parameters and bops": {"target_parameters": 0.4, "target_bops": 0.09},
    "bops": {"target_bops": 0.09},
    "bops and mean bits": {"target_bops": 0.08, "mean_bits": 5},
    "more bops than mean bits ask for": {"target_bops": 0.2, "mean_bits": 5},
    "choices": {"target_sparsity": 0.4, "bit_choices": [4, 8], "mean_bits": 6},
    "learned widths": {"target_sparsity": 0.4, "mean_bits": 5.2, "bit_rule": "ppsg"},
    "the paper's widths": {"target_sparsity": 0.4, "mean_bits": 5.2, "bit_rule": "paper"},
}


@pytest.mark.parametrize("name", TARGETS)
def test_targets_are_met_at_the_end(name: str) -> None:
    """From below, and nearer than the smallest step the toy can take: one channel, one bit of one layer."""
    config = small_config(**{"target_sparsity": None, **TARGETS[name]})
    model, optimizer = make(config)
    for step in range(STEPS):
        train_step(model, optimizer, step)
    bits = torch.tensor([float(layer.weight_quantizer.bits()) for layer in quantized_layers(model).values()])
    whole = bits.round()
    assert torch.allclose(bits, whole, atol=1e-3) and set(whole.tolist()) <= set(map(float, config.widths))
    book, gone = optimizer.ledger, optimizer.gone
    if config.target_sparsity is not None:
        assert optimizer.removed_groups == 4 == optimizer.target_groups
    if config.target_parameters is not None:
        kept, wanted = book.prunable_parameters(gone), 0.6 * (4 * HEAD + 6 * CHANNEL)
        assert wanted - HEAD < kept <= wanted
    weights = book.weights(gone).float()
    step = float(weights.max()) * (4 if config.bit_choices else 1)
    left = []  # what may still be spent, in steps
    if config.target_bops is not None:
        left.append((config.target_bops - book.relative_bops(gone, whole)) * 288 * 1024 / (step * 32))
    if config.wanted_mean_bits is not None:
        left.append(
            float(config.wanted_mean_bits - (weights * whole).sum() / weights.sum()) * float(weights.sum()) / step
        )
    assert min(left) > -1e-4 and min(left) < 1


def test_widths_follow_sensitivity() -> None:
    """A layer whose gradients are made a hundred times larger gets the bits."""
    model, optimizer = make(small_config(target_sparsity=0.0, mean_bits=5))
    for step in range(44):
        train_step(model, optimizer, step)
        if step == 42:
            optimizer.curvature.copy_(torch.tensor([1.0, 1.0, 1e6, 1.0]))
    bits = [round(float(layer.weight_quantizer.bits())) for layer in model.layers]
    assert bits[2] == 8 and sum(w * b for w, b in zip(WEIGHTS, bits, strict=True)) <= 5 * sum(WEIGHTS)


def test_narrow_widths_get_a_clipping_value_of_less_error() -> None:
    """The one that was learned at 8 bits never serves 4 bits better, and here serves some layer worse."""
    model, optimizer = make(small_config(target_sparsity=0.0, mean_bits=4))
    for step in range(43):
        train_step(model, optimizer, step)
    learned = [layer.weight_quantizer.q_m.clone() for layer in model.layers]
    train_step(model, optimizer, 43)
    better = 0
    for layer, q_m in zip(model.layers, learned, strict=True):
        found, weight = layer.weight_quantizer, layer.weight
        errors = [(quantize(weight, value / 7, value) - weight).square().sum() for value in (q_m, found.q_m)]
        assert errors[1] <= 1.01 * errors[0]
        better += bool(errors[1] < 0.97 * errors[0])
    assert better > 0
