"""Really faster: the fastest correct path for every layer of a compressed model."""

from geta_hf.inference.loading import load_for_inference
from geta_hf.inference.prepare import InferenceReport, prepare_for_inference

__all__ = ["InferenceReport", "load_for_inference", "prepare_for_inference"]
