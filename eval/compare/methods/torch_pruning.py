"""Torch-Pruning (arXiv 2301.12900, MIT): its own dependency graph and group Taylor score, then GPTQ.

Its graph says what a channel of an MLP takes with it, and its importance scores that; groups are then removed through
this project's families, so that sizes agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eval.compare.job import Job
from eval.compare.method import Compressed
from eval.compare.scores import Choice
from eval.compare.shared import find_pairs, round_with
from geta_hf.methods.one_shot.choice import Candidate
from geta_hf.qadg.group_types import Family
from geta_hf.quantization.by_block import Batch, uncached
from geta_hf.utils.module_state import eval_mode


class _Logits(nn.Module):
    """Give a model as its graph is traced: from tokens to logits."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits."""
        found: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return found


def score(model: PreTrainedModel, families: Sequence[Family], batches: Sequence[Batch]) -> Tensor:
    """Return Torch-Pruning's group Taylor importance of MLP channels, float64, shape (groups,); 0 for other kinds."""
    import torch_pruning

    model.zero_grad(set_to_none=True)
    with eval_mode(model), uncached(model), torch.enable_grad():
        for batch in batches:
            (model(**batch).loss / len(batches)).backward()
        graph = torch_pruning.DependencyGraph().build_dependency(_Logits(model), batches[0]["input_ids"][:1])
    importance = torch_pruning.importance.GroupTaylorImportance()
    found = torch.zeros(sum(family.size for family in families), dtype=torch.float64)
    start = 0
    for family in families:
        if family.kind == "channels":
            layer, places = _root(model, family)
            group = graph.get_pruning_group(
                layer, torch_pruning.prune_linear_out_channels, idxs=list(range(layer.out_features))
            )
            found[start : start + family.size] = importance(group).double().cpu()[places]
        start += family.size
    model.zero_grad(set_to_none=True)
    return found


def _root(model: nn.Module, family: Family) -> tuple[nn.Linear, Tensor]:
    """Return a linear layer whose outputs are a family's channels, and the output of each."""
    for member in family.members:
        path, _, leaf = member.tensor.rpartition(".")
        layer = model.get_submodule(path)
        if leaf == "weight" and isinstance(layer, nn.Linear) and member.dim == 0 and not member.consumer:
            return layer, member.index[:, 0]
    raise LookupError(family.name)


CHOICE = Choice(score, alike=True, kinds=("channels",))  # type: ignore[arg-type]


@dataclass(frozen=True)
class TorchPruning:
    """Remove the channels of the least importance in every layer, with least squares, and round by GPTQ."""

    name: str = "Torch-Pruning + GPTQ"
    needs: str = "gradients"
    packages: tuple[str, ...] = ("torch_pruning",)

    def run(self, job: Job) -> Compressed:
        """Compress."""
        scores = job.remember(self.name, lambda: score(job.load(), job.space.trainable, job.data.scores))
        pairs: list[Candidate] = find_pairs(job, scores, CHOICE)
        return round_with(job, pairs)


METHODS = (TorchPruning(),)
