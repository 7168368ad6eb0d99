"""The runs behind `written_by_09b780f`: tiny models and data from seeds, trained on a CPU.

`write_fixtures.py` trains them once; the tests resume from the checkpoints that it kept. Only public names of geta_hf
are used here, so that this file works under every layout of the package. Models, data and configs must never change: a
checkpoint resumes only under the config and the data of the run that wrote it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrainingArguments,
)

from geta_hf import GETAConfig, GETATrainer

WRITTEN = Path(__file__).parent / "written_by_09b780f"
EXPORTS, CHECKPOINTS, SPACES, CONFIGS = (WRITTEN / name for name in ("exports", "checkpoints", "spaces", "configs"))
EXPECTED = WRITTEN / "expected"

STEPS = 16
STAGES: dict[str, Any] = {"warmup": 2, "projection": 4, "joint": 6, "projection_periods": 2, "pruning_periods": 3}
PROJECTION, JOINT, COOLDOWN = 4, 9, 14
"""A step in the middle of each stage: warm-up ends with step 2, projection with 6, the joint stage with 12."""

_NOUNS, _VERBS = ("pen", "ink", "page", "book"), ("writes", "reads", "falls", "dries")
WORDS = ["<unk>", "<s>", "the", "a", "old", "new", "red", "blue", *_NOUNS, *_VERBS, "slowly", "today", "."]
TEXT = "the old pen writes slowly . a new book falls today . the red ink dries . a blue page reads ."
"""For the perplexity of the models that have a tokenizer."""


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        model: makes the model from a seed.
        rows: makes the training rows.
        config: makes the GETAConfig.
        auto: name of the auto class that loads what is exported.
        checkpoints: the steps whose checkpoints are kept.
        lora: fields of peft's LoraConfig; without them all weights are trained.
        tokenized: whether a tokenizer is exported too.
        arguments: changes of the TrainingArguments.
    """

    model: Callable[[], PreTrainedModel]
    rows: Callable[[], list[dict[str, Tensor]]]
    config: Callable[[], GETAConfig]
    auto: str
    checkpoints: tuple[int, ...] = ()
    lora: dict[str, Any] | None = None
    tokenized: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)


def bert() -> PreTrainedModel:
    """Return a classifier of 3 classes: 2 layers, hidden 16, 4 heads, 32 channels."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=32,
        max_position_embeddings=16,
        num_labels=3,
    )
    model = BertForSequenceClassification(config)
    model.config.name_or_path = "someone/tiny-bert"  # what the card and the checkpoints name as the base model
    return model


def llama(layers: int = 2, vocabulary: int = 24) -> PreTrainedModel:
    """Return a Llama with grouped queries: hidden 16, 4 heads over 2 key-value heads, 32 channels."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


def gpt2() -> PreTrainedModel:
    """Return a GPT-2: weights stored as (in, out), the embedding tied to the head."""
    torch.manual_seed(2)
    config = GPT2Config(
        vocab_size=60, n_positions=16, n_embd=16, n_layer=2, n_head=4, n_inner=32, bos_token_id=1, eos_token_id=1
    )
    return GPT2LMHeadModel(config)


def convnext() -> PreTrainedModel:
    """Return a convolutional classifier with linear layers of 4 · 8 and 4 · 16 channels."""
    torch.manual_seed(3)
    config = ConvNextConfig(
        hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=16, patch_size=4, num_labels=3
    )
    return ConvNextForImageClassification(config)


def sentences(count: int = 48) -> list[dict[str, Tensor]]:
    """Return rows of 10 tokens, 2 of them padding, with a class."""
    generator = torch.Generator().manual_seed(10)
    found = []
    for _ in range(count):
        ids = torch.randint(4, 60, (10,), generator=generator)
        ids[-2:] = 0
        found.append({"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": ids[0] % 3})
    return found


def texts(count: int = 48, vocabulary: int = 24) -> list[dict[str, Tensor]]:
    """Return rows of 8 tokens, each its own label."""
    ids = torch.randint(2, vocabulary, (count, 8), generator=torch.Generator().manual_seed(11))
    return [{"input_ids": row, "labels": row} for row in ids]


def images(count: int = 48) -> list[dict[str, Tensor]]:
    """Return images of 3 · 16 · 16 with a class."""
    pixels = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(12))
    return [{"pixel_values": one, "labels": torch.tensor(place % 3)} for place, one in enumerate(pixels)]


RUNS: dict[str, Run] = {
    "bert": Run(
        model=bert,
        rows=sentences,
        config=lambda: GETAConfig(**STAGES, bits=(3, 8), activation_bits=(4, 6), calibration_batches=2),
        auto="AutoModelForSequenceClassification",
        checkpoints=(PROJECTION, JOINT, COOLDOWN),
    ),
    "llama_lora": Run(
        model=llama,
        rows=texts,
        config=lambda: GETAConfig(**STAGES, target_parameters=0.4, embedding_bits=4),
        auto="AutoModelForCausalLM",
        checkpoints=(JOINT,),
        lora={"r": 2, "lora_alpha": 4, "target_modules": "all-linear"},
        tokenized=True,
    ),
    "llama_short": Run(
        model=lambda: llama(layers=3),
        rows=texts,
        config=lambda: GETAConfig(
            **STAGES, drop_layers=1, uniform=True, multiple_of=2, bits=(4, 8), bit_choices=[4, 8], distill_logits=0.5
        ),
        auto="AutoModelForCausalLM",
        checkpoints=(JOINT,),
        tokenized=True,
    ),
    "gpt2_paper": Run(
        model=gpt2,
        rows=lambda: texts(vocabulary=60),
        config=lambda: GETAConfig.paper(
            **STAGES, eta=0.9, bits=(4, 8), prune=["residual"], keep=["channels"], learn_activation_exponent=False
        ),
        auto="AutoModelForCausalLM",
        checkpoints=(JOINT,),
        arguments={"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 1e-2},
    ),
    "convnext": Run(
        model=convnext,
        rows=images,
        # What a size alone meant then.
        config=lambda: GETAConfig(**STAGES, per_channel=True, target_bops=0.08, split="even"),
        auto="AutoModelForImageClassification",
        checkpoints=(JOINT,),
    ),
}

FORMS: dict[str, dict[str, str]] = {
    "vanilla": {"format": "vanilla"},
    "compressed-tensors": {"format": "compressed-tensors"},
    "shards": {"max_shard_size": "4KB"},
}
"""How `llama_short` is written besides: the end of the folder's name -> options of `convert`."""


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of `WORDS`."""
    made = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", pad_token="<unk>")


def make_trainer(name: str, folder: Path) -> GETATrainer:
    """Return the trainer of a run, ready to train or to resume.

    Args:
        name: one of `RUNS`.
        folder: its output directory; a checkpoint is written there after every step that the run keeps.
    """
    run = RUNS[name]
    torch.manual_seed(0)
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 8,
        "learning_rate": 2e-3,
        "weight_decay": 0.01,
        "logging_steps": 8,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    extra: dict[str, Any] = {}
    if run.lora is not None:
        from peft import LoraConfig

        extra["peft_config"] = LoraConfig(**run.lora)
    if run.tokenized:
        extra["processing_class"] = tokenizer()
    return GETATrainer(
        run.model(),
        TrainingArguments(**(values | run.arguments)),
        geta_config=run.config(),
        train_dataset=run.rows(),
        **extra,
    )


def inputs_of(name: str) -> dict[str, Tensor]:
    """Return a fixed batch of 2 rows for a run's model."""
    rows = RUNS[name].rows()[:2]
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0] if key != "labels"}


def outputs_of(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Return the logits of a model in eval mode, or its last hidden state where it has no head."""
    model.eval()
    with torch.no_grad():
        found = model(**batch)
    return found.logits if "logits" in found else found.last_hidden_state


def method_state(trainer: GETATrainer) -> dict[str, Tensor]:
    """Return the vectors that the compression itself keeps in the optimizer's state, as a checkpoint names them."""
    kept = trainer.optimizer.state_dict()["state"].values()
    return {key: value for values in kept for key, value in values.items() if key.startswith("qasso.")}


def arithmetic() -> str:
    """Return a digest of what this machine and these libraries compute, without geta_hf.

    Sums are made in another order on other processors and under other versions of torch. Where this digest is that of
    the writing machine, the same training must give the same bits.
    """
    digest = hashlib.sha256()
    for make, rows in ((bert, sentences), (llama, texts), (gpt2, lambda: texts(vocabulary=60))):
        model = make().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        torch.manual_seed(4)
        for start in (0, 8, 16):
            part = rows()[start : start + 8]
            model(**{key: torch.stack([row[key] for row in part]) for key in part[0]}).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        for parameter in model.parameters():
            digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors to a safetensors file, below folders that are made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.detach().clone().contiguous() for name, value in tensors.items()}, path)


def read_json(path: Path) -> Any:
    """Return the content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))
