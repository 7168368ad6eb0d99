"""What is changed for an entire process comes back, however it was set and whatever happens in between."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from geta_hf.training.preparation import first_batches
from geta_hf.utils.process_state import full_precision, random_state_kept

_PLACES = (
    ("generic", "all"),
    *((backend, op) for backend in ("cuda", "mkldnn") for op in ("all", "matmul", "conv", "rnn")),
)


def _in_force() -> list[Any]:
    """Return all that torch says of its precision, in both interfaces; `mixed` where reading one of them raises."""
    found: list[Any] = [torch._C._get_fp32_precision_getter(*place) for place in _PLACES]
    readers: tuple[Callable[[], Any], ...] = (
        torch.get_float32_matmul_precision,
        lambda: torch.backends.cuda.matmul.allow_tf32,
        lambda: torch.backends.cudnn.allow_tf32,
        lambda: torch.backends.cudnn.enabled,
        torch._C._get_cublas_allow_fp16_reduced_precision_reduction,
        torch._C._get_cublas_allow_bf16_reduced_precision_reduction,
        torch._C._get_cublas_allow_fp16_accumulation,
        torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed,
        lambda: torch.is_autocast_enabled("cpu"),
        lambda: torch.is_autocast_enabled("cuda"),
    )
    for read in readers:
        try:
            found.append(read())
        except RuntimeError:
            found.append("mixed")
    return found


def _snapshot() -> list[list[Any]]:
    """Return what is in force now, and after each setting that others inherit has changed: that shows who inherits."""
    found = [_in_force()]
    put = torch._C._set_fp32_precision_setter
    generic = torch._C._get_fp32_precision_getter("generic", "all")
    for value in ("ieee", "tf32", "none"):
        put("generic", "all", value)
        found.append(_in_force())
    put("generic", "all", generic)
    return found


@pytest.fixture
def _settings() -> Iterator[None]:
    yield
    put = torch._C._set_fp32_precision_setter
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = True
    for place in _PLACES:
        if place not in (("cuda", "conv"), ("cuda", "rnn")):
            put(*place, "none")
    matmul = torch.backends.cuda.matmul
    matmul.allow_fp16_accumulation = False
    matmul.allow_fp16_reduced_precision_reduction = True
    matmul.allow_bf16_reduced_precision_reduction = True
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(False)


def _set(path: str, value: object) -> Callable[[], None]:
    holder, _, name = path.rpartition(".")

    def run() -> None:
        found: Any = torch.backends
        for part in holder.split(".") if holder else ():
            found = getattr(found, part)
        setattr(found, name, value)

    return run


_WAYS: dict[str, tuple[Callable[[], object], ...]] = {
    "nothing": (),
    "matmul.allow_tf32": (_set("cuda.matmul.allow_tf32", True),),
    "cudnn.allow_tf32 off": (_set("cudnn.allow_tf32", False),),
    "high": (lambda: torch.set_float32_matmul_precision("high"),),
    "medium": (lambda: torch.set_float32_matmul_precision("medium"),),
    "generic tf32": (_set("fp32_precision", "tf32"),),
    "generic ieee": (_set("fp32_precision", "ieee"),),
    "generic bf16": (_set("fp32_precision", "bf16"),),
    "cudnn.fp32_precision": (_set("cudnn.fp32_precision", "tf32"),),
    "cuda.matmul.fp32_precision": (_set("cuda.matmul.fp32_precision", "tf32"),),
    "cudnn.conv ieee": (_set("cudnn.conv.fp32_precision", "ieee"),),
    "mkldnn": (_set("mkldnn.matmul.fp32_precision", "bf16"), _set("mkldnn.conv.fp32_precision", "tf32")),
    "both interfaces": (lambda: torch.set_float32_matmul_precision("high"), _set("fp32_precision", "ieee")),
    "high, then inherited": (
        lambda: torch.set_float32_matmul_precision("high"),
        _set("cuda.matmul.fp32_precision", "none"),
        _set("mkldnn.matmul.fp32_precision", "none"),
    ),
    "sums in half precision": (
        _set("cuda.matmul.allow_fp16_accumulation", True),
        _set("cuda.matmul.allow_bf16_reduced_precision_reduction", (False, False)),
        lambda: torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True),
    ),
}


@pytest.mark.usefixtures("_settings")
@pytest.mark.parametrize("way", _WAYS)
def test_products_are_exact_for_a_while_and_settings_come_back_by_whatever_way_they_were_made(way: str) -> None:
    for step in _WAYS[way]:
        step()
    before = _snapshot()

    def check() -> None:
        get = torch._C._get_fp32_precision_getter
        assert get("cuda", "matmul") == "ieee"
        assert {get("mkldnn", op) for op in ("matmul", "conv", "rnn")} == {"ieee"}
        assert not torch.backends.cudnn.enabled
        assert torch.get_float32_matmul_precision() == "highest"
        assert torch.backends.cuda.matmul.allow_tf32 is False
        assert not torch._C._get_cublas_allow_fp16_accumulation()
        assert not torch._C._get_cublas_allow_bf16_reduced_precision_reduction()[0]
        assert not torch._C._get_cublas_allow_fp16_reduced_precision_reduction()[0]
        assert not torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()

    with full_precision():
        check()
        with full_precision():  # within another one
            check()
        check()
    assert _snapshot() == before


@pytest.mark.usefixtures("_settings")
@pytest.mark.parametrize("way", _WAYS)
def test_settings_come_back_after_an_error(way: str) -> None:
    for step in _WAYS[way]:
        step()
    before = _snapshot()
    with pytest.raises(KeyError), full_precision():
        raise KeyError
    assert _snapshot() == before


@pytest.mark.usefixtures("_settings")
def test_code_of_models_may_switch_cudnn_off() -> None:
    """A CTC loss of transformers does; torch then reads the former interface, which raises where the two differ."""
    with full_precision(), torch.backends.cudnn.flags(enabled=False):
        pass
    assert torch.backends.cudnn.enabled
    assert torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_autocast_is_off_for_a_while(device: str) -> None:
    # Without a GPU autocast of one is switched on by itself, without a context.
    torch.set_autocast_enabled(device, True)
    try:
        with full_precision():
            assert not torch.is_autocast_enabled(device)
        assert torch.is_autocast_enabled(device)
    finally:
        torch.set_autocast_enabled(device, False)


# --- random numbers ---------------------------------------------------------------------------------------------------


@pytest.fixture
def _gpus(monkeypatch: pytest.MonkeyPatch) -> list[torch.Generator]:
    """Pretend that there are two GPUs, each with a generator."""
    generators = [torch.Generator().manual_seed(number) for number in (10, 11)]
    monkeypatch.setattr(torch.cuda, "default_generators", tuple(generators))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    accelerator = torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: accelerator)
    return generators


def test_only_the_generators_of_the_devices_are_seeded_and_all_come_back(_gpus: list[torch.Generator]) -> None:
    torch.manual_seed(3)
    states = [generator.get_state() for generator in (torch.default_generator, *_gpus)]
    with random_state_kept([torch.device("cuda", 1), torch.device("cpu"), torch.device("meta")], seed=5):
        assert torch.default_generator.initial_seed() == 5
        assert [generator.initial_seed() for generator in _gpus] == [10, 5]
        torch.rand(3)
        torch.rand(3, generator=_gpus[1])
    after = [generator.get_state() for generator in (torch.default_generator, *_gpus)]
    assert all(torch.equal(one, other) for one, other in zip(states, after, strict=True))


def test_a_data_loader_on_several_gpus_warns_of_nothing_and_draws_for_itself(
    _gpus: list[torch.Generator],
) -> None:
    state = _gpus[1].get_state()

    def batches() -> Iterator[torch.Tensor]:
        yield torch.rand(2, generator=_gpus[1])  # of the current device, as a collator may draw

    assert len(first_batches(batches, 1)) == 1
    assert torch.equal(_gpus[1].get_state(), state)


def test_devices_that_nothing_was_initialized_on_have_nothing_to_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "default_generators", ())
    with random_state_kept([torch.device("cuda", 0), torch.device("cuda")], seed=1):
        pass
