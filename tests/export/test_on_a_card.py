"""What an export, loading and preparing take on a GPU: models take turns there, and codes are made piece by piece."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from geta_hf import attach_quantizers, prepare_for_inference
from geta_hf.errors import GETAError
from geta_hf.export import export
from geta_hf.qadg import PruningSpace
from geta_hf.serialization import packed_layers
from geta_hf.utils import residence
from geta_hf.utils.residence import parked, visiting
from tests.pretend_cuda import pretend_cuda
from tests.spaces import build_space

SIZES = {"hidden_size": 96, "intermediate_size": 96, "num_hidden_layers": 8, "vocab_size": 64}


def some_batch() -> dict[str, Tensor]:
    return {"input_ids": torch.arange(1, 9)[None]}


def trained(dtype: torch.dtype) -> tuple[PreTrainedModel, PruningSpace]:
    """Return a model whose weights outweigh its activations, with half of its channels at zero and 6 bits."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16, **SIZES)
    ).to(dtype)
    space = build_space(model, some_batch())
    tensors = model.state_dict()
    for family in space.prunable:
        for member in family.members:
            tensors[member.tensor].index_fill_(member.dim, member.index[: family.size // 2].flatten(), 0)
    attach_quantizers(model, initial_bits=6)
    return model, space


def weight_bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


@dataclass(frozen=True)
class Exported:
    folder: Path
    weights: int
    peak: int


def exported(dtype: torch.dtype, folder: Path) -> Exported:
    """Export a model on the card, and check that it is afterwards where and what it was."""
    model, space = trained(dtype)
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pretend_cuda() as card:
        model.to("cuda")
        before = {name: id(parameter) for name, parameter in model.named_parameters()}
        card.reset_peak()
        weights = card.live
        export(model, folder, space=space, batch=some_batch())
        found = Exported(folder, weights, card.peak)
        gc.collect()
        assert card.live == weights == weight_bytes(model)
        # Optimizers hold these very parameters.
        assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
        assert all(tensor.is_cuda for tensor in model.state_dict().values())
    assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())
    return found


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return exported(torch.bfloat16, tmp_path_factory.mktemp("card") / "small")


def test_an_export_takes_little_more_than_the_weights_on_the_card(halves: Exported) -> None:
    assert halves.peak <= 1.15 * halves.weights


@pytest.mark.slow
def test_an_export_in_single_precision_takes_no_more(tmp_path: Path) -> None:
    found = exported(torch.float32, tmp_path / "small")
    assert found.peak <= 1.15 * found.weights


def test_loading_and_preparing_take_little_more_than_what_remains(
    halves: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With pieces as small next to these weights as they are next to those of large models."""
    monkeypatch.setattr(packed_layers, "PIECE", 1 << 10)
    with pretend_cuda() as card:
        card.reset_peak()
        small = LlamaForCausalLM.from_pretrained(halves.folder, device_map="cuda", dtype=torch.bfloat16)
        assert all(tensor.is_cuda for tensor in small.state_dict().values())
        # Without pieces it is 1.085 times what is loaded, and 1.118 to prepare it.
        assert card.peak <= 1.05 * card.live
        loaded = card.live
        prepare_for_inference(small, compute="int8")
        assert card.peak <= 1.1 * loaded


def test_parked_and_visiting_models_keep_their_tensors() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[0].weight.grad = torch.ones(4, 4)
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pretend_cuda() as card:
        model.to("cuda")
        tensors = dict(model.state_dict(keep_vars=True))
        with parked(model):
            assert not any(tensor.is_cuda for tensor in model.state_dict().values())
            with visiting(model, torch.device("cuda", 0)):
                assert all(tensor.is_cuda for tensor in model.state_dict().values())
                model(torch.ones(2, 4, device="cuda"))  # batch norm counts it
            assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())
            with pytest.raises(GETAError), visiting(model, torch.device("cuda", 0)):
                raise GETAError("failed")
            assert not any(tensor.is_cuda for tensor in model.state_dict().values())
        assert all(tensor.is_cuda for tensor in model.state_dict().values())
        assert {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()} == {
            name: id(tensor) for name, tensor in tensors.items()
        }
        assert card.live


def fail_half_way(move: Callable[..., None], tensors: list[Tensor], device: torch.device) -> None:
    """Move tensors as `residence` does, but find no memory for the last one on the CPU."""
    if device.type == "cpu":
        move(tensors[:-1], device)
        raise RuntimeError("no memory is left")
    move(tensors, device)


def test_a_parked_model_comes_back_after_an_error_on_the_way_and_with_buffers_that_were_replaced() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with pretend_cuda():
        model.to("cuda")
        with parked(model):
            model[1].running_mean = torch.ones(4)
        assert all(tensor.is_cuda for tensor in model.state_dict().values())
        with (
            mock.patch.object(residence, "_move", partial(fail_half_way, residence._move)),
            pytest.raises(RuntimeError, match="no memory is left"),
            parked(model),
        ):
            pass
        assert all(tensor.is_cuda for tensor in model.state_dict().values())
