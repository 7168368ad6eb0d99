"""BertForSequenceClassification as geta_hf compressed it: `from_pretrained(FOLDER, trust_remote_code=True)`.

The classes are those of transformers; the import of the quantizer lets them read packed weights.
"""

import transformers.models.bert.configuration_bert
import transformers.models.bert.modeling_bert

from .geta_loader import GETALoader  # noqa: F401


class BertConfig(transformers.models.bert.configuration_bert.BertConfig):
    pass


class BertForSequenceClassification(transformers.models.bert.modeling_bert.BertForSequenceClassification):
    config_class = BertConfig


class BertModel(transformers.models.bert.modeling_bert.BertModel):
    config_class = BertConfig
