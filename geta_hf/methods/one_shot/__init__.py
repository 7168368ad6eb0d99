"""Compression without training: groups, widths and rounding are decided on a few batches of calibration data."""

from geta_hf.methods.one_shot.config import OneShotConfig
from geta_hf.methods.one_shot.method import Calibration, Measured, OneShotMethod, Outcome, Trial

__all__ = ["Calibration", "Measured", "OneShotConfig", "OneShotMethod", "Outcome", "Trial"]
