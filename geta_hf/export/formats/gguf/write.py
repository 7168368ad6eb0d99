"""Write a GGUF file from a compressed model, and say in the folder what it is."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from geta_hf.errors import GETAError
from geta_hf.export.formats.exported import require
from geta_hf.export.formats.gguf.architectures import Layout, layout_of, tensors, write_metadata
from geta_hf.export.formats.gguf.blocks import choose_type, encode
from geta_hf.export.formats.gguf.proof import Decoded, perplexity_notes, prove_decoded, prove_run
from geta_hf.export.formats.gguf.vocabulary import Vocabulary, read_vocabulary
from geta_hf.export.formats.plain import LEFT_OUT
from geta_hf.serialization.encode import activation_bits

FILE_NAME = "model.gguf"

_BYTES_OF_FLOAT = {"F32": 4, "F16": 2, "BF16": 2}


def write_gguf(
    model: PreTrainedModel,
    folder: Path,
    batch: Mapping[str, Tensor],
    *,
    processing_class: Any = None,
    float32: bool = False,
    ternary: bool = False,
) -> None:
    """Write a compressed model as model.gguf, which llama.cpp and Ollama run as it is.

    Weights of at most 8 bits go into the smallest block type that holds their codes as they are: Q4_0, Q5_0 or Q8_0,
    and Q2_K, Q3_K or Q6_K for rows of a multiple of 256. The step size is stored in half precision, which changes it by
    2^-11 of itself at most, and not at all where it is such a number. Weights whose rows are no multiple of 32 long
    (train with `multiple_of=32` to avoid them), wider codes, and embeddings that were not quantized are F16. Layers may
    differ for Llama, Mistral, and Qwen2 as far as its biases allow: llama.cpp calls that architecture `deci`.

    Every tensor of the written file is decoded and compared. Where the package xllamacpp is installed, llama.cpp runs
    the file: its probabilities of next tokens have to be the model's, within 1e-3 in F32 and within what its
    activations of 8 bits explain otherwise, and its tokens of a text those of the tokenizer.
    config.json and README.md say what was found.

    Args:
        model: compressed, or plain; left unchanged.
        folder: an existing empty folder.
        batch: what to prove on, with `input_ids`.
        processing_class: the tokenizer, which the file holds.
        float32: store every tensor as F32, to compare.
        ternary: store 2 bits in rows of a multiple of 256 as TQ2_0, 2.06 bits for each weight in place of Q2_K's 2.63.
            It is as exact, but not all of llama.cpp's backends have kernels for it: CUDA has none.

    Raises:
        GETAError: as `check_gguf`, or the file holds other values, or llama.cpp gives other probabilities.
    """
    layout, vocabulary = _described(model, processing_class)
    types = _write(model, layout, vocabulary, folder / FILE_NAME, float32, ternary)
    decoded = prove_decoded(folder / FILE_NAME, tensors(model, layout))

    def write_floats(path: Path) -> None:
        _write(model, layout, vocabulary, path, True)

    exact = all(kind == "F32" for kind in types.values())
    run = prove_run(model, folder / FILE_NAME, batch, _tokenizer(processing_class), None if exact else write_floats)
    found = {
        "format": "gguf",
        "file": FILE_NAME,
        "load": f"xllamacpp.Server(params), with params.model.path = '{FILE_NAME}'",
        "architecture": layout.architecture.name,
        "types": dict(Counter(types.values())),
        "not_exact": {name: {"type": types[name], "error": error} for name, error in decoded.errors.items() if error},
        "notes": [*layout.notes, *_fallbacks(model, layout, types), *perplexity_notes(run)],
        "run": asdict(run),
    }
    config = copy.deepcopy(model.config)
    for key in LEFT_OUT:
        config.__dict__.pop(key, None)
    config.exported_as = found
    config.save_pretrained(folder)
    (folder / "README.md").write_text(_card(found, decoded), encoding="utf-8")


def check_gguf(model: PreTrainedModel, processing_class: Any) -> None:
    """Raise GETAError for whatever keeps a model from being written, known before it is cut.

    Args:
        model: trained or compressed.
        processing_class: a tokenizer, or a processor that has one.

    Raises:
        GETAError: the package gguf is missing, GGUF has no name for the architecture or a tensor, no place for what was
            cut, no model for the tokenizer, or no rounded activations.
    """
    _described(model, processing_class)


def _described(model: PreTrainedModel, processing_class: Any) -> tuple[Layout, Vocabulary]:
    require("gguf", "gguf")
    if rounded := activation_bits(model):
        raise GETAError(
            f"GGUF has no place for rounded activations, which {len(rounded)} layers have (the first is "
            f"{next(iter(rounded))}); export in the geta format, or train on float activations"
        )
    layout = layout_of(model)
    return layout, read_vocabulary(_tokenizer(processing_class), layout.vocabulary, model.config)


def _tokenizer(processing_class: Any) -> PreTrainedTokenizerBase | None:
    return getattr(processing_class, "tokenizer", processing_class)


def _write(
    model: PreTrainedModel,
    layout: Layout,
    vocabulary: Vocabulary,
    path: Path,
    float32: bool,
    ternary: bool = False,
) -> dict[str, str]:
    """Write the file; return the type of every tensor."""
    import gguf

    writer = gguf.GGUFWriter(path, layout.architecture.name)
    types: dict[str, str] = {}
    sizes: Counter[str] = Counter()
    # The header with all sizes comes first in the file. Values are computed twice, so that no more than one tensor
    # is in memory at a time.
    for name, values_of in tensors(model, layout):
        values = values_of()
        kind = "F32" if float32 else choose_type(values, ternary)
        shape = _byte_shape(tuple(values.floats.shape), kind)
        types[name] = kind
        sizes[kind] += values.floats.numel()
        nbytes = 1
        for size in shape:
            nbytes *= size
        writer.add_tensor_info(name, shape, _uint8(), nbytes, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.add_type("model")
    writer.add_name(_name(model, vocabulary))
    writer.add_size_label(gguf.size_label(sum(sizes.values()), 0, 0, 0))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(_file_type(max(sizes, key=sizes.__getitem__)))
    write_metadata(writer, model, layout)
    vocabulary.write(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, values_of in tensors(model, layout):
        writer.write_tensor_data(encode(values_of(), types[name]))
    writer.close()
    return types


_PHI_3_TOKENS = {"<unk>", "<s>", "</s>", "<|endoftext|>"}


def _name(model: PreTrainedModel, vocabulary: Vocabulary) -> str:
    name = Path(model.config.name_or_path or model.config.model_type).name
    # By such a name llama.cpp changes how these tokens treat spaces, and fails where they are missing.
    named = "phi3" in name.lower() or "phi-3" in name.lower()
    return "model" if named and not _PHI_3_TOKENS.issubset(vocabulary.tokens) else name


def _uint8() -> Any:
    import numpy as np

    return np.dtype(np.uint8)


def _byte_shape(shape: tuple[int, ...], kind: str) -> tuple[int, ...]:
    import gguf

    block, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return (*shape[:-1], shape[-1] // block * nbytes)


def _file_type(kind: str) -> Any:
    import gguf

    names = {"F32": "ALL_F32", "Q3_K": "MOSTLY_Q3_K_M"}
    return gguf.LlamaFileType[names.get(kind, f"MOSTLY_{kind}")]


def _fallbacks(model: PreTrainedModel, layout: Layout, types: Mapping[str, str]) -> list[str]:
    """Say which quantized weights are stored as floats, and why."""
    found = []
    for name, values_of in tensors(model, layout):
        if types[name] not in _BYTES_OF_FLOAT or name.endswith(("norm.weight", ".bias")):
            continue
        values = values_of()
        if values.bits:
            found.append(f"{name} ({values.bits} bits, rows of {values.floats.shape[-1]}) is {types[name]}")
    if found:
        found.append("rows that are a multiple of 32 long have block types: train with multiple_of=32")
    return found


def _card(found: Mapping[str, Any], decoded: Decoded) -> str:
    """Return the README of the folder."""
    types = ", ".join(f"{kind} ({count} tensors)" for kind, count in found["types"].items())
    run = found["run"]
    lines = [
        "# A model for llama.cpp",
        "",
        f"`{FILE_NAME}` holds a compressed model, its tokenizer and its chat template, for stock llama.cpp and "
        f"programs built on it. Architecture: `{found['architecture']}`. Types: {types}.",
        "",
        "```python",
        "import xllamacpp",
        "",
        "params = xllamacpp.CommonParams()",
        f'params.model.path = "{FILE_NAME}"',
        "server = xllamacpp.Server(params)",
        'answer = server.handle_completions({"prompt": "Once upon a time", "max_tokens": 32, "temperature": 0})',
        "```",
        "",
    ]
    if found["not_exact"]:
        lines += [
            f"{len(found['not_exact'])} of {len(decoded.errors)} tensors are not exactly the trained ones. The largest "
            f"difference is {max(decoded.errors.values()):.2g} of the largest value of its tensor; config.json "
            f"(`exported_as`) lists all.",
            "",
        ]
    else:
        lines += [f"All {len(decoded.errors)} tensors are exactly the trained ones.", ""]
    if run["ran"]:
        expected, found_here, in_floats = run["perplexity"]
        lines += [
            f"Run by llama.cpp ({run['runner']}): the largest difference of a probability of a next token from "
            f"transformers is {run['difference']:.2g} ({run['mean_difference']:.2g} in the mean over steps), and "
            f"{run['float_difference']:.2g} with all tensors in F32. Of {run['tokens']} tokens generated greedily in "
            f"F32, {run['same_tokens']} are those of transformers; any others are ties.",
            "",
            f"Perplexity of a short text: {expected:.4g} in transformers, {found_here:.4g} in llama.cpp, and "
            f"{in_floats:.4g} there with all tensors in F32.",
            "",
        ]
    else:
        lines += [f"Not run: {run['runner']}. Every tensor of the file was decoded and compared."]
    lines += [f"- {note}" for note in found["notes"]]
    return "\n".join(lines) + "\n"
