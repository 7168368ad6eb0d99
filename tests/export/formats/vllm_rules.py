"""What vLLM 0.33 does with a folder, written again from its source: parameters, weight loading, and a forward pass.

A Llama or a DeciLM: queries, keys and values are one parameter, gate and up another. A packed one has codes in whole
32-bit words along the inputs, and a scale for each output, or for each group of inputs of an output.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import silu
from transformers import AutoConfig

SHARDS = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"} | {
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
PARTS = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


class Loaded:
    """A folder as vLLM has it in memory.

    Args:
        folder: with config.json and safetensors.

    Raises:
        AssertionError: a tensor without a parameter, of another shape, or a parameter that nothing fills.
    """

    def __init__(self, folder: Path) -> None:
        self.config: Any = AutoConfig.from_pretrained(
            folder, trust_remote_code=(folder / "configuration_decilm.py").is_file()
        )
        stored = json.loads((folder / "config.json").read_text())
        self.architecture = stored["architectures"][0]
        self.groups = stored.get("quantization_config", {}).get("config_groups", {})
        self.sizes = [self._layer(number) for number in range(self.config.num_hidden_layers)]
        self.parts = self._parts()
        self.parameters = {name: torch.full(shape, float("nan")) for name, (shape, _) in self._shapes().items()}
        self._fill(folder)

    # --- sizes by the configuration -------------------------------------------------------------------------------

    def _layer(self, number: int) -> tuple[int, int, int]:
        """Heads, heads of keys and values, channels."""
        heads = self.config.num_attention_heads
        if self.architecture == "DeciLMForCausalLM":
            block = self.config.block_configs[number]
            assert block.attention.no_op is False and block.ffn.no_op is False and not hasattr(block.ffn, "ffn_mult")
            return heads, heads // block.attention.n_heads_in_group, block.ffn.intermediate_size
        assert self.architecture in ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
        return heads, self.config.num_key_value_heads, self.config.intermediate_size

    @property
    def head_dim(self) -> int:
        config = self.config
        if self.architecture == "Qwen2ForCausalLM":
            return config.hidden_size // config.num_attention_heads  # it does not read `head_dim`
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def _parts(self) -> dict[str, dict[str, int]]:
        """Joined layer -> rows of each of its parts, in order; an ordinary layer has one part, itself."""
        found: dict[str, dict[str, int]] = {}
        for number, (heads, shared, channels) in enumerate(self.sizes):
            attention, mlp = f"model.layers.{number}.self_attn", f"model.layers.{number}.mlp"
            width = self.head_dim
            found[f"{attention}.qkv_proj"] = {
                "q_proj": heads * width,
                "k_proj": shared * width,
                "v_proj": shared * width,
            }
            found[f"{attention}.o_proj"] = {"o_proj": self.config.hidden_size}
            found[f"{mlp}.gate_up_proj"] = {"gate_proj": channels, "up_proj": channels}
            found[f"{mlp}.down_proj"] = {"down_proj": self.config.hidden_size}
        return found

    def _inputs(self, name: str) -> int:
        number = int(name.split(".")[2])
        heads, _, channels = self.sizes[number]
        return {"o_proj": heads * self.head_dim, "down_proj": channels}.get(
            name.split(".")[-1], self.config.hidden_size
        )

    def _bias(self, name: str) -> bool:
        config, leaf = self.config, name.split(".")[-1]
        attention = bool(getattr(config, "attention_bias", False) or getattr(config, "bias", False))
        if leaf == "qkv_proj":
            return True if self.architecture == "Qwen2ForCausalLM" else getattr(config, "qkv_bias", attention)
        return attention if leaf == "o_proj" else bool(getattr(config, "mlp_bias", False))

    def scheme(self, name: str) -> dict[str, Any] | None:
        """The weights' scheme of a layer: all parts of a joined one must be named, and the first one's counts."""
        targets = {target: group["weights"] for group in self.groups.values() for target in group["targets"]}
        parent, leaf = name.rsplit(".", 1)
        found = []
        for part in PARTS.get(leaf, [leaf]):
            matches = [one for one in targets if re.match(one.removeprefix("re:"), f"{parent}.{part}")]
            found.append(targets[matches[0]] if matches else None)
        if None in found:
            assert found == [None] * len(found), f"{name} is packed in part"
            return None
        assert all(one == found[0] for one in found), f"the parts of {name} are packed in several ways"
        assert found[0]["symmetric"] and found[0]["strategy"] in ("channel", "group") and found[0]["num_bits"] in (4, 8)
        return found[0]

    def _shapes(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        hidden = self.config.hidden_size
        found: dict[str, tuple[tuple[int, ...], Any]] = {
            "model.embed_tokens.weight": ((self.config.vocab_size, hidden), None),
            "model.norm.weight": ((hidden,), None),
        }
        if not self.config.tie_word_embeddings:
            found["lm_head.weight"] = ((self.config.vocab_size, hidden), None)
        for number in range(self.config.num_hidden_layers):
            for norm in ("input_layernorm", "post_attention_layernorm"):
                found[f"model.layers.{number}.{norm}.weight"] = ((hidden,), None)
        for name, parts in self.parts.items():
            rows, columns, scheme = sum(parts.values()), self._inputs(name), self.scheme(name)
            if scheme is None:
                found[f"{name}.weight"] = ((rows, columns), None)
            else:
                words = math.ceil(columns * scheme["num_bits"] / 32)
                groups = columns // scheme["group_size"] if scheme["strategy"] == "group" else 1
                found[f"{name}.weight_packed"] = ((rows, words), scheme)
                found[f"{name}.weight_scale"] = ((rows, groups), scheme)
            if self._bias(name):
                found[f"{name}.bias"] = ((rows,), None)
        return found

    # --- the weights of the files ---------------------------------------------------------------------------------

    def _fill(self, folder: Path) -> None:
        packed: dict[str, Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    self._place(name, tensors.get_tensor(name), packed)
        for name, tensor in self.parameters.items():
            assert name in packed or not tensor.isnan().any(), f"nothing fills {name}"
        self.parameters |= packed

    def _place(self, name: str, tensor: Tensor, packed: dict[str, Tensor]) -> None:
        path, _, leaf = name.rpartition(".")
        parent, _, own = path.rpartition(".")
        if leaf == "weight_shape":
            assert tensor.tolist()[1] == self._inputs(f"{parent}.{SHARDS.get(own, own)}")
            return
        joined = f"{parent}.{SHARDS[own]}" if own in SHARDS else path
        target = f"{joined}.{leaf}"
        assert target in self.parameters, f"vLLM has no parameter for {name}"
        start, rows = 0, tensor.shape[0]
        if joined in self.parts:
            parts = self.parts[joined]
            start = sum(parts[part] for part in list(parts)[: list(parts).index(own)])
            assert rows == parts[own], f"{name} has {rows} rows, vLLM {parts[own]}"
        whole = self.parameters[target]
        assert tensor.shape[1:] == whole.shape[1:], (
            f"{name} is {tuple(tensor.shape)}, vLLM's {target} {tuple(whole.shape)}"
        )
        assert joined in self.parts or rows == whole.shape[0]
        if leaf == "weight_packed":
            assert tensor.dtype == torch.int32
            whole = packed.setdefault(target, torch.zeros(whole.shape, dtype=torch.int32))
        whole[start : start + rows] = tensor

    def weight(self, name: str) -> Tensor:
        """Decode a layer's weight: codes are unsigned, less half of their range."""
        scheme = self.scheme(name)
        if scheme is None:
            return self.parameters[f"{name}.weight"].float()
        bits, columns = scheme["num_bits"], self._inputs(name)
        words = self.parameters[f"{name}.weight_packed"].numpy().view(np.uint32)
        places = np.arange(32, dtype=np.uint32)
        stream = ((words[:, :, None] >> places) & 1).reshape(len(words), -1)[:, : columns * bits]
        codes = (stream.reshape(len(words), columns, bits) << np.arange(bits)).sum(-1).astype(np.int64) - 2 ** (
            bits - 1
        )
        scale = self.parameters[f"{name}.weight_scale"].float()
        return torch.from_numpy(codes).float() * scale.repeat_interleave(columns // scale.shape[1], 1)

    # --- forward ----------------------------------------------------------------------------------------------------

    def logits(self, ids: Tensor) -> Tensor:
        """Return the logits of one text, shape (tokens, vocabulary)."""
        embedding = self.parameters["model.embed_tokens.weight"].float()
        x = embedding[ids]
        for number, sizes in enumerate(self.sizes):
            path = f"model.layers.{number}"
            x = x + self._attention(f"{path}.self_attn", self._norm(f"{path}.input_layernorm", x), sizes)
            gate, up = self._linear(
                f"{path}.mlp.gate_up_proj", self._norm(f"{path}.post_attention_layernorm", x)
            ).chunk(2, -1)
            x = x + self._linear(f"{path}.mlp.down_proj", silu(gate) * up)
        head = self.parameters.get("lm_head.weight", embedding).float()
        return self._norm("model.norm", x) @ head.T

    def _linear(self, name: str, x: Tensor) -> Tensor:
        y = x @ self.weight(name).T
        return y + self.parameters[f"{name}.bias"] if f"{name}.bias" in self.parameters else y

    def _norm(self, name: str, x: Tensor) -> Tensor:
        mean = x.square().mean(-1, keepdim=True)
        return x * torch.rsqrt(mean + self.config.rms_norm_eps) * self.parameters[f"{name}.weight"].float()

    def _attention(self, name: str, x: Tensor, sizes: tuple[int, int, int]) -> Tensor:
        heads, shared, _ = sizes
        width, length = self.head_dim, len(x)
        q, k, v = self._linear(f"{name}.qkv_proj", x).split([heads * width, shared * width, shared * width], -1)
        theta = self.config.rope_parameters["rope_theta"]
        angles = torch.arange(length)[:, None] / theta ** (torch.arange(0, width, 2) / width)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]

        def rotate(y: Tensor) -> Tensor:
            first, second = y.view(length, -1, width).chunk(2, -1)
            return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

        q, k, v = rotate(q), rotate(k), v.view(length, -1, width)
        k, v = (one.repeat_interleave(heads // shared, 1) for one in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(width)
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
        return self._linear(f"{name}.o_proj", torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(length, -1))
