"""LlamaForCausalLM as geta_hf compressed it: `from_pretrained(FOLDER, trust_remote_code=True)`.

The classes are those of transformers; the import of the quantizer lets them read packed weights.
"""

import transformers.models.llama.configuration_llama
import transformers.models.llama.modeling_llama

from .geta_loader import GETALoader  # noqa: F401


class LlamaConfig(transformers.models.llama.configuration_llama.LlamaConfig):
    pass


class LlamaForCausalLM(transformers.models.llama.modeling_llama.LlamaForCausalLM):
    config_class = LlamaConfig


class LlamaModel(transformers.models.llama.modeling_llama.LlamaModel):
    config_class = LlamaConfig
