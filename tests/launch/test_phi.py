"""A causal language model under FSDP2: two gloo processes end like one on the same global batch, a layer less each.

torchrun --nproc_per_node 2 -m tests.launch.test_phi FOLDER
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import PartialState
from transformers import AutoModelForCausalLM, PhiConfig, PhiForCausalLM, TrainingArguments

from geta_hf import GETAConfig, GETATrainer
from tests.launch.scenarios import SMALL, STEPS, offer_fsdp_on_cpu, outcome

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
GROUPS = 2 * (4 + 48)


def run(folder: Path, processes: int, fsdp: bool) -> dict[str, object]:
    torch.manual_seed(0)
    model = PhiForCausalLM(PhiConfig(**SIZES, max_position_embeddings=32, resid_pdrop=0.0))
    with torch.no_grad():
        for parameter in model.parameters():  # far enough from zero for layers that are not missed alike
            parameter.add_(0.05 * torch.randn_like(parameter))
    ids = torch.randint(4, 60, (64, 10), generator=torch.Generator().manual_seed(0))
    values: dict = {"output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 8 // processes}
    values |= {"learning_rate": 1e-3, "logging_steps": 6, "save_strategy": "no", "report_to": "none"}
    if fsdp:
        layer = {"version": 2, "transformer_layer_cls_to_wrap": "PhiDecoderLayer"}
        values |= {"fsdp": True, "fsdp_config": layer}
    made = GETATrainer(
        model,
        TrainingArguments(**values, use_cpu=True, disable_tqdm=True, seed=3),
        geta_config=GETAConfig(drop_layers=1, **SMALL),
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],
    )
    made.train()
    report = made.export_model(folder / "small")
    kept = None if report is None else report.kept
    return outcome(made) | {"kept": kept, "losses": made.depth.losses, "removed": made.depth.removed}


@pytest.mark.slow
def test_two_processes_end_like_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    command += ["--rdzv_endpoint", "localhost:0", "-m", "tests.launch.test_phi", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-6000:]
    found, wanted = torch.load(tmp_path / "two.pt"), run(tmp_path / "one", 1, False)
    assert found["removed"] == wanted["removed"] and found["losses"] == pytest.approx(wanted["losses"], abs=1e-5)
    assert torch.equal(found["gone"], wanted["gone"]) and int(found["gone"].sum()) == GROUPS // 2
    assert found["bits"] == pytest.approx(wanted["bits"], abs=1e-3) and found["kept"] == wanted["kept"]
    for name, value in wanted["weights"].items():
        if not name.endswith("k_proj.bias"):  # the loss does not depend on it
            assert torch.allclose(found["weights"][name], value, atol=1e-4), name
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "small")
    assert len(small.model.layers) == 2


if __name__ == "__main__":
    torch.set_num_threads(1)
    state = PartialState(cpu=True)
    offer_fsdp_on_cpu()
    ended = run(Path(sys.argv[1]) / "run", state.num_processes, True)
    if state.process_index == 0:
        torch.save(ended, Path(sys.argv[1]) / "two.pt")
