"""Run a GGUF file in llama.cpp, in a process of its own: a file that llama.cpp cannot run may end the process.

Run as a script with two paths: a task to read, and a file to write what was found. It imports nothing of geta_hf.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any


def main(task_file: str, result_file: str) -> None:
    """Continue prompts, greedily, and turn texts into tokens.

    Args:
        task_file: JSON with `model` (a path), `prompts` (lists of token ids), `new_tokens`, `listed` (how many of the
            likeliest tokens to list), `context` (a length) and `texts`.
        result_file: gets `prompts`, for each a list of (token, {token: log probability}), and `texts`, lists of ids.
    """
    import xllamacpp

    task = json.loads(Path(task_file).read_text())
    params = xllamacpp.CommonParams()
    params.model.path = task["model"]
    params.n_ctx, params.n_parallel = task["context"], 1
    params.warmup, params.fit_params, params.verbosity = False, False, -1
    params.n_gpu_layers = 0
    # The default is F16, which would round what the model does not round.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)
    result = {
        "prompts": [_continue(server, prompt, task) for prompt in task["prompts"]],
        "texts": [_tokens(server.listening_address, text) for text in task["texts"]],
    }
    Path(result_file).write_text(json.dumps(result))


def _continue(server: Any, prompt: list[int], task: dict[str, Any]) -> list[tuple[int, dict[int, float]]]:
    options = {"temperature": 0, "cache_prompt": False, "n_predict": task["new_tokens"], "n_probs": task["listed"]}
    answer = server.handle_completions({"prompt": prompt, **options})
    steps = answer["choices"][0]["logprobs"]["content"]
    return [(step["id"], {one["id"]: one["logprob"] for one in step["top_logprobs"]}) for step in steps]


def _tokens(address: str, text: str) -> list[int]:
    body = json.dumps({"content": text, "add_special": True}).encode()
    request = urllib.request.Request(f"{address}/tokenize", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        found: list[int] = json.load(answer)["tokens"]
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
