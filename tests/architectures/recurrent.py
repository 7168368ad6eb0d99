"""Causal language models with state-space, convolution or linear-attention layers."""

from __future__ import annotations

from tests.architectures.base import CHANNELS, DECODER, EXPERTS, GQA, HEADS, LAYERS, VOCABULARY, WIDTH, Architecture

_MAMBA = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "state_size": 4}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_chunk_size": 4, "mamba_n_groups": 2}
_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 8,
}

RECURRENT = {
    "mamba": Architecture("MambaForCausalLM", _MAMBA | {"time_step_rank": 4}),
    "mamba2": Architecture(
        "Mamba2ForCausalLM", _MAMBA | {"num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 4}
    ),
    "falcon_mamba": Architecture("FalconMambaForCausalLM", _MAMBA | {"time_step_rank": 4}),
    "jamba": Architecture(
        "JambaForCausalLM",
        GQA
        | {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 4,
            "use_mamba_kernels": False,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
        },
    ),
    "bamba": Architecture("BambaForCausalLM", GQA | _MAMBA2 | {"attn_layer_indices": [1]}),
    "falcon_h1": Architecture("FalconH1ForCausalLM", GQA | _MAMBA2 | {"mamba_d_ssm": 64}),
    "zamba": Architecture(
        "ZambaForCausalLM",
        DECODER
        | {
            "num_hidden_layers": 4,
            "num_key_value_heads": HEADS,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
            "n_mamba_heads": 2,
            "use_mamba_kernels": False,
        },
    ),
    "zamba2": Architecture(
        "Zamba2ForCausalLM",
        DECODER
        | {
            "layers_block_type": ["mamba", "hybrid"],
            "mamba_d_state": 4,
            "mamba_ngroups": 1,
            "n_mamba_heads": 8,
            "chunk_size": 4,
            "use_mamba_kernels": False,
            "adapter_rank": 4,
        },
    ),
    "nemotron_h": Architecture("NemotronHForCausalLM", GQA | _MAMBA2),
    "granitemoehybrid": Architecture(
        "GraniteMoeHybridForCausalLM",
        GQA | _MAMBA2 | {"layer_types": ["mamba", "attention"], "num_local_experts": 4, "shared_intermediate_size": 24},
    ),
    "recurrent_gemma": Architecture(
        "RecurrentGemmaForCausalLM",
        GQA | {"lru_width": WIDTH, "attention_window_size": 8, "block_types": ["recurrent", "attention"]},
    ),
    "rwkv": Architecture(
        "RwkvForCausalLM",
        {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "intermediate_size": CHANNELS},
    ),
    "xlstm": Architecture(
        "xLSTMForCausalLM",
        {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_heads": HEADS},
    ),
    "lfm2": Architecture("Lfm2ForCausalLM", GQA | {"layer_types": ["conv", "full_attention"]}),
    "lfm2_moe": Architecture(
        "Lfm2MoeForCausalLM",
        EXPERTS | {"layer_types": ["conv", "full_attention"], "num_experts": 4, "num_dense_layers": 1},
    ),
    "qwen3_next": Architecture(
        "Qwen3NextForCausalLM", EXPERTS | _DELTA | {"num_experts": 4, "shared_expert_intermediate_size": 24}
    ),
    "qwen3_5": Architecture("Qwen3_5ForCausalLM", GQA | _DELTA),
    "olmo_hybrid": Architecture("OlmoHybridForCausalLM", GQA | _DELTA),
    "kimi_linear": Architecture(
        "KimiLinearForCausalLM",
        EXPERTS
        | {
            "num_key_value_heads": HEADS,
            "num_experts": 4,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "linear_attn_config": {
                "head_dim": 8,
                "num_heads": 4,
                "short_conv_kernel_size": 4,
                "kda_layers": [1],
                "full_attn_layers": [2],
            },
        },
    ),
    "minimax": Architecture(
        "MiniMaxForCausalLM",
        GQA
        | {
            "head_dim": 8,
            "num_local_experts": 4,
            "layer_types": ["linear_attention", "full_attention"],
            "block_size": 4,
        },
    ),
}
