"""Scores are second derivatives for masks, sequence by sequence; losses of rounding are written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from geta_hf.errors import GETAError
from geta_hf.methods.one_shot.gradients import measure_gradients, sequences, total_loss
from geta_hf.methods.one_shot.layers import Kept, compress_layer, fit_grid, rounding_losses
from geta_hf.qadg.group_labels import GroupLabels
from geta_hf.quantization.covariances import as_rows
from geta_hf.quantization.functional import quantize


class Small(nn.Module):
    """Two layers and a loss: a mean over two predictions for each sequence."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(5, 6), nn.Linear(6, 3)
        self.mask = torch.ones(6)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.down(self.mask * torch.tanh(self.up(x)))
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def data(labelled: bool = True) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(2):
        batch = {"x": torch.randn(3, 2, 5, generator=generator)}
        if labelled:
            batch["labels"] = torch.randint(0, 3, (3, 2), generator=generator)
        batches.append(batch)
    return batches


READ = [GroupLabels("down.weight", 1, torch.tensor([0, 0, 1, 1, 2, 3]))]
"""Groups 0 to 2; the last column belongs to none."""


def test_scores_are_those_of_masks_on_what_groups_give():
    model = Small()
    found = measure_gradients(model, data(), READ, 3, ["up.weight", "down.weight"])
    scores = torch.zeros(3, dtype=torch.float64)
    squares = torch.zeros(3, 6)
    for sequence in sequences(data()):
        model.mask = torch.ones(6, requires_grad=True)
        total = 2 * model(**sequence)["loss"]
        of_mask, of_weight = torch.autograd.grad(total, [model.mask, model.down.weight])
        derivative = torch.stack([of_mask[:2].sum(), of_mask[2:4].sum(), of_mask[4]])
        scores += derivative.double() ** 2
        squares += of_weight**2
    assert found.sequences == 6
    torch.testing.assert_close(found.groups, scores / 12, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(found.squares["down.weight"], squares / 6)


def test_labels_that_are_missing_are_drawn_from_the_model():
    model = Small()
    first = measure_gradients(model, data(labelled=False), READ, 3, ["down.weight"])
    again = measure_gradients(model, data(labelled=False), READ, 3, ["down.weight"])
    assert torch.equal(first.groups, again.groups) and bool((first.groups > 0).all())
    # Over many draws the mean gradient is zero, which that of other labels is not.
    generator = torch.Generator().manual_seed(0)
    sequence = next(sequences(data(labelled=False)))
    grads = []
    for _ in range(400):
        grads.append(torch.autograd.grad(total_loss(model, sequence, generator), model.down.bias)[0])
    stacked = torch.stack(grads)
    assert bool((stacked.mean(0).abs() < 4 * stacked.std(0) / 20).all())


def test_the_model_is_as_before():
    model = Small().train()
    model.up.bias.requires_grad_(False)
    model.up.weight.grad = torch.ones(6, 5)
    measure_gradients(model, data(), READ, 3, ["down.weight"])
    assert model.training and not model.up.bias.requires_grad and model.up.weight.requires_grad
    assert torch.equal(model.up.weight.grad, torch.ones(6, 5)) and model.down.weight.grad is None


def test_losses_that_are_not_finite_or_do_not_depend_on_layers_are_errors():
    model = Small()
    with torch.no_grad():
        model.down.bias.fill_(float("nan"))
    with pytest.raises(GETAError, match="the loss of Small on the calibration data is nan"):
        measure_gradients(model, data(), READ, 3, ["down.weight"])
    # No label can be drawn of such outputs.
    with pytest.raises(GETAError, match="the loss of Small on the calibration data is nan"):
        measure_gradients(model, data(labelled=False), READ, 3, ["down.weight"])
    model = Small()
    with torch.no_grad():
        model.mask = torch.zeros(6)
    with pytest.raises(GETAError, match="no layer of Small has a gradient"):
        measure_gradients(model, data(), READ, 3, ["up.weight"])


def test_losses_of_rounding_weigh_each_element():
    model = Small()
    layers = {"up": model.up, "down": model.down}
    squares = {f"{name}.weight": torch.rand_like(layer.weight) for name, layer in layers.items()}
    found = rounding_losses(layers, squares, [2, 4], True)
    for row, (name, layer) in enumerate(layers.items()):
        for column, bits in enumerate([2, 4]):
            grid = fit_grid(layer.weight.detach(), bits, True)
            error = quantize(layer.weight.detach(), grid.d[:, None], grid.q_m[:, None]) - layer.weight.detach()
            expected = (squares[f"{name}.weight"] * error**2).sum() / 2
            assert float(found[row, column]) == pytest.approx(float(expected), rel=1e-5)
    assert bool((found[:, 0] > found[:, 1]).all())


def test_outputs_that_are_removed_keep_their_weights_and_inputs_become_zero():
    layer = nn.Linear(6, 4)
    before = layer.weight.detach().clone()
    x = torch.randn(100, 6)
    kept = Kept(torch.tensor([True, False, True, True]), torch.tensor([True] * 4 + [False] * 2))
    grid = compress_layer(layer, x.t() @ x / 100, kept, 4)
    after = as_rows(layer, layer.weight).detach()
    assert torch.equal(after[1], before[1])
    assert not after[kept.rows][:, 4:].any()
    codes = after[kept.rows] / grid.d[kept.rows][:, None]
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
    assert bool((grid.d > 0).all())
