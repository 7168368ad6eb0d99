"""Image classification and backbones: transformers and convolutions."""

from __future__ import annotations

from tests.architectures.base import ATTENDING_STAGES, SIZES, STAGES, SWIN, VIT, Architecture

VISION = {
    "vit": Architecture("ViTForImageClassification", VIT),
    "deit": Architecture("DeiTForImageClassification", VIT),
    "dinov2": Architecture("Dinov2ForImageClassification", VIT),
    "swin": Architecture("SwinForImageClassification", SWIN),
    "pvt_v2": Architecture(
        "PvtV2ForImageClassification",
        {
            "image_size": 32,
            "hidden_sizes": [16, 16, 32, 32],
            "num_attention_heads": [1, 2, 2, 4],
            "depths": [1, 1, 1, 1],
        },
    ),
    "resnet": Architecture(
        "ResNetForImageClassification", {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]}
    ),
    "convnext": Architecture("ConvNextForImageClassification", STAGES),
    "regnet": Architecture(
        "RegNetForImageClassification",
        {"embedding_size": 16, "hidden_sizes": [16, 32, 32, 32], "depths": [1, 1, 1, 1], "groups_width": 8},
    ),
    "resnet-basic": Architecture(
        "ResNetForImageClassification",
        {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 2], "layer_type": "basic"},
    ),
    "regnet-y": Architecture(
        "RegNetForImageClassification",
        {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 1], "groups_width": 8, "layer_type": "y"},
    ),
    "vit_mae": Architecture(
        "ViTMAEForPreTraining",
        VIT
        | {
            "decoder_num_attention_heads": 2,
            "decoder_hidden_size": 16,
            "decoder_num_hidden_layers": 2,
            "decoder_intermediate_size": 24,
        },
    ),
    "vit_msn": Architecture("ViTMSNForImageClassification", VIT),
    "vit-mim": Architecture("ViTForMaskedImageModeling", VIT),
    "dinov2-swiglu": Architecture("Dinov2ForImageClassification", VIT | {"use_swiglu_ffn": True}),
    "dinov2_with_registers": Architecture(
        "Dinov2WithRegistersForImageClassification", VIT | {"num_register_tokens": 2}
    ),
    "dinov3_vit": Architecture("DINOv3ViTModel", VIT | {"num_register_tokens": 2}),
    "dinov3_convnext": Architecture("DINOv3ConvNextModel", STAGES),
    "ijepa": Architecture("IJepaForImageClassification", VIT),
    "beit": Architecture("BeitForImageClassification", VIT | {"use_relative_position_bias": True}),
    "beit-shared": Architecture(
        "BeitForImageClassification", VIT | {"use_shared_relative_position_bias": True, "use_mask_token": True}
    ),
    "data2vec-vision": Architecture(
        "Data2VecVisionForImageClassification",
        VIT | {"use_relative_position_bias": True, "layer_scale_init_value": 0.1},
    ),
    "vitdet": Architecture("VitDetModel", VIT | {"window_block_indices": [0], "window_size": 2}),
    "hiera": Architecture(
        "HieraForImageClassification",
        {
            "image_size": [32, 32],
            "patch_stride": [4, 4],
            "mlp_ratio": 2.0,
            "embed_dim": 16,
            "num_heads": [2, 4],
            "depths": [1, 1],
            "num_query_pool": 1,
            "masked_unit_size": [4, 4],
        },
    ),
    "swinv2": Architecture("Swinv2ForImageClassification", SWIN),
    "donut-swin": Architecture("DonutSwinForImageClassification", SWIN),
    "focalnet": Architecture(
        "FocalNetForImageClassification",
        {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "focal_levels": [2, 2]},
    ),
    "convnextv2": Architecture("ConvNextV2ForImageClassification", STAGES),
    "mobilevit": Architecture(
        "MobileViTForImageClassification",
        {
            "image_size": 32,
            "hidden_sizes": [16, 24, 32],
            "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32],
            "num_attention_heads": 4,
        },
    ),
    "mobilevitv2": Architecture("MobileViTV2ForImageClassification", {"image_size": 64, "width_multiplier": 0.125}),
    "mobilenet_v1": Architecture("MobileNetV1ForImageClassification", {"image_size": 32, "depth_multiplier": 0.25}),
    "mobilenet_v2": Architecture("MobileNetV2ForImageClassification", {"image_size": 32, "depth_multiplier": 0.25}),
    "efficientnet": Architecture(
        "EfficientNetForImageClassification",
        {
            "image_size": 32,
            "width_coefficient": 0.25,
            "hidden_dim": 320,
            "kernel_sizes": [3, 3, 5],
            "in_channels": [32, 16, 24],
            "out_channels": [16, 24, 40],
            "strides": [1, 2, 2],
            "num_block_repeats": [1, 2, 2],
            "expand_ratios": [1, 6, 6],
            "depthwise_padding": [],
        },
    ),
    "levit": Architecture(
        "LevitForImageClassification",
        {
            "image_size": 64,
            "hidden_sizes": [16, 24, 32],
            "num_attention_heads": [2, 3, 4],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
            "mlp_ratio": [2, 2, 2],
            "attention_ratio": [2, 2, 2],
            "patch_size": 16,
        },
    ),
    "poolformer": Architecture("PoolFormerForImageClassification", STAGES),
    "segformer-classifier": Architecture(
        "SegformerForImageClassification",
        ATTENDING_STAGES,
    ),
    "pvt": Architecture(
        "PvtForImageClassification",
        ATTENDING_STAGES | {"image_size": 64},
    ),
    "cvt": Architecture(
        "CvtForImageClassification",
        {"embed_dim": [8, 16, 32], "num_heads": [1, 2, 4], "depth": [1, 2, 3], "cls_token": [False, False, True]},
    ),
    "bit": Architecture(
        "BitForImageClassification",
        {
            "embedding_size": 16,
            "hidden_sizes": [16, 32],
            "depths": [1, 1],
            "num_groups": 4,
            "layer_type": "preactivation",
        },
    ),
    "bit-bottleneck": Architecture(
        "BitForImageClassification",
        {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 1], "num_groups": 4, "layer_type": "bottleneck"},
    ),
    "swiftformer": Architecture(
        "SwiftFormerForImageClassification",
        {"embed_dims": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "mlp_ratio": 2, "image_size": 64},
    ),
    "textnet": Architecture(
        "TextNetForImageClassification",
        {
            "image_size": [32, 32],
            "stem_out_channels": 8,
            "hidden_sizes": [8, 8, 16, 16, 32],
            "conv_layer_kernel_sizes": [[[3, 3]], [[3, 3]], [[3, 1]], [[1, 3]]],
            "conv_layer_strides": [[2], [2], [2], [2]],
        },
    ),
    "hgnet_v2": Architecture(
        "HGNetV2ForImageClassification",
        {
            "stem_channels": [3, 8, 8],
            "stage_in_channels": [8, 16],
            "stage_mid_channels": [8, 8],
            "stage_out_channels": [16, 32],
            "stage_num_blocks": [1, 1],
            "stage_numb_of_layers": [2, 2],
            "stage_downsample": [False, True],
            "stage_light_block": [False, True],
            "stage_kernel_size": [3, 3],
            "hidden_sizes": [16, 32],
            "depths": [1, 1],
            "embedding_size": 8,
        },
    ),
    "imagegpt": Architecture(
        "ImageGPTForImageClassification", {"vocab_size": 17, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4}
    ),
    "aimv2-vision": Architecture("Aimv2VisionModel", VIT),
    "mlcd": Architecture("MLCDVisionModel", VIT),
    "pixio": Architecture("PixioModel", VIT),
    "mgp-str": Architecture(
        "MgpstrForSceneTextRecognition",
        SIZES
        | {
            "image_size": [32, 64],
            "patch_size": 8,
            "mlp_ratio": 2.0,
            "max_token_length": 5,
            "num_bpe_labels": 20,
            "num_wordpiece_labels": 20,
        },
    ),
    "radio": Architecture(
        "RadioModel",
        SIZES | {"image_size": 32, "patch_size": 8, "mlp_ratio": 2.0, "max_img_size": 64, "patch_dim": 192},
    ),
    "pp_lcnet": Architecture(
        "PPLCNetForImageClassification",
        {
            "block_configs": [
                [[3, 8, 16, 1, False]],
                [[3, 16, 16, 2, False], [3, 16, 24, 1, False]],
                [[3, 24, 24, 1, False]],
                [[5, 24, 32, 2, False]],
                [[5, 32, 32, 1, True]],
            ],
            "stem_channels": 8,
            "class_expand": 32,
        },
    ),
}
