from __future__ import annotations

import torch

from geta_hf.utils.upload import upload
from tests.pretend_cuda import CARD, CPU, pretend_cuda


def test_tensors_arrive_with_their_shapes_and_the_host_does_not_wait() -> None:
    given = [torch.arange(6).view(2, 3), torch.arange(0), torch.tensor([7])]
    with pretend_cuda() as card:
        sent = upload(given, CARD)
        assert not card.reads
        assert [tensor.device for tensor in sent] == [CARD] * 3
        assert [tensor.tolist() for tensor in sent] == [tensor.tolist() for tensor in given]
        assert all(here is tensor for here, tensor in zip(upload(given, CPU), given, strict=True))
