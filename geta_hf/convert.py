"""From a training checkpoint, or an exported folder, to a folder of any format, without a trainer in memory."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from geta_hf.config import CONFIG_NAME, CompressionConfig, GETAConfig, read_config
from geta_hf.errors import GETAError
from geta_hf.export import ExportReport, export
from geta_hf.export.folder_files import STRUCTURE_NAME, copy_beside, write_structure
from geta_hf.export.formats import OWN, WITH_TOKENIZER, writer
from geta_hf.export.formats.geta import write_geta
from geta_hf.export.untouched import Untouched, untouched_of, write_untouched
from geta_hf.methods import make_method
from geta_hf.methods.parameter_groups import quantizer_parameters
from geta_hf.qadg import build_space
from geta_hf.qadg.group_types import Family
from geta_hf.qadg.space import PruningSpace
from geta_hf.qadg.tracing.dummy_inputs import make_dummy_inputs
from geta_hf.quantization import select_layers
from geta_hf.quantization.layers import LAYER_TYPES
from geta_hf.quantization.quantizer import BY_INPUT, UNSIGNED
from geta_hf.reporting.comparison import is_export, load_model
from geta_hf.reporting.folder_summary import CARD_NAME, empty_model_of
from geta_hf.reporting.model_card import write_card
from geta_hf.serialization.atomic_folder import check_apart, check_target, write_folder
from geta_hf.serialization.sizes import check_shards, stored_names
from geta_hf.serialization.validate import check_links
from geta_hf.training.checkpoints import Progress, base_name, is_finished, read_progress, stored_headers
from geta_hf.training.complete import newest_to_export
from geta_hf.training.lora import load_lora, merge_stored, plan_lora
from geta_hf.utils.process_state import exclusive

_OWN_LEAF = re.compile(r"\.(?=weight_quantizer\.|input_quantizer\.|lora\.)")
"""Splits the name of a tensor of a quantizer, or of LoRA, behind the path of its layer."""


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    format: str = "geta",
    embedding_bits: int | None = None,
    max_shard_size: int | str | None = None,
    overwrite: bool = False,
) -> ExportReport | None:
    """Write what a run or an export holds in some format.

    Args:
        source: a checkpoint of GETATrainer, the folder of a run (its newest complete checkpoint is taken), or an
            exported folder.
        target: where the new folder is to appear.
        format: one of `geta_hf.export.formats.FORMATS`.
        embedding_bits: as for `geta_hf.export`; for a checkpoint alone. By default what its config says.
        max_shard_size: as for `geta_hf.export`.
        overwrite: replace an existing model folder, but not one that holds the source, or files which no export writes,
            such as the state of a training.

    Returns:
        What the export of a checkpoint wrote; None for one of a folder.

    Raises:
        GETAError: `source` is neither, a checkpoint of a run that had not finished, an unknown format, a link that
            leads out of the source, or whatever keeps the export from being right. The target is then as it was before.

    Example:
        >>> import torch
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> sizes = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 32, "num_hidden_layers": 1}
        >>> model = BertForSequenceClassification(BertConfig(vocab_size=30, **sizes))
        >>> batch = {"input_ids": torch.arange(1, 9)[None]}
        >>> import tempfile
        >>> from geta_hf import attach_quantizers, convert, export
        >>> _ = attach_quantizers(model, initial_bits=8)
        >>> folder = tempfile.TemporaryDirectory()
        >>> report = export(model, folder.name + "/small", batch=batch)
        >>> convert(folder.name + "/small", folder.name + "/plain", format="vanilla")
        >>> plain = BertForSequenceClassification.from_pretrained(folder.name + "/plain")  # without geta_hf's quantizer
        >>> folder.cleanup()
    """
    folder = Path(source)
    place = Path(target).resolve()
    check_target(place, overwrite)
    check_shards(max_shard_size, format)
    writer(format)
    if is_export(folder):
        if embedding_bits is not None:
            raise GETAError(f"{folder} is an export already, and its embedding stays as it is; export the checkpoint")
        check_links(folder)
        _rewrite(folder, place, format, max_shard_size, overwrite)
        return None
    checkpoint = _checkpoint_of(folder)
    check_links(checkpoint)
    check_apart(checkpoint, place)
    config = read_config(checkpoint / CONFIG_NAME)
    removed = _finished(read_progress(checkpoint), checkpoint)
    model = load_checkpoint(checkpoint, config)
    # No data set is needed: the proof holds on any inputs.
    batch = make_dummy_inputs(model)
    card = partial(write_card, base_model=base_name(model), repo_id=place.name)
    return export(
        model,
        place,
        space=build_space(model, batch, prune=config.prune, keep=config.keep),
        batch=batch,
        config=config,
        processing_class=_processing_class(checkpoint),
        # As noted at the time: fewer would mean that the weights are not those of that step.
        expected_zero_groups=removed,
        embedding_bits=config.embedding_bits if embedding_bits is None else embedding_bits,
        embedding_grid=config.embedding_grid,
        format=format,
        max_shard_size=max_shard_size,
        finish=card if format == OWN else None,
        overwrite=overwrite,
    )


def _rewrite(folder: Path, target: Path, format: str, max_shard_size: int | str | None, overwrite: bool) -> None:
    """Write an exported folder in another format, or load and save it again in its own, if need be over itself."""
    if folder.resolve() != target:
        check_apart(folder, target)
    model = load_model(folder)
    batch = make_dummy_inputs(model)
    tokenizer = _processing_class(folder) if format in WITH_TOKENIZER else None
    write = writer(format, model, tokenizer) if format != OWN else partial(write_geta, max_shard_size=max_shard_size)

    def fill(fresh: Path) -> None:
        write(model, fresh, batch)
        copy_beside(folder, fresh, structure=format == OWN)
        if format != OWN:
            return
        # save_pretrained writes neither, so a folder that was loaded and saved by it gets both back.
        if not (fresh / STRUCTURE_NAME).is_file():
            space = _dense_space(folder, batch)
            write_structure(fresh, model, {} if space is None else _kept(space, model))
            write_untouched(fresh, Untouched() if space is None else untouched_of(space))
        if not (fresh / CARD_NAME).is_file():
            write_card(fresh, repo_id=target.name)

    write_folder(target, fill, overwrite=overwrite)


def _dense_space(folder: Path, batch: Mapping[str, Tensor]) -> PruningSpace | None:
    """Build the pruning space of an exported model before it was cut; None if transformers cannot build the model."""
    config = read_config(folder / CONFIG_NAME) if (folder / CONFIG_NAME).is_file() else GETAConfig()
    dense = empty_model_of(folder)
    return None if dense is None else build_space(dense, batch, prune=config.prune, keep=config.keep)


def _kept(space: PruningSpace, model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Return family -> (groups kept, groups before), as far as the sizes of the model and of the dense one tell."""
    counts = {family.name: (_remaining_groups(family, space, model), family.size) for family in space.prunable}
    return {name: (kept, before) for name, (kept, before) in counts.items() if kept is not None}


def _remaining_groups(family: Family, space: PruningSpace, model: PreTrainedModel) -> int | None:
    """Count the remaining groups of a family; None where its tensors disagree, since another family cut them."""
    found = set()
    for member in family.members:
        size = model.state_dict()[member.tensor].shape[member.dim]
        found.add((space.shapes[member.tensor][member.dim] - size) / member.index.shape[1])
    removed = found.pop()
    # A fraction of a group, or two counts, can only come from a cut of another family through the same tensors.
    return None if found or removed % 1 else family.size - int(removed)


def _checkpoint_of(folder: Path) -> Path:
    if not folder.is_dir():
        raise GETAError(f"{folder} is no folder; name a run, a checkpoint or an exported folder")
    # A run's folder with a config.json holds its final model, which is later than its last checkpoint.
    last = None if (folder / "config.json").is_file() else newest_to_export(folder, is_finished)
    checkpoint = folder if last is None else last
    if not (checkpoint / CONFIG_NAME).is_file():
        raise GETAError(f"{checkpoint} has no {CONFIG_NAME}: it is neither a checkpoint of GETATrainer nor an export")
    return checkpoint


def _finished(progress: Progress, checkpoint: Path) -> int:
    if not progress.finished:
        raise GETAError(
            f"{checkpoint} is from step {progress.step}, before its run had finished; train on before exporting"
        )
    return progress.removed_groups


def load_checkpoint(checkpoint: Path, config: CompressionConfig) -> PreTrainedModel:
    """Load the model of a checkpoint with its trained quantizers, what LoRA learned merged into its weights.

    Args:
        checkpoint: a folder that GETATrainer saved, with the full model in safetensors files.
        config: the run's own.

    Raises:
        GETAError: a folder without weights (shards of FSDP), or without a quantizer that the config asks for.
    """
    stored_headers(checkpoint)  # which finds what is damaged
    with _quiet():  # transformers would list every quantizer as unexpected
        model = load_model(checkpoint)
    stored = _as_in_model(_stored(checkpoint), model)
    if (lora := load_lora(checkpoint)) is not None:
        merge_stored(model, plan_lora(model, lora, select_layers(model, config.include, config.exclude)), stored)
    # After the merge, since peft looks for plain layers; the values of the quantizers come from the checkpoint below.
    method = make_method(config)
    method.by_input = _layers_with(stored, f".weight_quantizer.{BY_INPUT}")
    method.unsigned = _layers_with(stored, f".input_quantizer.{UNSIGNED}")
    method.attach(model, None)  # ranges of inputs are read from the checkpoint
    with torch.no_grad():
        for name, parameter in quantizer_parameters(model, trained=False).items():
            if name not in stored or stored[name].shape != parameter.shape:
                raise GETAError(
                    f"{checkpoint} holds no {name} of shape {tuple(parameter.shape)}; was it written completely?"
                )
            parameter.copy_(stored[name])
    return model


def _layers_with(stored: Mapping[str, Tensor], ending: str) -> list[str]:
    """Return the layers of which a checkpoint has a buffer."""
    return [name.removesuffix(ending) for name in stored if name.endswith(ending)]


def _as_in_model(stored: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """Return tensors of quantizers and of LoRA under the model's own names, where transformers renames modules."""
    paths = {f"{path}.d": path for path, module in model.named_modules() if isinstance(module, tuple(LAYER_TYPES))}
    pieces = stored_names(model, dict.fromkeys(paths, (1,)))
    renamed = {found[0][0].removesuffix(".d"): paths[name] for name, found in pieces.items()}
    found = {}
    for name, tensor in stored.items():
        leaf = _OWN_LEAF.search(name)
        end = len(name) if leaf is None else leaf.start()
        found[renamed.get(name[:end], name[:end]) + name[end:]] = tensor
    return found


def _stored(checkpoint: Path) -> Mapping[str, Tensor]:
    """Read the tensors of quantizers and of LoRA, which are small; the weights are loaded by transformers."""
    found: dict[str, Tensor] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            names = [name for name in tensors.keys() if "_quantizer." in name or ".lora." in name]  # noqa: SIM118
            found |= {name: tensors.get_tensor(name) for name in names}
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    with exclusive():
        level = logging.get_verbosity()
        logging.set_verbosity_error()
        try:
            yield
        finally:
            logging.set_verbosity(level)


def _processing_class(checkpoint: Path) -> Any:
    """Load the tokenizer or processor saved with a checkpoint; None where there is none."""
    # A processor's folder has the files of its tokenizer too, so it is asked for first.
    if (checkpoint / "processor_config.json").is_file():
        return transformers.AutoProcessor.from_pretrained(checkpoint)
    if (checkpoint / "tokenizer_config.json").is_file():
        return transformers.AutoTokenizer.from_pretrained(checkpoint)
    return None
