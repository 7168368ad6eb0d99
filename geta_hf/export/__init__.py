"""Turn a trained model into a folder that is proved to compute the same, in one of several formats."""

from geta_hf.export.export import ExportReport, export

__all__ = ["ExportReport", "export"]
