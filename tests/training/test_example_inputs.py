"""What of a batch the model is recorded and proved on: rows of any layout, classes of any signature and output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    TrainerCallback,
    TrainingArguments,
)

from geta_hf import GETAConfig, GETATrainer
from geta_hf.training.example_inputs import divides_by_count, find_left_out

SMALL = GETAConfig(warmup=1, projection=2, joint=4, projection_periods=1, pruning_periods=2)


def make(model: PreTrainedModel, folder: Path, rows: list[dict[str, Any]], **changes: Any) -> GETATrainer:
    collator = changes.pop("data_collator", None)
    kind = changes.pop("kind", GETATrainer)
    values = {"max_steps": 9, "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True}
    args = TrainingArguments(str(folder), **{**values, "per_device_train_batch_size": 4, **changes})
    return kind(model, args, geta_config=SMALL, train_dataset=rows, data_collator=collator)


def text(count: int = 24) -> list[dict[str, Any]]:
    found = []
    for place in range(count):
        ids = [3 + (place * other) % 40 for other in range(1, 9)]
        found.append({"input_ids": ids, "attention_mask": [1] * 6 + [0] * 2, "labels": place % 2})
    return found


# --- batches that are not indexed by sample -------------------------------------------------------------------------


def test_patches_of_all_pictures_in_one_tensor(tmp_path: Path) -> None:
    words = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    scaling = {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 2}
    vision |= {"spatial_merge_size": 2, "temporal_patch_size": 1}
    tokens = {"image_token_id": 50, "vision_start_token_id": 51, "vision_end_token_id": 52, "video_token_id": 53}
    config = Qwen2VLConfig(text_config={**words, **heads, **scaling}, vision_config=vision, **tokens)

    def collate(rows: list[dict[str, int]]) -> dict[str, Tensor]:
        ids = torch.tensor([[5, 51, 50, 52, row["word"]] for row in rows])
        pictures = {
            "pixel_values": torch.randn(4 * len(rows), 12),
            "image_grid_thw": torch.tensor([[1, 2, 2]] * len(rows)),
        }
        positions = torch.arange(5).expand(3, len(rows), 5)
        return {
            "input_ids": ids,
            "labels": ids.clone(),
            "mm_token_type_ids": (ids == 50).int(),
            "position_ids": positions,
            **pictures,
        }

    rows = [{"word": 6 + place} for place in range(16)]
    made = make(
        Qwen2VLForConditionalGeneration(config),
        tmp_path,
        rows,
        data_collator=collate,
        remove_unused_columns=False,
    )
    shapes = {name: tuple(tensor.shape) for name, tensor in made._batch.items()}
    assert shapes["pixel_values"] == (8, 12) and shapes["position_ids"] == (3, 2, 5)
    assert shapes["input_ids"] == (2, 5)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, pad_token_id=0))


def test_packed_rows(tmp_path: Path) -> None:
    rows = [{"input_ids": row["input_ids"][: 4 + place % 4]} for place, row in enumerate(text())]
    collator = DataCollatorWithFlattening(return_tensors="pt", return_flash_attn_kwargs=True)
    made = make(llama(), tmp_path, rows, data_collator=collator, remove_unused_columns=False)
    two = [len(row["input_ids"]) for row in rows]
    packed = made._batch["input_ids"].shape
    assert packed[0] == 1 and packed[1] in {a + b for a in two for b in two}
    assert made._batch["position_ids"].shape == packed and isinstance(made._batch["max_length_q"], int)


@pytest.mark.slow
def test_a_collator_that_needs_the_full_batch_gets_it(tmp_path: Path) -> None:
    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        assert len(rows) == 4
        ids = torch.tensor([row["input_ids"] for row in rows])
        return {"input_ids": ids, "labels": ids.clone(), "logits_to_keep": 0}

    made = make(llama(), tmp_path, text(), data_collator=collate)
    assert made._batch["input_ids"].shape == (4, 8) and made._train_batch_size == 4
    assert "logits_to_keep" in made._batch and "labels" not in made._batch


# --- classes of one's own -------------------------------------------------------------------------------------------


class OwnConfig(PreTrainedConfig):
    model_type = "own-example"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 24)
        self.down = nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


class Own(PreTrainedModel):
    """A classifier that returns a dict and takes no return_dict."""

    config_class = OwnConfig
    accepts_loss_kwargs = False

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        self.words = nn.Embedding(50, 16)
        self.layers = nn.ModuleList([Block()])
        self.head = nn.Linear(16, 2)
        self.post_init()

    def classify(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        x = self.words(input_ids)
        for layer in self.layers:
            x = layer(x)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return self.head((x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.classify(input_ids, attention_mask)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


class OwnTuple(Own):
    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.classify(input_ids, attention_mask)
        return (logits,) if labels is None else (F.cross_entropy(logits, labels), logits)


class OwnKeywords(Own):
    def forward(self, **kwargs):
        return super().forward(**kwargs)


class OwnRest(Own):
    def forward(self, input_ids, **rest):
        return super().forward(input_ids, **rest)


class OwnRequired(Own):
    def forward(self, input_ids, labels, attention_mask=None):
        return OwnTuple.forward(self, input_ids, attention_mask, labels)


class OwnNested(Own):
    def forward(self, inputs, labels=None):
        found = super().forward(inputs["input_ids"], inputs["attention_mask"], labels)
        return {"loss": found.pop("loss", None), "heads": found}


def nest(rows: list[dict[str, Any]]) -> dict[str, Any]:
    columns = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
    labels = columns.pop("labels")
    return {"inputs": columns, "labels": labels}


class OwnBare(Own):
    def forward(self, input_ids, attention_mask=None):
        return self.classify(input_ids, attention_mask)


class LossOutside(GETATrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = F.cross_entropy(outputs, labels)
        return (loss, outputs) if return_outputs else loss


WAYS: dict[type[Own], tuple[set[str], dict[str, Any]]] = {
    Own: ({"input_ids", "attention_mask"}, {}),
    OwnTuple: ({"input_ids", "attention_mask"}, {}),
    OwnKeywords: ({"input_ids", "attention_mask"}, {"remove_unused_columns": False}),
    OwnRest: ({"input_ids", "attention_mask"}, {"remove_unused_columns": False}),
    OwnRequired: ({"input_ids", "attention_mask", "labels"}, {}),
    OwnNested: ({"inputs"}, {"remove_unused_columns": False, "data_collator": nest}),
    OwnBare: ({"input_ids", "attention_mask"}, {"remove_unused_columns": False, "kind": LossOutside}),
}


SLOW = (Own, OwnTuple, OwnKeywords, OwnNested)  # each is near to another one


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind in SLOW), id=kind.__name__) for kind in WAYS]
)
def test_own_classes_train_export_and_reload(kind: type[Own], tmp_path: Path) -> None:
    names, changes = WAYS[kind]
    torch.manual_seed(0)
    made = make(kind(OwnConfig()), tmp_path / "run", text(), **changes)
    assert made._batch.keys() == names
    made.train()
    report = made.export_model(tmp_path / "small")
    assert report is not None and list(report.kept.values()) == [(12, 24)]
    ids = torch.tensor([row["input_ids"] for row in text(3)])
    mask = torch.tensor([row["attention_mask"] for row in text(3)])
    small = kind.from_pretrained(tmp_path / "small").eval()
    with torch.no_grad():
        torch.testing.assert_close(small.classify(ids, mask), made.model.eval().classify(ids, mask))


def test_labels_and_what_no_forward_takes_are_left_out() -> None:
    batch = {**nest(text(2))["inputs"], "labels": torch.tensor([0, 1]), "weights": torch.ones(2)}
    assert find_left_out(Own(OwnConfig()), batch, ["labels"]) == {"labels", "weights"}
    assert find_left_out(OwnRest(OwnConfig()), batch, []) == {"labels", "weights"}
    batch.pop("weights")
    assert find_left_out(OwnRest(OwnConfig()), batch, []) == {"labels"}


# --- losses that are means ------------------------------------------------------------------------------------------


def bert(kind: type[PreTrainedModel]) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return kind(BertConfig(vocab_size=50, **sizes, **dropouts))


def test_only_losses_that_are_divided_by_the_count_of_labels_are_scaled_by_it() -> None:
    ids = torch.arange(3, 11).view(2, 4)
    classes = {"input_ids": ids, "labels": torch.tensor([0, 1])}
    assert not divides_by_count(bert(BertForSequenceClassification), classes)
    assert divides_by_count(llama(), {"input_ids": ids, "labels": ids})
    assert divides_by_count(Own(OwnConfig()), classes)  # takes no count, as Trainer sees by itself


def test_a_classifier_takes_the_same_step_in_micro_batches(tmp_path: Path) -> None:
    found = []
    for rows, steps in ((8, 1), (2, 4)):
        made = make(
            bert(BertForSequenceClassification),
            tmp_path,
            text(),
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=steps,
            optim="sgd",
            max_steps=8,
            max_grad_norm=0.0,
        )
        made.add_callback(StopAfterOne())
        made.train()
        found.append(made.model.classifier.weight.detach().clone())
    torch.testing.assert_close(*found, rtol=0, atol=1e-7)


class StopAfterOne(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = True
