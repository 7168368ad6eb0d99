"""Write the folders, checkpoints and numbers below `written_by_09b780f`, with the package as it was at that commit.

    git worktree add ../geta_hf_09b780f 09b780f
    cp -r tests/compatibility ../geta_hf_09b780f/tests/
    cd ../geta_hf_09b780f && rm -rf tests/compatibility/written_by_09b780f
    OMP_NUM_THREADS=1 PYTHONPATH=$PWD python -m tests.compatibility.write_fixtures

Never run it with a later commit: the tests would then compare that commit with itself. Everything comes from seeds and
short trainings on one thread of a CPU (`runs.py`), so a second run on a like machine gives the same bytes.

Checkpoints lack `training_args.bin`, a pickle of Trainer's that holds paths and that resuming does not read.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import TrainerCallback

from geta_hf import GETAConfig, GETATrainer, build_space, convert, perplexity, write_card
from tests.compatibility import runs


class _SaveAt(TrainerCallback):
    def __init__(self, steps: tuple[int, ...]) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = state.global_step in self.steps


def _load(folder: Path, auto: str) -> Any:
    return getattr(transformers, auto).from_pretrained(folder)


def _save_json(path: Path, values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _write_outputs(name: str, folder: Path, target: Path) -> None:
    """Write what a folder gives on the fixed batch: the logits, and the last hidden state without the head."""
    batch = runs.inputs_of(name)
    logits = runs.outputs_of(_load(folder, runs.RUNS[name].auto), batch)
    hidden = runs.outputs_of(_load(folder, "AutoModel"), batch)
    runs.save_tensors(target, {"logits": logits, "hidden": hidden})


def _write_run(name: str, work: Path) -> None:
    """Train, keep checkpoints and the export, and note what resuming from each checkpoint gives."""
    trainer = runs.make_trainer(name, work / "run")
    trainer.add_callback(_SaveAt(runs.RUNS[name].checkpoints))
    trainer.train()
    final = trainer.model.state_dict()
    trainer.export_model(runs.EXPORTS / name)
    if name == "bert":
        scores = {"dense": {"accuracy": 0.9125}, "compressed": {"accuracy": 0.8875}}
        write_card(runs.EXPORTS / name, dataset="someone/films", metrics=scores)
    _write_outputs(name, runs.EXPORTS / name, runs.EXPECTED / "exports" / f"{name}.safetensors")
    for step in runs.RUNS[name].checkpoints:
        source, target = work / "run" / f"checkpoint-{step}", runs.CHECKPOINTS / name / f"checkpoint-{step}"
        (source / "training_args.bin").unlink()
        shutil.copytree(source, target)
        again = runs.make_trainer(name, work / f"again-{step}")
        again.train(resume_from_checkpoint=str(target))
        _check_equal(again, final, target)
    if runs.RUNS[name].checkpoints:
        runs.save_tensors(runs.EXPECTED / "final" / f"{name}.safetensors", final)
        runs.save_tensors(runs.EXPECTED / "final" / f"{name}-state.safetensors", runs.method_state(trainer))


def _check_equal(trainer: GETATrainer, final: dict[str, Tensor], checkpoint: Path) -> None:
    state = trainer.model.state_dict()
    unlike = [name for name in final if not torch.equal(state[name], final[name])]
    if unlike or set(state) != set(final):
        raise SystemExit(f"resuming from {checkpoint} gives another {unlike}")


def _write_other_formats() -> None:
    for form, options in runs.FORMS.items():
        folder = runs.EXPORTS / f"llama_short-{form}"
        convert(runs.EXPORTS / "llama_short", folder, **options)
        _write_outputs("llama_short", folder, runs.EXPECTED / "exports" / f"{folder.name}.safetensors")


def _write_checkpoint_export(work: Path) -> None:
    """Note what the export of the checkpoint from cool-down holds and gives."""
    name = f"checkpoint-{runs.COOLDOWN}"
    convert(runs.CHECKPOINTS / "bert" / name, work / "export")
    _write_outputs("bert", work / "export", runs.EXPECTED / "exports" / f"bert-{name}.safetensors")
    shutil.copy(work / "export" / "geta_structure.json", runs.EXPECTED / "exports" / f"bert-{name}.json")


def _write_spaces() -> None:
    for name in ("bert", "llama_short", "convnext"):
        model = runs.RUNS[name].model()
        build_space(model, runs.inputs_of(name)).save(runs.SPACES / name)


def _write_configs() -> None:
    runs.CONFIGS.mkdir(parents=True)
    targets = {"target_parameters": 0.3, "mean_bits": 5, "bits": (2, 8), "bit_choices": [8, 2, 4]}
    stages = {"warmup": 100, "projection": "1.5 epochs", "joint": "300 steps"}
    lists = {
        "include": [r"layer\.0"],
        "exclude": ["head", "pooler"],
        "prune": ["residual"],
        "keep": ["*.0.*"],
        "drop_layers": ["encoder.layer.3", "encoder.layer.5"],
    }
    rules = {"saliency": "taylor", "bit_rule": "ppsg", "clipping": "max", "bit_reduction": 2, "initial_bits": 16}
    sized = {"target_bytes": 1_000_000, "target_sparsity": 0.25, "activation_bits": (4, 8), "embedding_bits": 4}
    written = {
        "defaults.json": GETAConfig(),
        "paper.json": GETAConfig.paper(),
        "lists.json": GETAConfig(**lists),
        "targets.json": GETAConfig(**targets, **stages, min_kept=0.1, multiple_of=8, uniform=True, per_channel=True),
        "rules.yaml": GETAConfig(**rules, learn_activation_exponent=True, distill_logits=1.0, distill_hidden=0.5),
        "sized.yaml": GETAConfig(**sized, drop_layers=2, epsilon=1e-6),
    }
    for name, config in written.items():
        config.save(runs.CONFIGS / name)


def _write_perplexities() -> None:
    found = {}
    for name in ("llama_lora", "llama_short", *(f"llama_short-{form}" for form in runs.FORMS)):
        model = _load(runs.EXPORTS / name, "AutoModelForCausalLM")
        read = transformers.AutoTokenizer.from_pretrained(runs.EXPORTS / name)
        found[name] = perplexity(model, read, runs.TEXT).nats_per_token
    _save_json(runs.EXPECTED / "nats_per_token.json", found)


def main() -> None:
    """Write everything. The folder must not exist."""
    if runs.WRITTEN.exists():
        sys.exit(f"{runs.WRITTEN} exists; what earlier commits wrote is never written again")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as home:
        for name in runs.RUNS:
            _write_run(name, Path(home) / name)
        _write_other_formats()
        _write_checkpoint_export(Path(home))
    _write_spaces()
    _write_configs()
    _write_perplexities()
    _save_json(runs.EXPECTED / "arithmetic.json", runs.arithmetic())


if __name__ == "__main__":
    main()
