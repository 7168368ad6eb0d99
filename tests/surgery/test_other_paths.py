"""Paths that the batch does not take: a cut model must follow on them too, or the families are not pruned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    BigBirdConfig,
    BigBirdForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from geta_hf.errors import GETAError
from geta_hf.export import export
from geta_hf.qadg import PruningSpace, build_space
from geta_hf.reporting.model_card import write_card
from geta_hf.surgery import other_paths as paths
from geta_hf.surgery import verify as gate
from geta_hf.surgery.build_space import prepare_space
from geta_hf.surgery.other_paths import OtherPath, PathError, compare_path, other_paths, path_outputs
from geta_hf.surgery.trial_cut import try_cuts
from tests.export.tiny_encoders import train_by_hand

SIZES = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 24}


def tokens(count: int) -> dict[str, Tensor]:
    return {"input_ids": 3 + torch.arange(2 * count).view(2, count) % 27}


def reasons(space: PruningSpace) -> dict[str, str]:
    return {family.kind: family.reason for family in space.families if "does not follow" in family.reason}


# --- shorter and longer text --------------------------------------------------------------------------------------


def big_bird() -> PreTrainedModel:
    torch.manual_seed(0)
    sparse = {"block_size": 2, "num_random_blocks": 1, "max_position_embeddings": 40}
    return BigBirdForSequenceClassification(BigBirdConfig(**SIZES, **sparse)).eval()


def test_short_text_that_runs_other_code_is_exported_and_equal(tmp_path: Path) -> None:
    """Full attention is a module that BigBird builds as it runs, from its configuration."""
    model, batch = big_bird(), tokens(32)
    space, _ = prepare_space(model, batch)
    assert {family.kind for family in space.prunable} == {"heads", "channels"}
    kept = train_by_hand(model, space)
    assert min(kept.values()) < 4
    export(model, tmp_path / "out", space=space, batch=batch)
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        for count in (32, 8, 1):  # the first one before the modules are replaced for good
            expected, found = model(**tokens(count)).logits, reloaded(**tokens(count)).logits
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


class SlopesConfig(PreTrainedConfig):
    model_type = "slopes"


class Slopes(PreTrainedModel):
    """Attention with a slope for each head: a table that is computed again for text of more than 16 tokens."""

    config_class = SlopesConfig
    anew_beyond = 16
    fixed_in_training = False

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.heads = 4
        self.embedding = nn.Embedding(30, 16)
        self.qkv = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])
        self.out = nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
        self.head = nn.Linear(16, 2)
        self.scale = nn.Parameter(torch.ones(1))
        self.slopes = nn.Parameter(2.0 ** -torch.arange(1, 5))
        self.post_init()

    def forward(self, input_ids: Tensor, scale_mask: Tensor | None = None, labels: Tensor | None = None) -> Any:
        x = self.embedding(input_ids)
        rows, length, _ = x.shape
        q, k, v = (layer(x).view(rows, length, -1, 4).transpose(1, 2) for layer in self.qkv)
        slopes = self.slopes
        if length > self.anew_beyond:
            slopes = 2.0 ** -(torch.arange(1, self.heads + 1) * 4 / self.heads)
        distance = torch.arange(length)[:, None] - torch.arange(length)
        weights = (q @ k.transpose(2, 3) / 2 - slopes.view(-1, 1, 1) * distance.abs()).softmax(-1)
        mixed = (weights @ v).transpose(1, 2)
        if scale_mask is not None:
            mixed = mixed * self.scale * scale_mask.view(rows, length, 1, 1).expand(rows, length, self.heads, 4)
        if self.training and labels is not None:
            mixed = mixed.reshape(rows, length, 16) if self.fixed_in_training else mixed
        x = x + self.out(mixed.flatten(2))
        x = x + self.down(self.up(x).relu())
        logits = self.head(x.mean(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"logits": logits} if loss is None else {"loss": loss, "logits": logits}


def slopes() -> Slopes:
    torch.manual_seed(0)
    return Slopes(SlopesConfig()).eval()


def test_a_table_computed_anew_for_longer_text_is_refused_before_training() -> None:
    found = reasons(prepare_space(slopes(), tokens(12))[0])
    assert set(found) == {"heads"} and "on text of 64 tokens" in found["heads"]


def test_positions_end_where_the_table_of_the_model_ends() -> None:
    torch.manual_seed(0)
    model = RobertaForSequenceClassification(RobertaConfig(**SIZES, max_position_embeddings=22)).eval()
    longest = [path for path in other_paths(model, tokens(12)) if "20 tokens" in path.name]
    assert len(longest) == 1 and longest[0].batch["input_ids"].shape == (1, 20)
    assert path_outputs(model, longest[0])["logits"].shape == (1, 2)
    assert not any("tokens" in path.name for path in other_paths(model, tokens(22)) if "8" not in path.name)


# --- optional inputs ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_input_that_reads_parameters_of_its_own_is_refused() -> None:
    torch.manual_seed(0)
    model = XLNetForSequenceClassification(XLNetConfig(vocab_size=30, d_model=16, n_layer=1, n_head=4, d_inner=24))
    found = reasons(prepare_space(model.eval(), tokens(8))[0])
    assert set(found) == {"heads"} and "with token_type_ids" in found["heads"]


def test_an_attribute_that_an_optional_input_alone_reads_is_changed_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Slopes, "anew_beyond", 1000)
    model, batch = slopes(), tokens(12)
    space, _ = prepare_space(model, batch)
    assert {family.kind for family in space.prunable} == {"heads", "channels"}
    train_by_hand(model, space)
    export(model, tmp_path / "out", space=space, batch=batch)
    # What only the optional input reads is named in the card.
    assert "never read by the recorded inputs, so not pruned: scale" in write_card(tmp_path / "out").read_text()
    reloaded = Slopes.from_pretrained(tmp_path / "out").eval()
    assert reloaded.heads < 4
    with torch.no_grad():
        for optional in ({}, {"scale_mask": torch.rand(2, 12)}):
            expected, found = model(**batch, **optional), reloaded(**batch, **optional)
            torch.testing.assert_close(found["logits"], expected["logits"], rtol=0, atol=1e-6)


def test_an_export_without_a_trial_is_refused_on_a_path_that_is_wrong(tmp_path: Path) -> None:
    model, batch = slopes(), tokens(12)
    space = build_space(model, batch)
    train_by_hand(model, space)
    with pytest.raises(GETAError, match=r"on text of 64 tokens: .*arange"):
        export(model, tmp_path / "out", space=space, batch=batch)
    assert not (tmp_path / "out").exists()


def test_an_index_beyond_a_table_is_found_before_a_gpu_sees_it() -> None:
    table, index = torch.zeros(4, 2), torch.tensor([[0, 4]])
    with paths._CheckedIndices():
        for look_up in (nn.functional.embedding, lambda i, t: t[i], lambda i, t: t.index_select(0, i[0])):
            assert look_up(index.clamp(max=3), table).shape[-1] == 2
            with pytest.raises(IndexError, match="beyond 4"):
                look_up(index, table)


# --- training mode ------------------------------------------------------------------------------------------------


def test_code_of_training_alone_is_refused_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Slopes, "fixed_in_training", True)
    model, labels = slopes(), {"labels": torch.tensor([0, 1])}
    space = build_space(model, tokens(12))
    assert "heads" not in reasons(_only_training(model, space, None))
    found = reasons(_only_training(model, space, labels))
    assert set(found) == {"heads"} and "in training mode" in found["heads"]


def test_nothing_is_dropped_in_training_mode_and_all_state_comes_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(4))
    x = torch.randn(3, 4)
    path = OtherPath("in training mode", {}, training=True)
    with paths._same_buffers(model):
        dropped = path.call(model, lambda: model[0](x), {})
        path.call(model, lambda: model(x), {})
        assert model.training and model[1].running_mean.any()
    assert torch.equal(dropped, x) and not model[1].running_mean.any()


def test_outputs_that_depend_on_chance_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = slopes()
    usual = Slopes.forward
    monkeypatch.setattr(
        Slopes, "forward", lambda self, **given: {"logits": usual(self, **given)["logits"] + torch.rand(self.heads)[0]}
    )
    other = slopes()
    other.heads = 3
    nn.init.ones_(other.head.bias)
    path = OtherPath("on text of 8 tokens", tokens(8))
    compare_path(model, other, path)
    monkeypatch.setattr(paths, "_is_random", lambda *given: False)
    with pytest.raises(PathError, match="on text of 8 tokens"):
        compare_path(model, other, path)


def _only_training(model: PreTrainedModel, space: PruningSpace, labels: dict[str, Tensor] | None) -> PruningSpace:
    usual = gate.other_paths

    def chosen(*given: Any) -> list[OtherPath]:
        return [path for path in usual(*given) if path.training]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate, "other_paths", chosen)
        return try_cuts(model, space, tokens(12), None, labels)
