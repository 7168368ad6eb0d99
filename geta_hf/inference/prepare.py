"""Choose, for every packed layer of a compressed model, the fastest path that computes the right values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from transformers import PreTrainedModel

from geta_hf.errors import GETAError
from geta_hf.inference.layers import (
    DYNAMIC,
    FLOAT,
    STATIC,
    WEIGHT_ONLY,
    fits_integers,
    is_exact,
    path_of,
    set_path,
)
from geta_hf.inference.products import on_gpu
from geta_hf.qadg.tracing.raw_reads import find_raw_reads
from geta_hf.serialization.packed_layers import PackedLayer, packed_layers
from geta_hf.surgery.compare_outputs import comparison_mode
from geta_hf.utils.gpu import multiplies_bytes, runs_triton
from geta_hf.utils.model_io import to_device
from geta_hf.utils.tables import format_table

Compute = Literal["auto", "int8", "float"]
COMPUTE: tuple[Compute, ...] = get_args(Compute)


@dataclass(frozen=True)
class InferenceReport:
    """The paths that `prepare_for_inference` chose and the memory that the model takes; `print` it for a table.

    Attributes:
        paths: module path -> `float`, `int8 static`, `int8 dynamic` or `weight only`, for every packed layer.
        bytes_before: part of the model -> bytes of its tensors before the call.
        bytes_after: the same after it.
    """

    paths: dict[str, str]
    bytes_before: dict[str, int]
    bytes_after: dict[str, int]

    def __str__(self) -> str:
        pairs = {part: (before, self.bytes_after[part]) for part, before in self.bytes_before.items()}
        pairs["all"] = (sum(self.bytes_before.values()), sum(self.bytes_after.values()))
        rows = [(part, *(f"{size / 2**20:.2f} MiB" for size in sizes)) for part, sizes in pairs.items()]
        counts = ", ".join(f"{count} {path}" for path, count in Counter(self.paths.values()).items())
        return f"{format_table(('in memory', 'before', 'after'), rows)}\n\nlayers: {counts}"


def prepare_for_inference(
    model: PreTrainedModel, compute: Compute = "auto", batch: Mapping[str, Tensor] | None = None
) -> InferenceReport:
    """Give every packed layer the fastest path on its device, in place. Call it again after moving the model.

    A layer takes one of these paths:

    - `float`: the layer's own forward on the decoded weight, as the model was loaded. It is the only one for weights of
      more than 8 bits, convolutions, tied weights and offloaded layers.
    - `int8 static`: 8-bit integers on both sides, where training rounded the input to at most 8 bits. The values are
      those of `float` except for the last bits of fp32.
    - `int8 dynamic`: every row of the input is rounded to 8 bits over its own range when it comes in. The model was not
      trained so, and it is chosen on request only: sentence embeddings of a trained MiniLM keep a cosine of 0.999.
    - `weight only`, on a GPU: codes of one byte, or of half a byte up to 4 bits, are decoded within the product, which
      is exact. Integer paths use this kernel too for inputs of up to 64 rows, as in generation.

    Integers are for processors that multiply them natively (AVX-512 or AVX VNNI, AMX; GPUs from Turing on); on older
    GPUs layers are `weight only` instead, and on other processors every layer remains `float`. Without a batch every
    layer that can do without `float` does. With one, both ways are timed for every layer on its own input in that
    batch; a layer whose weight the model reads itself, past the layer's forward, remains `float`.

    A model with an integer layer is in evaluation mode and has no trainable parameters afterwards; such layers hold one
    byte or half a byte for each weight and no float copy. Saving writes the same folder as before, and
    `compute="float"` restores the float weights.

    Args:
        model: an export as `from_pretrained` returns it, on the device that it is to run on.
        compute: `auto` (default) chooses exact paths only; `int8` allows `int8 dynamic` too; `float` undoes everything.
        batch: keyword arguments of the model's forward, of the sizes that it is to be fast on. Default None.

    Returns:
        The chosen paths, and the memory before and after, in bytes.

    Raises:
        GETAError: an unknown `compute`, a model without packed layers, or weights that were changed after loading.

    Example:
        >>> import torch
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> sizes = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 32, "num_hidden_layers": 1}
        >>> model = BertForSequenceClassification(BertConfig(vocab_size=30, **sizes))
        >>> batch = {"input_ids": torch.arange(1, 9)[None]}
        >>> import tempfile
        >>> from geta_hf import attach_quantizers, export, prepare_for_inference
        >>> _ = attach_quantizers(model, initial_bits=8)
        >>> folder = tempfile.TemporaryDirectory()
        >>> report = export(model, folder.name + "/small", batch=batch)
        >>> small = BertForSequenceClassification.from_pretrained(folder.name + "/small")
        >>> print(prepare_for_inference(small))
        | ...
        >>> folder.cleanup()
    """
    check_compute(compute)
    layers = packed_layers(model)
    if not layers:
        raise GETAError(f"this {type(model).__name__} has no packed layer; load a folder that geta_hf exported")
    before = memory_by_part(model)
    wanted = _wanted_paths(model, layers, compute)
    if wanted and batch is not None:
        raw = find_raw_reads(model, layers, to_device(batch, model.device), (False,))
        wanted = {name: path for name, path in wanted.items() if name not in raw}
    # All inputs are taken before the first path is set: afterwards layers would see rounded ones.
    inputs = {} if batch is None else _layer_inputs(model, wanted, batch)
    for name, layer in layers.items():
        path = wanted.get(name, FLOAT)
        if batch is not None and path != FLOAT:
            # Each input is dropped once it was used, since those of all layers may be larger than the model.
            path = path if name in inputs and _is_faster(name, layer, path, inputs.pop(name)) else FLOAT
        set_path(name, layer, path)
    paths = {name: path_of(layer) for name, layer in layers.items()}
    if set(paths.values()) != {FLOAT}:
        model.eval().requires_grad_(False)
    return InferenceReport(paths, before, memory_by_part(model))


def check_compute(compute: str) -> None:
    """Check that `compute` is one that `prepare_for_inference` knows.

    Raises:
        GETAError: it is not.
    """
    if compute not in COMPUTE:
        raise GETAError(f"compute is {compute!r}; choose one of {', '.join(COMPUTE)}")


def _wanted_paths(model: nn.Module, layers: Mapping[str, PackedLayer], compute: str) -> dict[str, str]:
    """Return the layers that can do without `FLOAT`, each with the path to take instead."""
    if compute == "float":
        return {}
    holders = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    wanted = {}
    for name, layer in layers.items():
        # A weight that another module holds too has to remain what that module expects.
        if fits_integers(layer) and holders[id(layer.weight)] == 1:
            path = wanted_path(layer, compute)
            if path != FLOAT:
                wanted[name] = path
    return wanted


def wanted_path(layer: PackedLayer, compute: str) -> str:
    """Return the path that a layer which `fits_integers` takes on its device under `auto` or `int8`."""
    device = layer.weight.device
    gpu = on_gpu(layer.weight)
    if multiplies_bytes(device) if gpu else layer.weight.is_cpu and _cpu_has_integers():
        if is_exact(layer):
            return STATIC
        if compute == "int8":
            return DYNAMIC
    return WEIGHT_ONLY if gpu and runs_triton(device) else FLOAT


@cache
def _cpu_has_integers() -> bool:
    """Return whether the CPU adds products of bytes up in 32 bits; others are slow, or overflow 16 bits."""
    # Without these, AVX2 adds pairs of byte products in 16 bits, which saturate.
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))


@torch.no_grad()
def _layer_inputs(model: PreTrainedModel, names: Mapping[str, str], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the first input of each of these layers when the model runs the batch; layers not called are missing."""
    found: dict[str, Tensor] = {}

    def store(name: str, module: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> None:
        # A layer that is called several times is timed on its first call.
        found.setdefault(name, (*args, *kwargs.values())[0])

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(partial(store, name), with_kwargs=True) for name in names
    ]
    try:
        with comparison_mode(model):
            model(**to_device(batch, model.device))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _is_faster(name: str, layer: PackedLayer, path: str, x: Tensor) -> bool:
    """Return whether a path takes less time than `FLOAT` on this input; the layer may be on either afterwards."""
    seconds = {}
    for tried in (FLOAT, path):
        set_path(name, layer, tried)
        timer = Timer("layer(x)", globals={"layer": layer, "x": x}, num_threads=torch.get_num_threads())
        with torch.no_grad():
            # The minimum, since other programs can only add time. FLOAT comes first, so the layer ends on the path
            # that is tried.
            seconds[tried] = min(timer.timeit(3).mean for _ in range(3))
    return seconds[path] < seconds[FLOAT]


def memory_by_part(model: nn.Module) -> dict[str, int]:
    """Return the bytes of all tensors of a model, by part; a tensor that is in several parts counts in the first."""
    layers = packed_layers(model).values()
    streams = [stream for layer in layers if (stream := layer.stream) is not None]
    embeddings = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    linears = [layer.weight for layer in layers if not isinstance(layer, nn.Embedding)]
    parts = {"embeddings": embeddings, "packed layers": linears, "codes kept for saving": streams}
    parts["other tensors"] = [*model.parameters(), *model.buffers()]
    # Tied tensors count once, for the first part that has them.
    seen: set[int] = set()
    return {part: sum(_new_bytes(tensor, seen) for tensor in tensors) for part, tensors in parts.items()}


def _new_bytes(tensor: Tensor, seen: set[int]) -> int:
    if id(tensor) in seen:
        return 0
    seen.add(id(tensor))
    return tensor.nbytes
