"""GPT2LMHeadModel as geta_hf compressed it: `from_pretrained(FOLDER, trust_remote_code=True)`.

The classes are those of transformers; the import of the quantizer lets them read packed weights.
"""

import transformers.models.gpt2.configuration_gpt2
import transformers.models.gpt2.modeling_gpt2

from .geta_loader import GETALoader  # noqa: F401


class GPT2Config(transformers.models.gpt2.configuration_gpt2.GPT2Config):
    pass


class GPT2LMHeadModel(transformers.models.gpt2.modeling_gpt2.GPT2LMHeadModel):
    config_class = GPT2Config


class GPT2Model(transformers.models.gpt2.modeling_gpt2.GPT2Model):
    config_class = GPT2Config
