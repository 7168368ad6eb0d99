"""How fast onnxruntime runs a compressed encoder, by what it makes of the integer weights, beside PyTorch and dense.

    python benchmarks/onnx_speed.py [--threads 1] [--repeats 20] [--batch 1 8] [--length 128 384]

The encoder has the sizes of MiniLM (6 layers, width 384) and random weights; half of every layer's heads and channels
is cut and 8 bits are left, of the embedding too. All take turns in one process on the same batches; the table gives the
median of each and the median over the turns of its speed-up over dense fp32 in the same turn, which another job on the
machine changes little, and how far the outputs are from the compressed model's, as a share of the largest.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import onnxruntime
import torch
from transformers import BertConfig, BertForQuestionAnswering, PreTrainedModel

from geta_hf import attach_quantizers, build_space, export, prepare_for_inference
from geta_hf.export.formats.onnx import write_onnx
from geta_hf.quantization import quantized_layers, step_size
from geta_hf.utils.tables import format_table

Batch = dict[str, torch.Tensor]
SIZES = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
BITS = 8

DENSE = "dense fp32"
# What to call it, the folder it runs, and the session options.
PATHS = {
    DENSE: ("dense", {}),
    "pruned fp32": ("weights", {"session.disable_quant_qdq": "1"}),
    "int8 weights": ("weights", {"session.qdq_matmulnbits_accuracy_level": "1"}),
    "int8 weights, inputs rounded in blocks": ("weights", {}),
    "dynamic int8 (as the file comes)": ("dynamic", {}),
}
TORCH = ("PyTorch, dense fp32", "PyTorch, compressed, int8")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="of onnxruntime")
    parser.add_argument("--repeats", type=int, default=20, help="runs of each, of which the median counts")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--length", type=int, nargs="+", default=[128, 384])
    return parser.parse_args()


def make_batch(rows: int, length: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 30000, (rows, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def halved(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Return the model as it comes out of training at 50 % and 8 bits, exported and loaded."""
    sample = make_batch(2, 16)
    space = build_space(model, sample)
    for family in space.prunable:
        gone = torch.randperm(family.size)[: family.size // 2]
        for member in family.members:
            model.state_dict()[member.tensor].index_fill_(member.dim, member.index[gone].flatten(), 0.0)
    attach_quantizers(model)
    for layer in quantized_layers(model).values():
        quantizer = layer.weight_quantizer
        quantizer.d.copy_(step_size(BITS, quantizer.q_m, quantizer.t))
    export(model, folder, space=space, batch=sample, embedding_bits=BITS)
    return BertForQuestionAnswering.from_pretrained(folder).eval()


def make_folders(home: Path) -> PreTrainedModel:
    """Write the three ONNX folders below `home`; returns the compressed model."""
    torch.manual_seed(0)
    model, sample = BertForQuestionAnswering(BertConfig(**SIZES)).eval(), make_batch(2, 16)
    for name in ("dense", "weights", "dynamic"):
        (home / name).mkdir()
    write_onnx(model, home / "dense", sample)
    small = halved(model, home / "geta")
    write_onnx(small, home / "weights", sample, dynamic_int8=False)
    write_onnx(small, home / "dynamic", sample)
    return small


def open_session(folder: Path, entries: dict[str, str], threads: int) -> onnxruntime.InferenceSession:
    session_options = onnxruntime.SessionOptions()
    session_options.intra_op_num_threads = threads
    for key, value in entries.items():
        session_options.add_session_config_entry(key, value)
    return onnxruntime.InferenceSession(folder / "model.onnx", session_options, providers=["CPUExecutionProvider"])


@torch.no_grad()
def medians(
    sessions: dict[str, onnxruntime.InferenceSession],
    models: dict[str, PreTrainedModel],
    batch: Batch,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, tuple[float, float]]:
    """Return the median of the seconds of each, and of how many times as fast as dense it was in the same turn."""
    feeds = {name: tensor.numpy() for name, tensor in batch.items()}
    calls: dict[str, Callable[[], object]] = {name: partial(one.run, None, feeds) for name, one in sessions.items()}
    calls |= {name: partial(model, **batch) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            start = clock()
            call()
            times[name].append(clock() - start)
    found = {}
    for name, values in times.items():
        ratios = [dense / own for dense, own in zip(times[DENSE][1:], values[1:], strict=True)]
        found[name] = statistics.median(values[1:]), statistics.median(ratios)
    return found


@torch.no_grad()
def distances(sessions: dict[str, onnxruntime.InferenceSession], batch: Batch, model: PreTrainedModel) -> list[str]:
    """Return the distance of every path but the dense one's, which is another model."""
    feeds, expected = {name: tensor.numpy() for name, tensor in batch.items()}, model(**batch).start_logits
    found = {name: torch.from_numpy(session.run(["start_logits"], feeds)[0]) for name, session in sessions.items()}
    shares = {name: float((logits - expected).abs().max() / expected.abs().max()) for name, logits in found.items()}
    return ["" if name == DENSE else f"{share:.1e}" for name, share in shares.items()]


def main() -> None:
    chosen = options()
    print(f"`python {' '.join(sys.argv)}`: onnxruntime {onnxruntime.__version__}, {os.cpu_count()} cores\n")
    with tempfile.TemporaryDirectory() as home:
        model = make_folders(Path(home))
        sizes = {name: sum(f.stat().st_size for f in Path(home, name).iterdir()) for name in ("dense", "weights")}
        sessions = {
            name: open_session(Path(home, folder), entries, chosen.threads) for name, (folder, entries) in PATHS.items()
        }
        torch.set_num_threads(chosen.threads)
        torch.manual_seed(0)
        models = {TORCH[0]: BertForQuestionAnswering(BertConfig(**SIZES)).eval()}
        models[TORCH[1]] = copy.deepcopy(model)
        prepare_for_inference(models[TORCH[1]], "int8")
        shapes = [(rows, length) for rows in chosen.batch for length in chosen.length]
        columns = [medians(sessions, models, make_batch(*shape), chosen.repeats) for shape in shapes]
        far = distances(sessions, make_batch(2, 128), model)
    header = ("onnxruntime", *(f"{rows} x {length}" for rows, length in shapes), "difference")
    shares = dict(zip(sessions, far, strict=True))
    rows = [
        (name, *(f"{1e3 * times[name][0]:.1f} ms ({times[name][1]:.2f}x)" for times in columns), share)
        for name, share in {**shares, **dict.fromkeys(models, "")}.items()
    ]
    print(format_table(header, rows))
    print(f"\nFolders: dense {sizes['dense'] / 1e6:.1f} MB, compressed {sizes['weights'] / 1e6:.1f} MB.")


if __name__ == "__main__":
    main()
