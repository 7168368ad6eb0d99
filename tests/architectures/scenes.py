"""Detection, segmentation, depth, poses, super-resolution; videos."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.architectures.base import (
    ATTENDING_STAGES,
    CHANNELS,
    SIZES,
    STAGES,
    SWIN,
    TOWERS,
    VIT,
    WIDTH,
    Architecture,
    noise,
)

_RESNET = {
    "model_type": "resnet",
    "embedding_size": 16,
    "hidden_sizes": [16, 32],
    "depths": [1, 1],
    "out_features": ["stage2"],
}
_RESNET_3 = _RESNET | {
    "hidden_sizes": [16, 16, 32],
    "depths": [1, 1, 1],
    "out_features": ["stage1", "stage2", "stage3"],
}
_VIT_BACKBONE = VIT | {"model_type": "dinov2", "out_indices": [1, 2], "reshape_hidden_states": False}
_DETR = TOWERS | {
    "d_model": WIDTH,
    "num_queries": 6,
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
}
_DEFORMABLE = _DETR | {
    "backbone_config": _RESNET_3,
    "num_feature_levels": 3,
    "encoder_n_points": 2,
    "decoder_n_points": 2,
}
_RT_DETR = _DEFORMABLE | {
    "backbone_config": _RESNET_3 | {"model_type": "rt_detr_resnet"},
    "encoder_hidden_dim": WIDTH,
    "encoder_in_channels": [16, 16, 32],
    "decoder_in_channels": [WIDTH, WIDTH, WIDTH],
    "encode_proj_layers": [2],
    "encoder_layers": 1,
    "feat_strides": [4, 8, 16],
    "eval_size": None,
}
_VIDEO = VIT | {"num_frames": 4, "tubelet_size": 2}
_SAM_VISION = SIZES | {
    "image_size": 32,
    "patch_size": 8,
    "output_channels": 16,
    "window_size": 2,
    "global_attn_indexes": [1],
    "mlp_dim": CHANNELS,
    "num_pos_feats": 8,
}
_SAM = {
    "vision_config": _SAM_VISION,
    "prompt_encoder_config": {"hidden_size": 16, "image_size": 32, "patch_size": 8, "mask_input_channels": 8},
    "mask_decoder_config": {
        "hidden_size": 16,
        "mlp_dim": CHANNELS,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "iou_head_hidden_dim": 16,
    },
}


def _points() -> dict[str, Tensor]:
    """A picture and one point of interest."""
    generator = torch.Generator().manual_seed(0)
    return {
        "pixel_values": torch.randn(2, 3, 32, 32, generator=generator),
        "input_points": torch.rand(2, 1, 1, 2, generator=generator) * 32,
        "input_labels": torch.ones(2, 1, 1, dtype=torch.long),
    }


SCENES = {
    "swin2sr": Architecture(
        "Swin2SRForImageSuperResolution", SWIN | {"patch_size": 1, "num_channels": 3, "upscale": 2, "image_size": 16}
    ),
    "segformer": Architecture(
        "SegformerForSemanticSegmentation",
        ATTENDING_STAGES | {"decoder_hidden_size": 16},
    ),
    "dpt": Architecture(
        "DPTForDepthEstimation",
        VIT
        | {
            "num_hidden_layers": 4,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [8, 8, 16, 16],
            "fusion_hidden_size": 16,
            "backbone_config": None,
            "readout_type": "project",
        },
    ),
    "depth_anything": Architecture(
        "DepthAnythingForDepthEstimation",
        {
            "backbone_config": _VIT_BACKBONE | {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]},
            "reassemble_hidden_size": WIDTH,
            "patch_size": 8,
            "neck_hidden_sizes": [8, 8, 16, 16],
            "fusion_hidden_size": 16,
            "head_hidden_size": 8,
        },
    ),
    "glpn": Architecture(
        "GLPNForDepthEstimation",
        ATTENDING_STAGES | {"decoder_hidden_size": 16},
    ),
    "zoedepth": Architecture(
        "ZoeDepthForDepthEstimation",
        {
            "backbone_config": {
                "model_type": "beit",
                **VIT,
                "num_hidden_layers": 4,
                "reshape_hidden_states": False,
                "out_features": ["stage1", "stage2", "stage3", "stage4"],
                "use_relative_position_bias": True,
            },
            "neck_hidden_sizes": [8, 8, 16, 16],
            "fusion_hidden_size": 16,
            "bottleneck_features": 16,
            "num_relative_features": 8,
            "bin_embedding_dim": 8,
            "backbone_hidden_size": WIDTH,
            "patch_transformer_hidden_size": 16,
            "patch_transformer_intermediate_size": 24,
            "patch_transformer_num_attention_heads": 2,
            "num_patch_transformer_layers": 2,
        },
    ),
    "upernet": Architecture(
        "UperNetForSemanticSegmentation",
        {
            "backbone_config": {
                "model_type": "convnext",
                **STAGES,
                "out_features": ["stage1", "stage2", "stage3", "stage4"],
            },
            "hidden_size": 16,
            "pool_scales": [1, 2],
            "use_auxiliary_head": False,
        },
    ),
    "yolos": Architecture("YolosForObjectDetection", VIT | {"image_size": [32, 32], "num_detection_tokens": 5}),
    "detr": Architecture("DetrForObjectDetection", _DETR | {"backbone_config": _RESNET}),
    "conditional_detr": Architecture("ConditionalDetrForObjectDetection", _DETR | {"backbone_config": _RESNET}),
    "dab-detr": Architecture("DabDetrForObjectDetection", _DETR | {"hidden_size": WIDTH, "backbone_config": _RESNET}),
    "deformable_detr": Architecture("DeformableDetrForObjectDetection", _DEFORMABLE),
    "table-transformer": Architecture("TableTransformerForObjectDetection", _DETR | {"backbone_config": _RESNET}),
    "rt_detr": Architecture(
        "RTDetrForObjectDetection",
        _RT_DETR,
    ),
    "sam": Architecture("SamModel", _SAM, _points),
    "sam-vision": Architecture("SamVisionModel", _SAM_VISION),
    "superpoint": Architecture(
        "SuperPointForKeypointDetection",
        {
            "encoder_hidden_sizes": [8, 8, 16, 16],
            "decoder_hidden_size": 16,
            "keypoint_decoder_dim": 65,
            "descriptor_decoder_dim": 16,
        },
    ),
    "vitpose": Architecture(
        "VitPoseForPoseEstimation",
        {
            "backbone_config": {
                "model_type": "vitpose_backbone",
                **SIZES,
                "image_size": [32, 32],
                "patch_size": [8, 8],
                "out_indices": [2],
                "mlp_ratio": 2,
            },
            "num_labels": 5,
        },
    ),
    "vitmatte": Architecture(
        "VitMatteForImageMatting",
        {
            "backbone_config": {
                "model_type": "vitdet",
                **VIT,
                "patch_size": 16,
                "num_channels": 4,
                "out_features": ["stage2"],
                "residual_block_indices": [1],
                "window_block_indices": [0],
                "window_size": 2,
            },
            "hidden_size": WIDTH,
            "fusion_hidden_sizes": [8, 8, 8, 8],
            "convstream_hidden_sizes": [8, 8, 8],
        },
    ),
    "videomae": Architecture("VideoMAEForVideoClassification", _VIDEO),
    "vivit": Architecture("VivitForVideoClassification", VIT | {"num_frames": 4, "tubelet_size": [2, 8, 8]}),
    "timesformer": Architecture("TimesformerForVideoClassification", VIT | {"num_frames": 4}),
    "vjepa2": Architecture(
        "VJEPA2Model",
        VIT
        | {
            "crop_size": 32,
            "frames_per_clip": 4,
            "mlp_ratio": 2,
            "pred_hidden_size": 24,
            "pred_num_attention_heads": 2,
            "pred_num_hidden_layers": 2,
            "pred_num_mask_tokens": 2,
        },
    ),
    "rt_detr_v2": Architecture("RTDetrV2ForObjectDetection", _RT_DETR),
    "d_fine": Architecture("DFineForObjectDetection", _RT_DETR | {"decoder_n_points": [2, 2, 2]}),
    "videoprism": Architecture(
        "VideoPrismVisionModel",
        VIT | {"num_frames": 2, "tubelet_size": [1, 8, 8], "num_spatial_layers": 2, "num_temporal_layers": 2},
    ),
    "seggpt": Architecture(
        "SegGptModel",
        SIZES
        | {
            "image_size": [64, 32],
            "patch_size": 8,
            "mlp_dim": CHANNELS,
            "pretrain_image_size": 32,
            "decoder_hidden_size": 8,
            "num_hidden_layers": 3,
            "merge_index": 0,
            "intermediate_hidden_state_indices": [1, 2],
        },
        lambda: {
            "pixel_values": noise(2, 3, 32, 32),
            "prompt_pixel_values": noise(2, 3, 32, 32),
            "prompt_masks": noise(2, 3, 32, 32),
        },
    ),
    "sam_hq": Architecture(
        "SamHQModel", _SAM | {"mask_decoder_config": _SAM["mask_decoder_config"] | {"vit_dim": 32}}, _points
    ),
}
