"""Measure what verifying the checksums of a folder adds to loading it.

    python -m benchmarks.checksums [--layers 6] [--bits 4] [--embedding_bits 8] [--pairs 15]

A BERT of random weights is exported once. Then it is loaded with and without verification in turns, in one process with
one torch thread; printed are the median seconds of both, and the median of the ratios. Verification runs in a thread of
its own, so seconds depend on whether a core is free for it; CPU seconds do not. A second table gives the CPU seconds of
verification alone, by the checksums that folders hold and by the CRC-32 of all bytes that they held at first, in turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from geta_hf import attach_quantizers, export
from geta_hf.qadg import PruningSpace
from geta_hf.serialization.checksums import checksums, verify_files
from geta_hf.utils.tables import format_table

VERIFY = "geta_hf.serialization.checksums.verify_files"


def load(folder: Path) -> tuple[float, float]:
    """Load a folder; return seconds and CPU seconds."""
    start, processor = time.perf_counter(), time.process_time()
    BertForSequenceClassification.from_pretrained(folder)
    return time.perf_counter() - start, time.process_time() - processor


def alone(folder: Path, turns: int) -> list[tuple[str, ...]]:
    """Return rows: kind of checksum, median CPU seconds of verifying the folder's file, and gigabytes a second."""
    file = folder / "model.safetensors"
    values = load_file(file)
    former = {name: f"{zlib.crc32(tensor.contiguous().numpy()):08x}" for name, tensor in values.items()}
    kinds = {"sums of columns and rows": checksums(values), "CRC-32 of all bytes": former}
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(turns):
        for kind, expected in kinds.items():
            start = time.process_time()
            verify_files([str(file)], expected)
            times[kind].append(time.process_time() - start)
    size = file.stat().st_size / 1e9
    medians = {kind: statistics.median(spent) for kind, spent in times.items()}
    return [(kind, f"{spent:.4f}", f"{size / spent:.1f}") for kind, spent in medians.items()]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see this file's head."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=6, help="of BERT-base's size")
    parser.add_argument("--bits", type=int, default=4, help="of all quantized layers")
    parser.add_argument("--embedding_bits", type=int, help="of the vocabulary's embedding; float without")
    parser.add_argument("--pairs", type=int, default=15, help="loads of each kind")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    model = BertForSequenceClassification(BertConfig(num_hidden_layers=args.layers))
    attach_quantizers(model, initial_bits=args.bits, target_bits=args.bits)
    batch = {"input_ids": torch.arange(1, 9)[None]}
    with tempfile.TemporaryDirectory() as home:
        report = export(
            model, Path(home) / "out", space=PruningSpace(()), batch=batch, embedding_bits=args.embedding_bits
        )
        load(report.path)
        of_verification = alone(Path(report.path), args.pairs)
        plain, verified = [], []
        for turn in range(args.pairs):
            for kind in (plain, verified) if turn % 2 else (verified, plain):
                if kind is plain:
                    with mock.patch(VERIFY, lambda files, expected: None):
                        kind.append(load(report.path))
                else:
                    kind.append(load(report.path))
    rows = []
    for place, name in enumerate(("seconds", "CPU seconds")):
        before, after = ([times[place] for times in kind] for kind in (plain, verified))
        ratio = statistics.median(new / old for new, old in zip(after, before, strict=True))
        rows.append((name, f"{statistics.median(before):.3f}", f"{statistics.median(after):.3f}", f"{ratio:.3f}"))
    print(f"python -m benchmarks.checksums {' '.join(sys.argv[1:] if argv is None else argv)}".rstrip())
    print(f"file: {report.file_bytes / 1e6:.1f} MB; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
    print(format_table(("", "without", "verified", "ratio"), rows))
    print("\n" + format_table(("verification alone", "CPU seconds", "GB/s"), of_verification))


if __name__ == "__main__":
    main()
