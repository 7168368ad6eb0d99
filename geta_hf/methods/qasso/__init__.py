"""QASSO (GETA, arXiv 2502.16638, Algorithms 2 and 3): prune groups and learn bit widths inside an optimizer's steps.

It wraps any torch optimizer. Nothing here knows Trainer, Accelerate or how a folder is written.
"""

from geta_hf.methods.qasso.optimizer import QASSO
from geta_hf.methods.qasso.schedule import COOLDOWN, JOINT, PROJECTION, STAGES, WARMUP, Phase, Schedule

__all__ = ["COOLDOWN", "JOINT", "PROJECTION", "QASSO", "STAGES", "WARMUP", "Phase", "Schedule"]
