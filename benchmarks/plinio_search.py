"""Run PLiNIO, the reference of the search (arXiv 2407.01054), on the network and images of `python -m eval.searches`.

    git clone https://github.com/eml-eda/plinio
    PYTHONPATH=plinio python benchmarks/plinio_search.py W --name N --data idx_dir=fashion-mnist [--strengths 0.3 1 3]

`W` and `N` are the work folder and the name of an `eval.searches images` run; each run starts from its dense model and
takes its steps. The library is used as it is: its mixture of 0, 2, 4 and 8 bits for each channel, its sharing of
choices, its quantizers and its size; activations have 8 bits and a sign. The training loop is the user's own there, and
its authors' is for hundreds of epochs, so choices follow ours: Adam, the temperature from 1 to 0.05, λ that rises over
half of the search, and then the likeliest choice is fixed. Its own export fails for widths of channels, so the score is
that of its model in evaluation mode, and the size is counted: the bits of the weights that remain, beside the bytes
that the file of `w2a8` has for everything else. It needs tdigest, networkx and torchinfo.

One line of `W/plinio.jsonl` for each strength, the weight of the expected size relative to 8 bits.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, set_seed
from transformers.modeling_outputs import ImageClassifierOutput

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from eval.results_file import read_results
from eval.searches import RESNET_8
from eval.study_tasks import ImageOptions, Lengths, Task, image_task
from eval.tables.__main__ import pairs
from geta_hf import GETAError, SearchConfig
from geta_hf.methods.search.sampling import price_at, temperature_at

WIDTHS = (0, 2, 4, 8)


class PlainBlock(nn.Module):
    """A basic block of our ResNet, written out so that `torch.fx` can follow it."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        first, second = block.layer
        self.conv1, self.norm1 = first.convolution, first.normalization
        self.conv2, self.norm2 = second.convolution, second.normalization
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()
        shortcut = block.shortcut
        self.shortcut = (
            nn.Identity()
            if isinstance(shortcut, nn.Identity)
            else nn.Sequential(shortcut.convolution, shortcut.normalization)
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(x)))))
        return self.relu2(out + self.shortcut(x))


class PlainResNet(nn.Module):
    """Our ResNet with the same modules and no code that depends on its input."""

    def __init__(self, model: Any, side: int) -> None:
        super().__init__()
        stem = model.resnet.embedder.embedder
        self.conv, self.norm, self.relu = stem.convolution, stem.normalization, nn.ReLU()
        self.blocks = nn.Sequential(
            *(PlainBlock(block) for stage in model.resnet.encoder.stages for block in stage.layers)
        )
        # Each stage but the first halves the side.
        self.pool = nn.AvgPool2d(side // 2 ** (len(model.resnet.encoder.stages) - 1))
        self.classifier = model.classifier[-1]

    def forward(self, x: Tensor) -> Tensor:
        out = self.pool(self.blocks(self.relu(self.norm(self.conv(x)))))
        return self.classifier(out.flatten(1))


class Scored(nn.Module):
    """Let `task.score` call a model of tensors as it calls those of transformers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> ImageClassifierOutput:
        return ImageClassifierOutput(logits=self.model(pixel_values))


def stored_bits(shapes: Sequence[tuple[int, int, int]], widths: Sequence[tuple[Sequence[int], int]]) -> int:
    """Return the bits of the weights of all layers.

    Args:
        shapes: (outputs, inputs, elements of a kernel) of each layer.
        widths: of each layer, the width of each output, 0 where it is removed, and how many inputs remain.
    """
    total = 0
    for (outputs, inputs, area), (own, remaining) in zip(shapes, widths, strict=True):
        assert len(own) == outputs and remaining <= inputs
        total += sum(own) * remaining * area
    return total


def search(
    task: Task, dense: PreTrainedModel, lengths: Lengths, strength: float, share: float, seed: int
) -> dict[str, Any]:
    """Run PLiNIO once, and return the score and the bits of its weights.

    Args:
        task: of images.
        dense: where it starts; changed.
        lengths: of the run.
        strength: what the expected size is multiplied by, relative to that at 8 bits.
        share: of the steps that are the search's.
        seed: of the order of the data.
    """
    from plinio.cost import params_bit
    from plinio.methods.mps import MPS, MPSType, get_default_qinfo
    from plinio.methods.mps.quant.quantizers import PACTActSigned

    set_seed(seed)
    images = task.collator([task.features[0]])["pixel_values"]
    plain = PlainResNet(dense, images.shape[-1]).train()
    full = 8 * sum(m.weight.numel() for m in plain.modules() if isinstance(m, nn.Conv2d))
    settings = get_default_qinfo(w_precision=WIDTHS, a_precision=(8,))
    settings["input_default"] |= {
        "quantizer": PACTActSigned,
        "kwargs": {"init_clip_val_inf": -1, "init_clip_val_sup": 1},
    }
    settings["layer_default"]["output"]["quantizer"] = PACTActSigned
    model = MPS(
        plain,
        input_example=images,
        w_search_type=MPSType.PER_CHANNEL,
        qinfo=settings,
        cost=params_bit,
        exclude_names=("classifier",),
    )
    model.train()
    weights = torch.optim.Adam(
        list(dict(model.named_net_parameters()).values()), lr=lengths.learning_rate, weight_decay=1e-4
    )
    searched = round(share * lengths.steps)
    rate = SearchConfig().choice_rate(searched)
    choices = torch.optim.Adam(list(dict(model.named_nas_parameters()).values()), lr=rate)
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(
        task.features, lengths.batch_size, shuffle=True, drop_last=True, collate_fn=task.collator, generator=order
    )
    decay = torch.optim.lr_scheduler.LambdaLR(weights, lambda step: 1 - step / lengths.steps)
    begin = time.process_time()
    spent = []
    for step, batch in enumerate(_endless(loader, lengths.steps)):
        open_choice = step < searched
        model.update_softmax_options(temperature=temperature_at(step, searched, 1.0, 0.05), hard=not open_choice)
        start = time.process_time()
        loss = nn.functional.cross_entropy(model(batch["pixel_values"]), batch["labels"])
        if open_choice:
            loss = loss + price_at(step, searched, strength) * model.cost / full
        weights.zero_grad()
        choices.zero_grad()
        loss.backward()
        weights.step()
        if open_choice:
            choices.step()
        decay.step()
        spent.append(time.process_time() - start)
    model.eval()
    found = task.score(Scored(model))
    shapes, widths = [], []
    for summary, layer in _convolutions(model):
        shapes.append((layer.weight.shape[0], layer.weight.shape[1], layer.weight[0, 0].numel()))
        remaining = int(layer.input_features_calculator.features_mask.sum())
        widths.append(([int(width) for width in summary["w_precision"]], remaining))
    bits = stored_bits(shapes, widths)
    kept = sum(
        sum(width > 0 for width in own) * remaining * shape[2]
        for shape, (own, remaining) in zip(shapes, widths, strict=True)
    )
    return {
        **found,
        "weight_bits": bits,
        "mean_bits": bits / max(kept, 1),
        "kept_weights": kept / sum(math.prod(shape) for shape in shapes),
        "search_step_ms": 1000 * sorted(spent[:searched])[searched // 2],
        "finetuning_step_ms": 1000 * sorted(spent[searched:])[(len(spent) - searched) // 2],
        "cpu_seconds": round(time.process_time() - begin, 1),
    }


def _convolutions(model: Any) -> list[tuple[dict[str, Any], Any]]:
    summary = model.summary()
    return [(summary[name], layer) for name, _, layer in model._unique_leaf_modules if isinstance(layer, nn.Conv2d)]


def _endless(loader: DataLoader[Any], steps: int) -> Any:
    done = 0
    while True:
        for batch in loader:
            if done == steps:
                return
            done += 1
            yield batch


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that the module's docstring describes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--name", required=True, help="of the study in the work folder")
    parser.add_argument("--data", nargs="+", metavar="KEY=VALUE", required=True, help="as of that study")
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.3, 1.0, 3.0])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    line = next(
        (line for line in read_results(args.work) if line["row"] == "w2a8" and line["study"] == args.name), None
    )
    if line is None:
        raise GETAError(f"{args.work} has no row w2a8 of {args.name!r}; run `python -m eval.searches images` first")
    settings = line["settings"]
    lengths = Lengths(settings["steps"], settings["batch_size"], settings["learning_rate"])
    task = image_task(ImageOptions(RESNET_8, pairs(args.data, "--data")), lengths, args.name)
    folder = args.work / args.name / "dense"
    for strength in args.strengths:
        dense = task.load(folder)
        weights = sum(m.weight.numel() for m in dense.modules() if isinstance(m, nn.Conv2d))
        other = line["bytes"] - weights * 2 // 8
        found = search(task, dense, lengths, strength, settings["search"], args.seed)
        result = {"strength": strength, "seed": args.seed, **found, "bytes": other + found["weight_bits"] // 8}
        with (args.work / "plinio.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    try:
        main()
    except GETAError as error:
        sys.exit(f"error: {error}")
