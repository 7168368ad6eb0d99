"""Say as plain data what each table compares: its rows, its sparsities, and what all of its cells share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from geta_hf import GETAConfig
from geta_hf.config import CompressionConfig
from geta_hf.methods import OneShotConfig, PostTrainingConfig

DENSE = "dense"
CONTROL = "dense, trained on"
PAPER = "the paper's rules"
SEQUENTIAL = "HESSO, then 8-bit rounding"
GPTQ = "HESSO, then 8-bit GPTQ"
TAUGHT = "defaults, with a teacher"
UNTRAINED = "compressed without training"
INPUTS = ", weights and inputs"
OURS = "defaults"

SCHEDULE: Mapping[str, Any] = {"warmup": 0.1, "projection": 0.1, "joint": 0.3, "pruning_periods": 10}
"""Stages in the proportions of the paper's runs: pruning over ten periods, half of the run in cool-down."""

HESSO: Mapping[str, Any] = {"saliency": "hesso", "bits": (8, 8), "clipping": "max"}
"""HESSO's score with float weights, then 8 bits rounded to the nearest from max|W|: the baseline of Table 5."""


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        name: as the table shows it.
        kind: `dense` (the model as it starts), `control` (trained on without compression), `paper`, `ours`,
            `sequential` (pruned with float weights, rounded after the last step), or `one_shot` (compressed without
            training to the relative BOPs of the row that `equals` names).
        changes: fields of the config that differ from the kind's own.
        equals: the field that is taken from another row's result, and the name of that row: `target_bops` is set to
            its relative BOPs and `target_bytes` to the bytes of its file, for the same sparsity and seed.
        steps: share of the steps of the table.
    """

    name: str
    kind: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    equals: tuple[str, str] | None = None
    steps: float = 1.0

    @property
    def compressed(self) -> bool:
        """Whether groups are removed and widths chosen."""
        return self.kind not in ("dense", "control")


@dataclass(frozen=True)
class Table:
    """What one command measures.

    Attributes:
        name: on the command line and in the results.
        title: of the rendered section.
        rows: in their order. A row that takes a figure from another one stands below it.
        target: the field that `sparsities` set.
        sparsities: shares to remove.
        shared: fields of every compressed cell's config.
    """

    name: str
    title: str
    rows: Sequence[Row]
    target: str
    sparsities: Sequence[float]
    shared: Mapping[str, Any]


def config_of(table: Table, row: Row, sparsity: float, figures: Mapping[str, Any] | None = None) -> CompressionConfig:
    """Return the config of a compressed cell.

    Args:
        table: with what all cells share.
        row: one whose `compressed` is True.
        sparsity: the share to remove.
        figures: the result of the row that `row.equals` names; needed where there is one.
    """
    values = {**SCHEDULE, **table.shared, table.target: sparsity, **row.changes}
    if row.equals is not None and figures is not None:
        unit, _ = row.equals
        values[unit] = figures["relative_bops" if unit == "target_bops" else "bytes"]
    if row.kind == "paper":
        return GETAConfig.paper(**values)
    if row.kind == "one_shot":
        # How a size is split between pruning and widths is what this method decides by itself.
        del values[table.target]
        return OneShotConfig(**{name: value for name, value in values.items() if name not in SCHEDULE})
    if row.kind == "sequential":
        return PostTrainingConfig(**{**HESSO, **values, "bits": (8, 8)})
    return GETAConfig(**values)


def _both(name: str, changes: Mapping[str, Any]) -> list[Row]:
    """Return a row with a change of the schedule under the paper's rules, and under ours at its BOPs."""
    paper = f"{PAPER}, {name}"
    return [
        Row(paper, "paper", changes),
        Row(f"{OURS}, {name}", "ours", changes, ("target_bops", paper)),
    ]


def _lengths() -> list[Row]:
    rows = []
    for share in (1.0, 1 / 3, 1 / 9, 1 / 27):
        name = "all steps" if share == 1 else f"1/{round(1 / share)} of the steps"
        control = f"{CONTROL}, {name}"
        paper = f"{PAPER}, {name}"
        rows += [
            Row(control, "control", steps=share),
            Row(paper, "paper", steps=share),
            Row(f"{OURS}, {name}", "ours", {}, ("target_bops", paper), share),
        ]
    return rows


def _grids() -> list[Row]:
    """Return a row for each grid at each mean width, rounded to nearest and with compensation."""
    rows = []
    for bits in (4, 3, 2):
        for grid in ("layer", "channel", "block32"):
            name = f"{OURS}, grid {grid}, {bits} bits"
            changes = {"grid": grid, "mean_bits": bits}
            rows += [
                Row(name, "ours", changes),
                Row(f"{name}, compensated", "ours", {**changes, "rounding": "compensated"}),
            ]
    return rows


def _images() -> list[Row]:
    """Return what is compared on images, with weights alone and with weights and inputs quantized."""
    rows = [Row(DENSE, "dense"), Row(CONTROL, "control"), Row(SEQUENTIAL, "sequential"), Row(PAPER, "paper")]
    rows += [
        Row(OURS, "ours"),
        Row(f"{OURS}, at the BOPs of the paper's rules", "ours", {}, ("target_bops", PAPER)),
        Row(UNTRAINED, "one_shot", {}, ("target_bops", OURS)),
    ]
    both = {"activation_bits": (4, 8)}
    return [*rows, Row(PAPER + INPUTS, "paper", both), Row(OURS + INPUTS, "ours", both)]


def _of_paper(changes: Mapping[str, Any]) -> list[Row]:
    """Return the rows of one of the paper's tables of images."""
    paper = Row(PAPER, "paper", changes)
    return [
        Row(CONTROL, "control"),
        paper,
        Row(f"{OURS}, at the BOPs of the paper's rules", "ours", changes, ("target_bops", PAPER)),
    ]


ALL_LAYERS: Mapping[str, Any] = {"include": ["."]}
"""First and last layers are quantized too: the paper says of none that it stays in floating point."""

CHANNELS_ALONE: Mapping[str, Any] = {"keep": ["heads"], "bits": (4, 8)}
"""The setting of Table 5: MLP channels are removed, and widths are learned inside 4 to 8 bits."""

COMPENSATED: Mapping[str, Any] = {"compensate": True, "rounding": "compensated"}
"""Least squares where groups are removed, and GPTQ where weights are rounded."""

TAUGHT_BOTH: Mapping[str, Any] = {"distill_logits": 1.0, "distill_hidden": 1.0}
"""A teacher by logits and by the hidden states of every layer."""

TABLES = {
    table.name: table
    for table in (
        Table(
            "table5",
            "Table 5: joint training against pruning and then rounding, MLP channels alone",
            [
                Row(DENSE, "dense"),
                Row(CONTROL, "control"),
                Row(SEQUENTIAL, "sequential"),
                Row(f"{SEQUENTIAL}, clipping values of least error", "sequential", {"clipping": "mse"}),
                Row(GPTQ, "sequential", {"clipping": "mse", "rounding": "compensated"}),
                # As fair to rounding afterwards as a teacher is to ours.
                Row(
                    f"{GPTQ}, with a teacher",
                    "sequential",
                    {"clipping": "mse", "rounding": "compensated", "distill_logits": 1.0},
                ),
                Row(PAPER, "paper"),
                Row(f"{OURS}, at the BOPs of the paper's rules", "ours", {}, ("target_bops", PAPER)),
                Row(f"{OURS}, at 8 bits", "ours", {"bits": (8, 8)}),
                Row(
                    f"{TAUGHT}, at the BOPs of the paper's rules",
                    "ours",
                    {"distill_logits": 1.0},
                    ("target_bops", PAPER),
                ),
            ],
            "target_sparsity",
            (0.5, 0.1, 0.3, 0.7),
            CHANNELS_ALONE,
        ),
        Table(
            "stages",
            "Each stage left out, at half of the MLP channels",
            [
                Row(CONTROL, "control"),
                *_both("all stages", {}),
                *_both("no warm-up", {"warmup": 0.0}),
                *_both("no projection", {"projection": 0.0}),
                *_both("no joint stage", {"joint": 0.0}),
                *_both("no cool-down", {"joint": 0.8}),
            ],
            "target_sparsity",
            (0.5,),
            CHANNELS_ALONE,
        ),
        Table(
            "lengths",
            "The length of the run, at half of the MLP channels",
            _lengths(),
            "target_sparsity",
            (0.5,),
            CHANNELS_ALONE,
        ),
        Table(
            "heads_and_channels",
            "Heads and channels, at equal bytes",
            [
                Row(CONTROL, "control"),
                Row(SEQUENTIAL, "sequential"),
                Row(PAPER, "paper"),
                Row(f"{OURS}, at the bytes of the paper's rules", "ours", {}, ("target_bytes", PAPER)),
                Row(
                    f"{TAUGHT}, at the bytes of the paper's rules",
                    "ours",
                    {"distill_logits": 1.0},
                    ("target_bytes", PAPER),
                ),
            ],
            "target_parameters",
            (0.5, 0.3),
            {"bits": (4, 8)},
        ),
        Table(
            "recovery",
            "What helps a model to recover, at 4 bits on average",
            [
                Row(CONTROL, "control"),
                Row(OURS, "ours"),
                Row(f"{OURS}, mask Fisher", "ours", {"saliency": "mask_fisher"}),
                Row(f"{OURS}, compensated", "ours", {"compensate": True}),
                Row(f"{OURS}, compensated rounding", "ours", {"rounding": "compensated"}),
                Row(f"{OURS}, both compensated", "ours", COMPENSATED),
                Row(f"{OURS}, compensated in one period", "ours", {**COMPENSATED, "joint": 0.05, "pruning_periods": 1}),
                Row(TAUGHT, "ours", {"distill_logits": 1.0}),
                Row(f"{OURS}, hidden-state teacher", "ours", {"distill_hidden": 1.0}),
                Row(f"{TAUGHT}, hidden states too", "ours", TAUGHT_BOTH),
                Row(f"{TAUGHT}, hidden states too, both compensated", "ours", {**TAUGHT_BOTH, **COMPENSATED}),
            ],
            "target_parameters",
            (0.5,),
            {"bits": (3, 8), "mean_bits": 4.0},
        ),
        Table(
            "images",
            "Images: joint training, pruning and then rounding, and no training",
            _images(),
            "target_sparsity",
            (0.5,),
            {"bits": (4, 8)},
        ),
        Table(
            "table2",
            "Table 2: ResNet-20 on CIFAR-10, weights alone",
            _of_paper({}),
            "target_sparsity",
            (0.35,),
            {"bits": (4, 12), **ALL_LAYERS},
        ),
        Table(
            "table3",
            "Table 3: VGG7 on CIFAR-10, weights and inputs",
            _of_paper({"activation_bits": (4, 12)}),
            "target_sparsity",
            (0.7,),
            {"bits": (4, 12), **ALL_LAYERS},
        ),
        Table(
            "table4",
            "Table 4: ResNet-50 on ImageNet, weights alone",
            _of_paper({}),
            "target_sparsity",
            (0.4, 0.5),
            {"bits": (4, 12), **ALL_LAYERS},
        ),
        Table(
            "table6",
            "Table 6: vision transformers, weights alone",
            _of_paper({}),
            "target_sparsity",
            (0.4,),
            {"bits": (4, 12), **ALL_LAYERS},
        ),
        Table(
            "rounding",
            "What a step size is shared by, without pruning",
            [Row(CONTROL, "control"), *_grids()],
            "target_sparsity",
            (0.0,),
            {"bits": (2, 8)},
        ),
    )
}
"""The name of a table -> what it compares."""

IMAGES = frozenset({"images", "table2", "table3", "table4", "table6"})
"""The names of the tables whose task is image classification."""
