"""Time series and decisions."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.architectures.base import CHANNELS, HEADS, LAYERS, TOWERS, WIDTH, Architecture

_PATCHES = {
    "num_input_channels": 3,
    "context_length": 16,
    "patch_length": 4,
    "patch_stride": 4,
    "d_model": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "ffn_dim": CHANNELS,
    "prediction_length": 4,
}
_FORECAST = TOWERS | {
    "prediction_length": 4,
    "context_length": 8,
    "lags_sequence": [1, 2],
    "num_time_features": 2,
    "d_model": WIDTH,
}


def _forecast() -> dict[str, Tensor]:
    """Ten past values and four future ones, with two features of time."""
    generator = torch.Generator().manual_seed(0)
    return {
        "past_values": torch.randn(2, 10, generator=generator),
        "past_time_features": torch.randn(2, 10, 2, generator=generator),
        "past_observed_mask": torch.ones(2, 10),
        "future_values": torch.randn(2, 4, generator=generator),
        "future_time_features": torch.randn(2, 4, 2, generator=generator),
    }


def _decisions() -> dict[str, Tensor]:
    """Five steps of states, actions and returns."""
    generator = torch.Generator().manual_seed(0)
    return {
        "states": torch.randn(2, 5, 6, generator=generator),
        "actions": torch.randn(2, 5, 3, generator=generator),
        "rewards": torch.randn(2, 5, 1, generator=generator),
        "returns_to_go": torch.randn(2, 5, 1, generator=generator),
        "timesteps": torch.arange(5).expand(2, 5).contiguous(),
        "attention_mask": torch.ones(2, 5),
    }


SERIES = {
    "patchtst": Architecture("PatchTSTForPrediction", _PATCHES),
    "patchtst-classifier": Architecture(
        "PatchTSTForClassification", _PATCHES | {"num_targets": 3, "use_cls_token": True}
    ),
    "patchtsmixer": Architecture("PatchTSMixerForPrediction", _PATCHES | {"num_layers": 2}),
    "patchtsmixer-gated": Architecture(
        "PatchTSMixerForTimeSeriesClassification",
        _PATCHES | {"num_layers": 2, "mode": "mix_channel", "self_attn": True, "self_attn_heads": 2, "num_targets": 3},
    ),
    "time_series_transformer": Architecture("TimeSeriesTransformerForPrediction", _FORECAST, _forecast),
    "informer": Architecture("InformerForPrediction", _FORECAST, _forecast),
    "autoformer": Architecture("AutoformerForPrediction", _FORECAST | {"label_length": 4}, _forecast),
    "timesfm": Architecture(
        "TimesFmModelForPrediction",
        {
            "patch_length": 8,
            "context_length": 32,
            "horizon_length": 8,
            "hidden_size": WIDTH,
            "intermediate_size": CHANNELS,
            "head_dim": 8,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
        },
    ),
    "decision_transformer": Architecture(
        "DecisionTransformerModel",
        {
            "state_dim": 6,
            "act_dim": 3,
            "hidden_size": WIDTH,
            "max_ep_len": 16,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "n_inner": CHANNELS,
        },
        _decisions,
    ),
    "timesfm2_5": Architecture(
        "TimesFm2_5ModelForPrediction",
        {
            "patch_length": 8,
            "context_length": 32,
            "horizon_length": 8,
            "output_quantile_len": 16,
            "hidden_size": WIDTH,
            "intermediate_size": CHANNELS,
            "head_dim": 8,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS,
        },
    ),
}
