"""Text encoder-decoders."""

from __future__ import annotations

import torch

from tests.architectures.base import (
    BART,
    CHANNELS,
    HEAD_DIM,
    HEADS,
    LAYERS,
    T5,
    VOCABULARY,
    WIDTH,
    Architecture,
    noise,
    tokens,
)

_GEMMA = HEAD_DIM | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}

SEQ2SEQ = {
    "t5": Architecture("T5ForConditionalGeneration", T5),
    "bart": Architecture("BartForConditionalGeneration", BART),
    "marian": Architecture("MarianMTModel", BART),
    "t5-gated": Architecture(
        "T5ForConditionalGeneration", T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    ),
    "mt5": Architecture("MT5ForConditionalGeneration", T5),
    "umt5": Architecture("UMT5ForConditionalGeneration", T5),
    "longt5": Architecture("LongT5ForConditionalGeneration", T5 | {"local_radius": 3}),
    "longt5-global": Architecture(
        "LongT5ForConditionalGeneration",
        T5 | {"local_radius": 3, "encoder_attention_type": "transient-global", "global_block_size": 4},
    ),
    "switch_transformers": Architecture(
        "SwitchTransformersForConditionalGeneration",
        T5 | {"num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    ),
    "mbart": Architecture("MBartForConditionalGeneration", BART),
    "pegasus": Architecture("PegasusForConditionalGeneration", BART),
    "pegasus_x": Architecture("PegasusXForConditionalGeneration", BART | {"num_global_tokens": 4, "block_size": 4}),
    "bigbird_pegasus": Architecture(
        "BigBirdPegasusForConditionalGeneration", BART | {"attention_type": "original_full"}
    ),
    "blenderbot": Architecture("BlenderbotForConditionalGeneration", BART),
    "blenderbot-small": Architecture("BlenderbotSmallForConditionalGeneration", BART),
    "led": Architecture(
        "LEDForConditionalGeneration",
        BART | {"max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64, "attention_window": 4},
    ),
    "m2m_100": Architecture("M2M100ForConditionalGeneration", BART),
    "nllb-moe": Architecture(
        "NllbMoeForConditionalGeneration",
        BART | {"num_experts": 4, "encoder_sparse_step": 2, "decoder_sparse_step": 2, "expert_capacity": 16},
    ),
    "mvp": Architecture("MvpForConditionalGeneration", BART),
    "mvp-prompt": Architecture(
        "MvpForConditionalGeneration", BART | {"use_prompt": True, "prompt_length": 4, "prompt_mid_dim": 16}
    ),
    "plbart": Architecture("PLBartForConditionalGeneration", BART),
    "fsmt": Architecture(
        "FSMTForConditionalGeneration",
        BART | {"src_vocab_size": VOCABULARY, "tgt_vocab_size": VOCABULARY, "langs": ["en", "de"]},
    ),
    "prophetnet": Architecture(
        "ProphetNetForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "encoder_ffn_dim": CHANNELS,
            "decoder_ffn_dim": CHANNELS,
            "num_encoder_layers": LAYERS,
            "num_decoder_layers": LAYERS,
            "num_encoder_attention_heads": HEADS,
            "num_decoder_attention_heads": HEADS,
            "max_position_embeddings": 64,
            "ngram": 2,
        },
    ),
    "t5gemma": Architecture(
        "T5GemmaForConditionalGeneration",
        {"encoder": _GEMMA, "decoder": _GEMMA | {"cross_attention_hidden_size": WIDTH}, "vocab_size": VOCABULARY},
    ),
    "udop": Architecture(
        "UdopForConditionalGeneration",
        T5 | {"image_size": 32, "patch_size": 8},
        lambda: {
            "input_ids": tokens(2, 8),
            "bbox": torch.rand(2, 8, 4),
            "pixel_values": noise(2, 3, 32, 32),
            "decoder_input_ids": tokens(2, 6),
        },
    ),
}
