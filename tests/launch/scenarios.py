"""What one process of a launch does: runs of GETATrainer, whose results it writes into files. For `test_launch`.

torchrun --nproc_per_node 2 -m tests.launch.scenarios FOLDER (ddp | fsdp2) NAME...
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForQuestionAnswering,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    TrainerCallback,
    TrainingArguments,
)

from geta_hf import GETAConfig, GETAError, GETATrainer, SearchConfig
from geta_hf.recipes import image_classification
from geta_hf.utils.shards import from_first_process
from tests.conftest import tiny_bert_config
from tests.recipes.pictures import SIDE, write_folder

CONFIGS = Path(image_classification.__file__).parent / "configs"
STEPS, GLOBAL_BATCH = 24, 8
SMALL = {"warmup": 2, "projection": 4, "joint": 12, "projection_periods": 2, "pruning_periods": 3}
SEARCH = {
    "layer": SearchConfig(target_sparsity=0.5, mean_bits=5, bits=(3, 8), warmup=2, search=12, activation_bits=(4, 8)),
    "group": SearchConfig(target_bops=0.06, bits=(2, 6), warmup=2, search=12, granularity="group"),
}
RULES = {
    "default": GETAConfig(**SMALL),
    "paper": GETAConfig.paper(**SMALL),
    "size": GETAConfig(**SMALL, target_bops=0.08, bits=(2, 8)),
}


class Stop(TrainerCallback):
    """Ends training after some steps, as an interruption would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_training_stop or state.global_step >= self.step
        control.should_save = control.should_save or state.global_step == self.step


def rows(count: int = 64) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        ids = torch.randint(4, 60, (12,), generator=generator)
        where = torch.tensor(int(ids[0]) % 9)
        found.append({"input_ids": ids, "start_positions": where, "end_positions": where})
    return found


def make(folder: Path, rules: str, processes: int, fsdp: bool = False, **changes: object) -> GETATrainer:
    values: dict = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": GLOBAL_BATCH // processes,
        "learning_rate": 1e-3,
        "logging_steps": 6,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        **({"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": "BertLayer"}} if fsdp else {}),
        **changes,
    }
    torch.manual_seed(0)
    model = BertForQuestionAnswering(tiny_bert_config())
    return GETATrainer(model, TrainingArguments(**values), geta_config=(RULES | SEARCH)[rules], train_dataset=rows())


def classified_run(folder: Path, rules: str, processes: int, fsdp: bool = False) -> dict[str, object]:
    """Train a classifier, whose loss is a mean over its rows, with a step size that shows every factor: SGD's."""
    values = {"max_steps": STEPS, "per_device_train_batch_size": GLOBAL_BATCH // processes, "seed": 3, "optim": "sgd"}
    args = TrainingArguments(
        str(folder), save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, learning_rate=0.1, **values
    )
    torch.manual_seed(0)
    model = BertForSequenceClassification(tiny_bert_config())
    data = [{"input_ids": row["input_ids"], "labels": row["start_positions"] % 2} for row in rows()]
    trainer = GETATrainer(model, args, geta_config=RULES[rules], train_dataset=data)
    trainer.train()
    return outcome(trainer)


def pictured_run(folder: Path, rules: str, processes: int, fsdp: bool = False) -> dict[str, object]:
    """Run the image recipe, whose command is the same under `accelerate launch`."""
    home = folder / "pictures"
    if PartialState().is_main_process:
        write_folder(home, 16)
    PartialState().wait_for_everyone()
    words = [
        str(CONFIGS / f"{rules}.yaml"),
        "--dataset_name",
        "null",
        "--train_dir",
        str(home),
        "--eval_dir",
        str(home),
    ]
    words += [
        "--architecture",
        f"{{model_type: cifar_resnet, image_size: {SIDE}, depths: [1, 1], hidden_sizes: [8, 16]}}",
    ]
    words += ["--output_dir", str(folder / "run"), "--max_steps", str(STEPS), "--dataloader_num_workers", "0"]
    words += ["--per_device_train_batch_size", str(GLOBAL_BATCH // processes), "--measure_speed", "false"]
    return image_classification.main([*words, "--use_cpu", "--disable_tqdm"])


def outcome(trainer: GETATrainer) -> dict[str, object]:
    """Weights whole, groups removed, and bits."""
    state = trainer.accelerator.get_state_dict(trainer.model)
    assert trainer.qasso is not None
    weights = {n: (v.full_tensor() if isinstance(v, DTensor) else v).clone() for n, v in state.items()}
    return {"weights": weights, "gone": trainer.qasso.gone.clone(), "bits": trainer.qasso.bits()}


def whole_run(folder: Path, rules: str, processes: int, fsdp: bool = False, **changes: object) -> dict[str, object]:
    trainer = make(folder / "run", rules, processes, fsdp, **changes)
    trainer.train()
    report = trainer.export_model(folder / "small")
    # In every process: the folder is there, and a failure of the first one is one of all.
    assert (folder / "small" / "config.json").is_file()
    refused = ""
    try:
        trainer.export_model(folder / "small")
    except GETAError as error:
        refused = str(error)
    assert "exists already" in refused and ("the first process failed" in refused) == (report is None)
    found = outcome(trainer)
    if report is not None:
        small = AutoModelForQuestionAnswering.from_pretrained(report.path)
        found["exported_parameters"] = sum(parameter.numel() for parameter in small.parameters())
    return found


def searched_run(folder: Path, rules: str, processes: int, fsdp: bool = False) -> dict[str, object]:
    """Search widths and groups; under FSDP return why that is refused."""
    try:
        trainer = make(folder, rules, processes, fsdp)
    except GETAError as error:
        return {"refused": str(error)}
    trainer.train()
    optimizer = trainer.method.optimizer
    weights = {name: value.clone() for name, value in trainer.accelerator.get_state_dict(trainer.model).items()}
    bits = optimizer.weight_bits if optimizer.entry_bits is None else optimizer.entry_bits.tolist()
    chosen = torch.tensor([*optimizer.removed.tolist(), *bits, *optimizer.input_bits])
    assert torch.equal(from_first_process(chosen), chosen)
    for name, value in weights.items():
        assert torch.equal(from_first_process(value), value), name
    logits = torch.cat([choices.detach().flatten() for choices in optimizer._logits])
    return {"gone": int(optimizer.removed.sum()), "logits": logits}


def stopped_run(folder: Path, rules: str, processes: int, fsdp: bool = False, stop: int = 9) -> dict[str, object]:
    trainer = make(folder, rules, processes, fsdp)
    trainer.add_callback(Stop(stop))
    trainer.train()
    return outcome(trainer)


def resumed_run(folder: Path, rules: str, processes: int, fsdp: bool = False, stop: int = 9) -> dict[str, object]:
    stopped_run(folder, rules, processes, fsdp, stop)
    second = make(folder, rules, processes, fsdp)
    second.train(resume_from_checkpoint=str(folder / f"checkpoint-{stop}"))
    return outcome(second)


def offer_fsdp_on_cpu() -> None:
    """Accelerate gives FSDP to accelerators alone, though torch runs it on CPUs: let it take gloo for one of them."""
    plain = PartialState.__init__

    def init(self, *args, **kwargs):
        plain(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_XPU

    PartialState.__init__ = init


def main(folder: Path, launch: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)  # a fork has that of the process that it was made of
    state = PartialState(cpu=True)
    fsdp, processes = launch == "fsdp2", state.num_processes
    if fsdp:
        offer_fsdp_on_cpu()
    for name in names:
        kind, rules = name.split("-")
        kinds = {"classified": classified_run, "whole": whole_run, "stopped": stopped_run, "resumed": resumed_run}
        run = (kinds | {"searched": searched_run, "pictured": pictured_run})[kind]
        found = run(folder / launch / name, rules, processes, fsdp)
        if state.process_index == 0:
            torch.save(found, folder / f"{launch}-{name}.pt")
        AcceleratorState._reset_state()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
