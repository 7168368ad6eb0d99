"""LoRA under DDP: two gloo processes end like one on the same global batch.

torchrun --nproc_per_node 2 -m tests.launch.test_lora FOLDER
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import PartialState
from peft import LoraConfig
from transformers import PhiConfig, PhiForCausalLM, TrainingArguments

from geta_hf import GETAConfig, GETATrainer
from tests.launch.scenarios import SMALL, STEPS, outcome

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def run(folder: Path, processes: int) -> dict[str, object]:
    torch.manual_seed(0)
    model = PhiForCausalLM(PhiConfig(**SIZES, max_position_embeddings=32, resid_pdrop=0.0))
    ids = torch.randint(4, 60, (64, 10), generator=torch.Generator().manual_seed(0))
    values: dict = {"output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 8 // processes}
    values |= {"learning_rate": 1e-3, "logging_steps": 6, "save_strategy": "no", "report_to": "none"}
    made = GETATrainer(
        model,
        TrainingArguments(**values, use_cpu=True, disable_tqdm=True, seed=3),
        geta_config=GETAConfig(**SMALL | {"joint": STEPS - 6}),  # widths are settled at the very end
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    made.train()
    assert made.qasso is not None
    return outcome(made) | {"scores": made.qasso.mean_square, "curvature": made.qasso.curvature}


@pytest.mark.slow
def test_two_processes_end_like_one(tmp_path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    command += ["--rdzv_endpoint", "localhost:0", "-m", "tests.launch.test_lora", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-6000:]
    found, wanted = torch.load(tmp_path / "two.pt"), run(tmp_path / "one", 1)
    assert torch.equal(found["gone"], wanted["gone"]) and int(found["gone"].sum()) == 52
    assert torch.allclose(found["scores"], wanted["scores"], rtol=1e-3)
    # Two gradients of half a batch each have more noise between them than the one, and what they share is left out.
    assert bool(((found["curvature"] / wanted["curvature"] - 1).abs() < 1).all())
    for name, value in wanted["weights"].items():
        if "quantizer" not in name:
            assert torch.allclose(found["weights"][name], value, atol=1e-4), name


if __name__ == "__main__":
    torch.set_num_threads(1)
    state = PartialState(cpu=True)
    ended = run(Path(sys.argv[1]) / "run", state.num_processes)
    if state.process_index == 0:
        torch.save(ended, Path(sys.argv[1]) / "two.pt")
