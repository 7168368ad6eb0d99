from __future__ import annotations

import pytest
import torch

from geta_hf.errors import GETAError
from geta_hf.serialization import bitpack as packing
from geta_hf.serialization import encode as saving
from geta_hf.serialization.bitpack import largest_code, stream_length, unpack
from geta_hf.serialization.encode import pack


def codes_of(bits: int, numel: int) -> torch.Tensor:
    limit = largest_code(bits)
    codes = torch.randint(-limit, limit + 1, (numel,), generator=torch.Generator().manual_seed(numel * 17 + bits))
    codes[:1], codes[-1:] = limit, -limit
    return codes


@pytest.mark.parametrize("bits", range(2, 17))
@pytest.mark.parametrize("numel", [0, 1, 7, 8, 9, 63, 1001])
def test_round_trip_is_exact_at_every_width_and_length(bits: int, numel: int) -> None:
    codes = codes_of(bits, numel)
    stream = pack(codes, bits)
    assert stream.dtype == torch.uint8
    assert stream.shape == (-(-numel * bits // 8),) == (stream_length(numel, bits),)
    back = unpack(stream, bits, numel)
    assert back.dtype == (torch.int8 if bits <= 8 else torch.int16)
    assert torch.equal(back.long(), codes)


@pytest.mark.parametrize("bits", range(2, 17))
def test_stream_is_the_documented_layout(bits: int) -> None:
    codes = codes_of(bits, 29)
    whole = sum((int(code) + 2 ** (bits - 1)) << (place * bits) for place, code in enumerate(codes))
    assert bytes(pack(codes, bits).tolist()) == whole.to_bytes(stream_length(29, bits), "little")


@pytest.mark.parametrize("bits", [2, 5, 16])
def test_chunks_leave_no_seam(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = codes_of(bits, 1003)
    whole = pack(codes, bits)
    for module in (packing, saving):
        monkeypatch.setattr(module, "ROWS_AT_ONCE", 7)
    assert torch.equal(pack(codes, bits), whole)
    assert torch.equal(unpack(whole, bits, 1003).long(), codes)


def test_any_shape_and_integer_type_is_taken() -> None:
    codes = codes_of(6, 24)
    for dtype in (torch.int8, torch.int16, torch.int32, torch.int64):
        assert torch.equal(pack(codes.to(dtype).view(2, 3, 4), 6), pack(codes, 6))


@pytest.mark.parametrize("bits", [1, 17, 0, -3, 4.0, True, "4"])
def test_width_out_of_range_is_refused(bits: object) -> None:
    with pytest.raises(GETAError, match="bits is"):
        pack(torch.zeros(4, dtype=torch.int32), bits)  # type: ignore[arg-type]


@pytest.mark.parametrize("code", [8, -8, 2**31 - 1, -(2**31)])
def test_code_that_does_not_fit_is_refused(code: int) -> None:
    with pytest.raises(GETAError, match="does not fit in 4 bits"):
        pack(torch.tensor([0, code, 0], dtype=torch.int32), 4)


@pytest.mark.parametrize(
    "stream",
    [torch.zeros(4, dtype=torch.uint8), torch.zeros(6, dtype=torch.uint8), torch.zeros(5), torch.zeros(1, 5).byte()],
)
def test_stream_of_wrong_size_or_type_is_refused(stream: torch.Tensor) -> None:
    with pytest.raises(GETAError, match="uint8 stream of 5 bytes"):
        unpack(stream, 4, 10)


def test_stream_overwritten_with_zeros_is_noticed() -> None:
    stream = pack(codes_of(5, 100), 5)
    stream[20:30] = 0
    with pytest.raises(GETAError, match="damaged"):
        unpack(stream, 5, 100)
