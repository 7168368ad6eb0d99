"""A module's own eyes on the configuration."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

from transformers import BertConfig, GPT2Config, PreTrainedConfig

from geta_hf.surgery.config_view import ConfigView, is_config, view_of


def test_only_the_overridden_reads_otherwise() -> None:
    config = BertConfig(num_attention_heads=4, hidden_size=32)
    view = view_of(config)
    view.override("num_attention_heads", 3)
    assert (view.num_attention_heads, view.hidden_size) == (3, 32)
    assert config.num_attention_heads == 4
    assert isinstance(view, PreTrainedConfig) and is_config(view) and isinstance(view, BertConfig)
    assert not hasattr(view, "absent")


def test_the_view_is_live_and_writes_go_through() -> None:
    config = BertConfig()
    view = view_of(config)
    config.hidden_act = "relu"
    assert view.hidden_act == "relu"
    view.hidden_act = "silu"
    view._attn_implementation_internal = "sdpa"
    assert (config.hidden_act, config._attn_implementation) == ("silu", "sdpa")
    assert vars(view) is vars(config)


def test_other_names_of_an_attribute_are_overridden_too() -> None:
    view = view_of(GPT2Config(n_head=4))
    view.override("num_attention_heads", 3)
    assert (view.n_head, view.num_attention_heads) == (3, 3)


def test_what_is_saved_through_a_view_is_the_original(tmp_path: Path) -> None:
    view = view_of(BertConfig(num_attention_heads=4, hidden_size=32))
    view.override("num_attention_heads", 3)
    view.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["num_attention_heads"] == 4
    assert view.to_dict()["num_attention_heads"] == 4


def test_copies_share_what_the_originals_shared() -> None:
    config = BertConfig(num_attention_heads=4, hidden_size=32)
    view = view_of(config)
    view.override("num_attention_heads", 3)
    other, base = copy.deepcopy((view, config))
    base.hidden_act = "relu"
    assert type(other) is ConfigView
    assert (other.num_attention_heads, other.hidden_act) == (3, "relu")
    loaded = pickle.loads(pickle.dumps(view))
    assert type(loaded) is ConfigView
    assert (loaded.num_attention_heads, loaded.hidden_size) == (3, 32)
    second = view_of(view)
    second.override("hidden_size", 8)
    assert (second.num_attention_heads, view.hidden_size) == (3, 32)
