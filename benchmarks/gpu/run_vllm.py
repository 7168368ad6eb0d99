"""Run a folder in vLLM, in a process of its own, which may be that of another environment.

    python benchmarks/gpu/run_vllm.py TASK RESULT

TASK is JSON with `model` (a folder) and `prompts` (lists of token ids); RESULT gets the log probability of every token
but the first, for each prompt, and the version of vLLM. It imports nothing of geta_hf.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(task_file: str, result_file: str) -> None:
    """Score the prompts."""
    import vllm

    task = json.loads(Path(task_file).read_text())
    model = vllm.LLM(
        task["model"],
        trust_remote_code=True,  # the configuration class of a folder whose layers differ
        skip_tokenizer_init=True,
        dtype="float16",
        enforce_eager=True,
        gpu_memory_utilization=0.3,
        max_model_len=256,
    )
    options = vllm.SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1, detokenize=False)
    answers = model.generate([{"prompt_token_ids": prompt} for prompt in task["prompts"]], options)
    scored = [
        [step[token].logprob for token, step in zip(prompt[1:], answer.prompt_logprobs[1:], strict=True)]
        for prompt, answer in zip(task["prompts"], answers, strict=True)
    ]
    Path(result_file).write_text(json.dumps({"version": vllm.__version__, "scored": scored}))


if __name__ == "__main__":
    main(*sys.argv[1:])
