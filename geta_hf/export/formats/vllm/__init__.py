"""The vLLM format: what vLLM loads by its own model classes, also where layers differ."""

from geta_hf.export.formats.vllm.architectures import check_vllm
from geta_hf.export.formats.vllm.write import write_vllm

__all__ = ["check_vllm", "write_vllm"]
