"""Write a compressed model into a folder and read it back: packed weights, the loader, and the code a folder carries.

Importing this room registers geta_hf's quantizer with transformers, so that `from_pretrained` reads such folders. The
names below are those that other rooms use often; everything else, such as `packed_layers`, is imported from its module.
Modules that folders carry (`remote_code.CARRIED`) import each other from their modules and never from here, since
only those imports can be made relative in the copy.
"""

from geta_hf.serialization.atomic_folder import check_target, write_folder
from geta_hf.serialization.encode import activation_bits, dense_weight, layer_codes, weight_bits, weight_holders
from geta_hf.serialization.hf_quantizer import QUANT_METHOD, GETAQuantizationConfig, attach_quantizer, has_quantizer
from geta_hf.serialization.remote_code import save_compressed
from geta_hf.serialization.sizes import check_shards, shard_options, tensor_bytes, tensor_sizes
from geta_hf.serialization.tied_weights import check_ties
from geta_hf.serialization.validate import check_readable, read_json

__all__ = [
    "QUANT_METHOD",
    "GETAQuantizationConfig",
    "activation_bits",
    "attach_quantizer",
    "check_readable",
    "check_shards",
    "check_target",
    "check_ties",
    "dense_weight",
    "has_quantizer",
    "layer_codes",
    "read_json",
    "save_compressed",
    "shard_options",
    "tensor_bytes",
    "tensor_sizes",
    "weight_bits",
    "weight_holders",
    "write_folder",
]
