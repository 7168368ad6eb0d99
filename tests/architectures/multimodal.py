"""Several modalities: contrastive pairs, fused encoders, pairs of an encoder and a decoder."""

from __future__ import annotations

import torch

from tests.architectures.base import (
    CHANNELS,
    CLIP_VISION,
    DECODER,
    ENCODER,
    HEADS,
    SIZES,
    T5,
    VIT,
    VOCABULARY,
    WIDTH,
    Architecture,
    noise,
    tokens,
)

_TEXT = ENCODER | {"max_position_embeddings": 32, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
_PAIR = {"text_config": _TEXT, "vision_config": VIT, "projection_dim": 16}
_BLIP_TEXT = _TEXT | {"encoder_hidden_size": WIDTH, "projection_dim": 16, "bos_token_id": 3, "sep_token_id": 2}
_PIX2STRUCT_TEXT = {
    "initializer_range": 0.02,
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "d_kv": 8,
    "d_ff": CHANNELS,
    "num_layers": 2,
    "num_heads": 4,
}


MULTIMODAL = {
    "clip": Architecture("CLIPModel", _PAIR),
    "clip-vision": Architecture("CLIPVisionModelWithProjection", CLIP_VISION),
    "clip-text": Architecture("CLIPTextModelWithProjection", _TEXT | {"projection_dim": 16}),
    "siglip": Architecture("SiglipModel", {"text_config": _TEXT, "vision_config": VIT}),
    "siglip2": Architecture(
        "Siglip2Model",
        {"text_config": _TEXT, "vision_config": SIZES | {"patch_size": 8, "num_patches": 16, "num_channels": 3}},
    ),
    "chinese_clip": Architecture("ChineseCLIPModel", _PAIR),
    "altclip": Architecture(
        "AltCLIPModel", _PAIR | {"text_config": _TEXT | {"project_dim": 16, "max_position_embeddings": 64}}
    ),
    "metaclip_2": Architecture("MetaClip2Model", _PAIR),
    "aimv2": Architecture("Aimv2Model", _PAIR),
    "clipseg": Architecture("CLIPSegModel", _PAIR),
    "owlvit": Architecture("OwlViTModel", _PAIR),
    "owlv2": Architecture("Owlv2Model", _PAIR),
    "xclip": Architecture(
        "XCLIPModel",
        _PAIR
        | {
            "vision_config": VIT
            | {
                "num_frames": 2,
                "hidden_size": WIDTH,
                "mit_hidden_size": WIDTH,
                "mit_intermediate_size": CHANNELS,
                "mit_num_attention_heads": 4,
            },
            "prompt_num_attention_heads": 4,
            "projection_dim": WIDTH,
        },
    ),
    "groupvit": Architecture(
        "GroupViTModel",
        {
            "text_config": _TEXT,
            "vision_config": VIT
            | {
                "depths": [1, 1, 1],
                "num_group_tokens": [4, 2, 0],
                "num_output_groups": [4, 2, 0],
                "num_hidden_layers": 3,
            },
            "projection_dim": 16,
            "projection_intermediate_dim": 24,
        },
    ),
    "blip": Architecture("BlipModel", _PAIR | {"text_config": _BLIP_TEXT}),
    "blip-captioning": Architecture("BlipForConditionalGeneration", _PAIR | {"text_config": _BLIP_TEXT}),
    "align": Architecture(
        "AlignModel",
        {
            "text_config": _TEXT,
            "vision_config": {
                "image_size": 32,
                "width_coefficient": 1.0,
                "hidden_dim": 24,
                "kernel_sizes": [3, 3],
                "in_channels": [32, 16],
                "out_channels": [16, 24],
                "strides": [1, 2],
                "num_block_repeats": [1, 2],
                "expand_ratios": [1, 6],
                "depthwise_padding": [],
            },
            "projection_dim": 24,
        },
    ),
    "flava": Architecture(
        "FlavaModel",
        {
            "text_config": _TEXT,
            "image_config": VIT,
            "multimodal_config": SIZES,
            "hidden_size": WIDTH,
            "projection_dim": 16,
        },
    ),
    "bridgetower": Architecture(
        "BridgeTowerModel",
        SIZES
        | {
            "hidden_size": 128,
            "text_config": _TEXT | {"hidden_size": 128, "pad_token_id": 1},
            "vision_config": VIT | {"hidden_size": 128},
        },
    ),
    "vilt": Architecture("ViltForQuestionAnswering", VIT | ENCODER | {"modality_type_vocab_size": 3}),
    "lxmert": Architecture(
        "LxmertModel",
        ENCODER | {"l_layers": 2, "x_layers": 2, "r_layers": 2, "visual_feat_dim": 16, "visual_pos_dim": 4},
        lambda: {"input_ids": tokens(2, 8), "visual_feats": noise(2, 5, 16), "visual_pos": noise(2, 5, 4)},
    ),
    "visual_bert": Architecture(
        "VisualBertModel",
        ENCODER | {"visual_embedding_dim": 16},
        lambda: {
            "input_ids": tokens(2, 8),
            "attention_mask": torch.ones(2, 8),
            "visual_embeds": noise(2, 5, 16),
            "visual_attention_mask": torch.ones(2, 5),
        },
    ),
    "layoutlmv3": Architecture(
        "LayoutLMv3ForSequenceClassification",
        ENCODER | {"input_size": 32, "image_size": 32, "patch_size": 8, "coordinate_size": 5, "shape_size": 6},
    ),
    "clap": Architecture(
        "ClapModel",
        {
            "text_config": _TEXT | {"projection_dim": 16},
            "audio_config": {
                "spec_size": 32,
                "patch_size": 2,
                "patch_stride": [2, 2],
                "num_mel_bins": 8,
                "window_size": 4,
                "hidden_size": 32,
                "patch_embeds_hidden_size": 16,
                "depths": [1, 1],
                "num_attention_heads": [2, 4],
                "projection_dim": 16,
                "enable_fusion": False,
            },
            "projection_dim": 16,
        },
        lambda: {"input_ids": tokens(2, 8), "input_features": noise(2, 1, 64, 8)},
    ),
    "clvp-encoder": Architecture(
        "ClvpEncoder", ENCODER | {"hidden_size": 64, "num_attention_heads": 2, "projection_dim": 64}
    ),
    "pix2struct-text": Architecture(
        "Pix2StructTextModel",
        _PIX2STRUCT_TEXT,
    ),
    "vision-encoder-decoder": Architecture(
        "VisionEncoderDecoderModel",
        {
            "encoder": VIT | {"model_type": "vit"},
            "decoder": DECODER | {"model_type": "bert", "is_decoder": True, "add_cross_attention": True},
        },
    ),
    "encoder-decoder": Architecture(
        "EncoderDecoderModel",
        {
            "encoder": ENCODER | {"model_type": "bert"},
            "decoder": DECODER | {"model_type": "bert", "is_decoder": True, "add_cross_attention": True},
        },
    ),
    "speech-encoder-decoder": Architecture(
        "SpeechEncoderDecoderModel",
        {
            "encoder": SIZES
            | {
                "model_type": "wav2vec2",
                "conv_dim": [16],
                "conv_stride": [5],
                "conv_kernel": [10],
                "num_conv_pos_embeddings": 4,
                "num_conv_pos_embedding_groups": 2,
            },
            "decoder": DECODER | {"model_type": "bert", "is_decoder": True, "add_cross_attention": True},
        },
        lambda: {"inputs": noise(2, 400), "decoder_input_ids": tokens(2, 8)},
    ),
    "vision-text-dual-encoder": Architecture(
        "VisionTextDualEncoderModel",
        {
            "vision_config": VIT | {"model_type": "vit"},
            "text_config": ENCODER | {"model_type": "bert"},
            "projection_dim": 16,
        },
    ),
    "grounding-dino": Architecture(
        "GroundingDinoForObjectDetection",
        {
            "backbone_config": {
                "model_type": "swin",
                "image_size": 64,
                "patch_size": 2,
                "embed_dim": 8,
                "depths": [1, 1, 1, 1],
                "num_heads": [2, 2, 4, 4],
                "window_size": 4,
                "out_features": ["stage2", "stage3", "stage4"],
            },
            "text_config": ENCODER | {"model_type": "bert"},
            "d_model": WIDTH,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": HEADS,
            "decoder_attention_heads": HEADS,
            "encoder_ffn_dim": CHANNELS,
            "decoder_ffn_dim": CHANNELS,
            "num_queries": 6,
            "max_text_len": 16,
        },
    ),
    "t5-encoder": Architecture("T5EncoderModel", T5),
    "pix2struct": Architecture(
        "Pix2StructForConditionalGeneration",
        {
            "text_config": _PIX2STRUCT_TEXT,
            "vision_config": {
                "hidden_size": WIDTH,
                "d_kv": 8,
                "d_ff": CHANNELS,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "patch_embed_hidden_size": 192,
                "seq_len": 64,
            },
        },
        lambda: {
            "flattened_patches": torch.cat([torch.ones(2, 9, 2), noise(2, 9, 192)], 2),
            "decoder_input_ids": tokens(2, 6),
        },
    ),
    "tipsv2": Architecture("Tipsv2Model", {"text_config": _TEXT, "vision_config": VIT}),
}
