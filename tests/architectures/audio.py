"""Sound: speech recognition, classification, codecs, synthesis."""

from __future__ import annotations

import torch

from tests.architectures.base import (
    BART,
    CHANNELS,
    GQA,
    HEADS,
    LAYERS,
    SIZES,
    SPEECH,
    TOWERS,
    VOCABULARY,
    WIDTH,
    Architecture,
    noise,
    tokens,
)

_SEW = SPEECH | {"squeeze_factor": 2, "conv_bias": True}
_SPECTRA = BART | {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 64}
_CONFORMER = SIZES | {
    "num_mel_bins": 16,
    "subsampling_conv_channels": 8,
    "subsampling_factor": 4,
    "conv_kernel_size": 5,
    "max_position_embeddings": 64,
}
_CODEC = {
    "audio_channels": 1,
    "num_filters": 4,
    "hidden_size": 16,
    "upsampling_ratios": [4, 2],
    "codebook_size": 16,
    "codebook_dim": 16,
    "num_lstm_layers": 1,
}
_SEAMLESS = TOWERS | {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "speech_encoder_layers": 1,
    "speech_encoder_attention_heads": HEADS,
    "speech_encoder_intermediate_size": CHANNELS,
    "t2u_encoder_layers": 1,
    "t2u_decoder_layers": 1,
}
_LISTENER = {
    "num_mel_bins": 8,
    "encoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "encoder_ffn_dim": CHANNELS,
    "d_model": WIDTH,
    "max_source_positions": 16,
    "hidden_size": WIDTH,
    "intermediate_size": CHANNELS,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
}

AUDIO = {
    "whisper": Architecture("WhisperForConditionalGeneration", _SPECTRA),
    "wav2vec2": Architecture("Wav2Vec2ForCTC", SPEECH),
    "wav2vec2-stable": Architecture(
        "Wav2Vec2ForCTC", SPEECH | {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True}
    ),
    "wav2vec2-adapter": Architecture("Wav2Vec2ForCTC", SPEECH | {"add_adapter": True, "output_hidden_size": 32}),
    "wav2vec2-xvector": Architecture(
        "Wav2Vec2ForXVector",
        SPEECH | {"tdnn_dim": [16, 16], "tdnn_kernel": [3, 1], "tdnn_dilation": [1, 1], "xvector_output_dim": 16},
    ),
    "hubert": Architecture("HubertForCTC", SPEECH),
    "wavlm": Architecture("WavLMForCTC", SPEECH | {"num_buckets": 16, "max_bucket_distance": 32}),
    "unispeech": Architecture("UniSpeechForCTC", SPEECH | {"num_ctc_classes": VOCABULARY}),
    "unispeech-sat": Architecture("UniSpeechSatForCTC", SPEECH),
    "sew": Architecture("SEWForCTC", _SEW),
    "sew-d": Architecture(
        "SEWDForCTC",
        _SEW | {"max_position_embeddings": 32, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]},
    ),
    "data2vec-audio": Architecture(
        "Data2VecAudioForCTC", SPEECH | {"num_conv_pos_embeddings": 2, "conv_pos_kernel_size": 5}
    ),
    "wav2vec2-conformer": Architecture(
        "Wav2Vec2ConformerForCTC", SPEECH | {"conv_depthwise_kernel_size": 5, "position_embeddings_type": "relative"}
    ),
    "wav2vec2-conformer-rotary": Architecture(
        "Wav2Vec2ConformerForCTC", SPEECH | {"conv_depthwise_kernel_size": 5, "position_embeddings_type": "rotary"}
    ),
    "wav2vec2-bert": Architecture(
        "Wav2Vec2BertForCTC",
        SIZES
        | {
            "vocab_size": VOCABULARY,
            "feature_projection_input_dim": 16,
            "conv_depthwise_kernel_size": 5,
            "left_max_position_embeddings": 4,
            "right_max_position_embeddings": 4,
            "apply_spec_augment": False,
        },
    ),
    "audio-spectrogram-transformer": Architecture(
        "ASTForAudioClassification", SIZES | {"max_length": 32, "num_mel_bins": 16, "patch_size": 8}
    ),
    "speech_to_text": Architecture(
        "Speech2TextForConditionalGeneration",
        _SPECTRA | {"input_feat_per_channel": 8, "conv_channels": 16, "conv_kernel_sizes": [3], "num_conv_layers": 1},
    ),
    "moonshine": Architecture(
        "MoonshineForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "intermediate_size": CHANNELS,
            "encoder_num_hidden_layers": LAYERS,
            "decoder_num_hidden_layers": LAYERS,
            "encoder_num_attention_heads": HEADS,
            "decoder_num_attention_heads": HEADS,
            "partial_rotary_factor": 0.5,
        },
    ),
    "parakeet_ctc": Architecture("ParakeetForCTC", {"encoder_config": _CONFORMER, "vocab_size": VOCABULARY}),
    "lasr_ctc": Architecture("LasrForCTC", {"encoder_config": _CONFORMER, "vocab_size": VOCABULARY}),
    "encodec": Architecture("EncodecModel", _CODEC, lambda: {"input_values": noise(2, 1, 400)}),
    "dac": Architecture(
        "DacModel",
        {
            "encoder_hidden_size": 4,
            "downsampling_ratios": [2, 4],
            "decoder_hidden_size": 16,
            "hidden_size": 16,
            "codebook_size": 16,
            "codebook_dim": 4,
            "n_codebooks": 2,
        },
    ),
    "mimi": Architecture(
        "MimiModel",
        _CODEC
        | {
            "hidden_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS,
            "head_dim": 8,
            "intermediate_size": CHANNELS,
            "num_quantizers": 2,
            "num_semantic_quantizers": 1,
            "vector_quantization_hidden_dimension": 16,
            "upsample_groups": WIDTH,
        },
    ),
    "speecht5": Architecture(
        "SpeechT5ForSpeechToText",
        SPEECH
        | {k: v for k, v in BART.items() if k != "d_model"}
        | {"max_speech_positions": 64, "max_text_positions": 64, "encoder_max_relative_position": 8},
    ),
    "vits": Architecture(
        "VitsModel",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 2,
            "ffn_dim": 24,
            "window_size": 4,
            "flow_size": 16,
            "spectrogram_bins": 9,
            "upsample_initial_channel": 16,
            "upsample_rates": [4, 4],
            "upsample_kernel_sizes": [8, 8],
            "resblock_kernel_sizes": [3],
            "resblock_dilation_sizes": [[1, 3]],
            "prior_encoder_num_wavenet_layers": 2,
            "duration_predictor_filter_channels": 16,
        },
    ),
    "fastspeech2_conformer": Architecture(
        "FastSpeech2ConformerModel",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "num_mel_bins": 8,
            "encoder_num_attention_heads": 2,
            "decoder_num_attention_heads": 2,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_linear_units": CHANNELS,
            "decoder_linear_units": CHANNELS,
            "speech_decoder_postnet_units": 16,
            "speech_decoder_postnet_layers": 2,
            "duration_predictor_channels": 16,
            "energy_predictor_channels": 16,
            "pitch_predictor_channels": 16,
            "pitch_predictor_layers": 2,
        },
        # Two frames for each of 8 tokens.
        labels=lambda: {
            "spectrogram_labels": noise(2, 16, 8),
            "duration_labels": torch.full((2, 8), 2),
            "pitch_labels": noise(2, 8, 1),
            "energy_labels": noise(2, 8, 1),
        },
    ),
    "univnet": Architecture(
        "UnivNetModel",
        {
            "model_in_channels": 8,
            "model_hidden_channels": 8,
            "num_mel_bins": 8,
            "resblock_kernel_sizes": [3],
            "resblock_stride_sizes": [4],
            "resblock_dilation_sizes": [[1, 3]],
            "kernel_predictor_hidden_channels": 8,
        },
        lambda: {"input_features": noise(2, 12, 8), "noise_sequence": noise(2, 12, 8)},
    ),
    "seamless_m4t": Architecture(
        "SeamlessM4TForTextToText",
        _SEAMLESS,
    ),
    "musicgen": Architecture(
        "MusicgenForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "ffn_dim": CHANNELS,
            "num_codebooks": 2,
        },
        lambda: {"input_ids": tokens(4, 8)},
    ),
    "moshi": Architecture("MoshiForCausalLM", GQA | {"head_dim": 8, "ffn_dim": CHANNELS}),
    "musicgen_melody": Architecture(
        "MusicgenMelodyForCausalLM",
        SIZES | {"vocab_size": VOCABULARY, "ffn_dim": CHANNELS, "num_codebooks": 2},
        lambda: {"input_ids": tokens(4, 8)},
    ),
    "seamless_m4t_v2": Architecture("SeamlessM4Tv2ForTextToText", _SEAMLESS),
    "voxtral": Architecture(
        "VoxtralForConditionalGeneration",
        {
            "text_config": GQA | {"model_type": "llama"},
            "audio_config": _LISTENER | {"encoder_ffn_dim": 128, "intermediate_size": 128},
            "audio_token_id": 90,
        },
        lambda: {"input_ids": torch.cat([torch.full((2, 4), 90), tokens(2, 6)], 1), "input_features": noise(2, 8, 32)},
    ),
    "qwen2_audio": Architecture(
        "Qwen2AudioForConditionalGeneration",
        {"text_config": GQA | {"model_type": "qwen2"}, "audio_config": _LISTENER, "audio_token_index": 90},
        lambda: {
            "input_ids": torch.cat([torch.full((2, 8), 90), tokens(2, 6)], 1),
            "attention_mask": torch.ones(2, 14, dtype=torch.long),
            "input_features": noise(2, 8, 32),
            "feature_attention_mask": torch.ones(2, 32, dtype=torch.long),
        },
    ),
}
