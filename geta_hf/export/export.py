"""From the trained model to a small folder in five steps: plan, cut, fill, prove, publish."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from geta_hf.config import EmbeddingGrid
from geta_hf.export.folder_files import (
    PICTURE_NAME,
    STRUCTURE_NAME,
    STRUCTURE_VERSION,
    SupportsSave,
    SupportsToDict,
    copy_beside,
    save_beside,
    write_structure,
)
from geta_hf.export.formats import OWN, writer
from geta_hf.export.plan import (
    ExportPlan,
    check_never_exported,
    integer_bits,
    plan_cut,
    plan_export,
    read_widths,
    with_path,
)
from geta_hf.export.steps import CutModel, cut, fill, prove, prove_paths, publish
from geta_hf.export.untouched import write_untouched
from geta_hf.methods.base import CompressionResult
from geta_hf.qadg.space import PruningSpace
from geta_hf.serialization.atomic_folder import check_target
from geta_hf.serialization.embeddings import RoundedEmbedding, rounded_embedding
from geta_hf.serialization.encode import activation_bits, weight_bits
from geta_hf.serialization.packed_layers import packed_layers
from geta_hf.serialization.sizes import check_shards, tensor_bytes
from geta_hf.surgery.other_paths import PathError
from geta_hf.utils.copies import copy_module
from geta_hf.utils.process_state import exclusive
from geta_hf.utils.quiet import without_bars
from geta_hf.utils.residence import parked

__all__ = [
    "PICTURE_NAME",
    "STRUCTURE_NAME",
    "STRUCTURE_VERSION",
    "ExportReport",
    "check_never_exported",
    "compress",
    "copy_beside",
    "export",
    "integer_bits",
    "write_structure",
]


@dataclass(frozen=True)
class ExportReport:
    """Describe what an export wrote.

    Attributes:
        path: the folder.
        tensor_bytes: bytes of all tensors in model.safetensors, or in its shards; 0 in formats without such files.
        file_bytes: bytes of model.safetensors or its shards, headers included.
        packed_bits: bits of all codes, Σ numel · b over the packed weights.
        bits: module path -> bits of its packed weight.
        activation_bits: module path -> bits of its input, for the layers that round it.
        kept: family -> (groups kept, groups before).
        difference: largest absolute difference of any output, trained against cut and against reloaded.
    """

    path: Path
    tensor_bytes: int
    file_bytes: int
    packed_bits: int
    bits: dict[str, int]
    activation_bits: dict[str, int]
    kept: dict[str, tuple[int, int]]
    difference: float


@exclusive()
@without_bars()
def export(
    model: PreTrainedModel,
    directory: str | os.PathLike[str],
    *,
    space: PruningSpace | None = None,
    batch: Mapping[str, Tensor] | None = None,
    config: SupportsToDict | None = None,
    processing_class: SupportsSave | None = None,
    expected_zero_groups: int | None = None,
    embedding_bits: int | None = None,
    embedding_grid: EmbeddingGrid = "channel",
    format: str = "geta",
    max_shard_size: int | str | None = None,
    finish: Callable[[Path], object] | None = None,
    overwrite: bool = False,
    result: CompressionResult | None = None,
) -> ExportReport:
    """Write a trained model as a small folder.

    In its own format, `AutoModelForX.from_pretrained` reads it once geta_hf is imported, or with
    `trust_remote_code=True`. The others are ways out to other programs: see `geta_hf.export.formats`.

    Groups whose trained slices are all exactly zero are cut away (a family keeps at least one group), every quantized
    weight is stored at its own bit width, everything else in its own dtype. What is cut passes gates 2 and 3 first
    (`verify_space`). Before the folder appears it is reloaded, and the trained, the cut and the reloaded model must
    give the same outputs, with eager and with sdpa attention (gate 4).
    Where a norm runs over what was cut, the trained model's recorded graph on the remaining slices takes its place.
    Layers that round their inputs do so in the folder with the same values. The trained and the cut model are compared
    without this rounding, since the last bit of a sum may decide which way an activation is rounded.

    Args:
        model: trained, with its quantizers attached and their bits rounded to integers; unchanged afterwards.
        directory: where the folder is to appear.
        space: the pruning space used in training; by default built from the batch.
        batch: what the proof runs on; by default the model's `dummy_inputs`.
        config: saved next to the model as geta_config.json; what was kept is saved as geta_structure.json.
        processing_class: tokenizer or processor to save with the model.
        expected_zero_groups: how many groups training was to remove; fewer are an error.
        embedding_bits: 2 to 8: the input embedding is rounded to it; the rounded model is then the one that the proof
            starts from. By default it stays as it is.
        embedding_grid: `channel`, a step size for every row of the embedding, or `block32`, one for every 32 elements
            of a row.
        format: one of `geta_hf.export.formats.FORMATS`.
        max_shard_size: bytes, or a size such as `2GB`: weights beyond it are written in several files. For the format
            `geta` alone. By default that of `save_pretrained`, 50 GB.
        finish: called with the folder when it is proven, before it appears, to add more files, such as a card.
        overwrite: replace an existing model folder, but not one that holds files which no export writes, such as the
            state of a training.
        result: what the method decided. It is checked against the model; read from it when None: the groups that are
            zero, and the widths of the quantizers.

    Raises:
        GETAError: groups that are not zero yet, bits that are not integers, a result that the model does not have,
            nothing to compress, a target that exists, a batch that the model cannot run, or outputs that differ. The
            target is then as it was before.

    Example:
        >>> import torch
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> sizes = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 32, "num_hidden_layers": 1}
        >>> model = BertForSequenceClassification(BertConfig(vocab_size=30, **sizes))
        >>> batch = {"input_ids": torch.arange(1, 9)[None]}
        >>> import tempfile
        >>> from geta_hf import attach_quantizers, export
        >>> _ = attach_quantizers(model, initial_bits=8)
        >>> folder = tempfile.TemporaryDirectory()
        >>> report = export(model, folder.name + "/small", batch=batch)
        >>> sorted(set(report.bits.values()))
        [8]
        >>> small = BertForSequenceClassification.from_pretrained(folder.name + "/small")
        >>> folder.cleanup()
    """
    target = Path(directory).resolve()
    # What is wrong with the call itself fails first: to record and prove a large model takes minutes.
    check_target(target, overwrite)
    check_shards(max_shard_size, format)
    write = writer(format, model, processing_class)
    plan = plan_export(model, space, batch, result, expected_zero_groups, embedding_bits)

    def add_files(folder: Path) -> None:
        # The folder is still a draft here: if the card fails, no folder without a card appears.
        save_beside(folder, config, processing_class)
        write_untouched(folder, plan.untouched)
        if finish is not None:
            finish(folder)

    # On a GPU the trained, the cut and the reloaded model would take its memory together. From here on all of them are
    # on the CPU, where the tensors are cut and packed, and each is on the GPU only while it runs.
    with parked(model):
        # The trained model is the reference of the proof, so its embedding is rounded for as long as the proof lasts.
        # Else the proof would find the rounding itself, and could not tell it from a fault of the cut.
        with rounded_embedding(model, embedding_bits, embedding_grid, plan.kept) as embedding:
            plan, smaller = _cut(model, plan)
            compressed = fill(smaller, plan, embedding)
            proof = prove(model, compressed, plan)
        # The folder has to give the outputs that the proof has found, so they are not computed again. Formats for other
        # programs compare in their own way (ONNX on the CPU in fp32) and hold no structure file.
        if format == OWN:
            options = {"kept": plan.kept_counts, "outputs": proof.outputs, "device": plan.device}
            write = partial(write, **options, max_shard_size=max_shard_size)
        difference = publish(target, compressed, plan, proof, write, add_files, overwrite)
    return _report(target, compressed, plan.kept_counts, difference)


def _cut(model: PreTrainedModel, plan: ExportPlan) -> tuple[ExportPlan, CutModel]:
    """Cut the model; once more for each path that reads attributes which the recordings had not shown."""
    while True:
        smaller = cut(model, plan)
        try:
            prove_paths(model, smaller, plan)
            return plan, smaller
        except PathError as error:
            plan = with_path(model, plan, error)


def compress(
    model: PreTrainedModel,
    space: PruningSpace,
    removed: dict[str, Tensor],
    batch: Mapping[str, Tensor],
    embedding: RoundedEmbedding | None = None,
) -> PreTrainedModel:
    """Return a cut and packed copy of a trained model, which `save_pretrained` writes in the format of an export.

    Args:
        model: as in `export`.
        space: as in `export`.
        removed: family name -> bool (groups,), the groups to cut away.
        batch: what the forward is recorded on, to find the attributes that a cut changes.
        embedding: how the model's embedding was rounded; None where it was not.

    Raises:
        GETAError: bits that are not integers, codes beyond their bit width, a cut that cannot be.
    """
    # Gates 2 and 3 are for `export`: here the caller answers for the groups.
    plan = plan_cut(model, space, batch, CompressionResult(removed, *read_widths(model)), verify=False)
    return fill(cut(copy_module(model), plan), plan, embedding)  # a copy, since `cut` shares what it does not change


def _report(target: Path, model: PreTrainedModel, kept: dict[str, tuple[int, int]], difference: float) -> ExportReport:
    files = sorted(target.glob("*.safetensors"))  # ONNX and others have none
    layers = packed_layers(model)
    return ExportReport(
        path=target,
        tensor_bytes=tensor_bytes(target) if files else 0,
        file_bytes=sum(file.stat().st_size for file in files),
        packed_bits=round(sum(layer.weight.numel() * layer.mean_bits for layer in layers.values())),
        bits=weight_bits(model),
        activation_bits=activation_bits(model),
        kept=kept,
        difference=difference,
    )
