"""Make a compressed model fast: choose the fastest correct path for every packed layer on its device.

Other rooms call `prepare_for_inference` on a loaded model or `load_for_inference` on a folder. What a folder holds does
not change by it: a prepared model is saved as the same folder, bit for bit.
"""

from geta_hf.inference.loading import load_for_inference
from geta_hf.inference.prepare import InferenceReport, prepare_for_inference

__all__ = ["InferenceReport", "load_for_inference", "prepare_for_inference"]
