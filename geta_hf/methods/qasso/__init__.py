"""QASSO (GETA, arXiv 2502.16638, Algorithms 2 and 3): prune groups and learn bit widths inside an optimizer's steps.

It wraps any torch optimizer. Nothing here knows Trainer, Accelerate or how a folder is written. From the outside in:

- `method.QASSOMethod` is the seam: it attaches quantizers, makes a `QASSO`, and turns its end into a result.
- `optimizer.QASSO.step` asks `schedule.Schedule.at` which stage the step falls into, and runs the method of that stage:
  `_warm_up_step`, `_projection_step`, `_joint_step` or `_cool_down_step`, each with the line numbers of Algorithm 2.
- Each of these calls `_base_step` (Algorithm 3). `_joint_step` also calls `_partition` (lines 11 and 12) and
  `joint_step.RedundantSlices.forget` (lines 16 to 19, on all redundant `slices.Slice`s at once).
- `equations` has the mathematics of all of them, as pure functions of tensors.
- `split.decide_split` divides a size between pruning and widths, where the config asks for it.
- When the joint stage ends, `QASSO.fix_bits` makes bit widths integers. `state.QASSOState` is all that is remembered.
"""

from geta_hf.methods.qasso.optimizer import QASSO
from geta_hf.methods.qasso.schedule import COOLDOWN, JOINT, PROJECTION, STAGES, WARMUP, Phase, Schedule
from geta_hf.utils.former_modules import former_names

__getattr__ = former_names(
    __name__,
    {
        "LayerEntry": "geta_hf.costs.ledger.LayerEntry",
        "Ledger": "geta_hf.costs.ledger.Ledger",
        "Target": "geta_hf.costs.targets.Target",
        "solve_target": "geta_hf.costs.targets.solve_target",
    },
)

__all__ = ["COOLDOWN", "JOINT", "PROJECTION", "QASSO", "STAGES", "WARMUP", "Phase", "Schedule"]
