"""Language models that see."""

from __future__ import annotations

import torch

from tests.architectures.base import (
    BART,
    CHANNELS,
    CLIP_VISION,
    DECODER,
    GQA,
    HEAD_DIM,
    HEADS,
    LAYERS,
    SIZES,
    VIT,
    VOCABULARY,
    WIDTH,
    Architecture,
    noise,
    tokens,
)

_LLAMA = GQA | {"model_type": "llama"}
_QWEN = GQA | {"model_type": "qwen2"}
_SIGLIP_VISION = VIT | {"model_type": "siglip_vision_model"}
_IMAGE_TOKEN = {"image_token_id": 90, "image_token_index": 90}
_MROPE = HEAD_DIM | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
_QWEN_VISION = {
    "depth": LAYERS,
    "embed_dim": WIDTH,
    "hidden_size": WIDTH,
    "num_heads": HEADS,
    "mlp_ratio": 2,
    "intermediate_size": CHANNELS,
    "out_hidden_size": WIDTH,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "window_size": 16,
    "fullatt_block_indexes": [1],
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
    "in_channels": 3,
}
_QWEN_TOKENS = {
    "image_token_id": 90,
    "video_token_id": 91,
    "vision_start_token_id": 92,
    "vision_end_token_id": 93,
}
_QFORMER = SIZES | {"encoder_hidden_size": WIDTH, "vocab_size": VOCABULARY}


SEEING = {
    "blip-2": Architecture(
        "Blip2ForConditionalGeneration",
        {
            "vision_config": VIT,
            "qformer_config": _QFORMER,
            "text_config": DECODER
            | {"model_type": "opt", "ffn_dim": CHANNELS, "word_embed_proj_dim": WIDTH, "pad_token_id": 1},
            "num_query_tokens": 4,
            **_IMAGE_TOKEN,
        },
    ),
    "instructblip": Architecture(
        "InstructBlipForConditionalGeneration",
        {
            "vision_config": VIT,
            "qformer_config": _QFORMER,
            "text_config": _LLAMA,
            "num_query_tokens": 4,
            **_IMAGE_TOKEN,
        },
        lambda: {
            "pixel_values": noise(2, 3, 32, 32),
            "qformer_input_ids": tokens(2, 6),
            "input_ids": torch.cat([torch.full((2, 4), 90), tokens(2, 8)], dim=1),
        },
    ),
    "git": Architecture("GitForCausalLM", DECODER | {"vision_config": VIT}),
    "llava": Architecture(
        "LlavaForConditionalGeneration",
        {"text_config": _LLAMA, "vision_config": CLIP_VISION, **_IMAGE_TOKEN, "vision_feature_layer": -1},
    ),
    "vipllava": Architecture(
        "VipLlavaForConditionalGeneration",
        {"text_config": _LLAMA, "vision_config": CLIP_VISION, **_IMAGE_TOKEN, "vision_feature_layers": [-1, -2]},
    ),
    "llava_next": Architecture(
        "LlavaNextForConditionalGeneration",
        {
            "text_config": _LLAMA,
            "vision_config": CLIP_VISION,
            **_IMAGE_TOKEN,
            "image_grid_pinpoints": [[32, 32]],
            "vision_feature_layer": -1,
        },
    ),
    "llava_onevision": Architecture(
        "LlavaOnevisionForConditionalGeneration",
        {
            "text_config": _QWEN,
            "vision_config": _SIGLIP_VISION,
            **_IMAGE_TOKEN,
            "image_grid_pinpoints": [[32, 32]],
            "vision_feature_layer": -1,
        },
    ),
    "paligemma": Architecture(
        "PaliGemmaForConditionalGeneration",
        {
            "text_config": HEAD_DIM | {"model_type": "gemma"},
            "vision_config": _SIGLIP_VISION | {"projection_dim": WIDTH},
            "projection_dim": WIDTH,
            **_IMAGE_TOKEN,
        },
    ),
    "gemma3-vision": Architecture(
        "Gemma3ForConditionalGeneration",
        {
            "text_config": HEAD_DIM,
            "vision_config": _SIGLIP_VISION | {"vision_use_head": False},
            "mm_tokens_per_image": 4,
            **_IMAGE_TOKEN,
        },
    ),
    "idefics": Architecture(
        "IdeficsForVisionText2Text",
        DECODER
        | {
            "vision_config": VIT | {"embed_dim": WIDTH},
            "perceiver_config": {"use_resampler": False},
            "cross_layer_interval": 1,
            "additional_vocab_size": 0,
        },
        lambda: {
            "input_ids": tokens(2, 8),
            "attention_mask": torch.ones(2, 8, dtype=torch.long),
            "pixel_values": noise(2, 1, 3, 32, 32),
            "image_attention_mask": torch.ones(2, 8, 1, dtype=torch.long),
        },
    ),
    "idefics2": Architecture(
        "Idefics2ForConditionalGeneration",
        {
            "text_config": GQA | {"model_type": "mistral"},
            "vision_config": VIT,
            "perceiver_config": {
                "hidden_size": WIDTH,
                "resampler_n_latents": 4,
                "resampler_depth": 1,
                "resampler_n_heads": HEADS,
                "resampler_head_dim": 8,
                "num_key_value_heads": 2,
            },
            **_IMAGE_TOKEN,
        },
    ),
    "idefics3": Architecture(
        "Idefics3ForConditionalGeneration",
        {"text_config": _LLAMA, "vision_config": VIT, "scale_factor": 2, **_IMAGE_TOKEN},
    ),
    "smolvlm": Architecture(
        "SmolVLMForConditionalGeneration",
        {"text_config": _LLAMA, "vision_config": VIT, "scale_factor": 2, **_IMAGE_TOKEN},
    ),
    "internvl": Architecture(
        "InternVLForConditionalGeneration",
        {
            "text_config": _QWEN,
            "vision_config": VIT | {"image_size": [32, 32], "patch_size": [8, 8]},
            "downsample_ratio": 0.5,
            "vision_feature_layer": -1,
            **_IMAGE_TOKEN,
        },
    ),
    "aya_vision": Architecture(
        "AyaVisionForConditionalGeneration",
        {
            "text_config": HEAD_DIM | {"model_type": "cohere2"},
            "vision_config": _SIGLIP_VISION,
            "downsample_factor": 2,
            "vision_feature_layer": -1,
            **_IMAGE_TOKEN,
        },
    ),
    "mistral3": Architecture(
        "Mistral3ForConditionalGeneration",
        {
            "text_config": GQA | {"model_type": "mistral"},
            "vision_config": VIT | {"model_type": "pixtral", "head_dim": 8},
            "spatial_merge_size": 2,
            "vision_feature_layer": -1,
            **_IMAGE_TOKEN,
        },
    ),
    "pixtral": Architecture("PixtralVisionModel", VIT),
    "got_ocr2": Architecture(
        "GotOcr2ForConditionalGeneration",
        {
            "text_config": _QWEN,
            "vision_config": VIT
            | {"image_size": 64, "patch_size": 4, "output_channels": 16, "window_size": 2, "global_attn_indexes": [1]},
            **_IMAGE_TOKEN,
        },
    ),
    "qwen2_vl": Architecture(
        "Qwen2VLForConditionalGeneration", {"text_config": _MROPE, "vision_config": _QWEN_VISION, **_QWEN_TOKENS}
    ),
    "qwen2_5_vl": Architecture(
        "Qwen2_5_VLForConditionalGeneration", {"text_config": _MROPE, "vision_config": _QWEN_VISION, **_QWEN_TOKENS}
    ),
    "qwen3_vl": Architecture(
        "Qwen3VLForConditionalGeneration", {"text_config": _MROPE, "vision_config": _QWEN_VISION, **_QWEN_TOKENS}
    ),
    "glm4v": Architecture(
        "Glm4vForConditionalGeneration",
        {"text_config": _MROPE, "vision_config": _QWEN_VISION | {"image_size": 32}, **_QWEN_TOKENS},
    ),
    "mllama-text": Architecture("MllamaForCausalLM", GQA | {"cross_attention_layers": []}),
    "janus": Architecture(
        "JanusForConditionalGeneration",
        {
            "text_config": _LLAMA,
            "vision_config": VIT | {"model_type": "janus_vision_model", "projection_dim": WIDTH, "depth": 2},
            "vq_config": {
                "embed_dim": 8,
                "num_embeddings": 16,
                "base_channels": 32,
                "channel_multiplier": [1, 1],
                "num_res_blocks": 1,
                "latent_channels": 32,
                "projection_dim": WIDTH,
                "image_token_embed_dim": WIDTH,
                "num_patches": 16,
            },
            **_IMAGE_TOKEN,
        },
    ),
    "kosmos-2": Architecture(
        "Kosmos2Model",
        {
            "text_config": {
                "vocab_size": VOCABULARY,
                "embed_dim": WIDTH,
                "layers": LAYERS,
                "ffn_dim": CHANNELS,
                "attention_heads": HEADS,
            },
            "vision_config": VIT,
            "latent_query_num": 4,
        },
        lambda: {
            "input_ids": tokens(2, 8),
            "pixel_values": noise(2, 3, 32, 32),
            "image_embeds_position_mask": (torch.arange(8) < 4).long().expand(2, 8).contiguous(),
        },
    ),
    "florence2": Architecture(
        "Florence2ForConditionalGeneration",
        {
            "text_config": BART | {"model_type": "bart"},
            "vision_config": {
                "embed_dim": [8, 16, 16, 32],
                "num_heads": [2, 2, 2, 4],
                "num_groups": [2, 2, 2, 4],
                "depths": [1, 1, 1, 1],
                "window_size": 4,
                "projection_dim": WIDTH,
                "max_temporal_embeddings": 4,
                "max_position_embeddings": 8,
            },
            **_IMAGE_TOKEN,
        },
    ),
    "video_llava": Architecture(
        "VideoLlavaForConditionalGeneration",
        {
            "text_config": _LLAMA,
            "vision_config": CLIP_VISION,
            "image_token_index": 90,
            "video_token_index": 91,
            "vision_feature_layer": -1,
        },
        lambda: {
            "input_ids": torch.cat([torch.full((2, 16), 90), tokens(2, 6)], 1),
            "attention_mask": torch.ones(2, 22, dtype=torch.long),
            "pixel_values_images": noise(2, 3, 32, 32),
        },
    ),
    "t5gemma2": Architecture(
        "T5Gemma2ForConditionalGeneration",
        {
            "encoder": {
                "text_config": HEAD_DIM,
                "vision_config": _SIGLIP_VISION | {"vision_use_head": False},
                "mm_tokens_per_image": 4,
                "image_token_index": 90,
            },
            "decoder": HEAD_DIM,
            "image_token_index": 90,
        },
    ),
    "ovis2": Architecture(
        "Ovis2ForConditionalGeneration",
        {
            "text_config": _QWEN,
            "vision_config": VIT | {"hidden_stride": 2, "vocab_size": 24, "num_visual_indicator_tokens": 2},
            "visual_indicator_token_ids": [80, 81, 82, 83, 84],
            "hidden_size": WIDTH,
            "vocab_size": VOCABULARY,
            **_IMAGE_TOKEN,
        },
    ),
    "lfm2_vl": Architecture(
        "Lfm2VlForConditionalGeneration",
        {
            "text_config": GQA | {"model_type": "lfm2", "layer_types": ["conv", "full_attention"]},
            "vision_config": SIZES | {"model_type": "siglip2_vision_model", "patch_size": 8, "num_patches": 16},
            "projector_hidden_size": 24,
            **_IMAGE_TOKEN,
        },
    ),
    "cohere2_vision": Architecture(
        "Cohere2VisionForConditionalGeneration",
        {
            "text_config": HEAD_DIM | {"model_type": "cohere2"},
            "vision_config": _SIGLIP_VISION,
            "downsample_factor": 2,
            "alignment_intermediate_size": 24,
            **_IMAGE_TOKEN,
        },
    ),
    "deepseek_vl": Architecture(
        "DeepseekVLForConditionalGeneration",
        {"text_config": _LLAMA, "vision_config": _SIGLIP_VISION, **_IMAGE_TOKEN},
    ),
    "qwen3_vl_moe": Architecture(
        "Qwen3VLMoeForConditionalGeneration",
        {
            "text_config": _MROPE | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
            "vision_config": _QWEN_VISION,
            **_QWEN_TOKENS,
        },
    ),
    "glm4v_moe": Architecture(
        "Glm4vMoeForConditionalGeneration",
        {
            "text_config": _MROPE
            | {
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "mrope_section": [1, 0, 1],
                    "partial_rotary_factor": 0.5,
                }
            }
            | {
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 24,
                "first_k_dense_replace": 1,
            },
            "vision_config": _QWEN_VISION | {"image_size": 32},
            **_QWEN_TOKENS,
        },
    ),
    "llava_next_video": Architecture(
        "LlavaNextVideoForConditionalGeneration",
        {
            "text_config": _LLAMA,
            "vision_config": CLIP_VISION,
            "image_grid_pinpoints": [[32, 32]],
            "vision_feature_layer": -1,
            "video_token_index": 91,
            **_IMAGE_TOKEN,
        },
    ),
}
