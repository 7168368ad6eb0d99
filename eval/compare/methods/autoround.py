"""AutoRound (arXiv 2309.05516, Apache-2.0): rounding and clipping learned by signed gradients, without pruning."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from eval.compare.job import Job
from eval.compare.method import Compressed
from geta_hf.errors import GETAError

WIDTHS = (8, 6, 5, 4, 3, 2)

ITERATIONS = 200
"""For each block, the package's default."""


@dataclass(frozen=True)
class AutoRounded:
    """Round the dense model at the largest single width that fits the budget, on the grid of all others."""

    name: str = "AutoRound, unpruned"
    needs: str = "gradients"
    packages: tuple[str, ...] = ("auto_round",)

    def run(self, job: Job) -> Compressed:
        """Compress; the result is scored in memory, with the weights as AutoRound rounds them."""
        from auto_round import AutoRound

        nothing = job.ledger.nothing
        widths = WIDTHS if job.budget.bits is None else (job.budget.bits,)
        bits = next((b for b in widths if job.ledger.stored_bytes(nothing, b) <= job.budget.bytes), None)
        if bits is None:
            raise GETAError(f"{job.budget.name} can't be reached by one width without pruning")
        rows = torch.cat([batch["input_ids"] for batch in job.data.covariances])
        model = AutoRound(
            job.load(),
            tokenizer=job.tokenizer,
            bits=bits,
            group_size=32 if job.grid == "block32" else -1,
            sym=True,
            iters=ITERATIONS,
            seqlen=rows.shape[1],
            nsamples=len(rows),
            batch_size=min(8, len(rows)),
            dataset=[{"input_ids": row[None]} for row in rows],
            device_map="cpu",
        ).quantize()[0]
        self._check_rounded(model, job, bits)
        return Compressed(
            model=model.float().eval(),
            share=0.0,
            mean_bits=bits,
            bytes=job.ledger.stored_bytes(nothing, bits),
            trained=True,
            note="in memory; in bf16, as the package makes it",
        )

    @staticmethod
    def _check_rounded(model: PreTrainedModel, job: Job, bits: int) -> None:
        """Raise GETAError for a layer that the package left in float, as it does with sizes that 32 does not divide."""
        for entry in job.ledger.layers:
            rows = model.get_parameter(entry.weight).detach()
            part = rows[:1, :32] if job.grid == "block32" else rows[:1]
            if part.numel() > 2**bits and len(part.unique()) > 2**bits:
                raise GETAError(f"AutoRound left {entry.weight} of shape {tuple(rows.shape)} unrounded")


METHODS = (AutoRounded(),)
