"""Causal language models with attention and dense feed-forward layers."""

from __future__ import annotations

from tests.architectures.base import (
    CHANNELS,
    DECODER,
    GPT,
    GQA,
    HEAD_DIM,
    HEADS,
    LAYERS,
    VOCABULARY,
    WIDTH,
    Architecture,
)

_BLOOM = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "n_layer": LAYERS, "n_head": HEADS}
_SLIDING = HEAD_DIM | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
_LATENT = DECODER | {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8}

DECODERS = {
    "gpt2": Architecture("GPT2LMHeadModel", GPT),
    "gpt_neox": Architecture("GPTNeoXForCausalLM", DECODER),
    "gptj": Architecture("GPTJForCausalLM", GPT | {"rotary_dim": 4}),
    "opt": Architecture(
        "OPTForCausalLM", DECODER | {"ffn_dim": CHANNELS, "word_embed_proj_dim": WIDTH, "pad_token_id": 1}
    ),
    "opt-projected": Architecture(
        "OPTForCausalLM",
        DECODER | {"ffn_dim": CHANNELS, "word_embed_proj_dim": 16, "pad_token_id": 1, "do_layer_norm_before": False},
    ),
    "bloom": Architecture("BloomForCausalLM", _BLOOM | {"pad_token_id": 0}),
    "phi": Architecture("PhiForCausalLM", DECODER),
    "phi3": Architecture("Phi3ForCausalLM", GQA),
    "llama": Architecture("LlamaForCausalLM", GQA),
    "mistral": Architecture("MistralForCausalLM", GQA),
    "qwen2": Architecture("Qwen2ForCausalLM", GQA),
    "olmo": Architecture("OlmoForCausalLM", GQA),
    "qwen3": Architecture("Qwen3ForCausalLM", HEAD_DIM),
    "gemma": Architecture("GemmaForCausalLM", HEAD_DIM),
    "gemma2": Architecture("Gemma2ForCausalLM", HEAD_DIM),
    "gemma3": Architecture("Gemma3ForCausalLM", _SLIDING),
    "glm": Architecture("GlmForCausalLM", HEAD_DIM),
    "falcon": Architecture(
        "FalconForCausalLM",
        DECODER | {"new_decoder_architecture": False, "multi_query": True, "parallel_attn": True, "bias": False},
    ),
    "falcon-gqa": Architecture(
        "FalconForCausalLM", DECODER | {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}
    ),
    "falcon-alibi": Architecture(
        "FalconForCausalLM", DECODER | {"multi_query": False, "parallel_attn": False, "bias": True, "alibi": True}
    ),
    "gpt_bigcode": Architecture("GPTBigCodeForCausalLM", GPT),
    "codegen": Architecture("CodeGenForCausalLM", GPT | {"rotary_dim": 4}),
    "gpt_neo": Architecture(
        "GPTNeoForCausalLM",
        DECODER
        | {"num_layers": 2, "num_heads": HEADS, "attention_types": [[["global", "local"], 1]], "window_size": 4},
    ),
    "gpt_neox_japanese": Architecture("GPTNeoXJapaneseForCausalLM", DECODER | {"intermediate_multiple_size": 2}),
    "mpt": Architecture("MptForCausalLM", {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4}),
    "starcoder2": Architecture("Starcoder2ForCausalLM", GQA),
    "stablelm": Architecture("StableLmForCausalLM", GQA),
    "stablelm-parallel": Architecture(
        "StableLmForCausalLM", GQA | {"use_parallel_residual": True, "qk_layernorm": True}
    ),
    "cohere": Architecture("CohereForCausalLM", GQA),
    "cohere2": Architecture("Cohere2ForCausalLM", _SLIDING),
    "granite": Architecture("GraniteForCausalLM", GQA),
    "nemotron": Architecture("NemotronForCausalLM", HEAD_DIM),
    "olmo2": Architecture("Olmo2ForCausalLM", GQA),
    "olmo3": Architecture("Olmo3ForCausalLM", _SLIDING),
    "persimmon": Architecture("PersimmonForCausalLM", DECODER),
    "smollm3": Architecture("SmolLM3ForCausalLM", GQA | {"no_rope_layers": [1, 0]}),
    "exaone4": Architecture("Exaone4ForCausalLM", _SLIDING),
    "helium": Architecture("HeliumForCausalLM", HEAD_DIM),
    "hunyuan_v1_dense": Architecture("HunYuanDenseV1ForCausalLM", HEAD_DIM),
    "arcee": Architecture("ArceeForCausalLM", HEAD_DIM),
    "seed_oss": Architecture("SeedOssForCausalLM", HEAD_DIM),
    "ernie4_5": Architecture("Ernie4_5ForCausalLM", HEAD_DIM),
    "glm4": Architecture("Glm4ForCausalLM", HEAD_DIM),
    "biogpt": Architecture("BioGptForCausalLM", DECODER | {"pad_token_id": 1}),
    "ctrl": Architecture("CTRLLMHeadModel", GPT | {"dff": CHANNELS}),
    "openai-gpt": Architecture("OpenAIGPTLMHeadModel", GPT),
    "xglm": Architecture(
        "XGLMForCausalLM", DECODER | {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": CHANNELS}
    ),
    "diffllama": Architecture("DiffLlamaForCausalLM", GQA | {"head_dim": 8}),
    "bitnet": Architecture("BitNetForCausalLM", GQA),
    "apertus": Architecture("ApertusForCausalLM", GQA),
    "cwm": Architecture("CwmForCausalLM", HEAD_DIM),
    "jais2": Architecture("Jais2ForCausalLM", HEAD_DIM),
    "ministral": Architecture("MinistralForCausalLM", _SLIDING),
    "ministral3": Architecture("Ministral3ForCausalLM", HEAD_DIM),
    "modernbert-decoder": Architecture(
        "ModernBertDecoderForCausalLM", DECODER | {"cls_token_id": 1, "sep_token_id": 2, "local_attention": 8}
    ),
    "nanochat": Architecture("NanoChatForCausalLM", GQA),
    "vaultgemma": Architecture("VaultGemmaForCausalLM", _SLIDING),
    "gemma3n": Architecture(
        "Gemma3nForCausalLM",
        HEAD_DIM
        | {
            "intermediate_size": [CHANNELS, CHANNELS],
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 4,
            "num_kv_shared_layers": 0,
            "laurel_rank": 8,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCABULARY,
            "altup_num_inputs": 2,
            "activation_sparsity_pattern": [0.0, 0.0],
        },
    ),
    "gemma4": Architecture(
        "Gemma4ForCausalLM",
        _SLIDING
        | {
            "global_head_dim": 8,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCABULARY,
            "num_kv_shared_layers": 0,
        },
    ),
    "minicpm3": Architecture("MiniCPM3ForCausalLM", _LATENT | {"v_head_dim": 8, "num_key_value_heads": HEADS}),
    "gemma3-bidirectional": Architecture("Gemma3ForCausalLM", _SLIDING | {"use_bidirectional_attention": True}),
    "youtu": Architecture("YoutuForCausalLM", _LATENT | {"v_head_dim": 8, "num_key_value_heads": HEADS}),
    "lfm3": Architecture("Lfm3ForCausalLM", GQA),
    "llama-bias": Architecture("LlamaForCausalLM", GQA | {"attention_bias": True, "tie_word_embeddings": True}),
    "hrm_text": Architecture("HrmTextForCausalLM", GQA),
    "bert-causal": Architecture("BertLMHeadModel", DECODER | {"is_decoder": True}),
    "trocr": Architecture(
        "TrOCRForCausalLM",
        DECODER | {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": CHANNELS},
    ),
    "cpmant": Architecture(
        "CpmAntForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "num_attention_heads": HEADS,
            "dim_head": 8,
            "dim_ff": CHANNELS,
            "num_hidden_layers": LAYERS,
            "prompt_types": 4,
            "prompt_length": 4,
        },
    ),
    "granite_swa": Architecture(
        "GraniteSWAForCausalLM", GQA | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    ),
    "doge": Architecture("DogeForCausalLM", GQA | {"keep_window_size": 16}),
    "hyperclovax": Architecture("HyperCLOVAXForCausalLM", HEAD_DIM),
    "emu3-text": Architecture("Emu3ForCausalLM", GQA),
}
