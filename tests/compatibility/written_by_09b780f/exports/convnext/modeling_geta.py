"""ConvNextForImageClassification as geta_hf compressed it: `from_pretrained(FOLDER, trust_remote_code=True)`.

The classes are those of transformers; the import of the quantizer lets them read packed weights.
"""

import transformers.models.convnext.configuration_convnext
import transformers.models.convnext.modeling_convnext

from .geta_loader import GETALoader  # noqa: F401


class ConvNextConfig(transformers.models.convnext.configuration_convnext.ConvNextConfig):
    pass


class ConvNextForImageClassification(transformers.models.convnext.modeling_convnext.ConvNextForImageClassification):
    config_class = ConvNextConfig


class ConvNextModel(transformers.models.convnext.modeling_convnext.ConvNextModel):
    config_class = ConvNextConfig
