"""Text encoders."""

from __future__ import annotations

from tests.architectures.base import CHANNELS, ENCODER, GQA, HEADS, LAYERS, VOCABULARY, WIDTH, Architecture, tokens

_DEBERTA = ENCODER | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 16}

ENCODERS = {
    "bert": Architecture("BertForSequenceClassification", ENCODER),
    "roberta": Architecture("RobertaForSequenceClassification", ENCODER | {"pad_token_id": 1}),
    "distilbert": Architecture(
        "DistilBertForSequenceClassification",
        {
            "vocab_size": VOCABULARY,
            "dim": WIDTH,
            "n_layers": LAYERS,
            "n_heads": HEADS,
            "hidden_dim": CHANNELS,
            "max_position_embeddings": 64,
        },
    ),
    "albert": Architecture("AlbertForSequenceClassification", ENCODER | {"embedding_size": 16}),
    "electra": Architecture("ElectraForSequenceClassification", ENCODER | {"embedding_size": 16}),
    "deberta": Architecture("DebertaForSequenceClassification", _DEBERTA),
    "deberta-v2": Architecture(
        "DebertaV2ForSequenceClassification",
        _DEBERTA | {"position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True},
    ),
    "longformer": Architecture(
        "LongformerForSequenceClassification", ENCODER | {"attention_window": 4, "pad_token_id": 1}, length=16
    ),
    "mpnet": Architecture("MPNetForSequenceClassification", ENCODER),
    "xlm-roberta-xl": Architecture("XLMRobertaXLForMaskedLM", ENCODER | {"pad_token_id": 1}),
    "roberta-prelayernorm": Architecture("RobertaPreLayerNormForMaskedLM", ENCODER | {"pad_token_id": 1}),
    "camembert": Architecture("CamembertForTokenClassification", ENCODER | {"pad_token_id": 1}),
    "data2vec-text": Architecture("Data2VecTextForMaskedLM", ENCODER | {"pad_token_id": 1}),
    "xmod": Architecture("XmodForMaskedLM", ENCODER | {"languages": ["en_XX"], "default_language": "en_XX"}),
    "bert-generation": Architecture("BertGenerationEncoder", ENCODER),
    "modernbert": Architecture(
        "ModernBertForMaskedLM",
        ENCODER | {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 8},
    ),
    "nomic_bert": Architecture("NomicBertForMaskedLM", ENCODER),
    "eurobert": Architecture("EuroBertForMaskedLM", GQA),
    "jina_embeddings_v3": Architecture("JinaEmbeddingsV3ForMaskedLM", ENCODER),
    "gte": Architecture("GteForMaskedLM", ENCODER),
    "neomme": Architecture("NeoMMEForMaskedLM", ENCODER, lambda: {"input_ids": tokens(2, 8)}),
    "funnel": Architecture(
        "FunnelForSequenceClassification",
        {
            "vocab_size": VOCABULARY,
            "block_sizes": [1, 1],
            "d_model": WIDTH,
            "n_head": HEADS,
            "d_head": 8,
            "d_inner": CHANNELS,
            "num_decoder_layers": 1,
        },
    ),
    "fnet": Architecture("FNetForSequenceClassification", ENCODER),
    "squeezebert": Architecture("SqueezeBertForSequenceClassification", ENCODER | {"embedding_size": WIDTH}),
    "mobilebert": Architecture(
        "MobileBertForSequenceClassification",
        ENCODER | {"embedding_size": 16, "intra_bottleneck_size": 16, "num_feedforward_networks": 2},
    ),
    "convbert": Architecture("ConvBertForSequenceClassification", ENCODER | {"embedding_size": 16}),
    "big_bird": Architecture("BigBirdForSequenceClassification", ENCODER | {"attention_type": "original_full"}),
    "big_bird-sparse": Architecture(
        "BigBirdForSequenceClassification", ENCODER | {"block_size": 4, "num_random_blocks": 1}, length=48
    ),
    "rembert": Architecture(
        "RemBertForSequenceClassification", ENCODER | {"input_embedding_size": 16, "output_embedding_size": 24}
    ),
    "esm": Architecture(
        "EsmForMaskedLM", ENCODER | {"pad_token_id": 1, "mask_token_id": 4, "position_embedding_type": "rotary"}
    ),
    "roformer": Architecture("RoFormerForSequenceClassification", ENCODER | {"embedding_size": 16}),
    "nystromformer": Architecture(
        "NystromformerForSequenceClassification", ENCODER | {"num_landmarks": 8, "segment_means_seq_len": 8}
    ),
    "yoso": Architecture("YosoForSequenceClassification", ENCODER | {"use_expectation": True}),
    "mra": Architecture("MraForSequenceClassification", ENCODER),
    "canine": Architecture("CanineForSequenceClassification", ENCODER | {"local_transformer_stride": 8}, length=16),
    "xlnet": Architecture(
        "XLNetForSequenceClassification",
        {"vocab_size": VOCABULARY, "d_model": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "d_inner": CHANNELS},
    ),
    "xlm": Architecture(
        "XLMForSequenceClassification",
        {"vocab_size": VOCABULARY, "emb_dim": WIDTH, "n_layers": LAYERS, "n_heads": HEADS},
    ),
    "flaubert": Architecture(
        "FlaubertForSequenceClassification",
        {"vocab_size": VOCABULARY, "emb_dim": WIDTH, "n_layers": LAYERS, "n_heads": HEADS},
    ),
    "luke": Architecture(
        "LukeForMaskedLM", ENCODER | {"pad_token_id": 1, "entity_vocab_size": 20, "entity_emb_size": 16}
    ),
    "layoutlm": Architecture("LayoutLMForSequenceClassification", ENCODER),
    "lilt": Architecture("LiltForSequenceClassification", ENCODER | {"hidden_size": 48, "channel_shrink_ratio": 4}),
    "bros": Architecture("BrosForTokenClassification", ENCODER | {"hidden_size": 64}),
    "markuplm": Architecture("MarkupLMForSequenceClassification", ENCODER | {"xpath_unit_hidden_size": 8}),
    "tapas": Architecture("TapasForSequenceClassification", ENCODER | {"type_vocab_sizes": [3, 8, 8, 2, 8, 8, 4]}),
    "splinter": Architecture("SplinterForQuestionAnswering", ENCODER | {"question_token_id": 4}),
    "megatron-bert": Architecture("MegatronBertForSequenceClassification", ENCODER),
    "ibert": Architecture("IBertForSequenceClassification", ENCODER | {"pad_token_id": 1}),
    "ibert-quantized": Architecture(
        "IBertForSequenceClassification", ENCODER | {"pad_token_id": 1, "quant_mode": True}
    ),
    "ernie": Architecture("ErnieForSequenceClassification", ENCODER),
    "roc_bert": Architecture(
        "RoCBertForSequenceClassification",
        ENCODER | {"pronunciation_vocab_size": 20, "shape_vocab_size": 20, "enable_shape": True},
    ),
    "reformer": Architecture(
        "ReformerForSequenceClassification",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "attention_head_size": 8,
            "num_attention_heads": HEADS,
            "feed_forward_size": CHANNELS,
            "attn_layers": ["local", "local"],
            "local_attn_chunk_length": 4,
            "max_position_embeddings": 16,
            "axial_pos_shape": [4, 4],
            "axial_pos_embds_dim": [16, 16],
            "is_decoder": False,
        },
        length=16,
    ),
    "perceiver": Architecture(
        "PerceiverForMaskedLM",
        {
            "vocab_size": VOCABULARY,
            "num_latents": 8,
            "d_latents": WIDTH,
            "d_model": WIDTH,
            "num_blocks": 1,
            "num_self_attends_per_block": 2,
            "num_self_attention_heads": HEADS,
            "num_cross_attention_heads": HEADS,
            "qk_channels": 16,
            "v_channels": WIDTH,
            "max_position_embeddings": 8,
        },
        lambda: {"inputs": tokens(2, 8)},
    ),
    "dpr": Architecture("DPRQuestionEncoder", ENCODER),
    "openai_privacy_filter": Architecture("OpenAIPrivacyFilterForTokenClassification", GQA | {"head_dim": 8}),
    "ultrabert": Architecture("UltrabertForMaskedLM", ENCODER),
    "xlm-roberta": Architecture("XLMRobertaForMaskedLM", ENCODER | {"pad_token_id": 1}),
    "esmc": Architecture("EsmcForMaskedLM", GQA | {"num_key_value_heads": HEADS, "head_dim": 8}),
}
