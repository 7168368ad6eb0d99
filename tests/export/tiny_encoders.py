"""Tiny encoders with quantizers attached and groups set to zero, as training leaves them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import (
    AlbertConfig,
    AlbertForQuestionAnswering,
    BertConfig,
    BertForQuestionAnswering,
    BloomConfig,
    BloomForCausalLM,
    DistilBertConfig,
    DistilBertForQuestionAnswering,
    ElectraConfig,
    ElectraForQuestionAnswering,
    MixtralConfig,
    MixtralForCausalLM,
    MPNetConfig,
    MPNetForQuestionAnswering,
    PreTrainedModel,
    RobertaConfig,
    RobertaForQuestionAnswering,
)

from geta_hf.qadg import kept_indices, zero_groups
from geta_hf.qadg.space import PruningSpace
from geta_hf.quantization import attach_quantizers, quantized_layers, step_size
from geta_hf.quantization.blocks import remaining_first

CLASSES = {
    "bert": (BertForQuestionAnswering, BertConfig),
    "roberta": (RobertaForQuestionAnswering, RobertaConfig),
    "electra": (ElectraForQuestionAnswering, ElectraConfig),
    "distilbert": (DistilBertForQuestionAnswering, DistilBertConfig),
    "albert": (AlbertForQuestionAnswering, AlbertConfig),
    "mpnet": (MPNetForQuestionAnswering, MPNetConfig),
}
HEADS = 4


def tiny_mixture() -> tuple[PreTrainedModel, list[dict[str, torch.Tensor]]]:
    """A mixture of experts in 16 bits, and batches with tokens that rounding sends to other experts."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": HEADS}
    config = MixtralConfig(vocab_size=512, num_key_value_heads=2, num_local_experts=4, **sizes)
    model = MixtralForCausalLM._from_config(config, dtype=torch.bfloat16)
    return model, [{"input_ids": torch.randint(512, (8, 64))} for _ in range(3)]


def tiny_model(kind: str = "bert", hidden: int = 32, layers: int = 2) -> PreTrainedModel:
    """A randomly initialized question-answering encoder whose biases and norms are not trivial."""
    torch.manual_seed(0)
    model_class, config_class = CLASSES[kind]
    sizes = {"vocab_size": 60, "max_position_embeddings": 40}
    if kind == "distilbert":
        sizes |= {"dim": hidden, "n_layers": layers, "n_heads": HEADS, "hidden_dim": 2 * hidden}
    else:
        sizes |= {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": HEADS}
        sizes |= {"intermediate_size": 2 * hidden}
    if kind == "albert":
        sizes |= {"embedding_size": 16}
    model = model_class(config_class(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tiny_bloom() -> PreTrainedModel:
    """A decoder that computes a slope for each of its heads as it runs (ALiBi)."""
    torch.manual_seed(0)
    return BloomForCausalLM(BloomConfig(vocab_size=60, hidden_size=32, n_layer=2, n_head=HEADS, use_cache=False)).eval()


@torch.no_grad()
def train_by_hand(
    model: PreTrainedModel,
    space: PruningSpace,
    quantize: bool = True,
    per_channel: bool = False,
    include: list[str] | None = None,
    grid: str | None = None,
) -> dict[str, int]:
    """Attach quantizers of 2 to 16 whole bits and set a different number of groups of each family to zero.

    Returns the number of groups that stay, by family.
    """
    kept = {}
    tensors = model.state_dict()
    for place, family in enumerate(space.prunable):
        chosen = torch.randperm(family.size)[: min(family.size - 1, 1 + (place % 3) * family.size // 4)]
        for member in family.members:
            tensors[member.tensor].index_fill_(member.dim, member.index[chosen].flatten(), 0.0)
        kept[family.name] = family.size - len(chosen)
    if quantize:
        attach_quantizers(model, per_channel=per_channel, include=include, grid=grid)
        form_all_blocks(model, kept_indices(space, zero_groups(model, space)))
    for place, layer in enumerate(quantized_layers(model).values()):
        quantizer = layer.weight_quantizer
        bits = 2 + (5 * place) % 15
        quantizer.d.copy_(step_size(bits, quantizer.q_m, quantizer.t))
        # Layers of 2 bits have three and four levels by turns.
        quantizer.set_four_levels(bits == 2 and place % 2 == 1)
    return kept


def form_all_blocks(model: PreTrainedModel, kept: Mapping[str, Mapping[int, torch.Tensor]]) -> None:
    """Let the blocks of every quantizer that has some be those of the kept inputs, as a method does."""
    for name, layer in quantized_layers(model).items():
        own = layer.weight_quantizer
        if own.order is not None:
            index = kept.get(f"{name}.weight", {}).get(1 - own.channel_dim)
            removed = torch.zeros(len(own.order), dtype=torch.bool)
            if index is not None:
                removed[:] = True
                removed[index] = False
            own.set_order(remaining_first(removed))


def some_batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, 8:] = 0
    return {"input_ids": torch.randint(3, 60, (2, 12), generator=generator), "attention_mask": mask}
