"""Turn a trained model into a folder that is proved to compute the same, in one of several formats."""

from geta_hf.export.export import ExportReport, export
from geta_hf.utils.former_modules import former_names

__getattr__ = former_names(
    __name__,
    {
        "GETAHfQuantizer": "geta_hf.serialization.hf_quantizer.GETAHfQuantizer",
        "GETAQuantizationConfig": "geta_hf.serialization.hf_quantizer.GETAQuantizationConfig",
        "check_ties": "geta_hf.serialization.tied_weights.check_ties",
        "rehearse": "geta_hf.surgery.trial_cut.try_cuts",
        "verify_surgery": "geta_hf.surgery.verify.verify_surgery",
    },
)

__all__ = ["ExportReport", "export"]
