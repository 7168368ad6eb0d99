"""Make it small and keep it loadable. Importing this package lets transformers read exported folders."""

from geta_hf.export.export import ExportReport, export
from geta_hf.export.gate import verify_surgery
from geta_hf.export.hf_quantizer import GETAHfQuantizer, GETAQuantizationConfig
from geta_hf.export.rehearsal import rehearse
from geta_hf.export.ties import check_ties

__all__ = [
    "ExportReport",
    "GETAHfQuantizer",
    "GETAQuantizationConfig",
    "check_ties",
    "export",
    "rehearse",
    "verify_surgery",
]
