"""How fast onnxruntime runs a compressed convolutional network, by what it makes of the integers, beside dense.

    python benchmarks/onnx_images.py [--model resnet20 wide8 resnet18] [--threads 1] [--repeats 20] [--batch 1 8]
        [--cpu-time]

Weights are random; half of the channels of every family are cut, and 8 bits are left of every weight and, in the last
rows, of every input of a convolution. All take turns in one process on the same images; the table gives the median of
each and the speed-up over dense fp32, and how far the outputs are from the compressed model's, as a share of the
largest.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import onnxruntime
import torch
from transformers import PreTrainedModel, ResNetConfig, ResNetForImageClassification

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.onnx_speed import BITS, DENSE, Batch, medians, open_session
from geta_hf import attach_quantizers, build_space, export
from geta_hf.export.formats.onnx import write_onnx
from geta_hf.qadg import zero_groups
from geta_hf.quantization import quantized_layers, step_size
from geta_hf.quantization.calibration import attach_input_quantizers
from geta_hf.recipes.cifar_models import CifarResNetConfig, CifarResNetForImageClassification
from geta_hf.utils.tables import format_table

MODELS = {"resnet20": 32, "wide8": 32, "resnet18": 112}
"""Name -> pixels of a side. `wide8` has three blocks of CIFAR's kind with four times the channels of ResNet-20."""

# What to call it, the folder it runs, and the session options.
PATHS = {
    DENSE: ("dense", {}),
    "pruned fp32": ("weights", {"session.disable_quant_qdq": "1"}),
    "int8 weights": ("weights", {}),
    "int8 weights and inputs (as the file comes)": ("integers", {}),
}
TORCH = ("PyTorch, dense fp32", "PyTorch, compressed, int8 weights")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--threads", type=int, default=1, help="of onnxruntime and PyTorch")
    parser.add_argument("--repeats", type=int, default=20, help="runs of each, of which the median counts")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--cpu-time", action="store_true", help="of the process, for a machine others use too")
    return parser.parse_args()


def make_batch(name: str, rows: int) -> Batch:
    side = MODELS[name]
    return {"pixel_values": torch.randn(rows, 3, side, side, generator=torch.Generator().manual_seed(rows))}


@torch.no_grad()
def make_dense(name: str) -> PreTrainedModel:
    """Return a model whose batch norm has seen data."""
    torch.manual_seed(0)
    if name == "resnet20":
        model: PreTrainedModel = CifarResNetForImageClassification(CifarResNetConfig(num_labels=10))
    elif name == "wide8":
        wide = {"embedding_size": 64, "hidden_sizes": [64, 128, 256], "depths": [1, 1, 1]}
        model = CifarResNetForImageClassification(CifarResNetConfig(num_labels=10, **wide))
    else:
        sizes = {"hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic"}
        model = ResNetForImageClassification(ResNetConfig(num_labels=1000, **sizes))
    for _ in range(3):
        model.train()(**make_batch(name, 4))
    return model.eval()


@torch.no_grad()
def make_compressed(name: str, folder: Path, inputs: bool) -> PreTrainedModel:
    """Return the model as it comes out of training at 50 % and 8 bits, exported and loaded; with `inputs` those too."""
    model, sample = make_dense(name), make_batch(name, 2)
    space = build_space(model, sample)
    removal = {family.name: torch.arange(family.size) % 2 == 1 for family in space.prunable}
    for family in space.prunable:
        for member in family.members:
            model.state_dict()[member.tensor].index_fill_(member.dim, member.index[removal[family.name]].flatten(), 0.0)
    assert all(int(zero.sum()) == int(removal[name].sum()) for name, zero in zero_groups(model, space).items())
    attach_quantizers(model)
    for layer in quantized_layers(model).values():
        quantizer = layer.weight_quantizer
        quantizer.d.copy_(step_size(BITS, quantizer.q_m, quantizer.t))
    if inputs:
        for layer in attach_input_quantizers(model, [sample]).values():
            quantizer = layer.input_quantizer
            quantizer.d.copy_(step_size(BITS, quantizer.q_m, quantizer.t))
    export(model, folder, space=space, batch=sample)
    return type(model).from_pretrained(folder).eval()


def make_folders(name: str, home: Path) -> dict[str, PreTrainedModel]:
    """Write the ONNX folders below `home`; return dense and compressed models by the folder they are compared with."""
    sample = make_batch(name, 2)
    for folder in ("dense", "weights", "integers"):
        (home / folder).mkdir()
    dense = make_dense(name)
    weights, both = (make_compressed(name, home / f"geta{inputs}", inputs) for inputs in (False, True))
    write_onnx(dense, home / "dense", sample)
    write_onnx(weights, home / "weights", sample, dynamic_int8=False)
    write_onnx(both, home / "integers", sample)
    return {"dense": dense, "weights": weights, "integers": both}


@torch.no_grad()
def distance(session: onnxruntime.InferenceSession, model: PreTrainedModel, batch: Batch) -> str:
    """Return the largest difference from the model's logits as a share of their largest."""
    expected = model(**batch).logits
    found = torch.from_numpy(session.run(["logits"], {name: value.numpy() for name, value in batch.items()})[0])
    return f"{float((found - expected).abs().max() / expected.abs().max()):.1e}"


def measure(name: str, chosen: argparse.Namespace) -> str:
    with tempfile.TemporaryDirectory() as home:
        models = make_folders(name, Path(home))
        sizes = {folder: sum(f.stat().st_size for f in Path(home, folder).iterdir()) for folder in models}
        sessions = {
            path: open_session(Path(home, folder), entries, chosen.threads) for path, (folder, entries) in PATHS.items()
        }
        torch.set_num_threads(chosen.threads)
        eager = dict(zip(TORCH, (models["dense"], models["weights"]), strict=True))
        clock = time.process_time if chosen.cpu_time else time.perf_counter
        columns = [medians(sessions, eager, make_batch(name, rows), chosen.repeats, clock) for rows in chosen.batch]
        far = {
            path: distance(sessions[path], models[folder], make_batch(name, 3)) for path, (folder, _) in PATHS.items()
        }
    header = (
        f"{name}, {MODELS[name]} pixels",
        *(f"{rows} image" + "s" * (rows > 1) for rows in chosen.batch),
        "difference",
        "MB",
    )
    table = []
    for path in (*PATHS, *TORCH):
        cells = (f"{1e3 * times[path][0]:.1f} ms ({times[path][1]:.2f}x)" for times in columns)
        size = f"{sizes[PATHS[path][0]] / 1e6:.2f}" if path in PATHS else ""
        table.append((path, *cells, far.get(path, ""), size))
    return format_table(header, table)


def main() -> None:
    chosen = options()
    print(f"`python {' '.join(sys.argv)}`: onnxruntime {onnxruntime.__version__}, {os.cpu_count()} cores")
    for name in chosen.model:
        print(f"\n{measure(name, chosen)}")


if __name__ == "__main__":
    main()
