"""How long it takes to split a size between pruning and widths, for the shapes of a model of 3 billion parameters.

    python benchmarks/joint_allocation.py

36 layers of width 2,048 with 32 heads and 11,008 MLP channels each, random losses, under several limits and sizes.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.memory import peak_bytes
from geta_hf.costs.joint_allocation import ExpectedLosses, allocate_jointly
from geta_hf.costs.ledger import LayerEntry, Ledger
from geta_hf.costs.selection import Limits
from geta_hf.costs.targets import BYTES, most_removed
from geta_hf.qadg.group_types import Family, Member
from geta_hf.utils.tables import format_table

LAYERS, HIDDEN, CHANNELS, HEADS, VOCABULARY = 36, 2048, 11008, 32, 151936
WIDTHS = [2, 3, 4, 5, 6, 8]


def _families() -> tuple[list[Family], dict[str, tuple[int, ...]]]:
    shapes: dict[str, tuple[int, ...]] = {"embedding": (VOCABULARY, HIDDEN)}
    families = []
    for layer in range(LAYERS):
        for kind, groups, each, reading in (("heads", HEADS, HIDDEN // HEADS, 3), ("channels", CHANNELS, 1, 2)):
            index = torch.arange(groups * each).view(groups, each)
            members = []
            for number in range(reading + 1):
                name = f"layers.{layer}.{kind}.{number}.weight"
                # The last one reads what the others make.
                dim = 1 if number == reading else 0
                shapes[name] = (HIDDEN, groups * each) if dim else (groups * each, HIDDEN)
                members.append(Member(name, dim, index))
            parameters = (reading + 1) * each * HIDDEN
            families.append(Family(f"layers.{layer}:{kind}", kind, tuple(members), True, parameters=parameters))
    return families, shapes


def main() -> None:
    """Print seconds of CPU time, what remains of the size, and what was decided."""
    families, shapes = _families()
    layers = [LayerEntry(name) for name in shapes if name != "embedding"]
    ledger = Ledger.of(families, shapes, layers, dict.fromkeys(shapes, 2))
    draw = torch.Generator().manual_seed(0)
    parts = []
    for family in families:
        parts.append(torch.rand(family.size, generator=draw, dtype=torch.float64) ** 3 * family.parameters * 1e-7)
    weights = ledger.weights(ledger.nothing)
    scale = weights / weights.mean() * torch.rand(len(weights), generator=draw, dtype=torch.float64)
    falling = torch.tensor([4.0 ** -(bits - 2) for bits in WIDTHS], dtype=torch.float64)
    losses = ExpectedLosses(torch.cat(parts), scale[:, None] * falling, WIDTHS)
    rows = []
    for name, limits in (
        ("none", Limits()),
        ("multiple_of=128", Limits(multiple_of=128)),
        ("uniform", Limits(uniform=True)),
    ):
        low = ledger.stored_bytes(most_removed(families, limits), float(WIDTHS[0]))
        high = ledger.stored_bytes(ledger.nothing, float(WIDTHS[-1]))
        for share in (0.05, 0.2, 0.5):
            size = int(low + (high - low) * share)
            begin = time.process_time()
            found = allocate_jointly(families, limits, ledger, losses, BYTES, size)
            seconds = time.process_time() - begin
            unused = (size - found.spent) / size
            removed = f"{int(found.removed.sum()):,}"
            rows.append((name, f"{size / 1e6:,.0f} MB", f"{seconds:.1f}", f"{unused:.1e}", removed))
    print(format_table(("limits", "size", "seconds", "unused share", "groups removed"), rows))
    peak = peak_bytes("cpu") / 2**20
    print(f"{ledger.groups:,} groups, {len(layers)} layers; peak memory of the process {peak:,.0f} MiB")


if __name__ == "__main__":
    main()
