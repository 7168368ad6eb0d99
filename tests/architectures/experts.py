"""Causal language models with routed experts."""

from __future__ import annotations

from tests.architectures.base import CHANNELS, EXPERTS, GQA, HEADS, LAYERS, VOCABULARY, WIDTH, Architecture

_LOCAL = GQA | {"num_local_experts": 4, "num_experts_per_tok": 2}
_MOE = EXPERTS | {"num_experts": 4}
_ROUTED = EXPERTS | {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "head_dim": 8}
_SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
_LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": HEADS,
    "first_k_dense_replace": 1,
}

EXPERT_MODELS = {
    "mixtral": Architecture("MixtralForCausalLM", _LOCAL),
    "qwen2_moe": Architecture("Qwen2MoeForCausalLM", _MOE | {"shared_expert_intermediate_size": 24}),
    "qwen3_moe": Architecture("Qwen3MoeForCausalLM", _MOE | {"head_dim": 8}),
    "olmoe": Architecture("OlmoeForCausalLM", _MOE),
    "phimoe": Architecture("PhimoeForCausalLM", _LOCAL),
    "gpt_oss": Architecture(
        "GptOssForCausalLM",
        _LOCAL | {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "deepseek_v2": Architecture("DeepseekV2ForCausalLM", _ROUTED | _LATENT),
    "deepseek_v3": Architecture("DeepseekV3ForCausalLM", _ROUTED | _LATENT | {"head_dim": 4}),
    "glm4_moe": Architecture("Glm4MoeForCausalLM", _ROUTED | {"first_k_dense_replace": 1}),
    "glm4_moe_lite": Architecture("Glm4MoeLiteForCausalLM", _ROUTED | _LATENT),
    "dots1": Architecture("Dots1ForCausalLM", _ROUTED | {"first_k_dense_replace": 1}),
    "dbrx": Architecture(
        "DbrxForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "d_model": WIDTH,
            "n_layers": LAYERS,
            "n_heads": HEADS,
            "max_seq_len": 64,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": CHANNELS, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
    "jetmoe": Architecture("JetMoeForCausalLM", _LOCAL | {"kv_channels": 8, "num_key_value_heads": 2}),
    "granitemoe": Architecture("GraniteMoeForCausalLM", _LOCAL),
    "granitemoeshared": Architecture("GraniteMoeSharedForCausalLM", _LOCAL | {"shared_intermediate_size": 24}),
    "llama4": Architecture(
        "Llama4ForCausalLM",
        _LOCAL | {"head_dim": 8, "intermediate_size_mlp": 40, "interleave_moe_layer_step": 2, "num_experts_per_tok": 1},
    ),
    "minimax_m2": Architecture("MiniMaxM2ForCausalLM", _LOCAL | {"head_dim": 8}),
    "ernie4_5_moe": Architecture(
        "Ernie4_5_MoeForCausalLM", EXPERTS | {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1}
    ),
    "hunyuan_v1_moe": Architecture("HunYuanMoEV1ForCausalLM", _MOE | {"head_dim": 8, "moe_topk": 2}),
    "flex_olmo": Architecture("FlexOlmoForCausalLM", _MOE),
    "afmoe": Architecture("AfmoeForCausalLM", _MOE | {"head_dim": 8, "num_dense_layers": 1}),
    "solar_open": Architecture("SolarOpenForCausalLM", _ROUTED),
    "exaone_moe": Architecture("ExaoneMoeForCausalLM", _MOE | {"head_dim": 8}),
    "longcat_flash": Architecture(
        "LongcatFlashForCausalLM",
        _ROUTED | _LATENT | {"head_dim": 4, "ffn_hidden_size": CHANNELS, "expert_ffn_hidden_size": 24},
    ),
    "mimo_v2_flash": Architecture("MiMoV2FlashForCausalLM", _ROUTED | {"v_head_dim": 8}),
    "laguna": Architecture("LagunaForCausalLM", _MOE | {"head_dim": 8}),
    "cohere2_moe": Architecture("Cohere2MoeForCausalLM", _MOE | {"head_dim": 8}),
    "hy_v3": Architecture("HYV3ForCausalLM", _MOE | {"head_dim": 8}),
    "mellum": Architecture("MellumForCausalLM", _MOE | {"head_dim": 8}),
    "deepseek_v32": Architecture("DeepseekV32ForCausalLM", _ROUTED | _LATENT),
    "granitemoe_swa": Architecture("GraniteMoeSWAForCausalLM", _LOCAL | {"sliding_window": 4}),
    "doge-moe": Architecture(
        "DogeForCausalLM", GQA | {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 2, "keep_window_size": 16}
    ),
    "mistral4": Architecture("Mistral4ForCausalLM", _ROUTED | _LATENT | {"head_dim": 12}),
    "axk1": Architecture(
        "AXK1ForCausalLM", _ROUTED | _LATENT | {"head_dim": 4, "mlp_layer_types": ["dense", "sparse"]}
    ),
    "minimax_m3_vl-text": Architecture(
        "MiniMaxM3VLForCausalLM",
        _LOCAL
        | {
            "head_dim": 8,
            "rotary_dim": 4,
            "dense_intermediate_size": CHANNELS,
            "shared_intermediate_size": 24,
            "mlp_layer_types": ["dense", "sparse"],
        },
    ),
    "kolibri1": Architecture(
        "Kolibri1ForCausalLM",
        _LOCAL | _SLIDING | {"head_dim": 8, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24},
    ),
    "beam": Architecture("BeamForCausalLM", _MOE | _SLIDING | {"head_dim": 8}),
    "flint": Architecture(
        "FlintForCausalLM",
        _MOE | _SLIDING | {"head_dim": 8, "shared_expert_intermediate_size": 24, "mlp_only_layers": [0]},
    ),
    "qwen3_5_moe": Architecture(
        "Qwen3_5MoeForCausalLM",
        _MOE
        | {
            "head_dim": 8,
            "shared_expert_intermediate_size": 24,
            "layer_types": ["full_attention", "full_attention"],
        },
    ),
    "zaya": Architecture("ZayaForCausalLM", _MOE | {"head_dim": 8, "router_hidden_size": 16, "num_experts_per_tok": 1}),
    "glm_moe_dsa": Architecture(
        "GlmMoeDsaForCausalLM", _ROUTED | _LATENT | {"mlp_layer_types": ["dense", "sparse"], "index_n_heads": 2}
    ),
    "bailing_hybrid": Architecture(
        "BailingHybridForCausalLM",
        _MOE
        | _LATENT
        | {
            "num_expert_group": 2,
            "topk_group": 1,
            "num_experts_per_token": 2,
            "head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "inkling-text": Architecture(
        "InklingForCausalLM",
        _ROUTED
        | {
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 8,
            "sliding_window_size": 4,
            "d_rel": 4,
            "rel_extent": 16,
            "layer_types": ["hybrid_sliding", "hybrid"],
        },
    ),
}
