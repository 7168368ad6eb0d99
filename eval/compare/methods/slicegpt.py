"""SliceGPT (arXiv 2401.15024): rotate the residual stream by PCA and slice it, block after block, then GPTQ.

A sliced network carries the first k coordinates of x Q. In memory the same is computed at full width: x is projected on
the first k directions, Q_k Q_kᵀ, wherever Q changes. Norms are taken over what remains, as the paper does, with their
weights fused into the next layers. Rounded are the matrices that a sliced network stores, W diag(α) Q_k and Q_kᵀ W.

Its result is no plain model: every block has two k by k matrices between rotations, which are counted at 16 bits.
Embedding and head are counted once, as in a model that ties them, with one matrix each into and out of the rotation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eval.compare.job import Job
from eval.compare.method import Compressed
from geta_hf.costs.ledger import Ledger
from geta_hf.errors import GETAError
from geta_hf.methods.compensation import Kept
from geta_hf.methods.one_shot.layers import compress_layer
from geta_hf.methods.one_shot.method import measure
from geta_hf.quantization.maths import block_count

WIDTHS = (2, 3, 4, 5, 6, 8)
MULTIPLE = 8
"""Widths of the sliced stream are multiples of it, as in the paper."""

READERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
MLP_READERS = ("mlp.gate_proj", "mlp.up_proj")
WRITERS = ("self_attn.o_proj", "mlp.down_proj")


def principal_directions(rows: Tensor) -> Tensor:
    """Return the directions of rows by falling share of their mean square: orthogonal, float64, shape (d, d).

    Args:
        rows: X, shape (n, d); the covariance Xᵀ X is not centered.
    """
    rows = rows.double()
    _, vectors = torch.linalg.eigh(rows.t() @ rows)
    return vectors.flip(1)


def sliced_bytes(ledger: Ledger, model: PreTrainedModel, kept: int, bits: int, grid: str) -> int:
    """Return the bytes of a sliced model: codes and step sizes, matrices between rotations, and all that is not sliced.

    Args:
        ledger: sizes of the dense model.
        model: the dense model.
        kept: k, width of the sliced stream.
        bits: of every weight.
        grid: `channel` or `block32`.
    """
    width = model.config.hidden_size
    total = ledger.stored_bytes(ledger.nothing, 0.0) - ledger.scale_bytes()
    for entry in ledger.layers:
        out, inputs = ledger.shapes[entry.weight]
        if entry.weight.removesuffix(".weight").endswith(WRITERS):
            out = kept
        else:
            inputs = kept
        total += out * inputs * bits // 8
        total += 4 * out if grid == "channel" else 2 * out * block_count(inputs)
    layers = model.config.num_hidden_layers
    return total + 2 * (2 * layers - 1) * kept * kept + 2 * 2 * width * kept


class Sliced:
    """A Llama-like model whose residual stream is projected after every attention and MLP, by hooks.

    Args:
        model: with RMSNorms before attention and MLP; changed in place.
        kept: k, directions that remain.
    """

    def __init__(self, model: PreTrainedModel, kept: int) -> None:
        self.model = model
        self.kept = kept
        self.layers: list[nn.Module] = list(model.model.layers)
        if not all(hasattr(layer, "post_attention_layernorm") for layer in self.layers):
            raise GETAError(f"SliceGPT is written for Llama-like blocks, and {type(model).__name__} has others")
        width = model.config.hidden_size
        # One for the embedding's output and two for every block.
        self.bases = [torch.eye(width)[:, :kept] for _ in range(2 * len(self.layers) + 1)]
        self._fuse_norms()

    @torch.no_grad()
    def _fuse_norms(self) -> None:
        """Move the weights of norms into the layers that read them."""
        for layer in self.layers:
            for norm, names in ((layer.input_layernorm, READERS), (layer.post_attention_layernorm, MLP_READERS)):
                for name in names:
                    layer.get_submodule(name).weight.mul_(norm.weight)
                norm.weight.fill_(1.0)

    def project(self, x: Tensor, place: int) -> Tensor:
        """Return x on the directions that remain at a place."""
        basis = self.bases[place]
        return x @ basis @ basis.t()

    def attach(self) -> None:
        """Put hooks on the model that project its stream, for good."""
        self.model.model.embed_tokens.register_forward_hook(lambda _, args, out: self.project(out, 0))
        for number, layer in enumerate(self.layers):
            stream: dict[str, Tensor] = {}

            def enter(_: nn.Module, args: Any, kwargs: Any, stream: dict[str, Tensor] = stream) -> None:
                stream["x"] = args[0] if args else kwargs["hidden_states"]

            def attended(
                _: nn.Module, args: Any, out: Any, stream: dict[str, Tensor] = stream, number: int = number
            ) -> Any:
                # The block adds its own input to this: together they are to be the projected sum.
                x = stream["x"]
                return (self.project(x + out[0], 2 * number + 1) - x, *out[1:])

            def leave(_: nn.Module, args: Any, out: Any, number: int = number) -> Any:
                if isinstance(out, tuple):
                    return (self.project(out[0], 2 * number + 2), *out[1:])
                return self.project(out, 2 * number + 2)

            layer.register_forward_pre_hook(enter, with_kwargs=True)
            layer.self_attn.register_forward_hook(attended)
            layer.register_forward_hook(leave)

    @torch.no_grad()
    def compress(self, batches: list[Mapping[str, Any]], bits: int | None, grid: str) -> None:
        """Find the rotations and round, block after block, each on the outputs of those before it.

        Args:
            batches: calibration data.
            bits: width of all weights; None leaves them in float.
            grid: what has a step size of its own.
        """
        states, calls = self._first_inputs(batches)
        self.bases[0] = self._directions(states)
        states = [self.project(state, 0) for state in states]
        for number, layer in enumerate(self.layers):
            place = 2 * number
            normed = [layer.input_layernorm(state) for state in states]
            self._round_readers(layer, READERS, normed, place, bits, grid)
            inner = self._attention_outputs(layer, normed, calls)
            # Directions after attention, from what it gives in float.
            summed = [state + layer.self_attn.o_proj(x) for state, x in zip(states, inner, strict=True)]
            self.bases[place + 1] = self._directions(summed)
            self._round_writer(layer.self_attn.o_proj, inner, place + 1, bits, grid)
            states = [
                self.project(state + layer.self_attn.o_proj(x), place + 1)
                for state, x in zip(states, inner, strict=True)
            ]
            normed = [layer.post_attention_layernorm(state) for state in states]
            self._round_readers(layer, MLP_READERS, normed, place + 1, bits, grid)
            mlp = layer.mlp
            inner = [mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x) for x in normed]
            summed = [state + mlp.down_proj(x) for state, x in zip(states, inner, strict=True)]
            self.bases[place + 2] = self._directions(summed)
            self._round_writer(mlp.down_proj, inner, place + 2, bits, grid)
            states = [self.project(state + mlp.down_proj(x), place + 2) for state, x in zip(states, inner, strict=True)]
        self.attach()

    def _first_inputs(self, batches: list[Mapping[str, Any]]) -> tuple[list[Tensor], list[dict[str, Any]]]:
        """Return what comes into the first block, and the other arguments of its attention."""
        states: list[Tensor] = []
        calls: list[dict[str, Any]] = []

        def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
            calls.append({name: item for name, item in kwargs.items() if name != "hidden_states"})

        handles = [
            self.layers[0].register_forward_pre_hook(lambda _, args: states.append(args[0])),
            self.layers[0].self_attn.register_forward_pre_hook(enter, with_kwargs=True),
        ]
        for batch in batches:
            self.model(input_ids=batch["input_ids"], use_cache=False)
        for handle in handles:
            handle.remove()
        return states, calls

    @staticmethod
    def _attention_outputs(layer: Any, normed: list[Tensor], calls: list[dict[str, Any]]) -> list[Tensor]:
        """Return what comes into the output projection of a block's attention."""
        found: list[Tensor] = []
        handle = layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: found.append(args[0]))
        for state, call in zip(normed, calls, strict=True):
            layer.self_attn(hidden_states=state, **call)
        handle.remove()
        return found

    def _directions(self, states: list[Tensor]) -> Tensor:
        """Return the first k principal directions of the normalized stream, shape (d, k)."""
        rows = torch.cat([state.flatten(0, -2) for state in states])
        rows = rows * rows.square().mean(-1, keepdim=True).clamp_min(1e-12).rsqrt()
        return principal_directions(rows)[:, : self.kept].float()

    def _round_readers(
        self, layer: nn.Module, names: tuple[str, ...], inputs: list[Tensor], place: int, bits: int | None, grid: str
    ) -> None:
        """Round what reads the stream as a sliced network stores it: W Q_k."""
        basis = self.bases[place]
        rows = torch.cat([state.flatten(0, -2) for state in inputs]) @ basis
        sigma = rows.t() @ rows / len(rows)
        for name in names:
            own = layer.get_submodule(name)
            own.weight.copy_(_rounded(own.weight @ basis, sigma, bits, grid) @ basis.t())

    def _round_writer(self, layer: Any, inputs: list[Tensor], place: int, bits: int | None, grid: str) -> None:
        """Round what writes to the stream as a sliced network stores it: Q_kᵀ W."""
        basis = self.bases[place]
        rows = torch.cat([state.flatten(0, -2) for state in inputs])
        sigma = rows.t() @ rows / len(rows)
        layer.weight.copy_(basis @ _rounded(basis.t() @ layer.weight, sigma, bits, grid))


def _rounded(weight: Tensor, covariance: Tensor, bits: int | None, grid: str) -> Tensor:
    """Return a weight rounded by GPTQ on the covariance of its inputs."""
    if bits is None:
        return weight
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.copy_(weight)
    everything = Kept(*(torch.ones(size, dtype=torch.bool) for size in weight.shape))
    compress_layer(layer, covariance, everything, bits, grid=grid)
    return layer.weight.detach()


@dataclass(frozen=True)
class SliceGPT:
    """Try for each width the widest stream that fits the budget, and keep the best on held-back data."""

    name: str = "SliceGPT + GPTQ"
    needs: str = "forward"
    packages: tuple[str, ...] = ()

    def run(self, job: Job) -> Compressed:
        """Compress."""
        found = [(job.load(), *pair) for pair in self._pairs(job)]
        if not found:
            raise GETAError(f"{job.budget.name} can't be reached by slicing to a quarter or more; raise the budget")
        trials = []
        for model, kept, bits in found:
            Sliced(model, kept).compress(list(job.data.covariances), bits, job.grid)
            trials.append(measure(model, job.data.held_back)[0])
        best = min(range(len(found)), key=lambda place: trials[place])
        model, kept, bits = found[best]
        width = model.config.hidden_size
        return Compressed(
            model=model,
            share=1 - kept / width,
            mean_bits=bits,
            bytes=sliced_bytes(job.ledger, model, kept, bits, job.grid),
            trials=[(1 - kept / width, bits, loss) for (_, kept, bits), loss in zip(found, trials, strict=True)],
            trained=True,
            note="in memory; removed: of the stream's width",
        )

    @staticmethod
    def _pairs(job: Job) -> Iterator[tuple[int, int]]:
        model = job.load()
        width = model.config.hidden_size
        for bits in WIDTHS if job.budget.bits is None else (job.budget.bits,):
            fits: Callable[[int], bool] = lambda kept, bits=bits: (  # noqa: E731
                sliced_bytes(job.ledger, model, kept, bits, job.grid) <= job.budget.bytes
            )
            kept = next((kept for kept in range(width, width // 4, -MULTIPLE) if fits(kept)), None)
            if kept is not None:
                yield kept, bits


METHODS = (SliceGPT(),)
