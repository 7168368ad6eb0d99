"""The GGUF format: one file for llama.cpp and what is built on it, with the learned codes as its own block types."""

from geta_hf.export.formats.gguf.write import check_gguf, write_gguf

__all__ = ["check_gguf", "write_gguf"]
