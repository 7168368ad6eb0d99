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
    """Continue prompts, greedily, score texts, and turn texts into tokens.

    Args:
        task_file: JSON with `model` (a path), `prompts` (lists of token ids), `new_tokens`, `listed` (how many of the
            likeliest tokens to list), `scored` (lists of token ids), `context` (a length), `threads` and `texts`.
        result_file: gets `prompts`, for each the `tokens` that follow and the `listed` log probabilities of each step
            by token; `scored`, for each the log probability of its second token, its third, and so on, null where
            llama.cpp gives none; and `texts`, each with its `tokens`.
    """
    import xllamacpp

    task = json.loads(Path(task_file).read_text())
    params = xllamacpp.CommonParams()
    params.model.path = task["model"]
    params.n_ctx, params.n_parallel = task["context"], 1
    # More threads than free cores wait for each other in loops.
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = task["threads"]
    params.warmup, params.fit_params, params.verbosity = False, False, 1
    params.n_gpu_layers = 0
    # By default both round keys, values and their products to F16, which the model does not.
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    # A window's cache that forgets what it has left cannot go back to a shorter text, and gives other values then.
    params.swa_full = True
    server = xllamacpp.Server(params)
    result = {
        "prompts": [_continue(server.listening_address, prompt, task) for prompt in task["prompts"]],
        "scored": [_score(server.listening_address, tokens) for tokens in task["scored"]],
        "texts": [
            _post(server.listening_address, "tokenize", content=text, add_special=True) for text in task["texts"]
        ],
    }
    Path(result_file).write_text(json.dumps(result))


def _continue(address: str, prompt: list[int], task: dict[str, Any]) -> dict[str, Any]:
    tokens: list[int] = []
    listed: list[dict[int, float]] = []
    # One token at a time, since none is listed for a token that ends within a character. What was read is cached.
    while len(tokens) < task["new_tokens"]:
        asked = {"temperature": 0, "n_predict": 1, "n_probs": task["listed"], "return_tokens": True}
        step = _post(address, "completion", prompt=prompt + tokens, **asked)
        if step.get("stop_type") == "eos" or not step["tokens"]:
            break
        tokens.append(step["tokens"][0])
        found = step.get("completion_probabilities") or [{"top_logprobs": []}]
        listed.append({one["id"]: one["logprob"] for one in found[0]["top_logprobs"]})
    return {"tokens": tokens, "listed": listed}


def _score(address: str, tokens: list[int]) -> list[float | None]:
    """Return the log probability of every token but the first, given those before it."""
    found: list[float | None] = []
    for place in range(1, len(tokens)):
        # The bias lets the token be chosen, and then its probability is listed. It is that without the bias.
        asked = {"temperature": 0, "n_predict": 1, "n_probs": 1, "logit_bias": [[tokens[place], 1e6]]}
        step = _post(address, "completion", prompt=tokens[:place], **asked)
        listed = step.get("completion_probabilities") or [{}]
        found.append(listed[0].get("logprob"))
    return found


def _post(address: str, path: str, **body: Any) -> Any:
    request = urllib.request.Request(
        f"{address}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.load(answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
