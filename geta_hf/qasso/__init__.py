"""What is removed and how many bits stay."""

from geta_hf.qasso.ledger import LayerEntry, Ledger
from geta_hf.qasso.optimizer import QASSO
from geta_hf.qasso.schedule import COOLDOWN, JOINT, PROJECTION, STAGES, WARMUP, Phase, Schedule
from geta_hf.qasso.target import Target, solve_target

__all__ = [
    "COOLDOWN",
    "JOINT",
    "PROJECTION",
    "QASSO",
    "STAGES",
    "WARMUP",
    "LayerEntry",
    "Ledger",
    "Phase",
    "Schedule",
    "Target",
    "solve_target",
]
